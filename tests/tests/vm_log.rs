//! The log's disk stalls, fails, fills, crawls, or is pulled, on real kernels: production goes on, the gap is declared, history is whole again; and
//! a power cut in the middle of it is not believed to have lost nothing.

#![allow(
    clippy::unwrap_used,
    reason = "in tests a surprise should end the test"
)]

use std::path::Path;
use varve_tests::guest::{Kernel, ORIGIN_MIB, disk, scenario_program};
use varve_tests::in_guests;

fn script(story: &str, fault: &str) -> String {
    format!(
        "mkdir -p /mnt/varve && mount /dev/ubdb /mnt/varve && {} {story} /mnt/varve /dev/ubda {fault}",
        scenario_program()
    )
}

/// The fault comes, stays for some seconds, and goes; then it comes again, and the power is cut in the middle of it.
fn fault(kernel: &Kernel, fault: &str) {
    let directory = tempfile::tempdir().unwrap();
    let mut disks = || {
        vec![
            disk(directory.path(), "origin", ORIGIN_MIB),
            disk(directory.path(), "lasting", 4096),
            disk(directory.path(), "log", 200),
        ]
    };
    let format = "mkfs.ext4 -q -F /dev/ubdb && ";
    let whole = format!("{format}{}", script("log-fault", fault));
    kernel.must(&format!("log {fault}"), &mut disks, 600, &whole);

    let disks = disks();
    let disks: Vec<&Path> = disks.iter().map(std::path::PathBuf::as_path).collect();
    let load = format!("{format}{}", script("log-fault-load", fault));
    let mut guest = kernel.start(&disks, &[], &load);
    guest.wait_for("LOADED");
    std::thread::sleep(std::time::Duration::from_millis(1500));
    guest.cut();
    let output = kernel.run(&disks, &[], 300, &script("after-bypass-cut", fault));
    let text = String::from_utf8_lossy(&output.stdout);
    println!("{} after a power cut, log {fault}: {text}", kernel.name());
    assert!(
        output.status.success(),
        "log {fault}, then a power cut, under {}: {}\n{text}",
        kernel.name(),
        output.status
    );
}

in_guests! {
    log_stalled: |kernel| fault(kernel, "stalled");
    log_failing: |kernel| fault(kernel, "failing");
    log_full: |kernel| fault(kernel, "full");
    log_slow: |kernel| fault(kernel, "slow");
    log_pulled: |kernel| fault(kernel, "pulled");
}
