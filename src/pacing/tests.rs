//! The pacer between threads of both sides.

use std::sync::Arc;

use super::*;

#[test]
fn an_idle_engine_costs_nothing_and_a_busy_one_a_bounded_wait() {
    let pacer = Pacer::new(Duration::from_millis(30), 0.0);
    pacer.yield_now();
    assert_eq!(pacer.yielded(), Duration::ZERO);
    pacer.set_busy(true);
    let t = Instant::now();
    pacer.yield_now();
    assert!(t.elapsed() >= Duration::from_millis(29), "waits while serving is busy");
    assert!(t.elapsed() < Duration::from_secs(60), "but not for ever");
}

#[test]
fn the_trainer_goes_on_as_soon_as_serving_is_idle() {
    let pacer = Arc::new(Pacer::new(Duration::from_secs(60), 0.0));
    pacer.set_busy(true);
    let trainer = std::thread::spawn({
        let pacer = Arc::clone(&pacer);
        move || pacer.yield_now()
    });
    std::thread::sleep(Duration::from_millis(20));
    pacer.set_busy(false);
    trainer.join().expect("trainer ends");
    assert!(pacer.yielded() < Duration::from_secs(30), "it is told, and does not wait to the end");
}

/// An engine that is always busy beside a trainer whose layers take `layer`: layers that it came through in `time`, and the
/// share of the time that the engine waited.
fn beside(floor: f64, training: bool, layer: Duration, time: Duration) -> (u64, f64) {
    let pacer = Pacer::new(Duration::from_secs(3600), floor);
    pacer.set_training(training);
    pacer.set_busy(true);
    let (over, begun) = (AtomicBool::new(false), Instant::now());
    let layers = std::thread::scope(|s| {
        let trainer = s.spawn(|| {
            let mut layers = 0;
            loop {
                pacer.yield_now();
                if over.load(SeqCst) {
                    return layers;
                }
                std::thread::sleep(layer);
                layers += 1;
            }
        });
        while begun.elapsed() < time {
            std::thread::sleep(Duration::from_millis(2));
            pacer.leave_floor();
        }
        over.store(true, SeqCst);
        pacer.set_busy(false);
        trainer.join().expect("no panic")
    });
    (layers, pacer.given().as_secs_f64() / begun.elapsed().as_secs_f64())
}

#[test]
fn an_engine_that_is_always_busy_leaves_the_floor_and_not_much_more() {
    let time = Duration::from_millis(2500);
    // long layers and short ones; the machine may be slow, so that both sides come late
    for (floor, layer) in [(0.1, 40), (0.1, 1), (0.3, 5)] {
        let (layers, share) = beside(floor, true, Duration::from_millis(layer), time);
        assert!(layers > 2 && (floor * 0.5..floor * 2.5).contains(&share), "{floor}, {layer} ms: {layers}, {share}");
    }
    assert_eq!(beside(0.0, true, Duration::from_millis(40), time / 5).0, 0, "without a floor it waits");
    assert_eq!(beside(0.5, false, Duration::from_millis(40), time / 5).1, 0.0, "nothing is given where nothing trains");
}

#[test]
fn a_trainer_that_does_not_come_delays_the_engine_by_a_bounded_time() {
    let pacer = Pacer::new(Duration::from_secs(3600), 0.5);
    pacer.set_training(true);
    pacer.set_busy(true);
    pacer.leave_floor();
    std::thread::sleep(SHORTEST_SPELL);
    let t = Instant::now();
    pacer.leave_floor();
    assert!(t.elapsed() >= LONGEST_GIFT && t.elapsed() < Duration::from_secs(60));
    assert!(pacer.given() >= LONGEST_GIFT);
    // a job that ends meanwhile ends the wait
    std::thread::sleep(SHORTEST_SPELL + LONGEST_GIFT);
    std::thread::scope(|s| {
        let waits = s.spawn(|| pacer.leave_floor());
        std::thread::sleep(Duration::from_millis(20));
        pacer.set_training(false);
        waits.join().expect("no panic");
    });
    assert!(!pacer.gift.load(SeqCst));
}

