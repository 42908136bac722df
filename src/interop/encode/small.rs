//! PEFT's IA3, LN_TUNING and TRAINABLE_TOKENS forms, and our BITFIT.

use serde_json::{Value, json};

use super::{Named, Part, Patches, Writer, is_matrix, plain};
use crate::{
    delta::{Patch, Site, SiteId},
    interop::{InteropError, keys},
};

/// Paths of these patches' modules.
fn paths(w: &Writer<'_>, patches: &Patches<'_>, pick: impl Fn(&Patch) -> bool) -> Result<Vec<String>, InteropError> {
    patches.iter().filter(|(_, p)| pick(p)).map(|(site, _)| w.path(*site)).collect()
}

fn bad(w: &Writer<'_>, site: SiteId) -> InteropError {
    InteropError::Unapplied(vec![w.path(site).unwrap_or_default()])
}

/// Absolute biases; none at all with a head alone.
pub(super) fn bitfit(w: &Writer<'_>, patches: &Patches<'_>) -> Result<Part, InteropError> {
    let mut tensors = Named::new();
    for (site, patch) in patches {
        let Patch::Bias(b) = patch else { return Err(bad(w, *site)) };
        let absolute = match w.base.bias(*site)? {
            Some(own) => (plain(b)? + plain(&own)?)?,
            None => plain(b)?,
        };
        tensors.insert(format!("{}.bias", keys::key(&w.path(*site)?)), absolute);
    }
    let mut config = w.config("BITFIT");
    config.remove("modules_to_save");
    config.insert("semantics".into(), json!("replace"));
    Ok(Part { config: Value::Object(config), tensors })
}

/// Vectors on outputs `[out, 1]` and inputs `[1, in]`.
pub(super) fn ia3(w: &Writer<'_>, patches: &Patches<'_>) -> Result<Part, InteropError> {
    let mut tensors = Named::new();
    for (site, patch) in patches {
        let vector = match patch {
            Patch::Scale(s) => plain(s)?.unsqueeze(1)?,
            Patch::InScale(s) => plain(s)?.unsqueeze(0)?,
            _ => return Err(bad(w, *site)),
        };
        if tensors.insert(format!("{}.ia3_l", keys::key(&w.path(*site)?)), vector).is_some() {
            return Err(InteropError::Unapplied(vec![format!("{}: two scales of one module", w.path(*site)?)]));
        }
    }
    let inputs = paths(w, patches, |p| matches!(p, Patch::InScale(_)))?;
    let mut config = w.config("IA3");
    config.insert("target_modules".into(), json!(w.endings(&paths(w, patches, |_| true)?, is_matrix)?));
    config.insert("feedforward_modules".into(), json!(w.endings(&inputs, is_matrix)?));
    config.insert("fan_in_fan_out".into(), json!(w.base.arch.conv1d));
    config.insert("init_ia3_weights".into(), json!(true));
    Ok(Part { config: Value::Object(config), tensors })
}

/// Whole gains and biases.
pub(super) fn ln(w: &Writer<'_>, patches: &Patches<'_>) -> Result<Part, InteropError> {
    let mut tensors = Named::new();
    for (site, patch) in patches {
        let Patch::Affine(n) = patch else { return Err(bad(w, *site)) };
        let key = keys::key(&w.path(*site)?);
        tensors.insert(format!("{key}.ln_tuning_layers.weight"), plain(&n.gain)?);
        if let Some(b) = &n.bias {
            tensors.insert(format!("{key}.ln_tuning_layers.bias"), plain(b)?);
        }
    }
    let is_norm = |s: Site| matches!(s, Site::Norm { .. } | Site::EmbeddingNorm | Site::FinalNorm);
    let mut config = w.config("LN_TUNING");
    config.insert("target_modules".into(), json!(w.endings(&paths(w, patches, |_| true)?, is_norm)?));
    Ok(Part { config: Value::Object(config), tensors })
}

/// Replaced rows of the embedding.
pub(super) fn tokens(w: &Writer<'_>, patches: &Patches<'_>) -> Result<Part, InteropError> {
    let [(site, Patch::TokenRows(t))] = patches.as_slice() else {
        return Err(InteropError::Unapplied(vec!["token rows of several modules".into()]));
    };
    let path = w.path(*site)?;
    let tensors = Named::from([(format!("{}.trainable_tokens_delta", keys::key(&path)), plain(&t.rows)?)]);
    let mut config = w.config("TRAINABLE_TOKENS");
    config.insert("token_indices".into(), json!(t.ids));
    config.insert("target_modules".into(), json!([path.rsplit('.').next().unwrap_or(&path)]));
    config.insert("init_weights".into(), json!(true));
    Ok(Part { config: Value::Object(config), tensors })
}
