//! Keys and values of all layers, by slot. Which slot belongs to whom is the page pool's business.

use candle_core::{DType, Device, Result, Tensor};

use crate::ops;

/// Keys and values, `[slots, kv_heads * head_dim]` per layer.
#[derive(Debug)]
pub struct KvCache {
    layers: Vec<(Tensor, Tensor)>,
    slots: usize,
}

impl KvCache {
    /// Allocates the whole cache: `width` is `kv_heads * head_dim`.
    ///
    /// # Errors
    /// Out of device memory.
    pub fn new(layers: usize, slots: usize, width: usize, dtype: DType, device: &Device) -> Result<Self> {
        let make = || -> Result<Tensor> {
            let numbers = Tensor::zeros((slots, width), dtype, device)?;
            ops::huge_pages_of(&numbers)?;
            Ok(numbers)
        };
        let layers = (0..layers).map(|_| Ok((make()?, make()?))).collect::<Result<_>>()?;
        Ok(Self { layers, slots })
    }

    /// Number of positions it holds.
    pub fn slots(&self) -> usize {
        self.slots
    }

    /// Bytes it takes.
    pub fn bytes(&self) -> usize {
        self.layers.iter().map(|(k, v)| crate::delta::bytes_of(k) + crate::delta::bytes_of(v)).sum()
    }

    /// Keys and values of a layer.
    pub(crate) fn layer(&self, layer: usize) -> (Tensor, Tensor) {
        self.layers[layer].clone()
    }

    /// Copies keys and values of all layers: slot `to[i]` gets what slot `from[i]` had before the call.
    ///
    /// # Errors
    /// A slot outside the cache.
    pub(crate) fn copy(&self, from: &[u32], to: &[u32]) -> Result<()> {
        let Some((first, _)) = self.layers.first().filter(|_| !from.is_empty()) else { return Ok(()) };
        let from = Tensor::new(from, first.device())?;
        for cached in self.layers.iter().flat_map(|(k, v)| [k, v]) {
            ops::write_rows(cached, to, &cached.index_select(&from, 0)?)?;
        }
        Ok(())
    }

    /// Writes the step's new keys and values of a layer: row `i` goes to `slots[i]`.
    ///
    /// # Errors
    /// A slot outside the cache.
    pub(crate) fn write(&self, layer: usize, slots: &[u32], k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        let (ck, cv) = &self.layers[layer];
        ops::write_rows(ck, slots, k)?;
        ops::write_rows(cv, slots, v)?;
        Ok((ck.clone(), cv.clone()))
    }
}
