//! The model: an [`Architecture`] read from a Hugging Face folder, its frozen weights, and the one [`Transformer`] forward
//! that serves, trains and evaluates every base and every delta.

pub mod arch;
mod base;
#[cfg(test)]
mod bf16_tests;
mod copy;
mod export;
pub mod family;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzz;
mod gguf;
mod heads;
mod load;
#[cfg(test)]
mod oracles;
mod quantize;
mod sites;
mod source;
mod table;
pub mod testing;
mod transformer;
mod walk;
mod weights;

pub use arch::{
    Architecture, BaseHead, BlockNames, ClsInner, LayerAttn, MlpKind, ModelError, Names, NormKind, Placement,
    Positions, RotaryShape,
};
pub use base::{Base, Held, LoadOptions};
pub use copy::PrivateCopy;
pub use export::{ModelFolder, folder_fingerprint, write_folder};
pub use gguf::tokenizer_metadata;
pub use heads::HeadLogits;
pub use quantize::Quantize;
pub use source::Source;
pub use transformer::{Input, Transformer};
pub use walk::Walk;
