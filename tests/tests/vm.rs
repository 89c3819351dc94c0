//! Real kernels, real ublk: each scenario under each test kernel, and the fallback on this machine's own kernel.
//!
//! `VARVE_TEST_KERNELS` names User Mode Linux kernels, separated by colons (`tests/vm/build-kernel` makes one). Without it these tests say so
//! loudly and do nothing; with CI=true that is a failure. `VARVE_TEST_SIZE=large` runs the large numbers (`make vm`).

#![allow(
    clippy::unwrap_used,
    reason = "in tests a surprise should end the test"
)]

use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// The smallest disk that every file system accepts (XFS: 300 MiB).
const ORIGIN_MIB: u64 = 320;
const KERNELS: &str = "VARVE_TEST_KERNELS";

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap()
        .to_path_buf()
}

fn bin() -> PathBuf {
    let scenario = PathBuf::from(env!("CARGO_BIN_EXE_scenario"));
    scenario.parent().unwrap().to_path_buf()
}

fn large() -> bool {
    std::env::var("VARVE_TEST_SIZE").is_ok_and(|size| size == "large")
}

fn sized(small: u32, large_number: u32) -> String {
    if large() { large_number } else { small }.to_string()
}

/// The kernels that can run here. One that is named and cannot boot is a failure, but for one known reason.
fn kernels() -> Vec<PathBuf> {
    let Ok(named) = std::env::var(KERNELS) else {
        assert!(
            std::env::var("CI").is_err(),
            "{KERNELS} is not set: in CI a missing test kernel is a failure"
        );
        println!(
            "SKIPPED: {KERNELS} is not set; no real ublk was tested (tests/vm/build-kernel makes a kernel)"
        );
        return Vec::new();
    };
    named
        .split(':')
        .filter(|path| !path.is_empty())
        .map(PathBuf::from)
        .filter(|kernel| boots(kernel))
        .collect()
}

fn boots(kernel: &Path) -> bool {
    assert!(kernel.exists(), "{} does not exist", kernel.display());
    let probe = |_| guest(kernel, &[], &[], 60, &["true"]).status.success();
    if (0..2).any(probe) {
        return true;
    }
    // User Mode Linux without seccomp mode reserves too little space for the registers of CPUs with AMX: init dies at once.
    let amx = std::fs::read_to_string("/proc/cpuinfo")
        .unwrap_or_default()
        .contains("amx_tile");
    let help = Command::new(kernel).arg("--help").output().unwrap();
    let seccomp = String::from_utf8_lossy(&help.stdout).contains("seccomp=");
    assert!(amx && !seccomp, "{} does not boot", kernel.display());
    println!(
        "SKIPPED: {} cannot run on this CPU (AMX registers, and no seccomp mode in this kernel)",
        kernel.display()
    );
    false
}

fn guest(
    kernel: &Path,
    disks: &[&Path],
    writable: &[&Path],
    seconds: u32,
    command: &[&str],
) -> Output {
    let mut runner = Command::new(repository().join("tests/vm/run"));
    runner
        .arg(kernel)
        .args(["-m", "1536", "-t", &seconds.to_string()]);
    for disk in disks {
        runner.arg("-d").arg(disk);
    }
    for directory in writable {
        runner.arg("-w").arg(directory);
    }
    // The programs may lie where the guest has a fresh file system.
    runner.arg("-w").arg(bin());
    runner
        .env("VARVE_BIN", bin())
        .arg("--")
        .args(command)
        .output()
        .unwrap()
}

fn disk(directory: &Path, name: &str, megabytes: u64) -> PathBuf {
    let path = directory.join(name);
    let file = std::fs::File::create(&path).unwrap();
    file.set_len(megabytes << 20).unwrap();
    path
}

