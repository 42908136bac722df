//! A base by its hub id: fetched through `hf-hub` into its usual cache, or taken from there.

use std::path::PathBuf;

/// Why a base could not be fetched.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// Neither a folder nor a GGUF file nor a hub id.
    #[error("{0:?} is neither a folder nor a GGUF file nor a hub id (org/name)")]
    NotAnId(String),
    /// This binary was built without it.
    #[error("{0:?} is not a folder, and this binary was built without the feature `hub` that fetches hub ids")]
    NotBuilt(String),
    /// The hub or the network.
    #[error("cannot fetch {id} from the hub: {reason}")]
    Fetch {
        /// What was asked for.
        id: String,
        /// What the client said.
        reason: String,
    },
    /// The repository has no weights that can be loaded.
    #[error(
        "{0} has no safetensors weights (pickles are refused; a GGUF file is to be fetched by hand and named by its path)"
    )]
    NoWeights(String),
}

/// Files of a repository that a base needs; weights are all `*.safetensors` at the top.
#[cfg(feature = "hub")]
const WANTED: &[&str] = &[
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
    "model.safetensors.index.json",
    "modules.json",
    "1_Pooling/config.json",
];

/// The folder of a base, or its GGUF file: `source` itself if it is one, else the snapshot of the hub id. Blocks on the
/// network.
///
/// # Errors
/// [`HubError`].
pub fn folder(source: &str) -> Result<PathBuf, HubError> {
    let path = PathBuf::from(source);
    if path.is_dir() || (path.is_file() && path.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf"))) {
        return Ok(path);
    }
    let is_id = source.split('/').count() == 2 && source.split('/').all(|part| crate::ids::check_name(part).is_ok());
    if !is_id {
        return Err(HubError::NotAnId(source.to_owned()));
    }
    fetch(source)
}

#[cfg(not(feature = "hub"))]
fn fetch(id: &str) -> Result<PathBuf, HubError> {
    Err(HubError::NotBuilt(id.to_owned()))
}

#[cfg(feature = "hub")]
fn fetch(id: &str) -> Result<PathBuf, HubError> {
    let fail = |e: hf_hub::api::sync::ApiError| HubError::Fetch { id: id.to_owned(), reason: e.to_string() };
    let repo = hf_hub::api::sync::ApiBuilder::from_env().build().map_err(fail)?.model(id.to_owned());
    // a complete snapshot in the cache is enough: a server must restart without the network
    let cached = hf_hub::Cache::from_env().model(id.to_owned());
    if let (Some(config), Some(_)) = (cached.get("config.json"), cached.get("tokenizer.json"))
        && (cached.get("model.safetensors").is_some() || cached.get("model.safetensors.index.json").is_some())
        && let (Some(dir), Ok(true)) = (config.parent(), complete(&cached))
    {
        return Ok(dir.to_path_buf());
    }
    let info = repo.info().map_err(fail)?;
    let names: Vec<String> = info.siblings.into_iter().map(|s| s.rfilename).collect();
    let weights: Vec<&String> = names.iter().filter(|n| n.ends_with(".safetensors") && !n.contains('/')).collect();
    if weights.is_empty() {
        return Err(HubError::NoWeights(id.to_owned()));
    }
    let mut dir = None;
    for name in names.iter().filter(|n| WANTED.contains(&n.as_str())).chain(weights) {
        let file = repo.get(name).map_err(fail)?;
        if name == "config.json" {
            dir = file.parent().map(std::path::Path::to_path_buf);
        }
    }
    dir.ok_or_else(|| HubError::Fetch { id: id.to_owned(), reason: "it has no config.json".into() })
}

/// Whether all shards that an index names are in the cache.
#[cfg(feature = "hub")]
fn complete(cached: &hf_hub::CacheRepo) -> std::io::Result<bool> {
    let Some(index) = cached.get("model.safetensors.index.json") else { return Ok(true) };
    let json: serde_json::Value = serde_json::from_slice(&std::fs::read(index)?)?;
    let shards = json.get("weight_map").and_then(serde_json::Value::as_object);
    let mut names: Vec<&str> =
        shards.into_iter().flat_map(|m| m.values()).filter_map(serde_json::Value::as_str).collect();
    names.dedup();
    Ok(names.iter().all(|n| cached.get(n).is_some()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_pass_and_paths_are_never_taken_for_ids() {
        let dir = std::env::temp_dir();
        assert_eq!(folder(&dir.to_string_lossy()).ok(), Some(dir));
        for bad in ["", "no-slash", "../nowhere-at-all", "a/b/c", "/nowhere/at/all", "org/..", "org/na me"] {
            assert!(matches!(folder(bad), Err(HubError::NotAnId(_))), "{bad:?}");
        }
    }
}
