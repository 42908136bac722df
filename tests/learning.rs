//! Real learning on real data: not part of the normal run (minutes). Point it at a base and a data folder:
//!
//! `DELTASERVE_LEARN_BASE=models/minilm DELTASERVE_LEARN_DATA=data/trec6 cargo test --release --test learning -- --ignored --nocapture`

use std::{path::PathBuf, sync::Arc, time::Instant};

use deltaserve::{
    admission::{
        params::PublishPolicy,
        train_params::{
            BitfitPart, HyperParams, JobEventBody, LoraPart, MethodPart, PTuningPart, PrefixPart, PromptPart,
            TrainData, TrainParams,
        },
    },
    delta::Task,
    model::{Base, LoadOptions},
    train::{
        BaseInfo, Inputs,
        encode::TextCodec,
        prepare,
        run::{Advance, Outcome, Run, RunInput},
        spec::BaseShape,
    },
};

fn env_dir(name: &str) -> PathBuf {
    PathBuf::from(std::env::var_os(name).unwrap_or_else(|| panic!("set {name}")))
}

#[test]
#[ignore = "minutes of training on data that is not in the repository"]
fn a_classifier_learns() {
    let (base_dir, data_dir) = (env_dir("DELTASERVE_LEARN_BASE"), env_dir("DELTASERVE_LEARN_DATA"));
    let base = Arc::new(Base::load(&base_dir, &LoadOptions::default()).unwrap());
    let tokenizer = tokenizers::Tokenizer::from_file(base_dir.join("tokenizer.json")).unwrap();
    let mut tokenizer = tokenizer;
    tokenizer.with_padding(None);
    tokenizer.with_truncation(None).unwrap();
    let codec = TextCodec::from_tokenizer(tokenizer, None, base.arch.eos.clone()).unwrap();
    let read = |name: &str| std::fs::read(data_dir.join(name)).unwrap();
    let labels: Vec<String> = serde_json::from_slice(&read("labels.json")).unwrap();
    let method = match std::env::var("DELTASERVE_LEARN_METHOD").as_deref() {
        Ok("bitfit") => MethodPart::Bitfit(BitfitPart::default()),
        Ok("prefix") => MethodPart::Prefix(PrefixPart::default()),
        Ok("projection") => MethodPart::Prefix(PrefixPart { projection: true, ..PrefixPart::default() }),
        Ok("prompt") => MethodPart::Prompt(PromptPart::default()),
        Ok("p-tuning") => MethodPart::PTuning(PTuningPart::default()),
        _ => MethodPart::Lora(LoraPart::default()),
    };
    let tags = read("train.jsonl").starts_with(b"{\"tokens\"");
    let params = TrainParams {
        output_name: "out".into(),
        task: if tags { Task::TokenCls } else { Task::SeqCls },
        data: TrainData::Jsonl(String::new()),
        validation: None,
        methods: vec![method],
        labels,
        k_per_class: None,
        problem: Default::default(),
        forgetting: None,
        replay: None,
        // evaluates once, at the end: the published delta is the last one
        hyper: HyperParams {
            eval_every: Some(1_000_000),
            learning_rate: std::env::var("DELTASERVE_LEARN_LR").ok().map(|lr| lr.parse().unwrap()),
            ..HyperParams::default()
        },
        publish: PublishPolicy::Upsert,
        from_delta: None,
        mix: None,
        ewc: None,
        preference: None,
        sweep: None,
        idempotency_key: None,
    };
    let (train, test) = (read("train.jsonl"), read(if tags { "dev.jsonl" } else { "test.jsonl" }));
    let info = BaseInfo { shape: BaseShape::of(&base), max_positions: base.arch.max_positions };
    let inputs =
        Inputs { params: &params, train: &train, validation: Some(&test), forgetting: None, replay: None, start: None };
    let prepared = prepare(inputs, info, &codec).unwrap_or_else(|problems| panic!("{problems:#?}"));
    println!("{} parameters, {:?}", prepared.reply.trainable_parameters, prepared.reply.memory);
    let start = Instant::now();
    let mut run = Run::new(base, None, RunInput::from(&prepared)).unwrap();
    let mut shown = 0;
    loop {
        let (events, outcome) = match run.advance() {
            Advance::More(events) => (events, None),
            Advance::Done(events, outcome) => (events, Some(*outcome)),
        };
        for event in events {
            match event {
                JobEventBody::Metrics(m) if m.step >= shown => {
                    shown += 50;
                    println!(
                        "{:4}/{} loss {:.4} {:.1} ms {:.0} tok/s eta {:.0} s",
                        m.step, m.total_steps, m.loss, m.step_ms, m.tokens_per_second, m.eta_seconds
                    );
                }
                JobEventBody::Eval(e) => println!("{e:?}"),
                _ => {}
            }
        }
        if let Some(outcome) = outcome {
            let seconds = start.elapsed().as_secs_f64();
            let Outcome::Trained(end) = outcome else { panic!("{outcome:?}") };
            let eval = end.best_eval.unwrap();
            println!("accuracy {:.4} macro-F1 {:.4} in {seconds:.1} s", eval.accuracy.unwrap(), eval.macro_f1.unwrap());
            return;
        }
    }
}
