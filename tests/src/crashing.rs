//! Scripts of the simulated volume that end in a crash: at every operation, and with a protection left out.

use crate::simulated::{Cut, Script, Simulated};
use blkfilter::{Law, Rules};
use varve_log::{CrashPlan, Disk, DiskFault};

/// Runs the script, crashes at operation `crash_at`, restarts (crashing again at `again` operations into the restart, if given), and
/// checks every promise. Returns whether the crash happened before the script's end, and how many instants between were compared.
pub fn crash_and_check<R: Rules>(
    script: Script,
    crash_at: u64,
    cut: Cut,
    again: Option<u64>,
) -> Result<(bool, u64), String> {
    let mut sim = Simulated::<R>::new(script);
    sim.machine.borrow_mut().crash_at(crash_at);
    let finished = sim.start() && sim.run(script);
    if !finished {
        sim.cut(cut);
        if let Some(again) = again {
            // What a process wrote that was killed lies in caches: then the power goes.
            let cut = match cut {
                Cut::Kill => Cut::Power(CrashPlan::Random),
                other => other,
            };
            let at = sim.machine.borrow().operations() + again;
            sim.machine.borrow_mut().crash_at(at);
            if !(sim.start() && sim.settle()) {
                sim.cut(cut);
            } else {
                sim.cut(Cut::Kill);
            }
        }
        if !sim.start() {
            return Err("did not start after the crash".to_owned());
        }
    }
    // Life goes on: more writes, then the end.
    let after = Script {
        requests: 12,
        log_faults: false,
        ..script
    };
    if !sim.run(after) {
        return Err("did not settle".to_owned());
    }
    sim.check().map(|()| (!finished, sim.instants.get()))
}

/// Operations of a script that is not crashed.
#[must_use]
pub fn operations_of(script: Script) -> u64 {
    let mut sim = Simulated::<Law>::new(script);
    assert!(sim.start() && sim.run(script));
    sim.machine.borrow().operations()
}

/// Runs the script to a crash at every `step`-th operation, under rules that leave a protection out, or on a disk that lies about flushes. Whether any run
/// ends in what `is_broken` looks for; a panic is told as such.
pub fn is_caught<R: Rules>(
    script: Script,
    cut: Cut,
    lying: Option<Disk>,
    step: usize,
    is_broken: impl Fn(&str) -> bool,
) -> bool {
    (1..=operations_of(script)).step_by(step).any(|crash_at| {
        let outcome = std::panic::catch_unwind(|| {
            let mut sim = Simulated::<R>::new(script);
            if let Some(disk) = lying {
                sim.machine.borrow_mut().disk(disk).fault = DiskFault::IgnoreFlush;
            }
            sim.machine.borrow_mut().crash_at(crash_at);
            if sim.start() && sim.run(script) {
                return sim.check();
            }
            sim.cut(cut);
            if !sim.start() || !sim.settle() {
                return Err("did not start".to_owned());
            }
            sim.check()
        });
        match outcome {
            Ok(checked) => checked.is_err_and(|broken| is_broken(&broken)),
            Err(_) => is_broken("a panic"),
        }
    })
}
