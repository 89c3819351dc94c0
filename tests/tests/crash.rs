//! The simulated machine: a crash at every operation of scripted runs, and each protection left out once.

#![allow(
    clippy::unwrap_used,
    reason = "in tests a surprise should end the test"
)]

use blkfilter::{AckPolicy, Law, Rules};
use varve_format::VolumeState;
use varve_log::{CrashPlan, Disk, DiskFault};
use varve_tests::crashing::{self, crash_and_check, operations_of};
use varve_tests::simulated::{Cut, Script, Simulated, VOLUME_BYTES};

fn script(seed: u64) -> Script {
    let ack = if seed.is_multiple_of(4) {
        AckPolicy::Local
    } else {
        AckPolicy::Async
    };
    Script {
        seed,
        requests: 60,
        log_faults: seed.is_multiple_of(3),
        ack,
        copies: false,
    }
}

fn cut(seed: u64, crash_at: u64) -> Cut {
    match (seed + crash_at) % 5 {
        0 => Cut::Power(CrashPlan::DropAll),
        1 | 2 => Cut::Power(CrashPlan::Random),
        3 => Cut::Power(CrashPlan::KeepAll),
        _ => Cut::Kill,
    }
}

/// Crashes at every operation of these scripts; returns the number of crash points.
fn every_operation(seeds: std::ops::Range<u64>) -> u64 {
    let (mut points, mut instants) = (0, 0);
    for seed in seeds {
        let script = script(seed);
        for crash_at in 1..=operations_of(script) {
            let again = crash_at.is_multiple_of(3).then_some(crash_at % 97);
            match crash_and_check::<Law>(script, crash_at, cut(seed, crash_at), again) {
                Ok((crashed, compared)) => {
                    points += u64::from(crashed);
                    instants += compared;
                }
                Err(broken) => panic!(
                    "seed {seed}, crash at {crash_at}, {:?}, again {again:?}: {broken}",
                    cut(seed, crash_at)
                ),
            }
        }
    }
    println!("{instants} instants between were compared");
    assert!(instants > points / 20, "only {instants} instants");
    points
}

macro_rules! crash_points {
    ($($name:ident: $seeds:expr),+ $(,)?) => {
        /// Crash points that each of the tests below must reach: eight times this is more than 20,000.
        const POINTS_MIN: u64 = 2500;
        $(#[test]
        fn $name() {
            let points = every_operation($seeds);
            println!("{points} crash points");
            assert!(points >= POINTS_MIN, "only {points} crash points");
        })+
    };
}

crash_points! {
    crash_at_every_operation_1: 100..108,
    crash_at_every_operation_2: 200..208,
    crash_at_every_operation_3: 300..308,
    crash_at_every_operation_4: 400..408,
    crash_at_every_operation_5: 500..508,
    crash_at_every_operation_6: 600..608,
    crash_at_every_operation_7: 700..708,
    crash_at_every_operation_8: 800..808,
}

/// Whether it is a promise about content that was broken.
fn is_promise(broken: &str) -> bool {
    ["the image at", "was flushed", "were durable"]
        .iter()
        .any(|words| broken.contains(words))
}

/// Leaves a protection out; the same crash points must then find a broken promise.
fn is_caught<R: Rules>(seeds: std::ops::Range<u64>, plan: CrashPlan, lying: Option<Disk>) -> bool {
    seeds.into_iter().any(|seed| {
        let script = Script {
            log_faults: R::MARK_BEFORE_BYPASS != Law::MARK_BEFORE_BYPASS,
            ..script(seed)
        };
        // A panic of the model, or a start that fails, proves nothing.
        crashing::is_caught::<R>(script, Cut::Power(plan), lying, 3, is_promise)
    })
}

#[test]
fn with_all_protections_nothing_is_caught() {
    assert!(!is_caught::<Law>(900..904, CrashPlan::DropAll, None));
    assert!(!is_caught::<Law>(900..904, CrashPlan::Random, None));
}

