//! Power cuts of real kernels under load: plain ones, and ones in which the disks lose what they were never told to keep.

#![allow(
    clippy::unwrap_used,
    reason = "in tests a surprise should end the test"
)]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use varve_tests::guest::{Kernel, ORIGIN_MIB, disk, large, scenario_program, sized};
use varve_tests::in_guests;
use varve_tests::replay::lose_unflushed;

/// Room for the history of all cuts, which nothing thins out; for few and for many of them.
const LASTING_MIB: [u32; 2] = [2048, 8192];
/// Room for every write of a load, sparse.
const WRITES_MIB: u64 = 8192;

/// What the disks do when the power goes.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Cut {
    /// They keep all that they had completed.
    Plain,
    /// They lose all that was not flushed.
    LoseAll,
    /// They lose about half of the sectors that were not flushed.
    LoseHalf,
    /// The protected disk loses flushed writes: no promise can hold, and the test must notice.
    Lie,
}

/// Four of six cuts lose something.
const CUTS: [Cut; 6] = [
    Cut::LoseAll,
    Cut::Plain,
    Cut::LoseHalf,
    Cut::LoseAll,
    Cut::Plain,
    Cut::LoseHalf,
];

/// The two disks of a machine, with what a cut needs to know of them.
struct Machine {
    directory: tempfile::TempDir,
    origin: PathBuf,
    lasting: PathBuf,
}

impl Machine {
    fn new() -> Machine {
        let directory = tempfile::tempdir().unwrap();
        let origin = disk(directory.path(), "origin", ORIGIN_MIB);
        let lasting = disk(
            directory.path(),
            "lasting",
            sized(LASTING_MIB[0], LASTING_MIB[1]).into(),
        );
        Machine {
            directory,
            origin,
            lasting,
        }
    }

    fn shared(&self) -> PathBuf {
        let shared = self.directory.path().join("shared");
        std::fs::create_dir_all(&shared).unwrap();
        shared
    }

    /// A script that maps both disks and runs a story. `logged`: what the disks are told is written down on two further ones.
    fn script(logged: bool, story: &str) -> String {
        let table = |disk: &str, log: &str| {
            if logged {
                format!("0 $(blockdev --getsz /dev/{disk}) log-writes /dev/{disk} /dev/{log}")
            } else {
                format!("0 $(blockdev --getsz /dev/{disk}) linear /dev/{disk} 0")
            }
        };
        format!(
            "set -e; dmsetup create origin --table \"{}\"; dmsetup create lasting --table \"{}\"; dmsetup mknodes; \
             mkdir -p /mnt/varve; mount /dev/mapper/lasting /mnt/varve; {} {story}",
            table("ubda", "ubdc"),
            table("ubdb", "ubdd"),
            scenario_program(),
        )
    }

    /// Runs load until the power is cut in this way. Gives the number of sectors that were lost.
    fn cut(&self, kernel: &Kernel, cut: Cut, number: u32) -> u64 {
        let shared = self.shared();
        let journal = shared.join("stamps").display().to_string();
        let after_ms = 900 + u64::from(number) * 211;
        if number == 0 {
            let made = kernel.run(
                &[&self.origin, &self.lasting],
                &[],
                60,
                "mkfs.ext4 -q -F /dev/ubdb",
            );
            assert!(made.status.success(), "mkfs: {made:?}");
        }
        if cut == Cut::Plain {
            let story = format!("load /mnt/varve /dev/mapper/origin {journal}");
            let mut guest = kernel.start(
                &[&self.origin, &self.lasting],
                &[&shared],
                &Machine::script(false, &story),
            );
            guest.wait_for("LOADED");
            std::thread::sleep(Duration::from_millis(after_ms));
            guest.cut();
            return 0;
        }
        let path = |name: &str| self.directory.path().join(name);
        let logs = [
            disk(self.directory.path(), "origin-writes", WRITES_MIB),
            disk(self.directory.path(), "lasting-writes", WRITES_MIB),
        ];
        copy_sparse(&self.origin, &path("origin-before"));
        copy_sparse(&self.lasting, &path("lasting-before"));
        let story = format!("load /mnt/varve /dev/mapper/origin {journal} {after_ms}");
        let mut guest = kernel.start(
            &[&self.origin, &self.lasting, &logs[0], &logs[1]],
            &[&shared],
            &Machine::script(true, &story),
        );
        guest.wait_for("STOPPED");
        guest.cut();
        let mut coin = 0x9e37_79b9_7f4a_7c15u64 ^ u64::from(number);
        let mut sectors_lost = 0;
        for (disk, name, log) in [
            (&self.origin, "origin", &logs[0]),
            (&self.lasting, "lasting", &logs[1]),
        ] {
            let keep = |sector: u64| {
                coin ^= coin << 13;
                coin ^= coin >> 7;
                coin ^= coin << 17;
                cut == Cut::LoseHalf && (coin ^ sector).count_ones().is_multiple_of(2)
            };
            let lies = cut == Cut::Lie && name == "origin";
            let before = path(&format!("{name}-before"));
            let lost = lose_unflushed(disk, &before, log, keep, lies).unwrap();
            println!("{cut:?}: {name}: {lost:?}");
            assert!(lost.entries > 100, "hardly anything was flushed: {lost:?}");
            sectors_lost += lost.sectors_lost;
        }
        sectors_lost
    }

