//! Mounting an image or a copy beside its original: same file system, same UUID.

use std::path::Path;
use std::process::Command;
use varve_control::ControlError;

/// What a tool prints, without the line's end; nothing if it fails.
#[must_use]
pub fn output_of(program: &str, arguments: &[&str]) -> String {
    Command::new(program)
        .args(arguments)
        .output()
        .map(|out| String::from_utf8_lossy(&out.stdout).trim().to_owned())
        .unwrap_or_default()
}

/// How a copy is mounted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MountMode {
    /// For reading and writing.
    Writable,
    /// For reading; the journal may be replayed into the device.
    ReadOnly,
    /// For reading, from a device that cannot be written: a journal is not replayed.
    Untouched,
}

/// The kind of file system on a device (`ext4`, `xfs`, …); empty: none that is known.
#[must_use]
pub fn file_system(node: &str) -> String {
    output_of("blkid", &["-p", "-o", "value", "-s", "TYPE", node])
}

/// Mounts a copy of a file system beside its original.
pub fn mount_copy(node: &str, directory: &Path, mode: MountMode) -> Result<(), ControlError> {
    let kind = file_system(node);
    let mut options = vec![if mode == MountMode::Writable {
        "rw"
    } else {
        "ro"
    }];
    if kind == "xfs" {
        options.push("nouuid"); // Its original may be mounted beside it.
    }
    if mode == MountMode::Untouched {
        match kind.as_str() {
            "xfs" => options.push("norecovery"),
            "ext3" | "ext4" => options.push("noload"),
            "btrfs" => options.push("rescue=nologreplay"),
            _ => {}
        }
    }
    let outcome = Command::new("mount")
        .args(["-o", &options.join(","), node])
        .arg(directory)
        .output()?;
    if outcome.status.success() {
        return Ok(());
    }
    let why = String::from_utf8_lossy(&outcome.stderr).trim().to_owned();
    Err(ControlError::new("X006-mount", format!("{node}: {why}")))
}
