//! Writing rows into a cache in place.

use candle_core::{CpuStorage, InplaceOp2, Layout, Result, Tensor, bail};

use super::{f32_slice, is_cpu_f32};

struct WriteRows<'a> {
    slots: &'a [u32],
}

impl InplaceOp2 for WriteRows<'_> {
    fn name(&self) -> &'static str {
        "write-rows"
    }

    fn cpu_fwd(
        &self,
        cache: &mut CpuStorage,
        cache_layout: &Layout,
        rows: &CpuStorage,
        rows_layout: &Layout,
    ) -> Result<()> {
        let (slots, width) = cache_layout.shape().dims2()?;
        let src = f32_slice(rows, rows_layout)?;
        let CpuStorage::F32(dst) = cache else { bail!("write-rows: the cache is not f32") };
        if cache_layout.contiguous_offsets().is_none_or(|(from, _)| from != 0) {
            bail!("write-rows: the cache must be a whole contiguous tensor");
        }
        for (row, &slot) in src.chunks_exact(width).zip(self.slots) {
            let slot = slot as usize;
            if slot >= slots {
                bail!("write-rows: slot {slot} of {slots}");
            }
            dst[slot * width..(slot + 1) * width].copy_from_slice(row);
        }
        Ok(())
    }
}

/// `cache[slots[i]] = rows[i]`; `cache` is `[slots, width]`, `rows` `[n, width]`. Untracked.
///
/// # Errors
/// A slot outside the cache; shapes that do not fit.
pub fn write_rows(cache: &Tensor, slots: &[u32], rows: &Tensor) -> Result<()> {
    let rows = rows.detach().contiguous()?;
    if rows.dim(0)? != slots.len() || rows.dim(1)? != cache.dim(1)? {
        bail!("write-rows: {:?} into {:?} at {} slots", rows.shape(), cache.shape(), slots.len());
    }
    if is_cpu_f32(cache) {
        return cache.inplace_op2(&rows, &WriteRows { slots });
    }
    // runs of consecutive slots, one copy each
    let mut at = 0;
    while at < slots.len() {
        let mut end = at + 1;
        while end < slots.len() && slots[end] == slots[end - 1] + 1 {
            end += 1;
        }
        cache.slice_set(&rows.narrow(0, at, end - at)?.contiguous()?, 0, slots[at] as usize)?;
        at = end;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{DType, Device};

    #[test]
    fn rows_land_in_their_slots_and_nowhere_else() {
        let cache = Tensor::zeros((6, 2), DType::F32, &Device::Cpu).unwrap();
        let rows = Tensor::new(&[[1f32, 2.0], [3.0, 4.0], [5.0, 6.0]], &Device::Cpu).unwrap();
        write_rows(&cache, &[4, 0, 1], &rows).unwrap();
        let got = cache.to_vec2::<f32>().unwrap();
        assert_eq!(got, [[3.0, 4.0], [5.0, 6.0], [0.0, 0.0], [0.0, 0.0], [1.0, 2.0], [0.0, 0.0]]);
        assert!(write_rows(&cache, &[9], &rows.narrow(0, 0, 1).unwrap()).is_err());
    }
}
