//! A private copy of a base's weights, to be trained: the resident base is never touched.
//!
//! The copy is a set of tensors under the names of the checkpoint. [`PrivateCopy::base`] makes the same [`Transformer`] of
//! any tensors under these names: of variables, whose gradients it passes on (norms and linears see that they are trained),
//! or of plain tensors, which get the form that the kernels like, bit for bit as a base that is loaded.

use std::collections::{BTreeSet, HashMap};

use candle_core::{DType, Tensor};

use super::{Architecture, Base, LoadOptions, ModelError, Transformer, weights};
use crate::delta::{Site, Task};

/// What a task's full fine-tuning trains of a base, by name.
#[derive(Debug, Clone)]
pub struct PrivateCopy {
    arch: Architecture,
    names: Vec<String>,
}

impl PrivateCopy {
    /// Reads the copy from the base's folder: names, and their tensors in f32 on the base's device, in order of name, each
    /// given to `take` before the next is read, so that no second set of them lies about. Left out is what the task's forward
    /// does not pass: the pooler of an encoder that does not classify texts by it, a language-model head of a classifier,
    /// classification heads.
    ///
    /// # Errors
    /// A folder that cannot be read or has changed since the base was loaded; those of `take`.
    pub fn read(
        base: &Base,
        task: Task,
        mut take: impl FnMut(&str, Tensor) -> candle_core::Result<()>,
    ) -> Result<Self, ModelError> {
        if let Some(file) = &base.gguf {
            let problem = format!("{} has no numbers that could be trained", file.display());
            return Err(ModelError::Unsupported(problem));
        }
        let config: serde_json::Value = serde_json::from_slice(&weights::read(&base.dir, "config.json")?)
            .map_err(|e| ModelError::Config(e.to_string()))?;
        let ckpt = weights::Checkpoint::open(&base.dir, base.arch.names.prefix, DType::F32, &base.device)?;
        if ckpt.fingerprint(&config)? != base.fingerprint {
            let dir = base.dir.display();
            return Err(ModelError::Checkpoint(format!("{dir} has changed since the base was loaded")));
        }
        let arch = trimmed(&base.arch, task);
        let names: BTreeSet<String> = (modules(base, &arch).iter())
            .flat_map(|module| ["weight", "bias"].map(|suffix| ckpt.name(module, suffix)))
            .flatten()
            .collect();
        for name in &names {
            take(name, ckpt.stored(name)?)?;
        }
        Ok(Self { arch, names: names.into_iter().collect() })
    }

    /// Stored names, in order.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// The base with these weights (f32, in the order of [`Self::names`]) in place of its own.
    ///
    /// # Errors
    /// Shapes that do not fit, or those of candle.
    pub fn base(&self, base: &Base, tensors: &[Tensor]) -> Result<Base, ModelError> {
        let given: HashMap<String, Tensor> = self.names.iter().cloned().zip(tensors.iter().cloned()).collect();
        let ckpt = weights::Checkpoint::given(given, self.arch.names.prefix, DType::F32, &base.device);
        let options = LoadOptions { device: base.device.clone(), dtype: DType::F32, quantize: None };
        let transformer = Transformer::load(&self.arch, &ckpt, &base.sites, &options)?;
        Ok(Base {
            arch: self.arch.clone(),
            fingerprint: base.fingerprint,
            sites: base.sites.clone(),
            parameters: transformer.parameters(),
            transformer,
            device: base.device.clone(),
            dtype: DType::F32,
            dir: base.dir.clone(),
            gguf: None,
        })
    }
}

impl Base {
    /// Numbers that full fine-tuning trains for a task, without a classification head.
    pub fn trained_by(&self, task: Task) -> u64 {
        let pooler = self.sites.iter().find(|(_, e)| e.site == Site::Pooler);
        let pooler = pooler.map_or(0, |(_, e)| (e.in_dim + usize::from(e.has_bias)) * e.out_dim) as u64;
        let body = self.transformer.body_parameters();
        let body = if pools(&self.arch, task) { body } else { body - pooler.min(body) };
        body + if task.generates() { self.transformer.head_parameters() } else { 0 }
    }
}

/// Whether the task's forward passes the pooler.
fn pools(arch: &Architecture, task: Task) -> bool {
    task == Task::SeqCls && arch.names.cls_inner.is_none()
}

/// The architecture without what the task does not use.
fn trimmed(arch: &Architecture, task: Task) -> Architecture {
    let mut arch = arch.clone();
    arch.head = None;
    if !pools(&arch, task) {
        arch.names.pooler = "";
    }
    if !task.generates() {
        arch.names.lm_head = "";
    }
    arch
}

/// Modules that have weights.
fn modules(base: &Base, arch: &Architecture) -> Vec<String> {
    let n = &arch.names;
    let own_head = !n.lm_head.is_empty() && !arch.tied_head;
    let used = |site: Site| match site {
        Site::Pooler => !n.pooler.is_empty(),
        Site::LmHead => own_head,
        _ => true,
    };
    let sites = base.sites.iter().filter(|(_, e)| used(e.site)).map(|(_, e)| e.module.clone());
    let lm_bias = if n.lm_head.is_empty() { "" } else { n.lm_bias };
    let tables = [n.position, n.token_type, lm_bias].map(str::to_owned);
    let biases = arch.stacks().map(|stack| Architecture::module(stack.names.relative_bias, 0));
    sites.chain(tables).chain(biases).filter(|module| !module.is_empty()).collect()
}
