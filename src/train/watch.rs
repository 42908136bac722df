//! Watching a job: its events from the log, as they come.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use tokio::sync::watch;

use super::{error::TrainError, handle::Shared};
use crate::admission::train_params::{JobEventBody, JobEventInfo};

/// How often the log is asked about a job of another server.
const POLL: Duration = Duration::from_millis(500);

/// A gap-free stream of a job's events: always read from the log, woken by the supervisor. A slow reader delays nobody
/// and misses nothing.
#[derive(Debug)]
pub struct JobWatch {
    pub(super) shared: Arc<Shared>,
    pub(super) id: String,
    pub(super) next: u64,
    pub(super) ready: VecDeque<JobEventInfo>,
    pub(super) news: Option<watch::Receiver<u64>>,
    /// A job of another server was seen to have ended.
    pub(super) ended: bool,
    pub(super) over: bool,
}

impl JobWatch {
    /// The next event; `None` after the terminal one.
    ///
    /// # Errors
    /// [`TrainError::Draining`] where the server stops before the job has ended, [`TrainError::Down`], or the log's.
    pub async fn next(&mut self) -> Result<Option<JobEventInfo>, TrainError> {
        const PAGE: u32 = 256;
        loop {
            if let Some(event) = self.ready.pop_front() {
                self.next = event.seq + 1;
                self.over = matches!(&event.body, JobEventBody::State(s) if s.state.is_terminal());
                return Ok(Some(event));
            }
            if self.over {
                return Ok(None);
            }
            // seen before reading, so that an event written meanwhile wakes the wait below
            if let Some(news) = &mut self.news {
                news.borrow_and_update();
            }
            self.ready = self.shared.log.events(&self.id, self.next, PAGE).await?.into();
            if !self.ready.is_empty() {
                continue;
            }
            match &mut self.news {
                Some(news) => {
                    if news.changed().await.is_err() {
                        self.news = None; // the job left memory: one last look
                    }
                }
                // it goes on at the next start
                None if self.shared.is_draining() => return Err(self.shared.gone()),
                // another server has it, or takes it: one more look after its end
                None if self.shared.log.is_shared() && !self.ended => {
                    let state = self.shared.log.state(&self.id).await?;
                    self.ended = state.is_none_or(|state| state.is_terminal());
                    if !self.ended {
                        tokio::time::sleep(POLL).await;
                    }
                }
                None => return Ok(None),
            }
        }
    }
}