/// Runs a scenario in a guest whose lasting files are on a second disk. A guest that dies without a status is infrastructure: tried once more, loudly.
fn scenario(kernel: &Path, arguments: &[&str]) {
    let directory = tempfile::tempdir().unwrap();
    for attempt in 0..2 {
        let origin = disk(directory.path(), "origin", ORIGIN_MIB);
        let lasting = disk(directory.path(), "lasting", 768);
        let log = disk(directory.path(), "log", 200);
        let script = format!(
            "mkfs.ext4 -q -F /dev/ubdb && mkdir -p /mnt/varve && mount /dev/ubdb /mnt/varve && {} {} /mnt/varve /dev/ubda {}",
            env!("CARGO_BIN_EXE_scenario"),
            arguments[0],
            arguments[1..].join(" ")
        );
        let output = guest(
            kernel,
            &[&origin, &lasting, &log],
            &[],
            600,
            &["bash", "-c", &script],
        );
        let text = String::from_utf8_lossy(&output.stdout);
        println!("{} {arguments:?}:\n{text}", kernel.display());
        if output.status.code() == Some(125) && attempt == 0 {
            println!("INFRASTRUCTURE: the guest died without a status; once more");
            continue;
        }
        assert!(
            output.status.success(),
            "{arguments:?} under {}: {}\n{text}",
            kernel.display(),
            output.status
        );
        return;
    }
}

fn everywhere(arguments: &[&str]) {
    for kernel in kernels() {
        scenario(&kernel, arguments);
    }
}

#[test]
fn ublk_ext4_images_at_many_instants() {
    everywhere(&["instants", "ext4", &sized(7, 34)]);
}

#[test]
fn ublk_xfs_images_at_many_instants() {
    everywhere(&["instants", "xfs", &sized(7, 34)]);
}

#[test]
fn ublk_btrfs_images_at_many_instants() {
    everywhere(&["instants", "btrfs", &sized(7, 34)]);
}

#[test]
fn ublk_images_equal_the_writers_memory() {
    everywhere(&["stamps", &sized(20, 100)]);
}

#[test]
fn ublk_sqlite_keeps_every_acknowledged_transaction() {
    everywhere(&["sqlite"]);
}

#[test]
fn ublk_sigkill_under_load_loses_nothing() {
    everywhere(&["kill", &sized(5, 50)]);
}

#[test]
fn ublk_foreign_write_is_noticed_and_healed() {
    everywhere(&["behind-our-back"]);
}

/// Power cuts of the guest under load; after each, device and history are identical and re-reading stays within its bound.
#[test]
fn ublk_power_cut_leaves_device_and_history_identical() {
    let cuts: u32 = sized(5, 30).parse().unwrap();
    for kernel in kernels() {
        let directory = tempfile::tempdir().unwrap();
        let origin = disk(directory.path(), "origin", ORIGIN_MIB);
        let lasting = disk(directory.path(), "lasting", 768);
        for cut in 0..cuts {
            let format = if cut == 0 {
                "mkfs.ext4 -q -F /dev/ubdb && "
            } else {
                ""
            };
            let mount = "mkdir -p /mnt/varve && mount /dev/ubdb /mnt/varve && ";
            let load = format!(
                "{format}{mount}{} load /mnt/varve /dev/ubda",
                env!("CARGO_BIN_EXE_scenario")
            );
            cut_power(
                &kernel,
                &[&origin, &lasting],
                &load,
                900 + u64::from(cut) * 211,
            );
            let check = format!(
                "{mount}{} after-cut /mnt/varve /dev/ubda",
                env!("CARGO_BIN_EXE_scenario")
            );
            let output = guest(
                &kernel,
                &[&origin, &lasting],
                &[],
                300,
                &["bash", "-c", &check],
            );
            let text = String::from_utf8_lossy(&output.stdout);
            println!("cut {cut}: {text}");
            assert!(
                output.status.success(),
                "cut {cut} under {}: {}\n{text}",
                kernel.display(),
                output.status
            );
        }
    }
}

