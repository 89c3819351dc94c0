//! Which volume a device is: by its name, as it is mapped, the disk under it, a partition of either, or a place where it is mounted.

use crate::Context;
use std::path::{Path, PathBuf};
use varve_cli::daemons;
use varve_cli::device::{mounted_on, partition_of};
use varve_control::{ControlError, VolumeInfo};

/// A volume, and which part of it is meant.
pub struct Source {
    /// The volume.
    pub volume: VolumeInfo,
    /// The device as it was named, for people.
    pub name: String,
    /// Partition of a whole disk.
    pub partition: Option<u32>,
}

/// Finds it.
pub fn find(context: &Context, text: &str) -> Result<Source, ControlError> {
    let volumes = daemons::volumes(&context.paths)?;
    let source = |volume: &VolumeInfo, partition| Source {
        volume: volume.clone(),
        name: text.to_owned(),
        partition,
    };
    if let Some(volume) = volumes.iter().find(|volume| volume.name == text) {
        return Ok(source(volume, None));
    }
    let missing = |why: String| ControlError::new("V027-missing", why);
    let path = std::fs::canonicalize(text)
        .map_err(|error| missing(format!("{text}: {error}; `lsblk` lists devices")))?;
    let path = if path.is_dir() {
        mounted_device(&path)
            .ok_or_else(|| missing(format!("{text} is a directory on which nothing is mounted")))?
    } else {
        path
    };
    for volume in &volumes {
        for device in [&volume.mapped, &volume.device] {
            let Ok(device) = std::fs::canonicalize(device) else {
                continue;
            };
            if device == path {
                return Ok(source(volume, None));
            }
            if let Some(number) = partition_of(&path, &device) {
                return Ok(source(volume, Some(number)));
            }
        }
    }
    Err(not_mapped(text, &path))
}

/// The block device that is mounted on a directory.
fn mounted_device(directory: &Path) -> Option<PathBuf> {
    let name = directory.display().to_string();
    let found = varve_cli::output_of(
        "findmnt",
        &["-n", "-v", "-o", "SOURCE", "--mountpoint", &name],
    );
    (!found.is_empty())
        .then(|| std::fs::canonicalize(found).ok())
        .flatten()
}

/// A device that goes past Varve: what can be done.
fn not_mapped(text: &str, path: &Path) -> ControlError {
    let mounts = mounted_on(path);
    let message = match mounts.first() {
        Some(place) => format!(
            "{text} is not protected by Varve, so nobody sees what is written to it: a copy at once is not possible. It is mounted on {place}. Either unmount it and run `varve protect {text}` (what is on it stays), or let protection begin with the next boot: `varve protect --at-next-boot {text}`"
        ),
        None => format!(
            "{text} is not protected by Varve, so nobody sees what is written to it. Run `varve protect {text}` first (what is on it stays)"
        ),
    };
    ControlError::new("H012-unmapped", message)
}