#[test]
fn leaving_out_the_origin_flush_is_caught() {
    assert!(is_caught::<Law>(
        900..910,
        CrashPlan::DropAll,
        Some(Disk::Origin)
    ));
}

#[test]
fn leaving_out_the_log_flush_is_caught() {
    assert!(is_caught::<Law>(
        900..910,
        CrashPlan::DropAll,
        Some(Disk::Log)
    ));
}

#[test]
fn leaving_out_the_state_flush_is_caught() {
    struct FaultsOnly;
    impl Rules for FaultsOnly {
        const MARK_BEFORE_BYPASS: bool = false;
    }
    // Without waiting for the mark, a power cut finds a log that looks whole.
    assert!(is_caught::<FaultsOnly>(900..940, CrashPlan::Random, None));
}

#[test]
fn leaving_out_the_intents_is_caught() {
    struct NoIntents;
    impl Rules for NoIntents {
        const LOG_BEFORE_COLD_WRITE: bool = false;
    }
    assert!(is_caught::<NoIntents>(900..910, CrashPlan::Random, None));
}

#[test]
fn retiring_without_an_origin_flush_is_caught() {
    struct NoStable;
    impl Rules for NoStable {
        const STABLE_AFTER_FLUSH: bool = false;
    }
    assert!(is_caught::<NoStable>(900..910, CrashPlan::DropAll, None));
}

#[test]
fn letting_overlapping_writes_race_is_caught() {
    struct NoWaiting;
    impl Rules for NoWaiting {
        const OVERLAP_WAITS: bool = false;
    }
    let caught = (900..910).any(|seed| {
        let outcome = std::panic::catch_unwind(|| {
            let mut sim = Simulated::<NoWaiting>::new(script(seed));
            assert!(sim.start() && sim.run(script(seed)));
            sim.check()
        });
        !matches!(outcome, Ok(Ok(())))
    });
    assert!(caught);
}

#[test]
fn clean_close_needs_no_reread_and_notices_a_foreign_write() {
    let script = Script {
        seed: 1,
        requests: 60,
        log_faults: false,
        ack: AckPolicy::Async,
        copies: false,
    };
    let mut sim = Simulated::<Law>::new(script);
    assert!(sim.start() && sim.run(script));
    sim.close();
    assert!(sim.start());
    assert_eq!(sim.reports.last().unwrap().reread_bytes, 0);
    assert!(sim.settle());
    sim.close();
    sim.tamper(4096, &[0xee; 512]);
    sim.forget_flushed();
    assert!(sim.start());
    assert_eq!(sim.state(), VolumeState::Unverified);
    assert!(sim.settle());
    let image = sim.history().image(sim.history().end, VOLUME_BYTES);
    assert_eq!(
        image[4096..4608],
        [0xee; 512],
        "what was written behind our back is in the history after healing"
    );
    // From a rescue system: the kernel that counted it is gone, and its first blocks tell.
    sim.close();
    sim.tamper_elsewhere(4096, &[0xdd; 512]);
    sim.forget_flushed();
    assert!(sim.start());
    assert_eq!(sim.state(), VolumeState::Unverified);
    assert!(sim.settle());
    let image = sim.history().image(sim.history().end, VOLUME_BYTES);
    assert_eq!(image[4096..4608], [0xdd; 512]);
    // Another boot alone is no reason to read anything.
    sim.close();
    sim.boot_again();
    assert!(sim.start());
    assert_eq!(sim.reports.last().unwrap().reread_bytes, 0);
}

