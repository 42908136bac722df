//! Laws of passes that independent runs share: each comes to what it comes to alone, whatever data, task, method and length the
//! others have; one that fails or stops leaves the others as they are.
//!
//! "As alone" is as in [`super::sweep_laws`]: losses to 1e-4, weights to 1e-3 of their norm.

use std::sync::Arc;

use super::{
    batches::{Stream, rng},
    encode::{Encoded, Target},
    full_laws::{full, kept},
    gradients::{self, Micro},
    laws::{hyper, input, lora as plain_lora, positions, shape, tiny},
    method_laws::all,
    objective::{Reads, Sequence, losses_of},
    resume_laws::busy,
    run::{Advance, Outcome, Run, RunInput, shared_pass},
    spec::TrainSpec,
    sweep_laws::{History, alone, assert_same, assert_same_gradients, failed, lora, near, note, shake, smooth, wild},
    together::{self, Member},
    trainable::Trainable,
};
use crate::{
    admission::train_params::{
        BitfitPart, JobEventBody, MethodPart, PreferenceMethod, PreferenceParams, ResolvedTraining,
    },
    delta::{Problem, Task},
    model::Base,
};

/// What is asked of a job's texts.
#[derive(Clone, Copy)]
pub(super) enum Asks {
    Next,
    /// One of so many labels.
    Label(u32),
    /// Any of so many.
    Labels(u32),
    Number,
    /// One of so many per word.
    Tags(u32),
    Translation,
}

impl Asks {
    fn task(self) -> Task {
        match self {
            Self::Next => Task::CausalLm,
            Self::Translation => Task::Seq2Seq,
            Self::Tags(_) => Task::TokenCls,
            Self::Label(_) | Self::Labels(_) | Self::Number => Task::SeqCls,
        }
    }

    fn problem(self) -> Problem {
        match self {
            Self::Labels(_) => Problem::MultiLabel,
            Self::Number => Problem::Regression,
            _ => Problem::SingleLabel,
        }
    }

    fn labels(self) -> u32 {
        match self {
            Self::Next | Self::Translation => 0,
            Self::Number => 1,
            Self::Label(n) | Self::Labels(n) | Self::Tags(n) => n,
        }
    }

    fn target(self, tokens: &[u32]) -> Target {
        match self {
            Self::Next | Self::Translation => Target::Tokens((0..tokens.len()).map(|t| t > 0).collect()),
            Self::Label(n) => Target::Label(tokens[0] % n),
            Self::Labels(n) => Target::Labels((0..n).filter(|l| (tokens[0] + l).is_multiple_of(2)).collect()),
            Self::Number => Target::Value((tokens[0] as f32 / 50.0).to_bits()),
            Self::Tags(n) => Target::Tags(tokens.iter().zip(0..).skip(1).map(|(id, t)| (t, id % n)).collect()),
        }
    }
}

/// Texts that no other seed has, of 3 to 8 tokens and `seed` more.
pub(super) fn texts(asks: Asks, seed: u32, n: u32) -> Arc<[Encoded]> {
    let one = |i: u32| {
        let tokens: Vec<u32> =
            (0..3 + seed + (7 * i + seed) % 6).map(|t| 3 + (31 * seed + 13 * i + t * t) % 90).collect();
        let source = match asks {
            Asks::Translation => tokens.iter().rev().map(|t| t + 3).chain([1]).collect(),
            _ => vec![],
        };
        Encoded { source, line: u64::from(i) + 1, ..Encoded::new(tokens.clone(), asks.target(&tokens)) }
    };
    (0..n).map(one).collect()
}

pub(super) fn job(
    base: &Base,
    (asks, seed): (Asks, u32),
    methods: &[MethodPart],
    resolved: ResolvedTraining,
) -> RunInput {
    let labels: Vec<String> = (0..asks.labels()).map(|i| format!("l{i}")).collect();
    let spec = TrainSpec::resolve_for(methods, (asks.task(), asks.problem()), &labels, shape(base)).unwrap();
    let plain = input(base, asks.task(), methods, resolved);
    let problem = asks.problem();
    let resolved = ResolvedTraining { labels, problem, seed: u64::from(seed), ..plain.resolved.clone() };
    RunInput { spec, resolved, train: texts(asks, seed, 24), ..plain }
}

fn named(name: &str) -> Vec<MethodPart> {
    all().into_iter().find(|(known, _)| *known == name).expect("a method").1
}

