//! What the fuzz targets call of this module.

use serde_json::{Map, Value};

use super::{family, gguf};

/// Reads a GGUF file's header and the configuration in it; what it says of its tokenizer.
pub(crate) fn gguf(data: &[u8]) -> Result<Map<String, Value>, String> {
    let (config, tokenizer) = gguf::look(data)?;
    drop(family::from_config(&config));
    Ok(tokenizer)
}
