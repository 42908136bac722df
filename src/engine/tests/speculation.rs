//! Speculative decoding: whoever guesses, right or wrong, each request says what it says without guesses, and nothing of a wrong
//! guess stays.

use parking_lot::Mutex;

use super::{
    constraint::{by_sevens, constrained},
    sequence::{Fate, Sequence},
    step::{Chosen, Got, Logits},
    *,
};
use crate::{
    admission::params::{BeamParams, NgramSpeculation},
    model::{
        LoadOptions, Quantize,
        testing::{random_base_as, tiny_gpt2, tiny_t5},
    },
};

/// Prompts with their outputs as they are without guesses.
static TRUTH: Mutex<Vec<Vec<u32>>> = Mutex::new(Vec::new());

/// Guesses what is in [`TRUTH`]; every third time a token in the middle is wrong, and never more than is known.
fn mostly_right(_: &[u32], tokens: &[u32], how: &NgramSpeculation) -> Vec<u32> {
    let truth = TRUTH.lock();
    let Some(text) = truth.iter().find(|text| text.starts_with(tokens)) else { return vec![] };
    let mut guess: Vec<u32> = text[tokens.len()..].iter().take(how.tokens as usize).copied().collect();
    if tokens.len().is_multiple_of(3)
        && let Some(token) = guess.get_mut(1 + tokens.len() % 2)
    {
        *token = (*token + 1) % 100;
    }
    guess
}

/// Guesses nonsense.
fn wrong(_: &[u32], tokens: &[u32], how: &NgramSpeculation) -> Vec<u32> {
    (0..how.tokens).map(|i| (tokens.len() as u32 * 7 + i * 13) % 120).collect()
}

fn speculating(job: &Job) -> Job {
    let mut job = job.clone();
    if let Work::Generate(how) = &mut job.work {
        how.speculation = Some(NgramSpeculation { tokens: 5, longest: 3, shortest: 1 });
    }
    job
}

fn with_drafts(jobs: &[Job]) -> Vec<Job> {
    jobs.iter().map(speculating).collect()
}

/// A prompt that repeats itself.
fn repetitive(n: u64, len: usize) -> Vec<u32> {
    prompt(n, 7).into_iter().cycle().take(len).collect()
}

fn sampled(seed: u64, max_new_tokens: usize) -> Work {
    let sampling = Sampling {
        temperature: 0.9,
        top_p: 0.95,
        top_k: 60,
        // some penalised
        repetition_penalty: if seed.is_multiple_of(2) { 1.0 } else { 1.1 },
        frequency_penalty: if seed % 4 == 3 { 0.2 } else { 0.0 },
        seed: Some(seed),
        ..Sampling::default()
    };
    let (stop_tokens, logprobs) = (vec![], (!seed.is_multiple_of(3)).then_some(2));
    Work::Generate(Generate { sampling, max_new_tokens, stop_tokens, logprobs, beams: None, speculation: None })
}

/// Greedy and sampled, bare and with different deltas, short and long; prompts from this number on.
fn jobs(base: &Base, first: u64) -> Vec<Job> {
    let job = |i: u64| {
        let new = 1 + (i as usize * 17) % 50;
        let work = if i.is_multiple_of(2) { greedy(new) } else { sampled(i, new) };
        let job = Job::new(repetitive(i, 3 + (i as usize * 13) % 60), work);
        if i.is_multiple_of(4) { job } else { job.with(&delta(base, (i % 4) as u8, 0)) }
    };
    (first..first + 14).map(job).collect()
}

/// What they say without guesses, each in an engine that does nothing else; it is the truth from now on.
fn plainly(base: &Arc<Base>, jobs: &[Job]) -> Vec<Answer> {
    let engine = Engine::new(base, roomy());
    let answers: Vec<Answer> = jobs.iter().map(|job| Answer::read(engine.submit(job))).collect();
    for (job, answer) in jobs.iter().zip(&answers) {
        assert_eq!(counted([answer]), (0, 0));
        TRUTH.lock().push([job.tokens.clone(), answer.ids()].concat());
    }
    answers
}

/// Tokens that were guessed, and those of them that were right.
fn counted<'a>(answers: impl IntoIterator<Item = &'a Answer>) -> (u32, u32) {
    let usages = answers.into_iter().filter_map(|a| a.finished.as_ref().map(|f| f.usage));
    usages.fold((0, 0), |(d, a), usage| (d + usage.drafted_tokens, a + usage.accepted_tokens))
}

