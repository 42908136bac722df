//! The model: an [`Architecture`] read from a Hugging Face folder, its frozen weights, and the one [`Transformer`] forward
//! that serves, trains and evaluates every base and every delta.

pub mod arch;
mod base;
pub mod family;
mod heads;
mod sites;
pub mod testing;
mod transformer;
mod weights;

pub use arch::{Architecture, BaseHead, MlpKind, ModelError, NormKind, Placement, Positions};
pub use base::{Base, LoadOptions};
pub use heads::HeadLogits;
pub use transformer::{Input, Transformer};
