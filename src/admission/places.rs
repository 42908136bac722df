//! Places: how many sequences may wait or run at a time. A call gets its places at once or is refused, so the queue is
//! never longer than this.

use std::{sync::Arc, time::Instant};

use metrics::{Gauge, gauge};
use tokio::sync::{AcquireError, OwnedSemaphorePermit, Semaphore};

use super::params::ServeError;

/// All places.
#[derive(Debug)]
pub(super) struct Places {
    free: Arc<Semaphore>,
    /// Those of the places that calls of many sequences may hold together: a share is always left to the others.
    bulk: Arc<Semaphore>,
    bulk_most: usize,
    most: usize,
    taken: Gauge,
}

/// One sequence's place; given back when dropped, on whatever way the sequence ends.
#[derive(Debug)]
pub(super) struct Place {
    _permit: OwnedSemaphorePermit,
    _bulk: Option<OwnedSemaphorePermit>,
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
        let bulk_most = (most - share_of(most).min(most)).max(1);
        Self { free: Arc::new(Semaphore::new(most)), bulk: Arc::new(Semaphore::new(bulk_most)), bulk_most, most, taken }
    }

    /// How many one call of many sequences holds at a time, so that others find some free.
    pub(super) fn share(&self) -> usize {
        share_of(self.most)
    }

    /// `n` places at once; `field` of the request asks for so many.
    ///
    /// # Errors
    /// [`ServeError::Overloaded`] if they are not free; a field error if there are not so many.
    pub(super) fn take(&self, n: usize, field: &str) -> Result<Vec<Place>, ServeError> {
        let (most, take) = (self.most, self.fits(n, field)?);
        let Ok(all) = Arc::clone(&self.free).try_acquire_many_owned(take) else {
            let free = self.free.available_permits();
            return Err(ServeError::Overloaded(format!("{n} sequences asked for, {free} of {most} places are free")));
        };
        Ok(self.places(n, all))
    }

    fn fits(&self, n: usize, field: &str) -> Result<u32, ServeError> {
        let most = self.most;
        let fits = u32::try_from(n).ok().filter(|_| n <= most);
        fits.ok_or_else(|| {
            ServeError::field(field, format!("asks for {n} sequences; this server admits at most {most} at a time"))
        })
    }

    fn places(&self, n: usize, mut all: OwnedSemaphorePermit) -> Vec<Place> {
        (0..n).filter_map(|_| all.split(1)).map(|permit| self.place(permit)).collect()
    }

    /// `n` places at once, at most a share, for a call of many sequences.
    ///
    /// # Errors
    /// [`ServeError::Overloaded`] if they are not free.
    pub(super) fn take_bulk(&self, n: usize) -> Result<Vec<Place>, ServeError> {
        let Ok(bulk) = Arc::clone(&self.bulk).try_acquire_many_owned(self.fits(n, "inputs")?) else {
            let free = self.bulk.available_permits();
            let message =
                format!("{n} sequences asked for, {free} of {} places for calls of many are free", self.bulk_most);
            return Err(ServeError::Overloaded(message));
        };
        Ok(with_bulk(self.take(n, "inputs")?, bulk))
    }

    /// One more place for a call that has some already, when one gets free. Calls wait in order, and each place in use
    /// comes back by itself, so this ends.
    ///
    /// # Errors
    /// [`ServeError::DeadlineExceeded`].
    pub(super) async fn next(&self, since: Instant, deadline: Option<Instant>) -> Result<Place, ServeError> {
        let one = self.wait((1, "inputs"), since, deadline).await?.pop();
        one.ok_or_else(|| ServeError::Internal("a place is missing".into()))
    }

    /// As many places at once as a field of the request asks for, as soon as they are free, for a call that was admitted
    /// already.
    ///
    /// # Errors
    /// [`ServeError::DeadlineExceeded`]; a field error if there are not so many.
    pub(super) async fn wait(
        &self,
        (n, field): (usize, &str),
        since: Instant,
        deadline: Option<Instant>,
    ) -> Result<Vec<Place>, ServeError> {
        let (fits, most) = (self.fits(n, field)?, u32::try_from(self.bulk_most).unwrap_or(u32::MAX));
        let (free, bulk) = (Arc::clone(&self.free), Arc::clone(&self.bulk));
        let acquire = async move {
            let bulk = bulk.acquire_many_owned(fits.min(most)).await?;
            Ok::<_, AcquireError>((free.acquire_many_owned(fits).await?, bulk))
        };
        let permit = match deadline {
            Some(at) => tokio::time::timeout_at(at.into(), acquire)
                .await
                .map_err(|_| ServeError::DeadlineExceeded(since.elapsed()))?,
            None => acquire.await,
        };
        let (all, bulk) = permit.map_err(|_| ServeError::Internal("the places are gone".into()))?;
        Ok(with_bulk(self.places(n, all), bulk))
    }

    fn place(&self, permit: OwnedSemaphorePermit) -> Place {
        self.taken.increment(1.0);
        Place { _permit: permit, _bulk: None, taken: self.taken.clone() }
    }
}

fn share_of(most: usize) -> usize {
    (most / 4).clamp(1, 64)
}

/// Places with a permit each of those for calls of many, as far as there are.
fn with_bulk(mut places: Vec<Place>, mut bulk: OwnedSemaphorePermit) -> Vec<Place> {
    places.iter_mut().for_each(|place| place._bulk = bulk.split(1));
    places
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Twelve places, three a share: calls of many hold nine together, however many wait, and single ones find the rest.
    #[tokio::test]
    async fn calls_of_many_leave_a_share_to_the_others() {
        let places = Arc::new(Places::new(12));
        assert_eq!(places.share(), 3);
        let held: Vec<_> = (0..3).map(|_| places.take_bulk(3).unwrap()).collect();
        assert!(matches!(places.take_bulk(1), Err(ServeError::Overloaded(_))));
        let waits = {
            let places = Arc::clone(&places);
            tokio::spawn(async move { places.wait((2, "n"), Instant::now(), None).await.map(|got| got.len()) })
        };
        tokio::task::yield_now().await;
        drop(places.take(3, "n").unwrap());
        assert!(!waits.is_finished());
        drop(held);
        assert_eq!(waits.await.unwrap().unwrap(), 2);
        assert_eq!(places.take_bulk(3).unwrap().len(), 3);
        assert_eq!(places.take(12, "n").unwrap().len(), 12);
    }

    #[tokio::test]
    async fn places_are_taken_at_once_or_not_at_all_and_come_back() {
        let places = Places::new(3);
        assert!(matches!(places.take(4, "n"), Err(ServeError::Invalid(_))));
        let mut held = places.take(2, "n").unwrap();
        assert!(matches!(places.take(2, "n"), Err(ServeError::Overloaded(_))));
        let third = places.take(1, "n").unwrap();
        let now = Instant::now();
        let late = places.next(now, Some(now)).await;
        assert!(matches!(late, Err(ServeError::DeadlineExceeded(_))));
        held.pop();
        let next = places.next(now, None).await.unwrap();
        drop((held, third, next));
        assert_eq!(places.take(3, "n").unwrap().len(), 3);
    }
}