/// The same tokens, ends and counts.
#[track_caller]
fn assert_exact(answers: &[Answer], expected: &[Answer]) {
    assert_same(answers, expected);
    for (i, (answer, expected)) in answers.iter().zip(expected).enumerate() {
        let told =
            |a: &Answer| a.finished.as_ref().map(|f| (f.reason, f.usage.prompt_tokens, f.usage.completion_tokens));
        assert_eq!(told(answer), told(expected), "request {i}");
    }
}

#[test]
fn greedy_and_sampled_outputs_are_those_without_drafts_whoever_guesses() {
    for (config, first) in [(tiny_llama(), 0), (tiny_gpt2(), 14)] {
        let base = base(&config);
        let jobs = jobs(&base, first);
        let expected = plainly(&base, &jobs);
        // some do not speculate
        let mixed: Vec<Job> =
            jobs.iter().enumerate().map(|(i, job)| if i % 5 == 4 { job.clone() } else { speculating(job) }).collect();
        let narrow =
            EngineConfig { max_batch_tokens: 24, max_sequences: 5, max_deltas: 2, prefill_chunk: 7, ..roomy() };
        let guesses: [(drafts::Guess, bool); 3] = [(drafts::lookup, false), (mostly_right, true), (wrong, false)];
        for ((guess, right), sizes) in guesses.into_iter().flat_map(|guess| [(guess, roomy()), (guess, narrow)]) {
            let engine = Engine::new(&base, sizes).guessing(guess);
            let answers = engine.together(&mixed);
            assert_exact(&answers, &expected);
            let (drafted, accepted) = counted(&answers);
            assert!(drafted > 0 && accepted <= drafted, "{accepted} of {drafted}");
            assert!(!right || 2 * accepted > drafted, "{accepted} of {drafted} are right");
            assert_eq!(counted(answers.iter().skip(4).step_by(5)), (0, 0), "nobody guesses for those that did not ask");
            engine.settle();
        }
    }
}

/// Without rounding of activations as on an f32 base; with it (`Activations::AsWeights`), what comes in by the last bits otherwise
/// may fall on the other side of a rounding, so that a close choice may fall otherwise.
#[test]
fn on_8_bits_outputs_are_those_without_drafts_as_far_as_rounding_lets_them() {
    for (config, first) in [(tiny_llama(), 120), (tiny_gpt2(), 140)] {
        let options = LoadOptions { quantize: Some(Quantize::Q8_0), ..LoadOptions::default() };
        let base = Arc::new(random_base_as(&config, 7, &options).expect("base"));
        let jobs = jobs(&base, first);
        let expected = plainly(&base, &jobs);
        for guess in [drafts::lookup as drafts::Guess, mostly_right, wrong] {
            let engine = Engine::new(&base, roomy()).guessing(guess);
            let answers = engine.together(&with_drafts(&jobs));
            assert_exact(&answers, &expected);
            assert!(counted(&answers).0 > 0);
            engine.settle();
        }
        let rounded = EngineConfig { activations: Activations::AsWeights, ..roomy() };
        let plain = Engine::new(&base, rounded).together(&jobs);
        let drafted = Engine::new(&base, rounded).guessing(wrong).together(&with_drafts(&jobs));
        assert!(counted(&drafted).0 > 0);
        for (i, (a, b)) in plain.iter().zip(&drafted).enumerate() {
            assert_eq!((a.tokens.len(), &a.failed), (b.tokens.len(), &b.failed), "request {i}");
            let greedy = matches!(&jobs[i].work, Work::Generate(how) if how.sampling.temperature <= 0.0);
            // up to where their ways part, and there both choices are all but equal
            let same = a.tokens.iter().zip(&b.tokens).take_while(|(a, b)| a.id == b.id).count();
            for (a, b) in a.tokens.iter().zip(&b.tokens).take(if greedy { same + 1 } else { same }) {
                assert!((a.logprob - b.logprob).abs() < 0.1, "request {i}: {a:?} {b:?}");
            }
        }
    }
}

