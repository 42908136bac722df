//! The resident base: loaded once, frozen, shared by serving and training.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use candle_core::{DType, Device, Tensor};

use super::{
    Architecture, ModelError, Quantize, Transformer, family,
    gguf::{self, GgufFile},
    sites, weights,
};
use crate::{
    delta::{SiteId, SiteTable},
    ids::BaseFingerprint,
    ops::Weight,
};

/// Where and how to keep the weights.
#[derive(Debug, Clone)]
pub struct LoadOptions {
    /// CPU or one GPU.
    pub device: Device,
    /// f32, bf16 or f16 on a GPU; on the CPU, f32 or bf16, which is then how matrices and the embedding table are kept, while
    /// everything else and what is computed stays f32.
    pub dtype: DType,
    /// What frozen linears are quantised to, on the CPU; `None` keeps them as `dtype`, or as a GGUF file has them.
    pub quantize: Option<Quantize>,
}

impl LoadOptions {
    /// Whether matrices are kept in bf16 for kernels that compute in f32.
    pub(super) fn in_bf16(&self) -> bool {
        self.device.is_cpu() && self.dtype == DType::BF16
    }

    /// Type of what is computed.
    pub(super) fn computed(&self) -> DType {
        if self.in_bf16() { DType::F32 } else { self.dtype }
    }

    /// A matrix stored `[out, in]`, as it is to be kept.
    pub(super) fn out_in(&self, w: &Tensor) -> candle_core::Result<Weight> {
        if self.in_bf16() { Weight::bf16_from_out_in(w) } else { Weight::from_out_in(w) }
    }

    /// A matrix stored `[in, out]`, as it is to be kept.
    pub(super) fn in_out(&self, w: &Tensor) -> candle_core::Result<Weight> {
        if self.in_bf16() { Weight::bf16_from_in_out(w) } else { Weight::from_in_out(w) }
    }
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self { device: Device::Cpu, dtype: DType::F32, quantize: None }
    }
}

/// Matrices, or parts of them, that are kept in one format.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Held {
    /// How many matrices.
    pub matrices: usize,
    /// Numbers in them.
    pub numbers: usize,
    /// Bytes in memory.
    pub bytes: usize,
}

/// What transformers generates by.
const GENERATION: &str = "generation_config.json";

/// A base model, ready to run. Its tensors are plain (never `Var`) and never change.
pub struct Base {
    /// What it is.
    pub arch: Architecture,
    /// Which bytes it is.
    pub fingerprint: BaseFingerprint,
    /// Where deltas may attach.
    pub sites: SiteTable,
    /// The forward.
    pub transformer: Transformer,
    /// Where it lives.
    pub device: Device,
    /// Type of its norms and biases, and of all that is computed.
    pub dtype: DType,
    /// The folder it came from.
    pub dir: PathBuf,
    /// The GGUF file it came from, if it is one of that folder.
    pub gguf: Option<PathBuf>,
    /// Numbers in it.
    pub parameters: u64,
}

impl std::fmt::Debug for Base {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Base").field("fingerprint", &self.fingerprint).field("dir", &self.dir).finish_non_exhaustive()
    }
}

impl Base {
    /// Loads a Hugging Face folder (`config.json`, `*.safetensors` and, where there is one, `generation_config.json`), a
    /// GGUF file, or a folder with one and without safetensors.
    ///
    /// # Errors
    /// [`ModelError`] names the file, field or tensor.
    pub fn load(path: &Path, options: &LoadOptions) -> Result<Self, ModelError> {
        let on_cpu = options.device.is_cpu();
        let supported: &[DType] =
            if on_cpu { &[DType::F32, DType::BF16] } else { &[DType::F32, DType::BF16, DType::F16] };
        if !supported.contains(&options.dtype) {
            return Err(ModelError::Unsupported(format!(
                "dtype {:?} is not supported on this device; supported: {supported:?} (16-bit checkpoints are \
                 converted at load)",
                options.dtype
            )));
        }
        if options.in_bf16() && options.quantize.is_some() {
            return Err(ModelError::Unsupported("a base is kept in bf16 or quantised, not both".into()));
        }
        let dtype = options.computed();
        let gguf = gguf::find(path)?;
        if !on_cpu && (gguf.is_some() || options.quantize.is_some()) {
            return Err(ModelError::Unsupported("quantised bases are supported on the CPU only".into()));
        }
        let parent = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let dir = if gguf.as_deref() == Some(path) { parent } else { path };
        let file = gguf.as_deref().map(GgufFile::open).transpose()?;
        let config: serde_json::Value = match &file {
            Some(file) => file.config().clone(),
            None => serde_json::from_slice(&weights::read(dir, "config.json")?)
                .map_err(|e| ModelError::Config(e.to_string()))?,
        };
        let mut arch = family::from_config(&config)?;
        if dir.join(GENERATION).is_file() {
            let generation = serde_json::from_slice(&weights::read(dir, GENERATION)?)
                .map_err(|e| ModelError::Config(format!("{GENERATION}: {e}")))?;
            family::complete(&mut arch, &generation);
        }
        let prefix = arch.names.prefix;
        let ckpt = match file {
            Some(file) => weights::Checkpoint::of_gguf(file, prefix, dtype, &options.device),
            None => weights::Checkpoint::open(dir, prefix, dtype, &options.device)?,
        };
        if !ckpt.has(arch.names.pooler, "weight") {
            arch.names.pooler = "";
        }
        // of encoders, only checkpoints of masked language models bring such a head
        if !arch.is_causal() && !ckpt.has(arch.names.lm_dense, "weight") {
            arch.names.lm_head = "";
        }
        // a classification checkpoint has no head of its own: the table then serves, whatever the config says
        arch.tied_head |= !ckpt.has(arch.names.lm_head, "weight");
        let sites = sites::table(&arch, |module| ckpt.has(module, "bias"));
        let transformer = Transformer::load(&arch, &ckpt, &sites, options)?;
        let fingerprint = ckpt.fingerprint(&config)?;
        let parameters = transformer.parameters();
        Ok(Self {
            arch,
            fingerprint,
            sites,
            transformer,
            device: options.device.clone(),
            dtype,
            dir: dir.to_path_buf(),
            gguf,
            parameters,
        })
    }