/// By family, jobs of all kinds that it takes.
fn jobs_of(base: &Base, family: &str, resolved: &ResolvedTraining) -> Vec<RunInput> {
    let everywhere = vec![positions::everywhere(2)];
    let prompt = vec![positions::prompt(3)];
    let prefix = vec![positions::prefix(3)];
    let bitfit = vec![MethodPart::Bitfit(BitfitPart { added: true, ..BitfitPart::default() })];
    let all: Vec<(Asks, Vec<MethodPart>)> = match family {
        "t5" => vec![
            (Asks::Translation, lora(0.2)),
            (Asks::Translation, everywhere),
            (Asks::Translation, prompt),
            (Asks::Translation, named("houlsby")),
        ],
        "bert" => vec![
            (Asks::Label(2), lora(0.2)),
            (Asks::Tags(3), bitfit),
            (Asks::Labels(4), named("houlsby")),
            (Asks::Label(5), prefix),
            (Asks::Number, prompt),
            (Asks::Tags(2), named("ia3")),
        ],
        _ => vec![
            (Asks::Next, lora(0.2)),
            (Asks::Label(3), prefix),
            (Asks::Next, bitfit),
            (Asks::Tags(4), plain_lora()),
            (Asks::Next, prompt),
            (Asks::Labels(2), named("pfeiffer")),
            (Asks::Number, named("dora")),
            (Asks::Next, named("lora and token rows")),
        ],
    };
    let made = |((asks, methods), i): ((Asks, Vec<MethodPart>), u32)| {
        let resolved = ResolvedTraining { label_smoothing: [0.0, 0.1, 0.0][i as usize % 3], ..resolved.clone() };
        job(base, (asks, i), &methods, resolved)
    };
    all.into_iter().zip(1..).map(made).collect()
}

#[test]
fn gradients_of_jobs_of_all_kinds_in_one_pass_are_those_of_each_alone() {
    for family in ["llama", "gpt2", "gemma2", "bert", "t5"] {
        let base = tiny(family);
        let made: Vec<(RunInput, Trainable)> = jobs_of(&base, family, &hyper(1))
            .into_iter()
            .zip(1..)
            .map(|(input, seed)| {
                let t = Trainable::init_on(&input.spec, &base, seed).unwrap();
                shake(t.vars(), seed);
                (input, t)
            })
            .collect();
        let deltas: Vec<_> = made.iter().map(|(_, t)| t.delta(&mut rng(5, Stream::Dropout)).unwrap()).collect();
        let examples: Vec<Vec<&Encoded>> =
            made.iter().zip(2..).map(|((input, _), n)| input.train.iter().take(n).collect()).collect();
        let members: Vec<Member<'_>> = (0..made.len())
            .map(|i| Member {
                delta: Arc::clone(&deltas[i]),
                vars: made[i].1.vars(),
                examples: &examples[i],
                smoothing: made[i].0.resolved.label_smoothing,
                weight: 3.0 + i as f64,
            })
            .collect();
        let found = together::gradients(&base, &members, None).unwrap();
        assert_eq!(found.len(), members.len());
        for (i, ((loss, grads), member)) in found.iter().zip(&members).enumerate() {
            let what = format!("{family}, job {i}");
            let sequences: Vec<Sequence<'_>> = member.examples.iter().map(|e| Sequence::from(*e)).collect();
            let (own, reads) = ((member.examples, &sequences[..]), Reads::of(member.examples));
            let losses: gradients::LossesOf<'_> =
                &|hidden, cx| Ok(losses_of(&base, hidden, own, member.smoothing, cx)?.each);
            let (delta, pacer, weight) = (Arc::clone(&member.delta), None, member.weight);
            let micro = Micro { base: &base, delta, sequences: &sequences, losses, reads, weight, pacer };
            let (alone, wanted) = gradients::whole(&micro, member.vars).unwrap();
            assert!(near(*loss, alone), "{what}: {loss}, alone {alone}");
            assert_same_gradients(&what, member.vars, grads, &wanted);
        }
    }
}

#[test]
fn what_cannot_be_in_one_pass_is_refused() {
    let base = tiny("llama");
    let t = Trainable::init_on(&job(&base, (Asks::Next, 1), &plain_lora(), hyper(1)).spec, &base, 1).unwrap();
    let delta = t.delta(&mut rng(1, Stream::Dropout)).unwrap();
    let says = |examples: &[&Encoded]| {
        let member = Member { delta: Arc::clone(&delta), vars: t.vars(), examples, smoothing: 0.0, weight: 1.0 };
        together::gradients(&base, &[member], None).unwrap_err().to_string()
    };
    let (next, label) = (texts(Asks::Next, 1, 1), texts(Asks::Label(2), 1, 1));
    assert!(says(&[&next[0], &label[0]]).contains("mixed targets"));
    assert!(says(&[&label[0]]).contains("without a head"));
    let rated = Encoded::new(vec![3, 4], Target::Rated(vec![false, true], true, None));
    assert!(says(&[&rated]).contains("losses of their own"));
}

