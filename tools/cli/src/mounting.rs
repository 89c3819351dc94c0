//! Mounting an image or a copy beside its original: same file system, same UUID.

use nix::mount::MsFlags;
use nix::sched::CloneFlags;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};
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

/// Mounts a copy of a file system beside its original, with further options.
pub fn mount_copy(
    node: &str,
    directory: &Path,
    mode: MountMode,
    further: &[&str],
) -> Result<(), ControlError> {
    let kind = file_system(node);
    let mut options = vec![if mode == MountMode::Writable {
        "rw"
    } else {
        "ro"
    }];
    options.extend(further);
    if kind.starts_with("ext") {
        options.push("errors=remount-ro"); // A file system may have been told to panic: that is for its own machine.
    }
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

/// From here on this process and its children see mounts of their own, which end with them; what is mounted or unmounted elsewhere goes on being seen.
pub fn keep_mounts_private() -> Result<(), ControlError> {
    let failed = |errno: nix::errno::Errno| {
        ControlError::new(
            "C006-permission",
            format!(
                "mounts of its own were refused to this command: {errno}; it must be run as root"
            ),
        )
    };
    nix::sched::unshare(CloneFlags::CLONE_NEWNS).map_err(failed)?;
    let flags = MsFlags::MS_REC | MsFlags::MS_SLAVE;
    nix::mount::mount(None::<&str>, "/", None::<&str>, flags, None::<&str>).map_err(failed)
}

/// The node of a device, or of one of its partitions, which the kernel makes a moment later.
#[must_use]
pub fn node_of(device: &str, partition: Option<u32>) -> String {
    let Some(number) = partition else {
        return device.to_owned();
    };
    let node = format!("{device}p{number}");
    let since = Instant::now();
    while !Path::new(&node).exists() && since.elapsed() < Duration::from_secs(3) {
        std::thread::sleep(Duration::from_millis(50));
    }
    node
}
