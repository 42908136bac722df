//! What the trainer's thread computes between two yield points, by the system's clock of its own time.

use std::time::{Duration, Instant};

/// Where the trainer's thread last left a yield point.
#[derive(Debug, Clone, Copy)]
pub(super) struct Lap {
    wall: Instant,
    cpu: Option<Duration>,
}

impl Lap {
    /// The calling thread, now.
    pub(super) fn now() -> Self {
        Self { wall: Instant::now(), cpu: thread_time() }
    }

    /// The time that the calling thread has computed since then, at most the time that has gone by. A thread that waits for a core
    /// costs nobody anything; where the system does not tell, all of the time counts.
    pub(super) fn computed(&self) -> Duration {
        let wall = self.wall.elapsed();
        let cpu = thread_time().zip(self.cpu).map(|(now, then)| now.saturating_sub(then));
        cpu.map_or(wall, |cpu| cpu.min(wall))
    }
}

#[cfg(any(target_os = "linux", target_os = "macos"))]
#[allow(clippy::unnecessary_wraps, reason = "other systems tell nothing")]
fn thread_time() -> Option<Duration> {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Some(Duration::new(time.tv_sec.try_into().unwrap_or(0), time.tv_nsec.try_into().unwrap_or(0)))
}

#[cfg(not(any(target_os = "linux", target_os = "macos")))]
fn thread_time() -> Option<Duration> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(target_os = "linux")]
    fn a_thread_that_sleeps_computes_nothing() {
        let lap = Lap::now();
        std::thread::sleep(Duration::from_millis(60));
        assert!(lap.computed() < Duration::from_millis(30));
        let lap = Lap::now();
        let mut x = 1_u64;
        while lap.computed() < Duration::from_millis(5) {
            x = std::hint::black_box(x.wrapping_mul(3));
        }
        assert!(lap.wall.elapsed() >= Duration::from_millis(5), "its own time is part of the time that goes by");
    }
}
