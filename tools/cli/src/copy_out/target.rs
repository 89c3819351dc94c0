//! Where a copy goes, and whether it may go there.

use crate::daemons;
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use varve_control::{ControlError, Paths, is_same_storage, load_specs, signals};

/// A place to copy to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// Standard output.
    Stdout,
    /// An NBD server, by its URI.
    Nbd(String),
    /// A file that becomes a qcow2 image.
    Qcow2(PathBuf),
    /// A file or a block device.
    File(PathBuf),
}

/// What a target may hold already.
#[derive(Clone, Copy, Debug, Default)]
pub struct Allowed {
    /// Anything: it is overwritten.
    pub anything: bool,
    /// A part of the same copy.
    pub a_part: bool,
    /// It must hold an older copy, of which only what changed is overwritten.
    pub an_older_copy: bool,
}

impl Target {
    /// What is written behind `--to`.
    pub fn parse(text: &str) -> Result<Target, ControlError> {
        let path = || std::path::absolute(text);
        Ok(match text {
            "-" => Target::Stdout,
            _ if text.starts_with("nbd://") || text.starts_with("nbd+unix://") => {
                Target::Nbd(text.to_owned())
            }
            _ if text.ends_with(".qcow2") => Target::Qcow2(path()?),
            _ => Target::File(path()?),
        })
    }

    /// Before anything is made: whether it may be written, and can be.
    pub fn check(&self, paths: &Paths, allowed: Allowed) -> Result<(), ControlError> {
        let exists = |path: &Path| {
            ControlError::new(
                "H018-target",
                format!(
                    "{} holds something already. Nothing was written; remove it, choose another name, or say --overwrite",
                    path.display()
                ),
            )
        };
        if let Target::File(path) | Target::Qcow2(path) = self
            && path.is_dir()
        {
            return Err(ControlError::new(
                "H018-target",
                format!(
                    "{} is a directory: name a file in it. Nothing was written",
                    path.display()
                ),
            ));
        }
        match self {
            Target::Stdout => Ok(()),
            Target::Nbd(_) => has_tool("nbdcopy", "libnbd-bin"),
            Target::Qcow2(path) => {
                has_tool("qemu-img", "qemu-utils")?;
                refuse_volumes(paths, path)?;
                if path.exists() && !allowed.anything {
                    return Err(exists(path));
                }
                Ok(())
            }
            Target::File(path) => {
                let is_device =
                    std::fs::metadata(path).is_ok_and(|m| m.file_type().is_block_device());
                refuse_volumes(paths, path)?;
                if allowed.an_older_copy {
                    return if path.exists() {
                        Ok(())
                    } else {
                        Err(ControlError::new(
                            "H015-base",
                            format!(
                                "{} is not there: it must be a file or device that holds the older copy",
                                path.display()
                            ),
                        ))
                    };
                }
                let holds = if is_device {
                    holds_data(path)?
                } else {
                    std::fs::metadata(path).is_ok_and(|metadata| metadata.len() > 0)
                };
                if holds && !allowed.a_part && !allowed.anything {
                    return Err(exists(path));
                }
                Ok(())
            }
        }
    }

    /// The file or device, if copying to it can be resumed.
    #[must_use]
    pub fn file(&self) -> Option<&Path> {
        match self {
            Target::File(path) => Some(path),
            _ => None,
        }
    }
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Target::Stdout => f.write_str("-"),
            Target::Nbd(uri) => f.write_str(uri),
            Target::Qcow2(path) | Target::File(path) => path.display().fmt(f),
        }
    }
}