#[test]
fn log_faults_reach_bypass_and_heal() {
    let mut bypasses = 0;
    for seed in 0..10 {
        let script = Script {
            seed,
            requests: 80,
            log_faults: true,
            ack: AckPolicy::Async,
            copies: false,
        };
        let mut sim = Simulated::<Law>::new(script);
        assert!(sim.start() && sim.run(script));
        sim.check().unwrap();
        bypasses += sim.bypasses;
        // Time goes by in steps of a millisecond; the mark that goes first takes some.
        let most = sim.config().log_wait_max_ns + 10_000_000;
        assert!(
            sim.longest_ns <= most,
            "seed {seed}: a request waited for {} ns",
            sim.longest_ns
        );
    }
    assert!(bypasses > 0, "no run reached bypass");
}

/// The log hangs while a volume starts, and what hung lands later: the header of a segment that never counted stands before the segments of the epoch that lives.
#[test]
fn a_header_that_lands_late_hides_nothing() {
    let mut late = 0;
    for seed in 0..12 {
        let script = Script {
            log_faults: false,
            ..script(seed)
        };
        let mut sim = Simulated::<Law>::new(script);
        assert!(sim.start() && sim.run(script));
        sim.cut(Cut::Kill);
        sim.machine.borrow_mut().disk(Disk::Log).fault = DiskFault::StalledWrites;
        assert!(sim.start());
        late += u64::from(sim.reports.last().unwrap().in_bypass);
        sim.machine.borrow_mut().disk(Disk::Log).fault = DiskFault::None;
        assert!(sim.run(script));
        sim.check()
            .unwrap_or_else(|broken| panic!("seed {seed}: {broken}"));
        let end = sim.history().end;
        sim.cut(Cut::Kill);
        assert!(sim.start());
        assert!(
            sim.history().end >= end,
            "seed {seed}: the history ended at {end}, now at {}",
            sim.history().end
        );
        assert!(sim.run(script));
        sim.check()
            .unwrap_or_else(|broken| panic!("seed {seed}: {broken}"));
    }
    assert!(late > 6, "only {late} starts met a log that hung");
}

/// A disk tells of a flush that failed once: whoever flushes next must hear of it, although the flush that failed was our own.
#[test]
fn a_flush_that_failed_for_nobody_is_told_to_the_next() {
    for seed in 0..6 {
        let script = Script {
            log_faults: false,
            ack: AckPolicy::Async,
            ..script(seed)
        };
        let mut sim = Simulated::<Law>::new(script);
        assert!(sim.start() && sim.run(script));
        assert!(!sim.flush_after_one_that_failed_for_nobody(), "seed {seed}");
        assert!(sim.settle());
        // Once.
        assert!(sim.run(script));
    }
}

/// The daemon is killed in a bypass that began within a span; the next one copies what changed, and the power goes in the midst of that.
#[test]
fn what_bypassed_the_log_within_a_span_is_read_again() {
    let mut points = 0;
    for seed in 0..10 {
        let script = Script {
            seed,
            requests: 25,
            log_faults: false,
            ack: AckPolicy::Async,
            copies: false,
        };
        for crash_after in (1..400).step_by(2) {
            let mut sim = Simulated::<Law>::new(script);
            assert!(sim.start() && sim.run(script));
            let at = sim.machine.borrow().operations() + 60;
            sim.machine.borrow_mut().crash_at(at);
            if sim.run(script) {
                break;
            }
            // Little is open, and is being read again.
            sim.cut(Cut::Power(CrashPlan::Random));
            assert!(sim.start());
            if sim.state() != VolumeState::Healing {
                break;
            }
            sim.machine.borrow_mut().disk(Disk::Log).fault = DiskFault::StalledWrites;
            if !sim.run_in_bypass(20) {
                break;
            }
            sim.cut(Cut::Kill);
            sim.machine.borrow_mut().disk(Disk::Log).fault = DiskFault::None;
            let at = sim.machine.borrow().operations() + crash_after;
            sim.machine.borrow_mut().crash_at(at);
            let finished = sim.start() && sim.run(script);
            if finished {
                break;
            }
            points += 1;
            sim.cut(Cut::Power(CrashPlan::Random));
            assert!(sim.start() && sim.run(script));
            sim.check()
                .unwrap_or_else(|broken| panic!("seed {seed}, crash {crash_after}: {broken}"));
        }
    }
    println!("{points} crash points");
    assert!(points > 300, "only {points} crash points");
}

