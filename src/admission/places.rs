//! Places: how many sequences may wait or run at a time. A call gets its places at once or is refused, so the queue is
//! never longer than this. A tenant that has half of them leaves the last ones to others, so that no flood fills the queue.

use std::{collections::HashMap, sync::Arc, time::Instant};

use metrics::{Gauge, counter, gauge};
use parking_lot::Mutex;
use tokio::sync::{AcquireError, OwnedSemaphorePermit, Semaphore};

use super::params::ServeError;
use crate::{ids::TenantId, telemetry::names};

/// Places of each tenant that has any.
type Held = Arc<Mutex<HashMap<TenantId, usize>>>;

/// All places.
#[derive(Debug)]
pub(super) struct Places {
    free: Arc<Semaphore>,
    /// Those of the places that calls of many sequences may hold together: a share is always left to the others.
    bulk: Arc<Semaphore>,
    bulk_most: usize,
    most: usize,
    /// Places that are left to tenants that have less than half of them.
    reserve: usize,
    held: Held,
    taken: Gauge,
}

/// One sequence's place; given back when dropped, on whatever way the sequence ends.
#[derive(Debug)]
pub(super) struct Place {
    _permit: OwnedSemaphorePermit,
    _bulk: Option<OwnedSemaphorePermit>,
    tenant: TenantId,
    held: Held,
    taken: Gauge,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.taken.decrement(1.0);
        let mut held = self.held.lock();
        if let Some(n) = held.get_mut(&self.tenant) {
            *n = n.saturating_sub(1);
            if *n == 0 {
                held.remove(&self.tenant);
            }
        }
    }
}

impl Places {
    pub(super) fn new(most: usize) -> Self {
        let taken = gauge!("deltaserve_queue_depth", "queue" => "admission");
        let bulk_most = (most - share_of(most).min(most)).max(1);
        let (free, bulk) = (Arc::new(Semaphore::new(most)), Arc::new(Semaphore::new(bulk_most)));
        Self { free, bulk, bulk_most, most, reserve: reserve_of(most), held: Held::default(), taken }
    }

    /// How many one call of many sequences holds at a time, so that others find some free.
    pub(super) fn share(&self) -> usize {
        share_of(self.most)
    }

    /// `n` places at once for a tenant; `field` of the request asks for so many.
    ///
    /// # Errors
    /// [`ServeError::Overloaded`] if they are not free, or only for others; a field error if there are not so many.
    pub(super) fn take(&self, tenant: &TenantId, n: usize, field: &str) -> Result<Vec<Place>, ServeError> {
        let (most, take) = (self.most, self.fits(n, field)?);
        // locked until they are counted, so that calls at the same moment do not take the reserve together
        let mut held = self.held.lock();
        let (free, own) = (self.free.available_permits(), held.get(tenant).copied().unwrap_or(0));
        if own + n > most / 2 && free >= n && free - n < self.reserve {
            let message = format!(
                "this tenant has {own} of {most} places and asked for {n}; {free} are free, of which {} are for others",
                self.reserve
            );
            return Err(refused("tenant_share", message));
        }
        let Ok(all) = Arc::clone(&self.free).try_acquire_many_owned(take) else {
            return Err(refused("places", format!("{n} sequences asked for, {free} of {most} places are free")));
        };
        *held.entry(tenant.clone()).or_default() += n;
        drop(held);
        Ok(self.places(tenant, n, all))
    }

    fn fits(&self, n: usize, field: &str) -> Result<u32, ServeError> {
        let most = self.most;
        let fits = u32::try_from(n).ok().filter(|_| n <= most);
        fits.ok_or_else(|| {
            ServeError::field(field, format!("asks for {n} sequences; this server admits at most {most} at a time"))
        })
    }

    /// Places that are counted already.
    fn places(&self, tenant: &TenantId, n: usize, mut all: OwnedSemaphorePermit) -> Vec<Place> {
        (0..n).filter_map(|_| all.split(1)).map(|permit| self.place(tenant, permit)).collect()
    }

    /// `n` places at once, at most a share, for a call of many sequences.
    ///
    /// # Errors
    /// [`ServeError::Overloaded`] if they are not free.
    pub(super) fn take_bulk(&self, tenant: &TenantId, n: usize) -> Result<Vec<Place>, ServeError> {
        let Ok(bulk) = Arc::clone(&self.bulk).try_acquire_many_owned(self.fits(n, "inputs")?) else {
            let free = self.bulk.available_permits();
            let message =
                format!("{n} sequences asked for, {free} of {} places for calls of many are free", self.bulk_most);
            return Err(refused("bulk_places", message));
        };
        Ok(with_bulk(self.take(tenant, n, "inputs")?, bulk))
    }

    /// One more place for a call that has some already, when one gets free. Calls wait in order, and each place in use
    /// comes back by itself, so this ends.
    ///
    /// # Errors
    /// [`ServeError::DeadlineExceeded`].
    pub(super) async fn next(
        &self,
        tenant: &TenantId,
        since: Instant,
        deadline: Option<Instant>,
    ) -> Result<Place, ServeError> {
        let one = self.wait(tenant, (1, "inputs"), since, deadline).await?.pop();
        one.ok_or_else(|| ServeError::Internal("a place is missing".into()))
    }

