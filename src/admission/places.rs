//! Places: how many sequences may wait or run at a time. A call gets its places at once or is refused, so the queue is
//! never longer than this.

use std::{sync::Arc, time::Instant};

use metrics::{Gauge, gauge};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::params::ServeError;

/// All places.
#[derive(Debug)]
pub(super) struct Places {
    free: Arc<Semaphore>,
    most: usize,
    taken: Gauge,
}

/// One sequence's place; given back when dropped, on whatever way the sequence ends.
#[derive(Debug)]
pub(super) struct Place {
    _permit: OwnedSemaphorePermit,
    taken: Gauge,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.taken.decrement(1.0);
    }
}

impl Places {
    pub(super) fn new(most: usize) -> Self {
        let taken = gauge!("deltaserve_queue_depth", "queue" => "admission");
        Self { free: Arc::new(Semaphore::new(most)), most, taken }
    }

    /// How many one call of many sequences holds at a time, so that others find some free.
    pub(super) fn share(&self) -> usize {
        (self.most / 4).clamp(1, 64)
    }

    /// `n` places at once.
    ///
    /// # Errors
    /// [`ServeError::Overloaded`] if they are not free; a field error if there are not so many.
    pub(super) fn take(&self, n: usize) -> Result<Vec<Place>, ServeError> {
        let (most, take) = (self.most, self.fits(n)?);
        let Ok(all) = Arc::clone(&self.free).try_acquire_many_owned(take) else {
            let free = self.free.available_permits();
            return Err(ServeError::Overloaded(format!("{n} sequences asked for, {free} of {most} places are free")));
        };
        Ok(self.places(n, all))
    }

    fn fits(&self, n: usize) -> Result<u32, ServeError> {
        let most = self.most;
        let fits = u32::try_from(n).ok().filter(|_| n <= most);
        fits.ok_or_else(|| {
            ServeError::field("n", format!("{n} sequences; this server admits at most {most} at a time"))
        })
    }

    fn places(&self, n: usize, mut all: OwnedSemaphorePermit) -> Vec<Place> {
        (0..n).filter_map(|_| all.split(1)).map(|permit| self.place(permit)).collect()
    }

    /// One more place for a call that has some already, when one gets free. Calls wait in order, and each place in use
    /// comes back by itself, so this ends.
    ///
    /// # Errors
    /// [`ServeError::DeadlineExceeded`].
    pub(super) async fn next(&self, since: Instant, deadline: Option<Instant>) -> Result<Place, ServeError> {
        let one = self.wait(1, since, deadline).await?.pop();
        one.ok_or_else(|| ServeError::Internal("a place is missing".into()))
    }

    /// `n` places at once, as soon as they are free, for a call that was admitted already.
    ///
    /// # Errors
    /// [`ServeError::DeadlineExceeded`]; a field error if there are not so many.
    pub(super) async fn wait(
        &self,
        n: usize,
        since: Instant,
        deadline: Option<Instant>,
    ) -> Result<Vec<Place>, ServeError> {
        let acquire = Arc::clone(&self.free).acquire_many_owned(self.fits(n)?);
        let permit = match deadline {
            Some(at) => tokio::time::timeout_at(at.into(), acquire)
                .await
                .map_err(|_| ServeError::DeadlineExceeded(since.elapsed()))?,
            None => acquire.await,
        };
        let all = permit.map_err(|_| ServeError::Internal("the places are gone".into()))?;
        Ok(self.places(n, all))
    }

    fn place(&self, permit: OwnedSemaphorePermit) -> Place {
        self.taken.increment(1.0);
        Place { _permit: permit, taken: self.taken.clone() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn places_are_taken_at_once_or_not_at_all_and_come_back() {
        let places = Places::new(3);
        assert!(matches!(places.take(4), Err(ServeError::Invalid(_))));
        let mut held = places.take(2).unwrap();
        assert!(matches!(places.take(2), Err(ServeError::Overloaded(_))));
        let third = places.take(1).unwrap();
        let now = Instant::now();
        let late = places.next(now, Some(now)).await;
        assert!(matches!(late, Err(ServeError::DeadlineExceeded(_))));
        held.pop();
        let next = places.next(now, None).await.unwrap();
        drop((held, third, next));
        assert_eq!(places.take(3).unwrap().len(), 3);
    }
}