/// What belongs to a volume, or to Varve, is nobody's target; by the volumes' files, so that it is known while no daemon runs.
fn refuse_volumes(paths: &Paths, path: &Path) -> Result<(), ControlError> {
    let refuse = |whose: &str| {
        Err(ControlError::new(
            "V037-same",
            format!(
                "{} belongs to {whose}. Nothing was written (to put an instant back on a volume: varve rewind)",
                path.display()
            ),
        ))
    };
    for spec in load_specs(&paths.volumes()).into_iter().flatten() {
        for place in [&spec.device, &spec.log, &spec.state] {
            if is_same_storage(path, place) {
                return refuse(&format!("the volume `{}`", spec.name));
            }
        }
    }
    // What is shown is known to the daemon alone; without it nothing is.
    for volume in daemons::volumes(paths).unwrap_or_default() {
        if !volume.mapped.is_empty() && is_same_storage(path, Path::new(&volume.mapped)) {
            return refuse(&format!("the volume `{}`", volume.name));
        }
    }
    let inside = |own: PathBuf| {
        let parent = path
            .parent()
            .and_then(|parent| std::fs::canonicalize(parent).ok());
        let own = std::fs::canonicalize(own).ok();
        matches!((parent, own), (Some(parent), Some(own)) if parent.starts_with(&own))
    };
    match inside(paths.store()) || inside(paths.volumes()) {
        true => refuse("Varve itself"),
        false => Ok(()),
    }
}

/// Whether a device holds anything: its first and last MiB, and a thousand places between, are looked at.
fn holds_data(path: &Path) -> Result<bool, ControlError> {
    const EDGE: u64 = 1 << 20;
    const PLACES: u64 = 1000;
    let mut device = std::fs::File::open(path)?;
    let bytes = device.seek(SeekFrom::End(0))?;
    let between = (1..PLACES).map(|number| (bytes / PLACES * number, 4096));
    let edges = [(0, EDGE), (bytes.saturating_sub(EDGE), EDGE)];
    for (offset, length) in edges.into_iter().chain(between) {
        let mut area = Vec::new();
        device.seek(SeekFrom::Start(offset))?;
        (&device).take(length).read_to_end(&mut area)?;
        if area.iter().any(|byte| *byte != 0) {
            return Ok(true);
        }
    }
    Ok(false)
}

fn has_tool(program: &str, package: &str) -> Result<(), ControlError> {
    run_tool(program, package, &["--version"])
}

fn run_tool(program: &str, package: &str, arguments: &[&str]) -> Result<(), ControlError> {
    let mut tool = Command::new(program);
    let outcome = signals::output(tool.args(arguments).stdin(Stdio::null())).map_err(|error| {
        ControlError::new(
            "H014-tool",
            format!("{program}: {error}; install {package}"),
        )
    })?;
    if outcome.status.success() {
        return Ok(());
    }
    let why = String::from_utf8_lossy(&outcome.stderr).trim().to_owned();
    Err(ControlError::new("H014-tool", format!("{program}: {why}")))
}

/// To an NBD server: libnbd's own tool does it.
pub(super) fn by_tool(source: &Path, uri: &str) -> Result<(), ControlError> {
    run_tool(
        "nbdcopy",
        "libnbd-bin",
        &["--flush", "--", &source.display().to_string(), uri],
    )
}

/// A qcow2 image, by qemu's own tool.
pub(super) fn qcow2(source: &Path, target: &Path, verify: bool) -> Result<(), ControlError> {
    // For nobody else's eyes: qemu-img keeps the mode of what is there.
    std::fs::File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(target)?;
    let path = target;
    let (source, target) = (source.display().to_string(), target.display().to_string());
    run_tool(
        "qemu-img",
        "qemu-utils",
        &[
            "convert", "-f", "raw", "-O", "qcow2", "-W", "-T", "none", &source, &target,
        ],
    )?;
    // qemu-img flushes nothing. What is compared then is read from the disk.
    let file = std::fs::File::open(path)?;
    file.sync_all()?;
    let parent = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty());
    std::fs::File::open(parent.unwrap_or(Path::new(".")))?.sync_all()?;
    let _ = posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
    if !verify {
        return Ok(());
    }
    run_tool(
        "qemu-img",
        "qemu-utils",
        &["compare", "-f", "raw", "-F", "qcow2", &source, &target],
    )
}
