//! Cross-attention: a decoder's rows look at their encoder's output (Vaswani et al. 2017).

use candle_core::{Result, Tensor, bail};

use super::{Cx, Linear, Pass, pass::Crossing};
use crate::{
    delta::SiteId,
    ops::{self, Ending},
};

/// Attention whose keys and values come from the encoder, behind a prefix of the sequence's delta. They are computed once per sequence and kept in the cache, where
/// there is one.
#[derive(Debug, Clone)]
pub struct CrossAttention {
    /// `[hidden, heads * head_dim]`.
    pub q: Linear,
    /// `[hidden, 2 kv_heads * head_dim]`: key and value side by side, of the encoder's rows.
    pub kv: Linear,
    /// `[heads * head_dim, hidden]`.
    pub out: Linear,
    /// Which layer of the cache.
    pub layer: usize,
    /// The site of its keys and values (prefixes).
    pub keys: SiteId,
}

impl CrossAttention {
    /// `[rows, hidden]` -> the same, added to the residual.
    ///
    /// # Errors
    /// A pass without the encoder's output; those of candle.
    pub fn forward(&self, x: &Tensor, residual: &Tensor, pass: &Pass<'_>) -> Result<Tensor> {
        let Some(crossing) = &pass.crossing else { bail!("a decoder without its encoder's output") };
        let q = self.q.forward(x, &pass.after)?; // [rows, qw]
        let (k, v) = self.keys_and_values(crossing, pass)?;
        let y = ops::attention(&q, &k, &v, &crossing.plan)?;
        self.out.forward_to(&y, Ending { act: None, residual: Some(residual) }, &pass.after) // [rows, hidden]
    }

    /// Puts keys and values of what is encoded in this step into the cache, if there is one, and does nothing else.
    ///
    /// # Errors
    /// As [`Self::forward`].
    pub fn keep(&self, pass: &Pass<'_>) -> Result<()> {
        match pass.crossing.as_ref().filter(|crossing| crossing.keys.is_cached()) {
            Some(crossing) => self.keys_and_values(crossing, pass).map(drop),
            None => Ok(()),
        }
    }

    /// Everything that the step's queries may see; with a cache, what is encoded in this step is in it from here on.
    fn keys_and_values(&self, crossing: &Crossing<'_>, pass: &Pass<'_>) -> Result<(Tensor, Tensor)> {
        let fresh = match &crossing.encoded {
            Some(encoded) => {
                let own = Cx { rows: encoded.rows, deltas: encoded.deltas, kv: None, memory: None, ..pass.cx };
                let kv = self.kv.forward(encoded.states, &own)?; // [encoder rows, 2 kw]
                let width = crossing.plan.kv_heads * crossing.plan.head_dim;
                Some((kv.narrow(1, 0, width)?, kv.narrow(1, width, width)?))
            }
            None => None,
        };
        match (fresh, pass.cx.kv) {
            (Some(fresh), _) => crossing.keys.all((self.layer, self.keys), fresh, &pass.cx),
            (None, Some(cache)) => Ok(cache.layer(self.layer)),
            (None, None) => bail!("a decoder without its encoder's output"),
        }
    }
}