/// What each run came to: its steps, its events, its end.
type Story = (History, Vec<JobEventBody>, Outcome);

/// Runs whose pieces go together wherever two or more can, and how many passes they shared.
fn company(base: &Arc<Base>, inputs: &[RunInput]) -> (Vec<Story>, usize) {
    let mut runs: Vec<Option<Run>> =
        inputs.iter().map(|input| Some(Run::new(Arc::clone(base), None, input.clone()).unwrap())).collect();
    let mut stories: Vec<(History, Vec<JobEventBody>, Option<Outcome>)> =
        inputs.iter().map(|_| (History::new(), Vec::new(), None)).collect();
    let mut passes = 0;
    while runs.iter().any(Option::is_some) {
        let offers = |run: &mut Option<Run>| run.as_mut().is_some_and(|run| run.shared_rows().is_some());
        let shares: Vec<bool> = runs.iter_mut().map(offers).collect();
        let chosen: Vec<&Run> =
            runs.iter().zip(&shares).filter(|(_, s)| **s).filter_map(|(run, _)| run.as_ref()).collect();
        passes += usize::from(chosen.len() > 1);
        let mut pass = shared_pass(&chosen).unwrap().into_iter();
        for (i, place) in runs.iter_mut().enumerate() {
            let Some(run) = place else { continue };
            let came = if shares[i] { run.take(pass.next().unwrap()) } else { run.advance() };
            note(&mut stories[i].0, run);
            match came {
                Advance::More(events) => stories[i].1.extend(events),
                Advance::Done(events, outcome) => {
                    stories[i].1.extend(events);
                    stories[i].2 = Some(*outcome);
                    *place = None;
                }
            }
        }
    }
    (stories.into_iter().map(|(history, events, end)| (history, events, end.unwrap())).collect(), passes)
}

/// Events that are the same whenever they are told: metrics come by the clock.
fn kinds(events: &[JobEventBody]) -> Vec<String> {
    let kind = |e: &JobEventBody| match e {
        JobEventBody::Eval(e) => format!("evaluation after {}", e.step),
        JobEventBody::Log(n) | JobEventBody::Warning(n) => n.code.clone(),
        other => format!("{other:?}").split(['(', ' ']).next().unwrap_or_default().to_owned(),
    };
    events.iter().filter(|e| !matches!(e, JobEventBody::Metrics(_))).map(kind).collect()
}

#[test]
fn jobs_of_all_kinds_come_together_to_what_they_come_to_alone() {
    for family in ["llama", "bert", "t5"] {
        let base = tiny(family);
        // a bias of keys shifts all scores of a query alike: its gradient is rounding, which must not become steps
        let mut jobs = jobs_of(&base, family, &ResolvedTraining { eps: 1e-4, ..busy(8) });
        for (i, job) in jobs.iter_mut().enumerate() {
            // one ends before the others, one has longer steps, some are evaluated at other times
            job.resolved.total_steps -= i as u32 % 3;
            job.resolved.batch_size += i as u32 % 2;
            job.resolved.eval_every = 2 + i as u32;
            job.validation = Arc::from(&job.train[..5]);
        }
        let (stories, passes) = company(&base, &jobs);
        assert!(passes >= 8, "{family}: {passes} passes were shared");
        for (i, (job, (history, events, end))) in jobs.iter().zip(stories).enumerate() {
            let what = format!("{family}, job {i}");
            let (wanted, said, _) = alone(&base, job);
            assert_eq!(wanted.len(), job.resolved.total_steps as usize, "{what}");
            assert_same(&what, &history, &wanted);
            assert_eq!(kinds(&events), kinds(&said), "{what}");
            assert!(matches!(end, Outcome::Trained(_)), "{what}: {end:?}");
        }
    }
}

#[test]
fn one_that_diverges_leaves_the_others_as_they_are_alone() {
    let base = tiny("llama");
    let (resolved, rates) = wild(&[1e-3, 100.0, 1e-2]);
    let jobs: Vec<RunInput> = rates
        .iter()
        .zip(1..)
        .map(|((rate, _), seed)| {
            let resolved = ResolvedTraining { learning_rate: *rate, ..resolved.clone() };
            job(&base, (Asks::Next, seed), &plain_lora(), resolved)
        })
        .collect();
    let (mut stories, passes) = company(&base, &jobs);
    assert!(passes > 0);
    let (history, _, end) = stories.remove(1);
    let why = failed(end);
    assert!(["NON_FINITE_LOSS", "DIVERGED"].contains(&why.code), "{}", why.code);
    assert!(history.len() < 10 && why.checkpoint.is_some(), "the last good weights are kept as of any job");
    for ((history, _, _), job) in stories.iter().zip([&jobs[0], &jobs[2]]) {
        let wanted = alone(&base, job).0;
        assert_eq!(wanted.len(), 10);
        assert_same("beside one that diverges", history, &wanted);
    }
}