/// The most that is read again after a power cut, wherever it comes once the first copy is whole, if so many regions may be open.
fn most_read_again(regions: usize) -> u64 {
    let mut most = 0;
    for seed in 0..4 {
        let script = Script {
            log_faults: false,
            ..script(seed)
        };
        for crash_after in (1..).step_by(3) {
            let mut sim = Simulated::<Law>::new(script);
            sim.limit_open_regions(regions);
            assert!(sim.start() && sim.settle());
            let at = sim.machine.borrow().operations() + crash_after;
            sim.machine.borrow_mut().crash_at(at);
            if sim.run(script) {
                break;
            }
            sim.cut(Cut::Power(CrashPlan::Random));
            assert!(sim.start());
            most = most.max(sim.reports.last().unwrap().reread_bytes);
        }
    }
    most
}

#[test]
fn no_more_is_read_again_after_a_power_cut_than_the_bound_says() {
    let (bounded, loose) = (most_read_again(8), most_read_again(13));
    println!("{bounded} bytes with eight regions, {loose} with thirteen");
    assert!((1..=8 * 8192).contains(&bounded), "{bounded}");
    assert!(
        loose > 8 * 8192,
        "{loose}: these scripts would never open more than eight regions"
    );
}

/// A volume is closed, its device is written without Varve (partly into the disk's cache only), and it is compared with its history under load; the
/// power goes at every operation of that. Returns the number of crash points and the bytes that needed no copy.
fn compared_in_doubt(seed: u64, flush_first: bool) -> Result<(u64, u64), String> {
    let before = Script {
        log_faults: false,
        ..script(seed)
    };
    // Half of the runs are idle: no application's flush helps.
    let after = Script {
        requests: seed % 2 * 15,
        ..before
    };
    let (mut points, mut found_equal) = (0, 0);
    for crash_after in 1.. {
        let mut sim = Simulated::<Law>::new(before);
        assert!(sim.start() && sim.run(before));
        sim.close();
        sim.flush_before_comparing = flush_first;
        sim.tamper(4096, &[0xee; 512]);
        // As if a block had been given the content it had long ago: the history does not differ, the disk may lose it.
        let image = sim.history().image(sim.history().end, VOLUME_BYTES);
        sim.tamper(32768, &[0xdd; 4096]);
        sim.scribble(32768, &image[32768..36864]);
        sim.forget_flushed();
        let at = sim.machine.borrow().operations() + crash_after;
        sim.machine.borrow_mut().crash_at(at);
        let finished = sim.start() && sim.run(after);
        found_equal = found_equal.max(sim.found_equal);
        if finished {
            sim.check()?;
        }
        points += 1;
        sim.cut(Cut::Power(CrashPlan::DropAll));
        if !sim.start() || !sim.run(after) {
            return Err(format!("crash {crash_after}: did not settle"));
        }
        sim.check()
            .map_err(|broken| format!("seed {seed}, crash {crash_after}: {broken}"))?;
        if finished {
            break;
        }
    }
    Ok((points, found_equal))
}

#[test]
fn comparing_a_volume_in_doubt_survives_a_power_cut_at_every_operation() {
    let mut points = 0;
    for seed in 40..46 {
        let (crashed, equal) = compared_in_doubt(seed, true).unwrap();
        assert!(equal > 0, "seed {seed}: nothing was found equal");
        points += crashed;
    }
    println!("{points} crash points");
    assert!(points > 300, "only {points} crash points");
}

#[test]
fn comparing_without_flushing_the_origin_first_is_caught() {
    assert!((40..46).any(|seed| compared_in_doubt(seed, false).is_err()));
}