/// Starts a guest and kills it, with all its processes, some time after it says LOADED.
fn cut_power(kernel: &Path, disks: &[&Path], command: &str, after_ms: u64) {
    let mut runner = Command::new(repository().join("tests/vm/run"));
    runner.arg(kernel).args(["-m", "1536", "-t", "300"]);
    for disk in disks {
        runner.arg("-d").arg(disk);
    }
    runner.arg("-w").arg(bin());
    runner
        .env("VARVE_BIN", bin())
        .args(["--", "bash", "-c", command]);
    let mut child = runner
        .process_group(0)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut said = String::new();
    let loaded = lines.by_ref().map_while(Result::ok).any(|line| {
        said += &line;
        said.push('\n');
        line.contains("LOADED")
    });
    assert!(loaded, "the load never began:\n{said}");
    std::thread::sleep(std::time::Duration::from_millis(after_ms));
    assert!(
        child.try_wait().unwrap().is_none(),
        "the guest ended before the cut: nothing was interrupted"
    );
    let group = format!("-{}", child.id());
    assert!(
        Command::new("kill")
            .args(["-KILL", "--", &group])
            .status()
            .unwrap()
            .success()
    );
    let _ = child.wait();
}

/// The same through FUSE and loop on this machine's own kernel.
fn fallback(arguments: &[&str]) {
    if !Path::new("/dev/fuse").exists() || !Path::new("/dev/loop-control").exists() {
        assert!(
            std::env::var("CI").is_err(),
            "in CI a missing /dev/fuse is a failure"
        );
        println!("SKIPPED: no /dev/fuse or /dev/loop-control here");
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let origin = disk(directory.path(), "origin", ORIGIN_MIB);
    let root = directory.path().join("root");
    std::fs::create_dir_all(&root).unwrap();
    // A mount namespace of its own: the tests' mounts end with it.
    let output = Command::new("unshare")
        .args([
            "--mount",
            "--propagation",
            "private",
            "sh",
            "-c",
            "mount -t tmpfs none /mnt && exec \"$@\"",
            "sh",
        ])
        .arg(env!("CARGO_BIN_EXE_scenario"))
        .arg(arguments[0])
        .arg(&root)
        .arg(&origin)
        .args(&arguments[1..])
        .env("VARVE_BIN", bin())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    println!("fallback {arguments:?}:\n{text}");
    let _ = Command::new(bin().join("varve"))
        .arg("--root")
        .arg(&root)
        .arg("down")
        .output();
    assert!(
        output.status.success(),
        "fallback {arguments:?}: {}\n{text}",
        output.status
    );
}

#[test]
fn fallback_ext4_images_at_many_instants() {
    fallback(&["instants", "ext4", &sized(7, 34)]);
}

#[test]
fn fallback_xfs_images_at_many_instants() {
    fallback(&["instants", "xfs", &sized(7, 34)]);
}

#[test]
fn fallback_images_equal_the_writers_memory() {
    fallback(&["stamps", &sized(20, 100)]);
}

#[test]
fn fallback_sqlite_keeps_every_acknowledged_transaction() {
    fallback(&["sqlite"]);
}

#[test]
fn ublk_log_stalled_failing_or_full_is_bypassed_and_healed() {
    for kind in ["stalled", "failing", "full"] {
        everywhere(&["log-fault", kind]);
    }
}

/// The log fails, production goes on, the power is cut: the log that comes back looks whole, and must not be believed.
#[test]
fn ublk_power_cut_in_bypass_is_not_believed_to_be_whole() {
    for kernel in kernels() {
        for kind in ["stalled", "failing"] {
            let directory = tempfile::tempdir().unwrap();
            let origin = disk(directory.path(), "origin", ORIGIN_MIB);
            let lasting = disk(directory.path(), "lasting", 768);
            let log = disk(directory.path(), "log", 200);
            let disks: [&Path; 3] = [&origin, &lasting, &log];
            let run = |story: &str, format: &str| {
                format!(
                    "{format}mkdir -p /mnt/varve && mount /dev/ubdb /mnt/varve && {} {story} /mnt/varve /dev/ubda {kind}",
                    env!("CARGO_BIN_EXE_scenario")
                )
            };
            cut_power(
                &kernel,
                &disks,
                &run("log-fault-load", "mkfs.ext4 -q -F /dev/ubdb && "),
                1500,
            );
            let output = guest(
                &kernel,
                &disks,
                &[],
                300,
                &["bash", "-c", &run("after-bypass-cut", "")],
            );
            let text = String::from_utf8_lossy(&output.stdout);
            println!("{kind}: {text}");
            assert!(
                output.status.success(),
                "{kind} under {}: {}\n{text}",
                kernel.display(),
                output.status
            );
        }
    }
}
