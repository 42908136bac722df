//! Jobs of several tenants that share training passes (`--train-share`): each succeeds under its own tenant with its own
//! events, and what it published is what it comes to by itself.

use deltaserve::{grpc::proto, telemetry};
use proto::{JobState, job_event::Body};

use crate::support::*;

/// Few rows a step.
fn small(name: &str, task: proto::Task, data: String, seed: u64) -> proto::TrainingSpec {
    let plain = spec(name, task, data, 150);
    let hyper = proto::HyperParameters {
        batch_size: Some(2),
        learning_rate: Some(2e-3),
        seed: Some(seed),
        ..plain.hyper.unwrap_or_default()
    };
    proto::TrainingSpec { hyper: Some(hyper), ..plain }
}

/// The loss of the last step.
fn last_loss(events: &[proto::JobEvent]) -> f64 {
    let of = |e: &proto::JobEvent| if let Some(Body::Metrics(m)) = &e.body { Some(m.loss) } else { None };
    events.iter().filter_map(of).next_back().expect("metrics")
}

/// Trains jobs of a tenant each, at the same time or one after the other: the loss of each one's last step.
async fn losses(share: usize, at_once: bool) -> Vec<f64> {
    let mut world = World::new();
    world.config.train.share = share;
    let running = world.start().await;
    let specs = [
        small("style", proto::Task::CausalLm, stories(12), 1),
        small("style", proto::Task::CausalLm, stories(7), 2),
        small("kind", proto::Task::SeqCls, labelled(10), 3),
    ];
    let mut created = Vec::new();
    for (spec, tenant) in specs.into_iter().zip(["anna", "ben", "cleo"]) {
        let client = running.client.tenant(tenant);
        let job = client.create_job(spec, "").await.expect("a job");
        if !at_once {
            client.ended(&job.id).await;
        }
        created.push((client, job.id));
    }
    let mut all = Vec::new();
    for (client, id) in created {
        let events = client.events(&id, 0).await.expect("a watch");
        assert!(events.iter().zip(1..).all(|(e, seq)| e.seq == seq), "a gap");
        let end = client.ended(&id).await;
        assert_eq!(end.state(), JobState::Succeeded, "{end:?}");
        assert_eq!(client.list().await.len(), 1, "its own version and no other's");
        all.push(last_loss(&events));
    }
    running.stop().await;
    all
}

#[tokio::test(flavor = "multi_thread")]
async fn jobs_of_several_tenants_share_passes_and_come_to_what_they_come_to_alone() {
    // no other test of this process asks for metrics
    let metrics = telemetry::init_metrics().expect("the first recorder");
    let alone = losses(1, false).await;
    let shared = || {
        let text = metrics.render();
        let count = text.lines().find(|l| l.starts_with("deltaserve_train_shared_passes_total{outcome=\"done\"}"));
        count.and_then(|l| l.split(' ').next_back()?.parse::<u64>().ok()).unwrap_or(0)
    };
    assert_eq!(shared(), 0, "each by itself");
    let together = losses(8, true).await;
    assert!(shared() > 0, "{}", metrics.render());
    assert!(metrics.render().contains("deltaserve_train_shared_pass_jobs_count"));
    for (a, b) in together.iter().zip(&alone) {
        // rounding may decide the direction of a step where a gradient is next to nothing
        assert!((a - b).abs() <= 2e-2 * b.abs().max(1.0), "{together:?}, alone {alone:?}");
    }
}
