//! Where a volume keeps its log and state file: opened, and never mistaken for somebody's data, a disk that took the name, or a file system that is
//! not mounted yet.

use crate::manager::{ANSWER_WAIT, error};
use crate::origin;
use crossbeam_channel::bounded;
use std::fs::File;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::time::Duration;
use varve_control::{ControlError, VolumeSpec};
use varve_log::{DirectFile, read_headers};

/// How long a log or state file on a file system of its own is waited for.
pub(crate) const LATE_WAIT: Duration = Duration::from_secs(15);

/// A new volume takes over nobody's data.
fn unless_data(path: &Path, new: bool) -> std::io::Result<()> {
    if new {
        origin::refuse_data(path)
    } else {
        Ok(())
    }
}

pub(crate) fn open_log(spec: &VolumeSpec, strict: bool) -> Result<File, ControlError> {
    let bytes = spec.segment_bytes * spec.segment_count;
    let opened = unless_data(&spec.log, strict)
        .and_then(|()| unless_missing(spec, &spec.log, strict))
        .and_then(|()| origin::open_log(&spec.log, bytes, !strict))
        .and_then(|file| {
            if !strict {
                unless_foreign(spec)?;
            }
            Ok(file)
        });
    or_broken(opened, strict)
        .map_err(|e| error("V014-log", format!("the log {}: {e}", spec.log.display())))
}

pub(crate) fn open_state(spec: &VolumeSpec, strict: bool) -> Result<File, ControlError> {
    let opened = unless_data(&spec.state, strict)
        .and_then(|()| unless_missing(spec, &spec.state, strict))
        .and_then(|()| origin::open_state(&spec.state));
    or_broken(opened, strict).map_err(|e| {
        error(
            "V015-state",
            format!("the state file {}: {e}", spec.state.display()),
        )
    })
}

/// A file on a file system of its own may come later than we do; an empty one in its place would hide it. A lost one on ours is made anew.
fn unless_missing(spec: &VolumeSpec, path: &Path, new: bool) -> std::io::Result<()> {
    let since = std::time::Instant::now();
    while !new && spec.apart && !path.exists() {
        if since.elapsed() > LATE_WAIT {
            return Err(std::io::Error::other(format!(
                "{} is not there: is its file system mounted? Mount it, then restart blkfilter",
                path.display()
            )));
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

/// A device whose name now means another disk is not taken for the log: it must hold segments of ours, or nothing.
fn unless_foreign(spec: &VolumeSpec) -> std::io::Result<()> {
    if !std::fs::metadata(&spec.log)?.file_type().is_block_device() {
        return Ok(());
    }
    // On a thread of its own: a disk that hangs must not keep the volume from starting. What reads the log next gives up in time.
    let (answer_in, answer) = bounded(1);
    let spec = spec.clone();
    std::thread::spawn(move || {
        let fine = if holds_log(&spec) {
            Ok(())
        } else {
            origin::refuse_data(&spec.log)
        };
        let _ = answer_in.send(fine);
    });
    answer.recv_timeout(ANSWER_WAIT).unwrap_or(Ok(()))
}

/// Whether a segment of this volume lies there.
pub(crate) fn holds_log(spec: &VolumeSpec) -> bool {
    let Ok(mut log) = DirectFile::open(&spec.log) else {
        return false;
    };
    read_headers(&mut log, spec.segment_bytes, spec.segment_count).is_ok_and(|headers| {
        headers
            .iter()
            .any(|segment| segment.header.volume().to_string() == spec.id)
    })
}

/// Whether log and state file lie on the file system that holds the volumes' files.
pub(crate) fn is_apart(spec: &VolumeSpec, volumes: &Path) -> bool {
    let device = |path: &Path| {
        let metadata = path.ancestors().find_map(|p| std::fs::metadata(p).ok());
        metadata.map(|metadata| std::os::unix::fs::MetadataExt::dev(&metadata))
    };
    device(&spec.log) != device(volumes) || device(&spec.state) != device(volumes)
}

/// Stands in for a file that cannot be opened: every read and write of it fails, which leads to bypass, not to a missing device.
fn or_broken(opened: std::io::Result<File>, strict: bool) -> std::io::Result<File> {
    match opened {
        Err(failed) if !strict => {
            eprintln!("blkfilter: {failed}: the volume starts without it");
            File::open("/dev/null")
        }
        result => result,
    }
}