/// Computes for so long.
fn compute(time: Duration) {
    let lap = Lap::now();
    while lap.computed() < time {
        std::hint::spin_loop();
    }
}

#[test]
fn the_duty_is_the_share_of_the_busy_time_that_training_computes() {
    let pacer = Pacer::new(Duration::from_secs(3600), 0.0).keeping(0.1);
    pacer.set_busy(true);
    let duty = pacer.duty();
    let (begun, mut layers) = (Instant::now(), 0);
    while layers < 20 {
        compute(Duration::from_millis(2));
        pacer.yield_now();
        layers += 1;
    }
    let share = f64::from(layers) * 0.002 / begun.elapsed().as_secs_f64();
    // other programs only make it less
    assert!(duty < 0.2 && share < 1.3 * duty, "{share}, {duty}");
    // the whole time: nothing waits, but while it is held
    pacer.duty.store(1.0_f64.to_bits(), SeqCst);
    let before = pacer.yielded();
    compute(Duration::from_millis(2));
    pacer.yield_now();
    assert_eq!(pacer.yielded(), before);
    pacer.held.store(true, SeqCst);
    std::thread::scope(|s| {
        let waits = s.spawn(|| pacer.yield_now());
        std::thread::sleep(10 * LOOK);
        assert!(!waits.is_finished(), "it is held");
        pacer.held.store(false, SeqCst);
    });
    assert!(pacer.yielded() >= before + 9 * LOOK);
}

#[test]
fn until_it_is_measured_no_wait_is_longer_than_permitted() {
    let pacer = Pacer::new(Duration::from_millis(30), 0.0).keeping(0.1);
    pacer.set_busy(true);
    compute(Duration::from_millis(60));
    let t = Instant::now();
    pacer.yield_now();
    assert!(t.elapsed() >= Duration::from_millis(29));
    pacer.measured.store(true, SeqCst);
    compute(Duration::from_millis(60));
    let t = Instant::now();
    pacer.yield_now();
    assert!(t.elapsed() >= Duration::from_millis(400), "nine times what was computed");
}

#[test]
fn a_wait_ends_when_the_duty_rises() {
    let pacer = Pacer::new(Duration::from_secs(3600), 0.0).keeping(0.1);
    pacer.set_busy(true);
    pacer.measured.store(true, SeqCst);
    pacer.duty.store(1e-4_f64.to_bits(), SeqCst);
    let t = Instant::now();
    std::thread::scope(|s| {
        let waits = s.spawn(|| {
            // the first is where this thread's time begins
            pacer.yield_now();
            compute(Duration::from_millis(20));
            pacer.yield_now();
        });
        std::thread::sleep(Duration::from_millis(200));
        assert!(!waits.is_finished());
        pacer.duty.store(1.0_f64.to_bits(), SeqCst);
    });
    assert!(t.elapsed() < Duration::from_secs(60), "of 200 s that it would have been");
}

#[test]
fn a_trainer_that_is_asked_something_is_not_held() {
    for (bound, held) in [(0.0, false), (0.1, true)] {
        let pacer = Pacer::new(Duration::from_secs(3600), 0.0).keeping(bound);
        pacer.set_busy(true);
        pacer.held.store(held, SeqCst);
        std::thread::scope(|s| {
            let waits = s.spawn(|| pacer.yield_now());
            std::thread::sleep(Duration::from_millis(50));
            assert!(!waits.is_finished());
            pacer.hurry();
        });
        let before = pacer.yielded();
        pacer.yield_now();
        assert_eq!(pacer.yielded(), before, "nor at the yield points that follow");
        pacer.calm();
        std::thread::scope(|s| {
            let waits = s.spawn(|| pacer.yield_now());
            std::thread::sleep(Duration::from_millis(50));
            let held = !waits.is_finished();
            pacer.set_busy(false);
            assert!(held, "until it has heard");
        });
    }
}