    /// Whether everything that was promised for after a cut holds.
    fn check(&self, kernel: &Kernel, what: &str) -> Result<(), String> {
        let story = format!(
            "after-cut /mnt/varve /dev/mapper/origin {}",
            self.shared().join("stamps").display()
        );
        let output = kernel.run(
            &[&self.origin, &self.lasting],
            &[&self.shared()],
            300,
            &Machine::script(false, &story),
        );
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        println!("{} {what}: {text}", kernel.name());
        if output.status.success() {
            Ok(())
        } else {
            Err(format!(
                "{what} under {}: {}\n{text}",
                kernel.name(),
                output.status
            ))
        }
    }
}

fn copy_sparse(from: &Path, to: &Path) {
    let copied = Command::new("cp")
        .arg("--sparse=always")
        .args([from, to])
        .status()
        .unwrap();
    assert!(copied.success());
}

/// After each cut, device and history are identical, everything that was acknowledged as flushed is there, and re-reading stays within its bound.
fn cuts(kernel: &Kernel) {
    let machine = Machine::new();
    let mut sectors_lost = 0;
    for number in 0..sized(6, 30) {
        let cut = CUTS[number as usize % CUTS.len()];
        sectors_lost += machine.cut(kernel, cut, number);
        let what = format!("cut {number} ({cut:?})");
        machine.check(kernel, &what).unwrap();
    }
    assert!(
        sectors_lost > 100,
        "the cuts lost {sectors_lost} sectors: they tested nothing"
    );
}

/// The same with a disk that lies about its flushes: if that goes unnoticed, the test above proves nothing.
fn lie(kernel: &Kernel) {
    let machine = Machine::new();
    machine.cut(kernel, Cut::Lie, 0);
    let broken = machine.check(kernel, "a lying disk").unwrap_err();
    assert!(broken.contains("BROKEN"), "{broken}");
}

/// A power cut in the middle of a rewind: it is finished before the device is offered, and can be undone.
fn rewind(kernel: &Kernel) {
    if kernel.is_emulated() && !large() {
        println!("left to `make vm` under emulation");
        return;
    }
    let machine = Machine::new();
    let made = kernel.run(
        &[&machine.origin, &machine.lasting],
        &[],
        60,
        "mkfs.ext4 -q -F /dev/ubdb",
    );
    assert!(made.status.success(), "mkfs: {made:?}");
    let story = "rewind-load /mnt/varve /dev/mapper/origin";
    let disks: [&Path; 2] = [&machine.origin, &machine.lasting];
    let mut guest = kernel.start(&disks, &[], &Machine::script(false, story));
    guest.wait_for("LOADED");
    std::thread::sleep(Duration::from_millis(300));
    guest.cut();
    let story = "after-rewind-cut /mnt/varve /dev/mapper/origin";
    let output = kernel.run(&disks, &[], 300, &Machine::script(false, story));
    let text = String::from_utf8_lossy(&output.stdout);
    println!("{}: {text}", kernel.name());
    assert!(output.status.success(), "{}: {text}", kernel.name());
}

in_guests! {
    power_cut_in_a_rewind_is_finished_and_can_be_undone: rewind;
    power_cut_leaves_device_and_history_identical: cuts;
    power_cut_of_a_lying_disk_is_noticed_by_the_test: lie;
}