    /// As many places at once as a field of the request asks for, as soon as they are free, for a call that was admitted
    /// already.
    ///
    /// # Errors
    /// [`ServeError::DeadlineExceeded`]; a field error if there are not so many.
    pub(super) async fn wait(
        &self,
        tenant: &TenantId,
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
        *self.held.lock().entry(tenant.clone()).or_default() += n;
        Ok(with_bulk(self.places(tenant, n, all), bulk))
    }

    fn place(&self, tenant: &TenantId, permit: OwnedSemaphorePermit) -> Place {
        self.taken.increment(1.0);
        let (tenant, held) = (tenant.clone(), Arc::clone(&self.held));
        Place { _permit: permit, _bulk: None, tenant, held, taken: self.taken.clone() }
    }
}

/// Counts a refusal.
fn refused(reason: &'static str, message: String) -> ServeError {
    counter!(names::REFUSALS, "reason" => reason).increment(1);
    ServeError::Overloaded(message)
}

/// An eighth; of few places none, so that one tenant can use them all.
fn reserve_of(most: usize) -> usize {
    if most < 16 { 0 } else { most / 8 }
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

    fn of(name: &str) -> TenantId {
        TenantId::new(name).unwrap()
    }

    /// Sixteen places, of which two are a reserve.
    #[tokio::test]
    async fn a_tenant_that_has_half_of_the_places_leaves_the_last_ones_to_others() {
        let places = Arc::new(Places::new(16));
        let (flood, other, third) = (of("flood"), of("other"), of("third"));
        let mut held: Vec<_> = (0..14).map(|_| places.take(&flood, 1, "n").unwrap()).collect();
        let refused = places.take(&flood, 1, "n").unwrap_err().to_string();
        assert!(refused.contains("14 of 16") && refused.contains("2 are for others"), "{refused}");
        let few = places.take(&other, 2, "n").unwrap();
        assert!(matches!(places.take(&third, 1, "n"), Err(ServeError::Overloaded(_))), "none is left");
        drop(few);
        // who leaves half of them may have the last
        held.truncate(7);
        let last = places.take(&other, 8, "n").unwrap();
        assert!(places.take(&flood, 1, "n").is_ok());
        drop((held, last));
        assert!(places.held.lock().is_empty(), "nothing is remembered of who has none");
        // a call that was admitted waits for its places, and they are counted
        let waited = places.wait(&flood, (12, "n"), Instant::now(), None).await.unwrap();
        assert_eq!(places.held.lock().get(&flood), Some(&12));
        drop(waited);
        assert_eq!(places.take(&third, 14, "n").unwrap().len(), 14);
        assert!(places.take(&third, 15, "n").is_err(), "no single call takes the reserve either");
    }

    /// Twelve places, three a share: calls of many hold nine together, however many wait, and single ones find the rest.
    #[tokio::test]
    async fn calls_of_many_leave_a_share_to_the_others() {
        let places = Arc::new(Places::new(12));
        assert_eq!(places.share(), 3);
        let held: Vec<_> = (0..3).map(|_| places.take_bulk(&of("a"), 3).unwrap()).collect();
        assert!(matches!(places.take_bulk(&of("a"), 1), Err(ServeError::Overloaded(_))));
        let waits = {
            let places = Arc::clone(&places);
            tokio::spawn(
                async move { places.wait(&of("a"), (2, "n"), Instant::now(), None).await.map(|got| got.len()) },
            )
        };
        tokio::task::yield_now().await;
        drop(places.take(&of("a"), 3, "n").unwrap());
        assert!(!waits.is_finished());
        drop(held);
        assert_eq!(waits.await.unwrap().unwrap(), 2);
        assert_eq!(places.take_bulk(&of("a"), 3).unwrap().len(), 3);
        assert_eq!(places.take(&of("a"), 12, "n").unwrap().len(), 12);
    }

    #[tokio::test]
    async fn places_are_taken_at_once_or_not_at_all_and_come_back() {
        let places = Places::new(3);
        assert!(matches!(places.take(&of("a"), 4, "n"), Err(ServeError::Invalid(_))));
        let mut held = places.take(&of("a"), 2, "n").unwrap();
        assert!(matches!(places.take(&of("a"), 2, "n"), Err(ServeError::Overloaded(_))));
        let third = places.take(&of("a"), 1, "n").unwrap();
        let now = Instant::now();
        let late = places.next(&of("a"), now, Some(now)).await;
        assert!(matches!(late, Err(ServeError::DeadlineExceeded(_))));
        held.pop();
        let next = places.next(&of("a"), now, None).await.unwrap();
        drop((held, third, next));
        assert_eq!(places.take(&of("a"), 3, "n").unwrap().len(), 3);
    }
}