/// A checkpoint is one of a step's start, whoever the step was begun for, and what goes on from it comes to the same again.
#[test]
fn a_run_that_shares_passes_stops_and_goes_on() {
    let base = tiny("llama");
    let jobs: Vec<RunInput> = (1..4).map(|seed| job(&base, (Asks::Next, seed), &lora(0.2), smooth(busy(6)))).collect();
    let wanted: Vec<History> = jobs.iter().map(|job| alone(&base, job).0).collect();
    for stop in 1..9 {
        let mut runs: Vec<Run> =
            jobs.iter().map(|job| Run::new(Arc::clone(&base), None, job.clone()).unwrap()).collect();
        for _ in 0..stop {
            assert!(runs.iter_mut().all(|run| run.shared_rows().is_some()));
            let shares = shared_pass(&runs.iter().collect::<Vec<_>>()).unwrap();
            runs.iter_mut().zip(shares).for_each(|(run, share)| drop(run.take(share)));
        }
        for ((mut run, job), wanted) in runs.into_iter().zip(&jobs).zip(&wanted) {
            let (bytes, step) = (run.to_bytes().unwrap().expect("bytes"), run.step());
            run.shared_rows();
            assert!(run.to_bytes().unwrap().as_ref() == Some(&bytes), "a step that is begun is no part of it");
            // two micro-batches a step
            assert_eq!(step, stop / 2);
            let mut again = Run::from_bytes(Arc::clone(&base), None, job.clone(), &bytes).unwrap();
            assert!(again.to_bytes().unwrap().as_ref() == Some(&bytes));
            let mut history = History::new();
            while let Advance::More(_) = again.advance() {
                note(&mut history, &again);
            }
            let later: History =
                wanted.iter().filter(|(at, _)| **at >= step.max(1)).map(|(at, w)| (*at, w.clone())).collect();
            assert_same(&format!("stopped after {stop} pieces"), &history, &later);
        }
    }
}

#[test]
fn whose_forward_or_backward_pass_is_another_one_shares_none() {
    let base = tiny("llama");
    let rows = |input: RunInput| Run::new(Arc::clone(&base), None, input).unwrap().shared_rows();
    let with = |resolved: ResolvedTraining| rows(job(&base, (Asks::Next, 2), &plain_lora(), resolved));
    let taken: usize = texts(Asks::Next, 2, 24).iter().map(Encoded::rows).sum();
    assert_eq!(with(ResolvedTraining { batch_size: 24, ..hyper(2) }), Some(taken));
    let prompt = job(&base, (Asks::Next, 2), &[positions::prompt(3)], ResolvedTraining { batch_size: 24, ..hyper(2) });
    assert_eq!(rows(prompt), Some(taken + 3 * 24), "virtual tokens are rows");
    assert_eq!(with(ResolvedTraining { kl_to_base: 0.1, ..hyper(2) }), None);
    assert_eq!(with(ResolvedTraining { gradient_checkpointing: true, ..hyper(2) }), None);
    let preference = Some(PreferenceParams::of(PreferenceMethod::Orpo).resolve());
    assert_eq!(with(ResolvedTraining { preference, ..hyper(2) }), None);
    assert_eq!(rows(job(&base, (Asks::Label(2), 2), &[], hyper(2))), None, "a head alone");
    let (_dir, on_disk) = kept("llama");
    let input = full(&on_disk, Task::CausalLm, hyper(2));
    assert_eq!(Run::new(on_disk, None, input).unwrap().shared_rows(), None, "a base of its own");
    // what comes next decides: an evaluation, and what follows the last step, are no pieces of training
    let mut run = Run::new(
        Arc::clone(&base),
        None,
        RunInput {
            validation: texts(Asks::Next, 9, 4),
            ..job(&base, (Asks::Next, 2), &plain_lora(), ResolvedTraining { eval_every: 1, ..hyper(3) })
        },
    )
    .unwrap();
    assert!(run.shared_rows().is_some());
    run.advance();
    assert_eq!((run.step(), run.shared_rows()), (1, None));
    assert!(shared_pass(&[&run]).unwrap_err().to_string().contains("not about to train"));
    let other = Run::new(tiny("llama"), None, job(&base, (Asks::Next, 1), &plain_lora(), hyper(1))).unwrap();
    assert!(shared_pass(&[&run, &other]).unwrap_err().to_string().contains("several bases"));
}
