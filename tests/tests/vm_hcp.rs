//! Hot copies on real kernels and through the fallback: what they show, under load, kills, broken disks and power cuts.

#![allow(
    clippy::unwrap_used,
    reason = "in tests a surprise should end the test"
)]

use std::path::Path;
use varve_tests::guest::{Kernel, ORIGIN_MIB, disk, fallback, large, scenario_program, sized};
use varve_tests::in_guests;

fn script(story: &str, argument: &str) -> String {
    format!(
        "mkdir -p /mnt/varve && mount /dev/ubdb /mnt/varve && {} {story} /mnt/varve /dev/ubda {argument}",
        scenario_program()
    )
}

fn scenario(kernel: &Kernel, arguments: &[&str]) {
    let directory = tempfile::tempdir().unwrap();
    let mut disks = || {
        vec![
            disk(directory.path(), "origin", ORIGIN_MIB),
            disk(directory.path(), "lasting", 8192),
            disk(directory.path(), "store", 400),
        ]
    };
    let script = format!(
        "mkfs.ext4 -q -F /dev/ubdb && {}",
        script(arguments[0], &arguments[1..].join(" "))
    );
    kernel.must(&format!("{arguments:?}"), &mut disks, 600, &script);
}

/// Stories in which the kernel plays no part of its own: under emulation only with the large numbers.
fn everywhere(kernel: &Kernel, arguments: &[&str]) {
    if kernel.is_emulated() && !large() {
        println!("left to `make vm`: {arguments:?} under emulation");
        return;
    }
    scenario(kernel, arguments);
}

/// Copies that must last are what they were after the power was cut under load.
fn power_cut(kernel: &Kernel) {
    let directory = tempfile::tempdir().unwrap();
    for round in 0..sized(1, 5) {
        let disks = [
            disk(directory.path(), "origin", ORIGIN_MIB),
            disk(directory.path(), "lasting", 8192),
        ];
        let disks: Vec<&Path> = disks.iter().map(std::path::PathBuf::as_path).collect();
        let load = format!("mkfs.ext4 -q -F /dev/ubdb && {}", script("copies-load", ""));
        let mut guest = kernel.start(&disks, &[], &load);
        let said = guest.wait_for("LOADED");
        let digests: Vec<&str> = said
            .lines()
            .filter(|line| line.starts_with("DIGEST"))
            .filter_map(|line| line.split_whitespace().nth(2))
            .collect();
        std::thread::sleep(std::time::Duration::from_millis(
            1500 + 300 * u64::from(round),
        ));
        guest.cut();
        let output = kernel.run(
            &disks,
            &[],
            300,
            &script("copies-after-cut", &digests.join(" ")),
        );
        let text = String::from_utf8_lossy(&output.stdout);
        println!("{} cut {round}: {text}", kernel.name());
        assert!(
            output.status.success(),
            "under {}: {}\n{text}",
            kernel.name(),
            output.status
        );
    }
}

/// The small or the large number; under emulation everything takes ten times as long.
fn amount(kernel: &Kernel, small: u32, large_number: u32) -> String {
    let large_number = match kernel.is_emulated() {
        true => (large_number / 4).max(small),
        false => large_number,
    };
    sized(small, large_number).to_string()
}

in_guests! {
    copies_under_full_load: |kernel| scenario(kernel, &["copies", &if kernel.is_emulated() { sized(6, 20) } else { 20 }.to_string()]);
    copies_of_ext4: |kernel| scenario(kernel, &["copies-fs", "ext4", &amount(kernel, 2, 20)]);
    copies_of_xfs: |kernel| scenario(kernel, &["copies-fs", "xfs", &amount(kernel, 2, 20)]);
    copies_of_btrfs: |kernel| scenario(kernel, &["copies-fs", "btrfs", &amount(kernel, 2, 20)]);
    killed_with_copies: |kernel| scenario(kernel, &["copies-killed", &amount(kernel, if kernel.is_emulated() { 3 } else { 6 }, 20)]);
    hcp_killed_at_each_step: |kernel| everywhere(kernel, &["copies-hcp-killed", &amount(kernel, 15, 400)]);
    limits_and_bad_input: |kernel| everywhere(kernel, &["copies-limits"]);
    copied_out: |kernel| if large() { scenario(kernel, &["copies-out"]) };
    four_devices_at_one_instant: |kernel| scenario(kernel, &["copies-group", &amount(kernel, 5, 30)]);
    disks_break_under_copies: |kernel| scenario(kernel, &["copies-faults"]);
    copies_that_must_last_survive_a_power_cut: power_cut;
}

#[test]
fn fallback_copies_under_full_load() {
    fallback(&["copies", &sized(8, 20).to_string()]);
}

#[test]
fn fallback_copies_of_ext4() {
    fallback(&["copies-fs", "ext4", "2"]);
}

#[test]
fn fallback_hcp_killed_at_each_step() {
    fallback(&["copies-hcp-killed", &sized(15, 400).to_string()]);
}

#[test]
fn fallback_limits_and_bad_input() {
    fallback(&["copies-limits"]);
}

#[test]
fn fallback_copied_out() {
    fallback(&["copies-out"]);
}

#[test]
fn fallback_four_devices_at_one_instant() {
    fallback(&["copies-group", "5"]);
}