/// Where serving takes every core, a trainer that is held in the middle of a layer would never come to rest.
#[test]
fn a_trainer_that_is_to_rest_is_given_time_to_come_there_and_no_more() {
    let pacer = Pacer::new(Duration::from_secs(3600), 0.5).keeping(0.1);
    pacer.set_training(true);
    pacer.set_busy(true);
    pacer.held.store(true, SeqCst);
    pacer.leave_floor();
    std::thread::sleep(SHORTEST_SPELL);
    let over = AtomicBool::new(false);
    std::thread::scope(|s| {
        s.spawn(|| {
            while !pacer.gift.load(SeqCst) && !over.load(SeqCst) {
                std::thread::sleep(Duration::from_millis(1));
            }
            pacer.yield_now();
        });
        pacer.leave_floor();
        let given = pacer.given();
        let rests = pacer.rests.load(SeqCst);
        std::thread::sleep(SHORTEST_SPELL + LONGEST_GIFT);
        pacer.leave_floor();
        let again = pacer.given();
        over.store(true, SeqCst);
        pacer.set_busy(false);
        assert!(rests && !given.is_zero(), "it came to rest in what was given: {given:?}");
        assert_eq!(again, given, "one that rests is given nothing");
    });
}

#[test]
fn without_traffic_nothing_is_held() {
    for bound in [0.0, 0.1] {
        let pacer = Pacer::new(Duration::from_secs(3600), 0.1).keeping(bound);
        pacer.set_training(true);
        pacer.held.store(true, SeqCst);
        compute(Duration::from_millis(5));
        pacer.yield_now();
        assert_eq!(pacer.yielded(), Duration::ZERO);
        assert_eq!(pacer.computed_us.load(SeqCst), 0, "and what is computed then is not beside serving");
    }
}

#[test]
fn a_trainer_that_has_its_floor_is_given_nothing() {
    let pacer = Pacer::new(Duration::from_secs(3600), 0.02).keeping(0.1);
    pacer.duty.store(1.0_f64.to_bits(), SeqCst);
    pacer.set_training(true);
    pacer.set_busy(true);
    let over = AtomicBool::new(false);
    let share = std::thread::scope(|s| {
        s.spawn(|| {
            while !over.load(SeqCst) {
                compute(Duration::from_millis(1));
                pacer.yield_now();
            }
        });
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_millis(1500) {
            std::thread::sleep(Duration::from_millis(2));
            pacer.leave_floor();
        }
        over.store(true, SeqCst);
        pacer.given().as_secs_f64() / begun.elapsed().as_secs_f64()
    });
    // its first spell may begin before it does
    assert!(share < 0.01, "{share}");
}

#[test]
fn no_slowdown_permitted_means_that_training_waits_for_as_long_as_serving_is_busy() {
    let pacer = Pacer::new(Duration::from_millis(1), 0.0).keeping(0.0);
    pacer.set_busy(true);
    std::thread::scope(|s| {
        let waits = s.spawn(|| pacer.yield_now());
        std::thread::sleep(Duration::from_millis(100));
        assert!(!waits.is_finished());
        pacer.set_busy(false);
    });
}

#[test]
fn steps_are_measured_beside_training_and_without_it() {
    let pacer = Pacer::new(Duration::from_millis(50), 0.0).keeping(0.1);
    pacer.set_training(true);
    pacer.set_busy(true);
    let over = AtomicBool::new(false);
    let probed = std::thread::scope(|s| {
        s.spawn(|| {
            while !over.load(SeqCst) {
                compute(Duration::from_micros(500));
                pacer.yield_now();
            }
        });
        let (begun, mut probed) = (Instant::now(), 0);
        while pacer.figures().is_none() && begun.elapsed() < Duration::from_secs(60) {
            std::thread::sleep(Duration::from_millis(1));
            pacer.stepped(4, 4);
            probed += u32::from(pacer.held.load(SeqCst));
        }
        over.store(true, SeqCst);
        pacer.set_busy(false);
        probed
    });
    assert!(probed > 0, "gaps without training are not those between two of its layers");
    assert!(pacer.measured.load(SeqCst));
    let figures = pacer.figures().expect("measured");
    assert!(figures.p99 > 0.001 && figures.p99_off > 0.001, "{figures:?}");
}
