//! Keys and values of all layers, by slot. Which slot belongs to whom is the page pool's business.

use candle_core::{CpuStorage, DType, Device, Result, Storage, Tensor};

use super::PAGE_SIZE;
use crate::ops;

/// Sums of a checksum that do not wait for each other.
const LANES: usize = 8;

/// A step of a checksum: any one number that changes, changes it.
fn mix(sum: u64, x: u64) -> u64 {
    (sum.rotate_left(5) ^ x).wrapping_mul(0x517c_c1b7_2722_0a95)
}

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

    /// A checksum of what all layers have in a page; `None` where the numbers are not f32 in host memory, and reading them
    /// would cost a copy.
    pub(crate) fn checksum(&self, page: u32) -> Option<u64> {
        let mut lanes = [0u64; LANES];
        for cached in self.layers.iter().flat_map(|(k, v)| [k, v]) {
            let (storage, layout) = cached.storage_and_layout();
            let Storage::Cpu(CpuStorage::F32(numbers)) = &*storage else { return None };
            let (from, to) = layout.contiguous_offsets()?;
            let size = PAGE_SIZE * layout.dims().get(1)?;
            let own = numbers.get(from..to)?.get(page as usize * size..(page as usize + 1) * size)?;
            let mut chunks = own.chunks_exact(LANES);
            for chunk in &mut chunks {
                lanes.iter_mut().zip(chunk).for_each(|(lane, x)| *lane = mix(*lane, u64::from(x.to_bits())));
            }
            chunks.remainder().iter().for_each(|x| lanes[0] = mix(lanes[0], u64::from(x.to_bits())));
        }
        Some(lanes.into_iter().fold(0, mix))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checksum_tells_every_number_of_its_page_and_no_other() -> Result<()> {
        let (layers, width, pages) = (2, 12, 3);
        let cache = KvCache::new(layers, pages * PAGE_SIZE, width, DType::F32, &Device::Cpu)?;
        let slots: Vec<u32> = (0..(pages * PAGE_SIZE) as u32).collect();
        let numbers = |seed: usize| -> Result<Tensor> {
            let all = (0..slots.len() * width).map(|i| ((i * 7 + seed * 13) % 101) as f32 - 50.0).collect();
            Tensor::from_vec(all, (slots.len(), width), &Device::Cpu)
        };
        for layer in 0..layers {
            cache.write(layer, &slots, &numbers(layer)?, &numbers(layer + 5)?)?;
        }
        let before: Vec<Option<u64>> = (0..pages as u32).map(|page| cache.checksum(page)).collect();
        assert!(before.iter().all(Option::is_some) && before[0] != before[1]);
        assert_eq!(cache.checksum(pages as u32), None, "there is no such page");
        // one number of one layer, of keys or of values, at the page's first, middle and last place
        for (layer, of_values) in [(0, false), (1, true)] {
            for slot in [PAGE_SIZE as u32, PAGE_SIZE as u32 + 7, 2 * PAGE_SIZE as u32 - 1] {
                for column in [0, 5, width - 1] {
                    let (k, v) = cache.layer(layer);
                    let cached = if of_values { v } else { k };
                    let row = cached.get(slot as usize)?.to_vec1::<f32>()?;
                    let mut other = row.clone();
                    other[column] += 1.0;
                    ops::write_rows(&cached, &[slot], &Tensor::from_vec(other, (1, width), &Device::Cpu)?)?;
                    assert_ne!(cache.checksum(1), before[1], "layer {layer}, slot {slot}, column {column}");
                    assert_eq!([cache.checksum(0), cache.checksum(2)], [before[0], before[2]]);
                    ops::write_rows(&cached, &[slot], &Tensor::from_vec(row, (1, width), &Device::Cpu)?)?;
                    assert_eq!(cache.checksum(1), before[1]);
                }
            }
        }
        let half = KvCache::new(1, PAGE_SIZE, 4, DType::BF16, &Device::Cpu)?;
        assert_eq!(half.checksum(0), None);
        Ok(())
    }
}
