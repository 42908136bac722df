//! The examples with the highest loss, as the last event about them tells.

use crate::{
    cli::{Common, client::Client, output},
    grpc::proto,
};
use proto::job_event::Body;

/// Reads the events that a job has had so far and prints the last about its worst examples.
///
/// # Errors
/// No such job; a lost connection.
pub(in crate::cli) async fn print(common: &Common, client: &Client, id: &str) -> anyhow::Result<()> {
    let job = client.training().get_job(proto::GetJobRequest { id: id.to_owned() }).await?.into_inner().job;
    let last = job.map_or(0, |job| job.last_seq);
    let mut found = None;
    if last > 0 {
        let keep = |event: &proto::JobEvent| {
            if let Some(Body::Worst(worst)) = &event.body {
                found = Some(worst.clone());
            }
            Ok((event.seq >= last).then_some(()))
        };
        super::follow(client, id, 0, keep).await?;
    }
    let Some(worst) = found else {
        output::note(
            "the job has told no examples yet; without examples for evaluation it tells them at its end, with --worst",
        );
        return Ok(());
    };
    if common.json {
        return output::json(&worst);
    }
    let (what, file) = (
        if worst.held_out { "evaluation" } else { "training" },
        if worst.of_validation { "validation" } else { "training" },
    );
    output::note(&format!("highest losses of {what} after step {}, by line of the {file} file:", worst.step));
    let row = |e: &proto::WorstExample| {
        let label =
            if e.label == e.predicted { e.label.clone() } else { format!("{} (model: {})", e.label, e.predicted) };
        vec![e.line.to_string(), format!("{:.4}", e.loss), label, e.text.escape_debug().to_string()]
    };
    let mut rows: Vec<_> = worst.examples.iter().map(row).collect();
    let mut headings = vec!["LINE", "LOSS", "LABEL", "TEXT"];
    if rows.iter().all(|r| r[2].is_empty()) {
        headings.remove(2);
        rows.iter_mut().for_each(|r| drop(r.remove(2)));
    }
    output::table(&headings, &rows)
}