#[test]
fn tokens_told_ahead_of_a_failure_count() {
    fn five_to_nine(_: &[u32], _: &[u32], _: &NgramSpeculation) -> Vec<u32> {
        (5..10).collect()
    }
    let base = base(&tiny_llama());
    let vocab = base.arch.vocab;
    let device = candle_core::Device::Cpu;
    // row `i` is for token 6 + i
    let likely = |(row, id): (usize, usize)| if id == 6 + row { 9.0_f32 } else { 0.0 };
    let rows: Vec<f32> = (0..5).flat_map(|row| (0..vocab).map(move |id| (row, id))).map(likely).collect();
    let rows = Tensor::from_vec(rows, (5, vocab), &device).expect("tensor");
    // a row of no logits breaks who reads it
    let broken = Tensor::zeros((5, 0), candle_core::DType::F32, &device).expect("tensor");
    let all: constraint::Allow = |_| Ok((Ending::No, (5..12).collect()));
    let three: constraint::Allow = |said| if said.len() < 3 { all_but(12) } else { Err("later".into()) };
    fn all_but(end: u32) -> Result<(Ending, Vec<u32>), String> {
        Ok((Ending::No, (5..end).collect()))
    }
    let told = |allow: constraint::Allow, rest: Tensor| {
        let (request, mut events) = speculating(&constrained(Job::new(prompt(130, 9), greedy(20)), allow)).request();
        let mut sequence = Sequence::new(request, &base.sites, false);
        assert_eq!(sequence.look(), Ok(true));
        assert_eq!(sequence.draft(five_to_nine).0, 5);
        let due = TokenOut { id: 5, logprob: 0.0, top: vec![] };
        let chosen = Chosen { drafted: 5, tokens: vec![due], rest: Some(Logits(rest)), non_finite: false };
        let (fate, tick) = sequence.take(Got::Tokens(chosen), true, Instant::now()).expect("tokens");
        let sent = std::iter::from_fn(|| events.try_recv().ok()).count();
        assert_eq!(tick.map_or(0, |tick| tick.tokens), sent);
        (fate, sent)
    };
    assert_eq!(told(all, rows.clone()), (Fate::GoesOn { grew: true }, 6));
    assert_eq!(told(three, rows), (Fate::Fails(EngineError::Constraint("later".into())), 3));
    let (fate, sent) = told(all, broken);
    assert!(matches!(&fate, Fate::Fails(EngineError::Internal(why)) if why.starts_with("panic: ")), "{fate:?}");
    assert_eq!(sent, 1);
}

#[test]
fn guesses_are_computed_where_they_are_right_and_stop_where_they_are_wrong() {
    let base = base(&tiny_llama());
    let job = Job::new(prompt(5, 9), greedy(60));
    let expected = plainly(&base, std::slice::from_ref(&job));
    fn right(_: &[u32], tokens: &[u32], how: &NgramSpeculation) -> Vec<u32> {
        let truth = TRUTH.lock();
        let text = truth.iter().find(|text| text.starts_with(tokens)).map(|text| &text[tokens.len()..]);
        text.unwrap_or_default().iter().take(how.tokens as usize).copied().collect()
    }
    // not one of them is right
    fn never(source: &[u32], tokens: &[u32], how: &NgramSpeculation) -> Vec<u32> {
        right(source, tokens, how).into_iter().map(|token| (token + 1) % 100).collect()
    }
    let told = |guess: drafts::Guess| {
        let engine = Engine::new(&base, roomy());
        engine.handle.commands.try_send(Command::GuessAsEver(guess)).expect("taken");
        let answer = Answer::read(engine.submit(&speculating(&job)));
        engine.settle();
        let (counts, steps) = (counted([&answer]), engine.handle.stats().steps);
        assert_exact(&[answer], &expected);
        (counts, steps)
    };
    let ((drafted, accepted), steps) = told(right);
    assert_eq!((accepted, steps), (drafted, 60 - u64::from(accepted)), "each spares a step");
    assert!(accepted >= 40, "{accepted}");
    let ((drafted, accepted), steps) = told(never);
    assert_eq!((accepted, steps), (0, 60));
    assert!(drafted <= 8, "{drafted}");
}

