//! The real program, killed again and again while clients upload, move, delete and train: after each start, everything that was
//! acknowledged is there, nothing that was deleted comes back, and nothing is torn.
//!
//! `DELTASERVE_CRASH_CYCLES` says how often (default 6), `DELTASERVE_SEED` repeats a run as far as the moment of a kill can be
//! repeated. Built with `--features failpoints`, it also ends the program at each place of the sources that has a failpoint.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests stop where anything fails")]

#[path = "../it/chance.rs"]
mod chance;
mod ledger;
#[allow(dead_code, reason = "shared with the other tests")]
#[path = "../it/support.rs"]
mod support;
mod verify;
mod work;

use std::{path::PathBuf, sync::Arc, time::Duration};

use chance::{Chance, number, seed};
use ledger::Ledger;
use support::*;
use verify::Verifier;
use work::{Load, Pool};

const DEFAULT_CYCLES: u64 = 6;

/// A world that dies often.
struct Mortal {
    world: Arc<World>,
    ledger: Arc<Ledger>,
    chance: Chance,
    cycle: u64,
    kills: u64,
}

impl Mortal {
    fn new(seed: u64) -> Self {
        let (world, ledger) = (Arc::new(World::new()), Arc::new(Ledger::default()));
        Self { world, ledger, chance: Chance::new(seed, 0), cycle: 0, kills: 0 }
    }

    /// Clients that work until the server is gone.
    fn load(&mut self, client: &Client, full: bool) -> Load {
        self.cycle += 1;
        let pool = Arc::new(Pool::new(&self.world, self.cycle));
        let seed = self.chance.below(1 << 20) as u64;
        Load::start(client, pool, &self.ledger, self.cycle, seed, full)
    }

    /// A blob that no row names, as a crash may leave it.
    fn plant_orphan(&mut self) -> PathBuf {
        let name: String = (0..64).map(|_| char::from(*self.chance.of(b"0123456789abcdef"))).collect();
        let shard = self.world.data_dir().join("blobs").join(&name[..2]);
        std::fs::create_dir_all(&shard).expect("a folder");
        let path = shard.join(name);
        std::fs::write(&path, b"nobody's").expect("a file");
        path
    }

    async fn verify(&mut self, client: &Client, all: bool) {
        let verifier = Verifier { world: &self.world, client, ledger: &self.ledger };
        verifier.verify(&mut self.chance, all).await;
    }

    /// A start that must succeed, after which everything is as it was acknowledged; then a kill.
    async fn survives(&mut self, all: bool) {
        let orphan = self.plant_orphan();
        let mut server = self.world.spawn().await;
        let client = server.client.clone();
        self.verify(&client, all).await;
        eventually("the orphan is collected", async || !orphan.exists()).await;
        server.kill();
        self.kills += 1;
    }

    fn report(&self, what: &str) {
        println!("{what}: {} kills, {}", self.kills, self.ledger.summary());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn kills_at_any_time_lose_and_tear_nothing() {
    let cycles = number("DELTASERVE_CRASH_CYCLES", DEFAULT_CYCLES);
    let mut mortal = Mortal::new(seed());
    for cycle in 0..cycles {
        let orphan = mortal.plant_orphan();
        let mut server = mortal.world.spawn().await;
        let client = server.client.clone();
        mortal.verify(&client, false).await;
        // on most starts there is time to collect; on some the kill comes first
        if cycle % 3 != 2 {
            eventually("the orphan is collected", async || !orphan.exists()).await;
        }
        let load = mortal.load(&client, false);
        let most = Duration::from_millis(if cycle % 2 == 0 { 150 } else { 700 });
        tokio::time::sleep(mortal.chance.time(most)).await;
        server.kill();
        mortal.kills += 1;
        load.ends().await;
        if cycle % 3 == 1 {
            verify::offline(&mortal.world.data_dir()).await;
        }
    }
    mortal.survives(true).await;
    verify::offline(&mortal.world.data_dir()).await;
    mortal.report("kills at any time");
    assert!(mortal.ledger.acknowledged() > cycles as usize, "hardly anything was done: {}", mortal.ledger.summary());
}

/// Ends the program at the places that have a failpoint, in an order of the seed, as many as there are cycles.
#[cfg(feature = "failpoints")]
#[tokio::test(flavor = "multi_thread")]
async fn an_end_at_any_failpoint_loses_and_tears_nothing() {
    use std::{collections::BTreeSet, os::unix::process::ExitStatusExt as _, time::Instant};

    /// Places that this load does not come to, or not each time.
    const RARE: &[&str] =
        &["registry-evicted", "job-blob-before-commit", "job-blob-committed", "job-try-before-commit"];
    const SIGABRT: i32 = 6;

    let seed = seed();
    let mut mortal = Mortal::new(seed);
    let mut points: Vec<String> = work::failpoints().into_iter().collect();
    assert!(points.len() > 30, "{points:?}");
    for at in (1..points.len()).rev() {
        points.swap(at, mortal.chance.below(at + 1));
    }
    let cycles = number("DELTASERVE_CRASH_CYCLES", points.len() as u64) as usize;
    let mut missed = BTreeSet::new();
    for (cycle, point) in points.iter().cycle().take(cycles).enumerate() {
        // the first time, then also later ones
        let nth = if cycle < points.len() { 1 } else { 1 + mortal.chance.below(4) };
        mortal.plant_orphan();
        println!("{point}:{nth}");
        let env = [("DELTASERVE_ABORT_AT", format!("{point}:{nth}"))];
        if let Some(mut server) = mortal.world.spawn_with(&env).await {
            let load = mortal.load(&server.client, point.starts_with("model-"));
            let until = Instant::now() + Duration::from_secs(15);
            let mut ended = None;
            while ended.is_none() && Instant::now() < until {
                tokio::time::sleep(Duration::from_millis(10)).await;
                ended = server.child.try_wait().expect("its state");
            }
            match ended {
                Some(status) => assert_eq!(status.signal(), Some(SIGABRT), "{point}: {status}"),
                None if nth > 1 => server.kill(),
                None => {
                    missed.insert(point.as_str());
                    server.kill();
                }
            }
            load.ends().await;
        }
        mortal.kills += 1;
        if cycle % 4 == 3 {
            verify::offline(&mortal.world.data_dir()).await;
        }
        mortal.survives(false).await;
    }
    mortal.survives(true).await;
    verify::offline(&mortal.world.data_dir()).await;
    mortal.report("ends at failpoints");
    let unexpected: Vec<_> = missed.iter().filter(|point| !RARE.contains(point)).collect();
    assert!(unexpected.is_empty(), "never reached: {unexpected:?}");
}
