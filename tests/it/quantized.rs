//! Quantised bases behind the API: mixed batches, training, what is said of them, and what is refused.

use deltaserve::{
    config::QuantizeChoice,
    grpc::proto,
    model::testing::{gguf, tiny_llama},
};
use proto::{JobState, job_event::Body};

use crate::support::*;

fn quantized() -> (World, World) {
    let (plain, mut world) = (World::new(), World::new());
    world.config.base.quantize = Some(QuantizeChoice::Q8_0);
    (plain, world)
}

#[tokio::test(flavor = "multi_thread")]
async fn deltas_of_the_plain_base_are_served_on_its_quantised_copy_in_one_batch() {
    let (plain, world) = quantized();
    let running = world.start().await;
    let client = &running.client;
    let info = client.info().await.expect("info").base.expect("a base");
    assert_eq!(info.dtype, "q8_0");
    assert!(info.weight_bytes > 0 && info.weight_bytes < plain.base.weight_bytes());
    // made for the plain base: the fingerprint is that of the same model
    assert_eq!(info.fingerprint, plain.base.fingerprint.to_string());
    for (name, seed) in [("a", 1), ("b", 2)] {
        client.upload(name, &plain.delta(seed)).await.expect("it is taken");
    }
    let mut alone = Vec::new();
    for name in ["", "a", "b"] {
        alone.push(client.text(name, "the red cat", 24).await);
    }
    assert!(alone[0] != alone[1] && alone[1] != alone[2], "{alone:?}");
    let together = futures::future::join_all((0..12).map(|i| {
        let client = client.clone();
        async move { client.text(["", "a", "b"][i % 3], "the red cat", 24).await }
    }));
    for (i, text) in together.await.into_iter().enumerate() {
        assert_eq!(text, alone[i % 3], "request {i}");
    }
    // what it says of a text is what the plain base says, nearly
    let whole = plain.start().await;
    let scores =
        |client: Client| async move { score(&client, "", scored("the red cat", " sat on it")).await.expect("a score") };
    let (got, want) = (scores(client.clone()).await, scores(whole.client.clone()).await);
    assert!((got - want).abs() < 0.05 * want.abs() && got != want, "{got} {want}");
    whole.stop().await;
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_learns_on_a_quantised_base_beside_requests() {
    let (_, world) = quantized();
    let running = world.start().await;
    let client = &running.client;
    let before = client.text("", "the red cat", 24).await;
    let job = client.create_job(spec("style", proto::Task::CausalLm, stories(24), 40), "").await.expect("a job");
    while [JobState::Queued, JobState::Running].contains(&client.job(&job.id).await.expect("the job").state()) {
        assert_eq!(client.text("", "the red cat", 24).await, before, "requests see the same base all the while");
    }
    let events = client.events(&job.id, 0).await.expect("a watch");
    let losses: Vec<f64> =
        events.iter().filter_map(|e| if let Some(Body::Metrics(m)) = &e.body { Some(m.loss) } else { None }).collect();
    assert!(losses.last() < losses.first(), "{losses:?}");
    assert_eq!(client.ended(&job.id).await.state(), JobState::Succeeded);
    assert_ne!(client.text("style", "the red cat", 24).await, before);
    running.stop().await;
}

/// A world on a GGUF file of its own base, in 8 bits, alone in a folder with the tokenizer.
fn of_file() -> World {
    let mut world = World::of(tiny_llama(), 7);
    let folder = std::path::PathBuf::from(&world.config.base.source);
    let place = folder.parent().expect("a parent").join("file");
    std::fs::create_dir(&place).expect("a folder");
    gguf::convert(&folder, &place.join("model.gguf"), candle_core::quantized::GgmlDType::Q8_0).expect("a file");
    std::fs::copy(folder.join("tokenizer.json"), place.join("tokenizer.json")).expect("a tokenizer");
    world.config.base.source = place.display().to_string();
    world
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gguf_file_is_served_and_trained_on_and_not_fine_tuned_in_full() {
    let mut world = of_file();
    let file = format!("{}/model.gguf", world.config.base.source);
    let in_folder = {
        let running = world.start().await;
        let info = running.client.info().await.expect("info").base.expect("a base");
        running.stop().await;
        info
    };
    assert_eq!((in_folder.dtype.as_str(), in_folder.name.as_str()), ("q8_0", "file"));
    world.config.base.source = file;
    let running = world.start().await;
    let client = &running.client;
    let info = client.info().await.expect("info").base.expect("a base");
    assert_eq!((info.name.as_str(), &info.fingerprint), ("model.gguf", &in_folder.fingerprint));
    assert_eq!((info.family.as_str(), info.parameters), ("llama", world.base.parameters));
    let before = client.text("", "the red cat", 16).await;
    // the file's tensors are not the folder's: what says that it was trained there is refused, what PEFT wrote is taken
    let mut files = world.delta(1);
    let refused = client.upload("a", &files).await.expect_err("of another base");
    assert_eq!(kind(&refused), (tonic::Code::FailedPrecondition, "BASE_MISMATCH".to_owned()));
    const WEIGHTS: &str = "adapter_model.safetensors";
    let tensors = candle_core::safetensors::load_buffer(&files.files[WEIGHTS], &candle_core::Device::Cpu);
    let unnamed = world.data_dir().with_file_name(WEIGHTS);
    candle_core::safetensors::save(&tensors.expect("tensors"), &unnamed).expect("a file");
    files.files.insert(WEIGHTS.into(), std::fs::read(&unnamed).expect("its bytes").into());
    client.upload("a", &files).await.expect("a PEFT folder of this shape");
    assert_ne!(client.text("a", "the red cat", 16).await, before);
    let job = client.create_job(spec("style", proto::Task::CausalLm, stories(24), 20), "").await.expect("a job");
    assert_eq!(client.ended(&job.id).await.state(), JobState::Succeeded);
    let mut full = spec("all", proto::Task::CausalLm, stories(24), 4);
    full.methods = vec![proto::MethodPart { part: Some(proto::method_part::Part::Full(proto::FullTuning {})) }];
    let refused = client.create_job(full, "").await.expect_err("no full fine-tuning");
    expect_invalid(&refused, "methods[0]", &["GGUF", "train a delta"]);
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_without_its_tokenizer_says_what_it_lacks() {
    let world = of_file();
    std::fs::remove_file(format!("{}/tokenizer.json", world.config.base.source)).expect("it was there");
    let Err(refused) = deltaserve::app::start(world.config.clone(), None).await else { panic!("it starts") };
    let refused = format!("{refused:#}");
    let words = ["model.gguf", "tokenizer.json", "tokenizer.ggml.model is missing"];
    assert!(words.iter().all(|w| refused.contains(w)), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_with_its_own_tokenizer_and_template_needs_nothing_beside_it() {
    let mut config = tiny_llama();
    config["vocab_size"] = serde_json::json!(320);
    let (folder, mut file) = (World::of(config.clone(), 7), World::of(config, 7));
    let source = std::path::PathBuf::from(&folder.config.base.source);
    let own = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/fixtures/models/llama/tokenizer.json");
    std::fs::copy(own, source.join("tokenizer.json")).expect("a tokenizer");
    let template = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}";
    let text = serde_json::json!({"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>",
        "chat_template": template});
    std::fs::write(source.join("tokenizer_config.json"), text.to_string()).expect("a template");
    let alone = file.data_dir().with_file_name("alone");
    std::fs::create_dir(&alone).expect("a folder");
    let path = alone.join("model.gguf");
    gguf::convert_whole(&source, &path, candle_core::quantized::GgmlDType::F32, "gpt-2").expect("a file");
    file.config.base.source = path.display().to_string();

    let (folder, file) = (folder.start().await, file.start().await);
    for running in [&folder, &file] {
        assert!(running.client.info().await.expect("info").base.expect("a base").has_chat_template);
    }
    let said =
        |client: Client, request: proto::GenerateRequest| async move { client.generate(request).await.expect("text") };
    let chat = |content: &str| {
        let message = proto::ChatMessage { role: "user".into(), content: content.into() };
        let chat = proto::prompt::Prompt::Chat(proto::Chat { messages: vec![message] });
        proto::GenerateRequest { prompt: Some(proto::Prompt { prompt: Some(chat) }), ..ask("", "", 16) }
    };
    let requests =
        [ask("", "the red cat", 24), ask("", "na\u{ef}ve \u{1f600}", 24), chat("hello"), chat("<|end_of_text|>")];
    for request in requests {
        let (want, got) =
            (said(folder.client.clone(), request.clone()).await, said(file.client.clone(), request).await);
        assert_eq!(got.text, want.text);
    }
    // training reads texts by the same tokenizer
    let job = file.client.create_job(spec("style", proto::Task::CausalLm, stories(24), 20), "").await.expect("a job");
    assert_eq!(file.client.ended(&job.id).await.state(), JobState::Succeeded);
    folder.stop().await;
    file.stop().await;
}