#[test]
fn what_is_shared_of_an_output_with_wrong_drafts_is_what_was_said() {
    let base = base(&tiny_llama());
    let first = [Job::new(prompt(41, 20), greedy(60)), Job::new(prompt(42, 20), sampled(42, 60))];
    let said = plainly(&base, &first);
    let next: Vec<Job> = first
        .iter()
        .zip(&said)
        .map(|(job, said)| Job::new([job.tokens.clone(), said.ids(), prompt(43, 5)].concat(), greedy(20)))
        .collect();
    let expected = plainly(&base, &next);
    for guess in [wrong as drafts::Guess, mostly_right] {
        let engine = Engine::new(&base, roomy()).guessing(guess);
        assert_exact(&engine.together(&with_drafts(&first)), &said);
        engine.settle();
        assert_eq!(engine.handle.stats().pages_cached, 2 * 4, "20 + 60 - 1 positions have four whole pages");
        let answers = engine.together(&with_drafts(&next));
        assert_exact(&answers, &expected);
        assert_eq!(answers.iter().map(Answer::cached).collect::<Vec<_>>(), [64, 64]);
        engine.settle();
    }
}

#[test]
fn an_output_ends_in_the_middle_of_right_drafts_where_it_ends_without() {
    let base = base(&tiny_llama());
    let job = Job::new(prompt(51, 9), sampled(51, 40));
    let whole = plainly(&base, std::slice::from_ref(&job));
    let ids = whole[0].ids();
    let mut met = 0;
    for (at, stop) in ids.iter().enumerate().take(30).skip(1) {
        let Work::Generate(how) = &job.work else { unreachable!() };
        let stops = Work::Generate(Generate { stop_tokens: vec![*stop], ..how.clone() });
        let short = Work::Generate(Generate { max_new_tokens: at, ..how.clone() });
        let jobs = [stops, short].map(|work| Job { work, ..job.clone() });
        let engine = Engine::new(&base, roomy());
        let expected = engine.together(&jobs);
        assert_eq!(expected[0].finished.as_ref().map(|f| f.reason), Some(FinishReason::StopToken));
        assert_eq!(expected[1].tokens.len(), at);
        let engine = engine.guessing(mostly_right);
        let answers = engine.together(&with_drafts(&jobs));
        assert_exact(&answers, &expected);
        met += counted(&answers).1;
        engine.settle();
    }
    assert!(met > 100, "{met} drafts were right");
}

#[test]
fn a_constraint_is_kept_to_and_ends_as_without_drafts() {
    let base = base(&tiny_llama());
    // ends after 30 tokens; by a stop token that is not sent; by itself; fails
    let ways: [(constraint::Allow, Vec<u32>); 4] = [
        (by_sevens, vec![]),
        (
            |said| match said.len() {
                22 => Ok((Ending::May, vec![])),
                n => Ok((Ending::No, vec![5 + n as u32 % 3, 60])),
            },
            vec![9],
        ),
        (|said| Ok((if said.len() == 13 { Ending::Must } else { Ending::No }, vec![5, 6, 7])), vec![]),
        (|said| if said.len() < 14 { Ok((Ending::No, vec![5, 6, 7])) } else { Err("later".into()) }, vec![]),
    ];
    let jobs: Vec<Job> = (0..)
        .zip(ways.iter().cycle().take(12))
        .map(|(i, (allow, stop_tokens))| {
            let work = if i % 3 == 0 { greedy(40) } else { sampled(i, 40) };
            let Work::Generate(how) = work else { unreachable!() };
            let work = Work::Generate(Generate { stop_tokens: stop_tokens.clone(), ..how });
            constrained(Job::new(prompt(60 + i, 12), work), *allow)
        })
        .collect();
    let expected = plainly(&base, &jobs);
    assert_eq!(expected.iter().filter(|a| a.failed.is_some()).count(), 3);
    let guesses: [(drafts::Guess, u32); 3] = [(drafts::lookup, 1), (mostly_right, 60), (wrong, 0)];
    for (guess, least) in guesses {
        let engine = Engine::new(&base, roomy()).guessing(guess);
        let answers = engine.together(&with_drafts(&jobs));
        assert_exact(&answers, &expected);
        assert!(counted(&answers).1 >= least, "{:?}", counted(&answers));
        engine.settle();
    }
}

