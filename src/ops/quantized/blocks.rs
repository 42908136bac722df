//! Blocks as ggml stores them (ggml-common.h, ggml-quants.c), read into codes and scales.

use super::QuantKind;

/// Codes and scales of one block.
pub(super) struct Block {
    /// A 16-bit float.
    pub(super) scale: u16,
    /// A 16-bit float; 0 where the format has no minimum.
    pub(super) min: u16,
    /// Of groups; signed for Q6K.
    pub(super) scales: [u8; 16],
    pub(super) mins: [u8; 16],
    /// In order; those of 8 bits signed.
    pub(super) codes: [u8; 256],
}

impl Block {
    /// Reads a block of `kind.block_bytes()` bytes.
    pub(super) fn read(kind: QuantKind, bytes: &[u8]) -> Self {
        let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let mut block = Self { scale: half(0), min: 0, scales: [0; 16], mins: [0; 16], codes: [0; 256] };
        match kind {
            QuantKind::Q4_0 => block.halves(&bytes[2..], None, 0),
            QuantKind::Q4_1 => {
                block.min = half(2);
                block.halves(&bytes[4..], None, 0);
            }
            QuantKind::Q5_0 => block.halves(&bytes[6..], Some(&bytes[2..6]), 16),
            QuantKind::Q5_1 => {
                block.min = half(2);
                block.halves(&bytes[8..], Some(&bytes[4..8]), 0);
            }
            QuantKind::Q8_0 => block.codes[..32].copy_from_slice(&bytes[2..34]),
            QuantKind::Q4K => {
                block.min = half(2);
                block.six_bits(&bytes[4..16]);
                block.chunks(&bytes[16..], None);
            }
            QuantKind::Q5K => {
                block.min = half(2);
                block.six_bits(&bytes[4..16]);
                block.chunks(&bytes[48..], Some(&bytes[16..48]));
            }
            QuantKind::Q6K => {
                block.scale = half(208);
                block.scales.copy_from_slice(&bytes[192..208]);
                block.sixths(&bytes[..128], &bytes[128..192]);
            }
        }
        block
    }

    /// Whether scale and minimum are finite.
    pub(super) fn is_finite(&self) -> bool {
        [self.scale, self.min].iter().all(|bits| bits & 0x7c00 != 0x7c00)
    }

    /// 32 codes: the first half in the low four bits of 16 bytes, the second in the high ones; a fifth bit of each in
    /// `fifth`, less `offset`.
    fn halves(&mut self, four: &[u8], fifth: Option<&[u8]>, offset: u8) {
        let bit = |i: usize| fifth.map_or(0, |bits| (bits[i / 8] >> (i % 8) & 1) << 4);
        for (i, byte) in four.iter().enumerate().take(16) {
            self.codes[i] = (byte & 15 | bit(i)).wrapping_sub(offset);
            self.codes[i + 16] = (byte >> 4 | bit(i + 16)).wrapping_sub(offset);
        }
    }

    /// 256 codes: of every 64, the first half in the low four bits of 32 bytes, the second in the high ones; a fifth bit of
    /// each in `fifth`, two bits of each byte for every 64.
    fn chunks(&mut self, four: &[u8], fifth: Option<&[u8]>) {
        for chunk in 0..4 {
            for i in 0..32 {
                let (byte, bits) = (four[chunk * 32 + i], fifth.map_or(0, |f| f[i] >> (2 * chunk)));
                self.codes[chunk * 64 + i] = byte & 15 | (bits & 1) << 4;
                self.codes[chunk * 64 + 32 + i] = byte >> 4 | (bits >> 1 & 1) << 4;
            }
        }
    }

    /// 256 codes of 6 bits less 32: of every 128, four low bits in 64 bytes, two high bits in 32.
    fn sixths(&mut self, low: &[u8], high: &[u8]) {
        for half in 0..2 {
            let (low, high) = (&low[half * 64..], &high[half * 32..]);
            for i in 0..32 {
                let parts = [low[i] & 15, low[i + 32] & 15, low[i] >> 4, low[i + 32] >> 4];
                for (quarter, four) in parts.into_iter().enumerate() {
                    let two = high[i] >> (2 * quarter) & 3;
                    self.codes[half * 128 + quarter * 32 + i] = (four | two << 4).wrapping_sub(32);
                }
            }
        }
    }

    /// Eight scales and eight minima of 6 bits in 12 bytes: four of each whole, the rest split.
    fn six_bits(&mut self, packed: &[u8]) {
        for i in 0..4 {
            self.scales[i] = packed[i] & 63;
            self.mins[i] = packed[i + 4] & 63;
            self.scales[i + 4] = packed[i + 8] & 15 | packed[i] >> 6 << 4;
            self.mins[i + 4] = packed[i + 8] >> 4 | packed[i + 4] >> 6 << 4;
        }
    }
}
