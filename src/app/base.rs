//! Loading the base and its text side.

use std::{path::Path, sync::Arc};

use anyhow::Context as _;
use candle_core::{DType, Device};

use crate::{
    admission::{BasePooling, params::Pooling},
    config::{BaseConfig, DeviceChoice, DtypeChoice},
    hub,
    model::{Base, LoadOptions},
    text::{ChatTemplate, TextModel},
    train::encode::{RenderFn, TextCodec},
};

/// A base with its text side.
pub(super) struct BaseParts {
    pub(super) base: Arc<Base>,
    pub(super) name: String,
    pub(super) text: Arc<TextModel>,
    pub(super) chat: Option<Arc<ChatTemplate>>,
    pub(super) pooling: BasePooling,
    pub(super) codec: TextCodec,
}

/// Loads on a blocking thread: gigabytes may be read and converted.
pub(super) async fn load(config: &BaseConfig) -> anyhow::Result<BaseParts> {
    let config = config.clone();
    tokio::task::spawn_blocking(move || load_now(&config)).await.context("load the base")?
}

fn load_now(config: &BaseConfig) -> anyhow::Result<BaseParts> {
    let started = std::time::Instant::now();
    let dir = hub::folder(&config.source)?;
    let device = device(config.device)?;
    let dtype = match config.dtype {
        Some(DtypeChoice::F32) => DType::F32,
        Some(DtypeChoice::Bf16) => DType::BF16,
        Some(DtypeChoice::F16) => DType::F16,
        None if device.is_cpu() => DType::F32,
        None => DType::BF16,
    };
    let base = Base::load(&dir, &LoadOptions { device, dtype }).with_context(|| format!("load {}", dir.display()))?;
    let text = Arc::new(TextModel::open(&dir)?);
    anyhow::ensure!(
        base.arch.vocab >= text.vocab_size() || text.vocab_size() - base.arch.vocab < 1024,
        "the tokenizer has {} tokens, the base's vocabulary {}: they do not belong together",
        text.vocab_size(),
        base.arch.vocab
    );
    let chat = ChatTemplate::open(&dir, &text)?.map(Arc::new);
    let codec = codec(&dir, &base, &text, chat.as_ref())?;
    let name = Path::new(&config.source)
        .file_name()
        .filter(|_| Path::new(&config.source).is_dir())
        .map_or_else(|| config.source.clone(), |n| n.to_string_lossy().into_owned());
    tracing::info!(
        name, family = base.arch.model_type, parameters = base.parameters, fingerprint = %base.fingerprint.short(),
        device = base.device_name(), dtype = ?base.dtype, seconds = started.elapsed().as_secs_f32(), "base is resident"
    );
    Ok(BaseParts { base: Arc::new(base), name, text, chat, pooling: pooling(&dir), codec })
}

fn device(choice: DeviceChoice) -> anyhow::Result<Device> {
    match choice {
        DeviceChoice::Cpu => Ok(Device::Cpu),
        DeviceChoice::Cuda(index) => cuda(index),
    }
}

#[cfg(not(feature = "cuda"))]
fn cuda(index: usize) -> anyhow::Result<Device> {
    anyhow::bail!("--device cuda:{index}: this binary was built without CUDA; see deploy/cuda/README.md")
}

#[cfg(feature = "cuda")]
fn cuda(index: usize) -> anyhow::Result<Device> {
    use candle_core::cuda_backend::cudarc;
    // SAFETY: these only try to open the libraries; without the check, making a device panics where they are missing.
    #[allow(unsafe_code)]
    let present = unsafe { cudarc::driver::sys::is_culib_present() && cudarc::cublas::sys::is_culib_present() };
    anyhow::ensure!(present, "--device cuda:{index}: no CUDA driver or cuBLAS library was found on this machine");
    // one stream of its own: the default stream is per thread, and tensors cross threads here
    Device::new_cuda_with_stream(index).with_context(|| format!("--device cuda:{index}"))
}

/// What training needs: the tokenizer without padding, the chat template, the tokens that end a text.
fn codec(dir: &Path, base: &Base, text: &TextModel, chat: Option<&Arc<ChatTemplate>>) -> anyhow::Result<TextCodec> {
    let refused = |e: tokenizers::Error| anyhow::anyhow!("tokenizer.json: {e}");
    let mut tokenizer = tokenizers::Tokenizer::from_file(dir.join("tokenizer.json")).map_err(refused)?;
    tokenizer.with_truncation(None).map_err(refused)?;
    tokenizer.with_padding(None);
    let render: Option<RenderFn> = chat.map(|chat| {
        let chat = Arc::clone(chat);
        let render: RenderFn = Arc::new(move |messages, open| chat.render(messages, open).map_err(|e| e.to_string()));
        render
    });
    let mut eos = base.arch.eos.clone();
    eos.extend(text.special().eos.filter(|id| !eos.contains(id)));
    let codec = TextCodec::from_tokenizer(Arc::new(tokenizer), render, eos);
    let codec = codec.map_err(|e| anyhow::anyhow!("tokenizer.json: {e}"))?;
    Ok(codec.with_decoder_start(base.arch.decoder_start))
}

/// How a sentence encoder's folder says to pool.
fn pooling(dir: &Path) -> BasePooling {
    let read =
        |name: &str| -> Option<serde_json::Value> { serde_json::from_slice(&std::fs::read(dir.join(name)).ok()?).ok() };
    if let Some(config) = read("1_Pooling/config.json") {
        let on = |key: &str| config.get(key).and_then(serde_json::Value::as_bool).unwrap_or(false);
        return match () {
            () if on("pooling_mode_mean_tokens") => Some(Pooling::Mean),
            () if on("pooling_mode_cls_token") => Some(Pooling::Cls),
            () if on("pooling_mode_lasttoken") => Some(Pooling::Last),
            () => None,
        };
    }
    None
}