#[test]
fn drafts_get_no_rows_that_others_need() {
    let base = base(&tiny_llama());
    let jobs: Vec<Job> = (0..6).map(|i| Job::new(prompt(70 + i, 1), greedy(20))).collect();
    let expected = plainly(&base, &jobs);
    for (max_batch_tokens, some) in [(6, false), (7, true)] {
        let engine = Engine::new(&base, EngineConfig { max_batch_tokens, max_sequences: 6, ..roomy() });
        let engine = engine.guessing(mostly_right);
        let answers = engine.together(&with_drafts(&jobs));
        assert_exact(&answers, &expected);
        assert_eq!(counted(&answers).0 > 0, some, "{:?} with {max_batch_tokens} rows", counted(&answers));
        engine.settle();
    }
}

#[test]
fn sequences_that_lose_their_pages_say_what_they_would_have_said() {
    let base = base(&tiny_llama());
    let jobs: Vec<Job> = (0..6)
        .map(|i| Job::new(prompt(80 + i, 20), if i % 2 == 0 { greedy(60) } else { sampled(i, 60) }))
        .map(|job| job.with(&delta(&base, 1, 0)))
        .collect();
    let expected = plainly(&base, &jobs);
    for guess in [mostly_right as drafts::Guess, wrong] {
        let engine = Engine::new(&base, EngineConfig { kv_pages: 12, prefill_chunk: 9, ..roomy() }).guessing(guess);
        let answers = engine.together(&with_drafts(&jobs));
        assert_exact(&answers, &expected);
        assert!(counted(&answers).0 > 0);
        engine.settle();
        assert!(engine.handle.stats().preemptions > 0, "12 pages cannot hold six sequences of five pages");
    }
}

#[test]
fn prompts_and_prefixes_ahead_change_nothing() {
    let base = base(&tiny_llama());
    let job = |(i, held): (u64, &positions::Held)| {
        Job::new(repetitive(90 + i, 11 + i as usize), if i % 2 == 0 { greedy(30) } else { sampled(i, 30) }).with(held)
    };
    let jobs: Vec<Job> = (0..).zip(&positions::kinds(&base, 0)).map(job).collect();
    let expected = plainly(&base, &jobs);
    for guess in [drafts::lookup as drafts::Guess, mostly_right, wrong] {
        let engine = Engine::new(&base, roomy()).guessing(guess);
        let answers = engine.together(&with_drafts(&jobs));
        assert_exact(&answers, &expected);
        assert!(counted(&answers).0 > 0);
        engine.settle();
    }
}

#[test]
fn an_encoder_decoder_speculates_and_looks_into_its_source() {
    let base = base(&tiny_t5());
    let jobs: Vec<Job> = (0..5).map(|i| source::job(100 + i, 6 + 5 * i as usize, 24)).collect();
    let engine = Engine::new(&base, roomy());
    let expected = engine.together(&jobs);
    // the last token of its output, wherever it is in the source
    fn read(source: &[u32], tokens: &[u32], how: &NgramSpeculation) -> Vec<u32> {
        assert!(!source.is_empty());
        let found = drafts::lookup(source, tokens, how);
        if found.is_empty() { wrong(source, tokens, how) } else { found }
    }
    let engine = engine.guessing(read);
    let answers = engine.together(&with_drafts(&jobs));
    assert_exact(&answers, &expected);
    assert!(counted(&answers).0 > 0);
    engine.settle();
}

#[test]
fn beams_are_searched_without_drafts() {
    let base = base(&tiny_llama());
    let Work::Generate(how) = greedy(12) else { unreachable!() };
    let search = BeamParams { beams: 3, length_penalty: 1.0, early_stopping: Default::default() };
    let beams = Some(Beams { search, told: 3 });
    let job = Job::new(repetitive(110, 20), Work::Generate(Generate { beams, logprobs: None, ..how }));
    let engine = Engine::new(&base, roomy());
    let [plain, drafted] = [job.clone(), speculating(&job)].map(|job| Answer::read(engine.submit(&job)).found);
    let outputs = |found: &Option<Vec<Hypothesis>>| {
        let found = found.iter().flatten();
        found.map(|h| (h.tokens.clone(), h.usage.drafted_tokens)).collect::<Vec<_>>()
    };
    assert_eq!(outputs(&plain), outputs(&drafted));
    assert!(outputs(&drafted).iter().all(|(_, drafts)| *drafts == 0) && !outputs(&drafted).is_empty());
    engine.settle();
}
