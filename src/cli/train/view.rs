//! What is shown of a job's events: a progress bar, plain lines, or JSON.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

use super::sweep::{self, Lead};
use crate::{
    cli::{Common, jobs::state_name, output},
    grpc::proto,
};

/// What is shown of events.
pub(super) struct View {
    form: Form,
    /// The best candidate of a sweep so far.
    lead: Option<Lead>,
}

enum Form {
    Json,
    Lines,
    Bar(ProgressBar),
}

impl View {
    pub(super) fn new(common: &Common) -> Self {
        Self { form: Form::new(common), lead: None }
    }

    /// Says what the job is.
    pub(super) fn expect(&mut self, resolved: &proto::ResolvedTraining) {
        self.lead = Lead::of(resolved);
    }

    /// Shows an event; tells how the job ended, if it did.
    pub(super) fn show(&mut self, event: &proto::JobEvent) -> anyhow::Result<Option<anyhow::Result<()>>> {
        use proto::job_event::Body;
        if matches!(self.form, Form::Json) {
            output::json(event)?;
        }
        match &event.body {
            Some(Body::State(change)) => return self.state(change),
            Some(Body::Metrics(m)) => self.metrics(m)?,
            Some(Body::Eval(e)) => {
                self.lead.iter_mut().for_each(|lead| lead.see(e));
                self.say(&eval_line(e))?;
            }
            Some(Body::Checkpoint(c)) => self.say(&match c.best {
                true => format!("kept the evaluation at step {} (jobs publish --step {0})", c.step),
                false => format!("checkpoint at step {}", c.step),
            })?,
            Some(Body::Warning(n)) => self.say(&format!("warning: {} {}", n.code, n.message))?,
            Some(Body::Forgetting(f)) => self.say(&format!(
                "held text: loss {:.4} with the delta, {:.4} without ({:+.4})",
                f.delta_loss, f.base_loss, f.forgetting
            ))?,
            Some(Body::Resumed(r)) => self.say(&format!("goes on from step {}", r.step))?,
            Some(Body::Mix(m)) => m.rows.iter().try_for_each(|row| self.say(&mix_line(&m.deltas, row)))?,
            Some(Body::Log(n)) => self.say(&n.message)?,
            Some(Body::Sweep(s)) => sweep::table(s).iter().try_for_each(|line| self.say(line))?,
            // a list: `worst::print` shows the last one
            Some(Body::Worst(_)) | None => {}
        }
        Ok(None)
    }

    fn state(&mut self, change: &proto::StateChange) -> anyhow::Result<Option<anyhow::Result<()>>> {
        use proto::JobState as State;
        let name = state_name(change.state());
        if let Form::Bar(bar) = &self.form {
            bar.set_prefix(name.clone());
        }
        Ok(Some(match change.state() {
            State::Succeeded => {
                let r = change.result.clone().unwrap_or_default();
                let made = match &r.model {
                    Some(m) => format!("made the model {} ({})", m.path, output::short(&m.fingerprint)),
                    None => format!("published {}@{} ({})", r.name, r.number, output::short(&r.id)),
                };
                self.say(&format!("{made}, loss {:.4}", r.final_loss))?;
                self.finish();
                Ok(())
            }
            State::Failed | State::Cancelled | State::Interrupted => {
                self.finish();
                let failure = change.failure.clone().unwrap_or_default();
                Err(anyhow::anyhow!("the job {name}: {} {}", failure.code, failure.message))
            }
            State::Unspecified | State::Queued | State::Running | State::Paused | State::Publishing => {
                if matches!(self.form, Form::Lines) {
                    output::line(&name)?;
                }
                return Ok(None);
            }
        }))
    }

    fn metrics(&mut self, m: &proto::Metrics) -> anyhow::Result<()> {
        match &self.form {
            Form::Json => Ok(()),
            Form::Lines => output::line(&format!(
                "{}step {}/{}  epoch {:.2}  loss {:.4}{}  lr {:.2e}  {:.0} tokens/s  eta {:.0} s",
                sweep::whose(m.candidate),
                m.step,
                m.total_steps,
                m.epoch,
                m.loss,
                m.kl.map(|kl| format!("  KL {kl:.4}")).unwrap_or_default(),
                m.learning_rate,
                m.tokens_per_second,
                m.eta_seconds
            )),
            Form::Bar(bar) => {
                bar.set_length(m.total_steps.into());
                bar.set_position(m.step.into());
                let eta = indicatif::HumanDuration(Duration::try_from_secs_f64(m.eta_seconds).unwrap_or_default());
                let message = match &self.lead {
                    Some(lead) => format!("{lead}  eta {eta}"),
                    None => format!("loss {:.4}  {:.0} tokens/s  eta {eta}", m.loss, m.tokens_per_second),
                };
                bar.set_message(message);
                Ok(())
            }
        }
    }

    fn say(&self, text: &str) -> anyhow::Result<()> {
        match &self.form {
            Form::Json => Ok(()),
            Form::Lines => output::line(text),
            Form::Bar(bar) => {
                bar.println(text);
                Ok(())
            }
        }
    }

    fn finish(&self) {
        if let Form::Bar(bar) = &self.form {
            bar.abandon();
        }
    }
}

impl Form {
    fn new(common: &Common) -> Self {
        if common.json {
            return Self::Json;
        }
        if !output::terminal() {
            return Self::Lines;
        }
        let template = "{prefix:>10} [{bar:32}] {pos}/{len}  {msg}";
        let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
        Self::Bar(ProgressBar::new(0).with_style(style.progress_chars("=> ")))
    }
}

fn eval_line(e: &proto::EvalResult) -> String {
    let number = |name: &str, value: Option<f64>| value.map(|v| format!("  {name} {v:.4}")).unwrap_or_default();
    format!(
        "{}evaluation at step {}: loss {:.4}{}{}{}{}{}{}{}{}{}{}{}{}{}{}",
        sweep::whose(e.candidate),
        e.step,
        e.loss,
        number("perplexity", e.perplexity),
        number("accuracy", e.accuracy),
        number("macro-F1", e.macro_f1),
        number("MCC", e.mcc),
        number("span-F1", e.span_f1),
        number("micro-F1", e.micro_f1),
        number("MSE", e.mse),
        number("Pearson", e.pearson),
        number("reward accuracy", e.reward_accuracy),
        number("reward margin", e.reward_margin),
        number("exact match", e.exact_match),
        number("BLEU", e.bleu),
        number("ROUGE-L", e.rouge_l),
        if e.best { "  (best)" } else { "" }
    )
}

/// Learned weights, which need not add up to 1.
fn mix_line(deltas: &[String], row: &proto::MixRow) -> String {
    let each: Vec<String> = deltas.iter().zip(&row.weights).map(|(d, w)| format!("{w:.3} {d}")).collect();
    let of = row.layer.map(|layer| format!(" of layer {layer}")).unwrap_or_default();
    format!("weights{of}: {}", each.join(", "))
}
