//! Real kernels, real ublk: each scenario under each test kernel, and the fallback on this machine's own kernel.
//!
//! See `varve_tests::guest` for how kernels are named.

#![allow(
    clippy::unwrap_used,
    reason = "in tests a surprise should end the test"
)]

use varve_tests::guest::{Kernel, ORIGIN_MIB, disk, fallback, large, scenario_program, sized};
use varve_tests::in_guests;

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
            // Room for the history of minutes at full speed.
            disk(directory.path(), "lasting", sized(4096, 24576).into()),
            disk(directory.path(), "log", 200),
        ]
    };
    kernel.must(&format!("{arguments:?}"), &mut disks, 600, &script);
}

/// Fewer instants where everything is emulated; still three of each file system that are checked, and twenty by the writer's memory.
fn instants(kernel: &Kernel) -> String {
    if kernel.is_emulated() {
        sized(3, 30)
    } else {
        sized(7, 34)
    }
    .to_string()
}

/// Stories in which the kernel plays no part of its own: under emulation only with the large numbers.
fn everywhere(kernel: &Kernel, arguments: &[&str]) {
    if kernel.is_emulated() && !large() {
        println!("left to `make vm`: {arguments:?} under emulation");
        return;
    }
    scenario(kernel, arguments);
}

in_guests! {
    ext4_images_at_many_instants: |kernel| scenario(kernel, &["instants", "ext4", &instants(kernel)]);
    xfs_images_at_many_instants: |kernel| scenario(kernel, &["instants", "xfs", &instants(kernel)]);
    btrfs_images_at_many_instants: |kernel| scenario(kernel, &["instants", "btrfs", &instants(kernel)]);
    images_equal_the_writers_memory: |kernel| scenario(kernel, &["stamps", &sized(20, 100).to_string()]);
    sqlite_keeps_every_acknowledged_transaction: |kernel| scenario(kernel, &["sqlite"]);
    killed_and_upgraded_under_load_loses_nothing: |kernel| scenario(kernel, &["kill", &sized(5, 50).to_string()]);
    foreign_write_is_noticed_and_healed: |kernel| scenario(kernel, &["behind-our-back"]);
    bad_input_is_refused_by_name: |kernel| everywhere(kernel, &["bad-input"]);
    sectors_sizes_and_partitions: |kernel| everywhere(kernel, &["shapes"]);
    killed_in_a_rewind_finishes_it: |kernel| everywhere(kernel, &["rewind-killed"]);
    unreadable_instant_takes_no_device_away: |kernel| everywhere(kernel, &["rewind-unreadable"]);
    lost_history_is_said_and_made_whole: |kernel| everywhere(kernel, &["holes"]);
    resized_device_is_followed: |kernel| everywhere(kernel, &["resize"]);
    history_thins_out_as_the_policy_says: |kernel| everywhere(kernel, &["retention"]);
    history_takes_no_more_space_than_it_may: |kernel| everywhere(kernel, &["space"]);
    what_ends_leaves_nothing_and_loses_nothing: |kernel| everywhere(kernel, &["ends"]);
    files_of_the_past_ext4: |kernel| everywhere(kernel, &["files", "ext4"]);
    files_of_the_past_xfs: |kernel| everywhere(kernel, &["files", "xfs"]);
    files_of_the_past_btrfs: |kernel| everywhere(kernel, &["files", "btrfs"]);
    points_are_made_by_themselves: |kernel| everywhere(kernel, &["points"]);
    points_reach_what_is_built_on_the_device: |kernel| everywhere(kernel, &["points-stacked"]);
    an_encrypted_store: |kernel| everywhere(kernel, &["encrypted"]);
    instants_are_copied_out: |kernel| everywhere(kernel, &["export-to"]);
    history_is_compressed_and_proved_by_itself: |kernel| everywhere(kernel, &["store-life"]);
}

#[test]
fn fallback_ext4_images_at_many_instants() {
    fallback(&["instants", "ext4", &sized(7, 34).to_string()]);
}

#[test]
fn fallback_xfs_images_at_many_instants() {
    fallback(&["instants", "xfs", &sized(5, 34).to_string()]);
}

#[test]
fn fallback_btrfs_images_at_many_instants() {
    fallback(&["instants", "btrfs", &sized(5, 34).to_string()]);
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
fn fallback_bad_input_is_refused_by_name() {
    fallback(&["bad-input"]);
}

#[test]
fn fallback_sectors_sizes_and_partitions() {
    fallback(&["shapes"]);
}

#[test]
fn fallback_unreadable_instant_takes_no_device_away() {
    fallback(&["rewind-unreadable"]);
}

#[test]
fn fallback_lost_history_is_said_and_made_whole() {
    fallback(&["holes"]);
}

#[test]
fn fallback_history_thins_out_as_the_policy_says() {
    fallback(&["retention"]);
}

#[test]
fn fallback_what_ends_leaves_nothing_and_loses_nothing() {
    fallback(&["ends"]);
}

#[test]
fn fallback_history_takes_no_more_space_than_it_may() {
    fallback(&["space"]);
}

#[test]
fn fallback_files_of_the_past_ext4() {
    fallback(&["files", "ext4"]);
}

#[test]
fn fallback_files_of_the_past_xfs() {
    fallback(&["files", "xfs"]);
}

#[test]
fn fallback_points_are_made_by_themselves() {
    fallback(&["points"]);
}

#[test]
fn fallback_an_encrypted_store() {
    fallback(&["encrypted"]);
}

#[test]
fn fallback_instants_are_copied_out() {
    fallback(&["export-to"]);
}

#[test]
fn fallback_history_is_compressed_and_proved_by_itself() {
    fallback(&["store-life"]);
}

#[test]
fn fallback_resized_device_is_followed() {
    fallback(&["resize"]);
}
