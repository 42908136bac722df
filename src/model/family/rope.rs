//! Rotary frequencies of a config. Transformers 4 writes `rope_theta` and `rope_scaling`, transformers 5 one
//! `rope_parameters`.

use serde_json::Value;

use super::{Config, ModelError};
use crate::{model::RotaryShape, nn::RopeScaling};

/// The frequencies of all layers, for heads of this width.
pub(super) fn shape(c: &Config<'_>, head_dim: usize) -> Result<RotaryShape, ModelError> {
    read(c, c.get("rope_parameters").or_else(|| c.get("rope_scaling")), head_dim)
}

/// The frequencies that `params` (possibly absent) say.
pub(super) fn read(c: &Config<'_>, params: Option<&Value>, head_dim: usize) -> Result<RotaryShape, ModelError> {
    let num = |key: &str| params.and_then(|p| p.get(key)).and_then(Value::as_f64);
    let theta = num("rope_theta").unwrap_or_else(|| c.f64_or("rope_theta", 10_000.0));
    let kind =
        params.and_then(|p| p.get("rope_type").or_else(|| p.get("type"))).and_then(Value::as_str).unwrap_or("default");
    let need = |key: &str| num(key).ok_or_else(|| ModelError::Config(format!("rope scaling {kind:?} lacks {key}")));
    let scaling = match kind {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: need("factor")? },
        "llama3" => RopeScaling::Llama3 {
            factor: need("factor")?,
            low: need("low_freq_factor")?,
            high: need("high_freq_factor")?,
            original: need("original_max_position_embeddings")?,
        },
        other => {
            return Err(ModelError::Unsupported(format!(
                "config.json: rope type {other:?} is not supported; supported are default, linear, llama3"
            )));
        }
    };
    let part = num("partial_rotary_factor").unwrap_or_else(|| c.f64_or("partial_rotary_factor", 1.0));
    let dim = (head_dim as f64 * part) as usize;
    if dim == 0 || dim > head_dim || !dim.is_multiple_of(2) {
        return Err(ModelError::Config(format!("partial_rotary_factor {part} of heads {head_dim} wide turns {dim}")));
    }
    Ok(RotaryShape { theta, scaling, dim })
}