    /// `cpu`, or `cuda:0` and so on.
    pub fn device_name(&self) -> String {
        match self.device.location() {
            candle_core::DeviceLocation::Cpu => "cpu".into(),
            candle_core::DeviceLocation::Cuda { gpu_id } => format!("cuda:{gpu_id}"),
            candle_core::DeviceLocation::Metal { gpu_id } => format!("metal:{gpu_id}"),
        }
    }

    /// The format of most numbers of its linears: `f32`, `bf16`, `q8_0`, `q4k` ...
    pub fn weight_format(&self) -> &'static str {
        let linears = self.transformer.linear_formats();
        linears.iter().max_by_key(|(_, held)| held.numbers).map_or(self.dtype.as_str(), |(kind, _)| *kind)
    }

    /// How the matrices of its linears are kept.
    pub fn linear_formats(&self) -> BTreeMap<&'static str, Held> {
        self.transformer.linear_formats()
    }

    /// Bytes of its weights in memory.
    pub fn weight_bytes(&self) -> u64 {
        self.transformer.bytes()
    }

    /// The frozen matrix of a linear site as `[in, out]` (possibly strided), and its bias.
    ///
    /// # Errors
    /// Those of candle.
    pub fn linear(&self, site: SiteId) -> candle_core::Result<Option<(Tensor, Option<Tensor>)>> {
        let Some((linear, columns)) = self.transformer.linear_at(site) else { return Ok(None) };
        let w = linear.weight.as_in_out()?.narrow(1, columns.start, columns.len())?;
        let b = linear.bias.as_ref().map(|b| b.narrow(0, columns.start, columns.len())).transpose()?;
        Ok(Some((w, b)))
    }

    /// The frozen bias of a linear or norm site, if it has one.
    ///
    /// # Errors
    /// Those of candle.
    pub fn bias(&self, site: SiteId) -> candle_core::Result<Option<Tensor>> {
        if let Some((linear, columns)) = self.transformer.linear_at(site) {
            return linear.bias.as_ref().map(|b| b.narrow(0, columns.start, columns.len())).transpose();
        }
        Ok(self.transformer.norm_at(site).and_then(|n| n.norm.bias.clone()))
    }

    /// Numbers in projections that lie side by side here and apart in the checkpoint: full fine-tuning joins them anew in
    /// every forward.
    pub fn joined_parameters(&self) -> u64 {
        self.transformer.joined_parameters()
    }

    /// The frozen norm of a norm site.
    pub fn norm(&self, site: SiteId) -> Option<&crate::ops::Norm> {
        self.transformer.norm_at(site).map(|n| &n.norm)
    }

    /// The embedding table, `[vocab, hidden]`; a copy where it is kept as the head's weight.
    ///
    /// # Errors
    /// Those of candle.
    pub fn table(&self) -> candle_core::Result<Tensor> {
        self.transformer.table().whole()
    }

    /// Whether a site's matrix was made of this one, `[out, in]`, or `[vocab, hidden]` of the embedding: has its numbers, or
    /// those that it comes to where it is rounded or quantised.
    ///
    /// # Errors
    /// Those of candle.
    pub fn holds(&self, site: SiteId, w: &Tensor) -> candle_core::Result<bool> {
        match self.transformer.linear_at(site) {
            Some((linear, columns)) => linear.weight.holds(columns, w),
            None => self.transformer.table().holds(w),
        }
    }

    /// Rows of the embedding table, `[ids, hidden]`.
    ///
    /// # Errors
    /// Ids outside the vocabulary.
    pub fn table_rows(&self, ids: &[u32]) -> candle_core::Result<Tensor> {
        self.transformer.table().rows(ids)
    }
}
