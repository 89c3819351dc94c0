//! Real kernels, real ublk: each scenario under each test kernel, and the fallback on this machine's own kernel.
//!
//! See `varve_tests::guest` for how kernels are named.

#![allow(
    clippy::unwrap_used,
    reason = "in tests a surprise should end the test"
)]

use std::path::Path;
use std::process::Command;
use varve_tests::guest::{Kernel, ORIGIN_MIB, disk, kernels, programs, scenario_program, sized};

/// Runs a scenario in a guest whose lasting files are on a second disk.
fn scenario(kernel: &Kernel, arguments: &[&str]) {
    let directory = tempfile::tempdir().unwrap();
    let script = format!(
        "mkfs.ext4 -q -F /dev/ubdb && mkdir -p /mnt/varve && mount /dev/ubdb /mnt/varve && {} {} /mnt/varve /dev/ubda {}",
        scenario_program(),
        arguments[0],
        arguments[1..].join(" ")
    );
    let mut disks = || {
        vec![
            disk(directory.path(), "origin", ORIGIN_MIB),
            disk(directory.path(), "lasting", 768),
            disk(directory.path(), "log", 200),
        ]
    };
    kernel.must(&format!("{arguments:?}"), &mut disks, 600, &script);
}

fn everywhere(arguments: &[&str]) {
    for kernel in kernels() {
        scenario(&kernel, arguments);
    }
}

#[test]
fn ublk_ext4_images_at_many_instants() {
    everywhere(&["instants", "ext4", &sized(7, 34).to_string()]);
}

#[test]
fn ublk_xfs_images_at_many_instants() {
    everywhere(&["instants", "xfs", &sized(7, 34).to_string()]);
}

#[test]
fn ublk_btrfs_images_at_many_instants() {
    everywhere(&["instants", "btrfs", &sized(7, 34).to_string()]);
}

#[test]
fn ublk_images_equal_the_writers_memory() {
    everywhere(&["stamps", &sized(20, 100).to_string()]);
}

#[test]
fn ublk_sqlite_keeps_every_acknowledged_transaction() {
    everywhere(&["sqlite"]);
}

#[test]
fn ublk_sigkill_under_load_loses_nothing() {
    everywhere(&["kill", &sized(5, 50).to_string()]);
}

#[test]
fn ublk_foreign_write_is_noticed_and_healed() {
    everywhere(&["behind-our-back"]);
}

#[test]
fn ublk_resized_device_is_followed() {
    everywhere(&["resize"]);
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
        .arg(scenario_program())
        .arg(arguments[0])
        .arg(&root)
        .arg(&origin)
        .args(&arguments[1..])
        .env("VARVE_BIN", programs())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    println!("fallback {arguments:?}:\n{text}");
    let _ = Command::new(programs().join("varve"))
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
    fallback(&["instants", "ext4", &sized(7, 34).to_string()]);
}

#[test]
fn fallback_xfs_images_at_many_instants() {
    fallback(&["instants", "xfs", &sized(7, 34).to_string()]);
}

#[test]
fn fallback_images_equal_the_writers_memory() {
    fallback(&["stamps", &sized(20, 100).to_string()]);
}

#[test]
fn fallback_sqlite_keeps_every_acknowledged_transaction() {
    fallback(&["sqlite"]);
}

#[test]
fn fallback_foreign_write_is_noticed_and_healed() {
    fallback(&["behind-our-back"]);
}

#[test]
fn fallback_resized_device_is_followed() {
    fallback(&["resize"]);
}
