//! The parts of the benchmark `zipf` that can be wrong without anyone noticing: its trace, and the optimum that it compares with.

#[path = "../benches/zipf/policies.rs"]
mod policies;

use policies::*;

#[test]
fn the_optimum_is_that_of_the_textbook() {
    // Belady's example in operating systems' textbooks: 20 references, 3 frames; 9 faults, 12 with LRU
    let trace = [7, 0, 1, 2, 0, 3, 0, 4, 2, 3, 0, 3, 2, 1, 2, 0, 1, 7, 0, 1];
    assert_eq!((trace.len() as u64 - belady(&trace, 3), trace.len() as u64 - lru(&trace, 3)), (9, 12));
    assert_eq!((belady(&trace, 6), lru(&trace, 6), lfu(&trace, 6)), (14, 14, 14), "six fit");
    assert_eq!((belady(&[], 3), lru(&[], 3), lfu(&[], 3)), (0, 0, 0));
}

/// By trying all victims: nothing is better than the optimum.
#[test]
fn nothing_is_better_than_the_optimum() {
    fn best(trace: &[u32], there: &[u32], room: usize) -> u64 {
        let Some((id, rest)) = trace.split_first() else { return 0 };
        if there.contains(id) {
            return 1 + best(rest, there, room);
        }
        let with = |there: &[u32]| [there, &[*id]].concat();
        if there.len() < room {
            return best(rest, &with(there), room);
        }
        let without = |i: usize| {
            let mut there = there.to_vec();
            there.remove(i);
            with(&there)
        };
        (0..there.len()).map(|i| best(rest, &without(i), room)).max().unwrap_or(0)
    }
    for seed in 0..40 {
        let trace = zipf(6, 0.7, 14, seed);
        for room in 1..4 {
            let optimum = belady(&trace, room);
            assert_eq!(optimum, best(&trace, &[], room), "{trace:?} {room}");
            assert!(lru(&trace, room) <= optimum && lfu(&trace, room) <= optimum);
        }
    }
}

#[test]
fn draws_follow_zipfs_law_and_the_seed() {
    let (deltas, n) = (1000, 200_000);
    let trace = zipf(deltas, 1.0, n, 3);
    assert_eq!(trace, zipf(deltas, 1.0, n, 3));
    assert_ne!(trace, zipf(deltas, 1.0, n, 4));
    let harmonic: f64 = (1..=deltas).map(|i| 1.0 / i as f64).sum();
    for rank in [0, 1, 4, 30] {
        let share = trace.iter().filter(|id| **id == rank).count() as f64 / n as f64;
        let expected = 1.0 / (f64::from(rank + 1) * harmonic);
        // five standard errors
        assert!((share - expected).abs() < 5.0 * (expected / n as f64).sqrt(), "{rank}: {share} {expected}");
    }
    assert!(zipf(1, 1.0, 10, 0).iter().all(|id| *id == 0));
}

#[test]
fn the_frequent_stay_with_counts_and_the_recent_with_lru() {
    // one that comes often, and ever new ones beside it
    let trace: Vec<u32> = (0..300).map(|i| if i % 4 == 0 { 0 } else { i }).collect();
    // what fades within a few requests is as the LRU, what never does as the LFU
    let shifts: Vec<u32> = [zipf(50, 1.0, 3000, 1), zipf(50, 1.0, 3000, 2).iter().map(|id| 49 - id).collect()].concat();
    assert_eq!(fading(&shifts, 8, 1e-2), lru(&shifts, 8));
    let (fades, never) = (fading(&shifts, 8, 200.0), fading(&shifts, 8, 1e9));
    assert!(never.abs_diff(lfu(&shifts, 8)) < 60 && fades > never, "{fades} {never}");
    // with counts, its first coming back still loses to one that came once and later
    assert_eq!((lfu(&trace, 2), lru(&trace, 2), belady(&trace, 2)), (73, 0, 74));
}

#[test]
fn popularity_shifts_and_scans_come_where_they_are_wanted() {
    assert_eq!(shifting(&[0, 9, 0, 9, 0], 10, 2), [0, 9, 2, 1, 4]);
    assert_eq!(scanning(&[9; 12], 2, 1), [9, 9, 9, 9, 0, 9, 9, 9, 9, 1, 9, 9]);
    assert_eq!(scanning(&[9; 11], 5, 2)[6..], [9, 9, 0, 1, 9]);
}

#[test]
fn the_most_popular_have_their_share_of_the_draws() {
    assert!((most_popular(10_000, 1.0, 256) - 0.6257).abs() < 1e-4);
    assert_eq!((most_popular(10, 0.0, 3), most_popular(5, 1.0, 9)), (0.3, 1.0));
    let trace = zipf(10_000, 1.0, 50_000, 1);
    let popular = trace.iter().filter(|id| **id < 256).count() as f64 / trace.len() as f64;
    assert!((popular - most_popular(10_000, 1.0, 256)).abs() < 0.01, "{popular}");
    // what knows the past alone stays below, what knows the future does not
    let rate = |hits: u64| hits as f64 / trace.len() as f64;
    assert!(
        rate(lru(&trace, 256)) < popular && rate(lfu(&trace, 256)) < popular && rate(belady(&trace, 256)) > popular
    );
}
