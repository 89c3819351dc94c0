//! Hot copies on the simulated machine: a crash at every operation, and each of their protections left out once.

#![allow(
    clippy::unwrap_used,
    reason = "in tests a surprise should end the test"
)]

use blkfilter::{AckPolicy, Law, Rules};
use varve_log::{CrashPlan, Disk};
use varve_tests::crashing::{self, crash_and_check, operations_of};
use varve_tests::simulated::{Cut, Script, Simulated};

fn script(seed: u64) -> Script {
    Script {
        seed,
        requests: 70,
        log_faults: seed.is_multiple_of(4),
        ack: AckPolicy::Async,
        copies: true,
    }
}

fn cut(seed: u64, crash_at: u64) -> Cut {
    match (seed + crash_at) % 5 {
        0 => Cut::Power(CrashPlan::DropAll),
        1 => Cut::Power(CrashPlan::Random),
        2 => Cut::Power(CrashPlan::KeepAll),
        _ => Cut::Kill,
    }
}

fn every_operation(seeds: std::ops::Range<u64>) {
    let mut points = 0;
    for seed in seeds {
        let script = script(seed);
        for crash_at in (1..=operations_of(script)).step_by(2) {
            let again = crash_at.is_multiple_of(3).then_some(crash_at % 97);
            match crash_and_check::<Law>(script, crash_at, cut(seed, crash_at), again) {
                Ok((crashed, _)) => points += u64::from(crashed),
                Err(broken) => panic!(
                    "seed {seed}, crash at {crash_at}, {:?}, again {again:?}: {broken}",
                    cut(seed, crash_at)
                ),
            }
        }
    }
    println!("{points} crash points");
    assert!(points >= 500, "only {points} crash points");
}

#[test]
fn copies_survive_a_crash_at_any_operation_1() {
    every_operation(1000..1006);
}

#[test]
fn copies_survive_a_crash_at_any_operation_2() {
    every_operation(1006..1012);
}

#[test]
fn scripts_do_what_they_should() {
    let mut counts = [0; 4];
    for seed in 1100..1140 {
        let mut sim = Simulated::<Law>::new(script(seed));
        assert!(sim.start() && sim.run(script(seed)));
        if let Err(broken) = sim.check() {
            panic!("seed {seed}: {broken}");
        }
        sim.cut(Cut::Power(CrashPlan::Random));
        assert!(sim.start() && sim.settle());
        if let Err(broken) = sim.check() {
            panic!("seed {seed}: {broken}");
        }
        for (sum, count) in counts.iter_mut().zip(sim.copies.unwrap().counts) {
            *sum += count;
        }
    }
    let [cut, announced, lost, found_again] = counts;
    println!("{cut} cut, {announced} announced, {lost} times lost, {found_again} found again");
    assert!(cut >= 40 && announced >= 30 && lost >= 4 && found_again >= 8);
}

/// Leaves a protection out; crash points must then find a copy that is not what it was.
fn is_caught<R: Rules>(plan: Option<CrashPlan>, lying: Option<Disk>) -> bool {
    (1200..1216).any(|seed| {
        let script = Script {
            log_faults: !R::MARK_BEFORE_LOSING_COPIES,
            ..script(seed)
        };
        let cut = plan.map_or(Cut::Kill, Cut::Power);
        crashing::is_caught::<R>(script, cut, lying, 7, |broken| broken.starts_with("copy "))
    })
}

#[test]
fn with_all_protections_nothing_is_caught() {
    assert!(!is_caught::<Law>(None, None));
    assert!(!is_caught::<Law>(Some(CrashPlan::DropAll), None));
}

#[test]
fn not_saving_before_overwriting_is_caught() {
    struct Unsaved;
    impl Rules for Unsaved {
        const SAVE_BEFORE_OVERWRITE: bool = false;
    }
    assert!(is_caught::<Unsaved>(None, None));
}

#[test]
fn not_flushing_the_spool_before_overwriting_is_caught() {
    struct Unflushed;
    impl Rules for Unflushed {
        const SPOOL_FLUSH_BEFORE_OVERWRITE: bool = false;
    }
    assert!(is_caught::<Unflushed>(Some(CrashPlan::Random), None));
}

#[test]
fn forgetting_durably_too_late_is_caught() {
    struct Unmarked;
    impl Rules for Unmarked {
        const MARK_BEFORE_LOSING_COPIES: bool = false;
    }
    assert!(is_caught::<Unmarked>(Some(CrashPlan::Random), None));
}

#[test]
fn a_spool_that_lies_about_flushes_is_caught() {
    assert!(is_caught::<Law>(
        Some(CrashPlan::DropAll),
        Some(Disk::Spool)
    ));
}
