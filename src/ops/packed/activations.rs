//! What activations are rounded to before they are multiplied with a frozen matrix.

use std::{cell::Cell, str::FromStr};

use crate::ops::Back;

/// Precision of activations in products with frozen matrices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Activations {
    /// None is lost.
    #[default]
    F32,
    /// As the matrix is kept, where that is faster: in 8 bits with a scale per 32 beside codes of 8 bits (Q8_0, Q5_0), in bf16
    /// beside bf16 where the machine multiplies pairs of them (AVX512-BF16); elsewhere f32.
    AsWeights,
}

impl FromStr for Activations {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "f32" => Ok(Self::F32),
            "weights" => Ok(Self::AsWeights),
            _ => Err(format!("is {s:?}; accepted are \"weights\" and \"f32\"")),
        }
    }
}

thread_local! {
    static ACTIVATIONS: Cell<Activations> = const { Cell::new(Activations::F32) };
}

/// Gives the ops that `f` calls on this thread activations of this precision; without it they have f32. It is for passes of
/// serving, whose rows then all get the same, however many they are; ops that are differentiated take f32 in any case.
pub fn with_activations<T>(activations: Activations, f: impl FnOnce() -> T) -> T {
    let _back = Back(&ACTIVATIONS, ACTIVATIONS.replace(activations));
    f()
}

/// What the ops of this thread have.
pub(in crate::ops) fn activations() -> Activations {
    ACTIVATIONS.get()
}
