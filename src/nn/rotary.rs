//! Frequencies of rotary embeddings and the angles of a step's rows.

use candle_core::{Device, Result, Tensor};

use crate::ops::RopeTable;

/// How a checkpoint stretches its frequencies.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RopeScaling {
    /// As trained.
    None,
    /// Positions divided by a factor (Chen et al. 2023).
    Linear {
        /// The factor.
        factor: f64,
    },
    /// Llama 3: long wavelengths divided by the factor, short ones kept, a ramp between.
    Llama3 {
        /// The factor.
        factor: f64,
        /// Wavelengths above `original / low` are divided.
        low: f64,
        /// Wavelengths below `original / high` are kept.
        high: f64,
        /// Context length of the pretraining.
        original: f64,
    },
}

/// Rotary frequencies of a model.
#[derive(Debug, Clone)]
pub struct Rotary {
    inv_freq: Vec<f32>,
    head_dim: usize,
}

impl Rotary {
    /// `head_dim`: width of a head, of which the first `dim` numbers turn; `theta`: the base of the frequencies.
    pub fn new(head_dim: usize, dim: usize, theta: f64, scaling: RopeScaling) -> Self {
        let inv_freq = (0..dim / 2)
            .map(|i| {
                let f = 1.0 / theta.powf(2.0 * i as f64 / dim as f64);
                let f = match scaling {
                    RopeScaling::None => f,
                    RopeScaling::Linear { factor } => f / factor,
                    RopeScaling::Llama3 { factor, low, high, original } => {
                        let wavelength = 2.0 * std::f64::consts::PI / f;
                        if wavelength > original / low {
                            f / factor
                        } else if wavelength < original / high {
                            f
                        } else {
                            let smooth = (original / wavelength - low) / (high - low);
                            (1.0 - smooth) * f / factor + smooth * f
                        }
                    }
                };
                f as f32
            })
            .collect();
        Self { inv_freq, head_dim }
    }

    /// With each frequency divided by its own factor.
    #[must_use]
    pub fn divided(mut self, factors: &[f32]) -> Self {
        self.inv_freq.iter_mut().zip(factors).for_each(|(f, factor)| *f /= factor);
        self
    }

    /// Angles of these positions.
    ///
    /// # Errors
    /// Those of candle.
    pub fn table(&self, positions: &[u32], device: &Device) -> Result<RopeTable> {
        let half = self.inv_freq.len();
        let mut cos = Vec::with_capacity(positions.len() * half);
        let mut sin = Vec::with_capacity(positions.len() * half);
        for &p in positions {
            for f in &self.inv_freq {
                let (s, c) = (p as f32 * f).sin_cos();
                cos.push(c);
                sin.push(s);
            }
        }
        let shape = (positions.len(), half);
        let (cos, sin) = (Tensor::from_vec(cos, shape, device)?, Tensor::from_vec(sin, shape, device)?);
        Ok(RopeTable { cos, sin, head_dim: self.head_dim })
    }
}
