//! Partitions of a mapped whole disk.

use std::process::{Command, Stdio};

/// Makes the kernel know the partitions of a device that was just shown. ublk does not look for them itself in every version; a device without a
/// partition table stays as it is.
pub fn show_partitions(device: &str) {
    let _ = Command::new("partx")
        .args(["--update", device])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
}
