//! Which volume a name is on, and where within it.

use crate::{Context, daemons};
use clap::Args;
use std::path::{Path, PathBuf};
use varve_cli::device::partition_of;
use varve_control::{ControlError, Mount, VolumeInfo, mounts};

#[derive(Args)]
pub struct Which {
    /// Volume; not needed while there is only one, or if PATH lies on one that is mounted.
    #[arg(long, short = 'V', value_name = "NAME")]
    volume: Option<String>,
    /// Partition of a whole disk's image.
    #[arg(long, value_name = "N")]
    partition: Option<u32>,
}

/// A name on a volume.
pub struct Place {
    /// The volume.
    pub volume: String,
    /// Partition of a whole disk.
    pub partition: Option<u32>,
    /// The name in the volume's own file system.
    pub inside: PathBuf,
    /// The name as it was given, for people.
    pub named: PathBuf,
    /// The name begins at the top of a btrfs, whatever its default subvolume is.
    pub top_level: bool,
}

/// Finds it: on a volume that is mounted on this machine, or in the file system of the volume that is named.
pub fn find(context: &Context, which: &Which, path: &Path) -> Result<Place, ControlError> {
    let absolute = std::path::absolute(path)?;
    let volumes = daemons::volumes(context).unwrap_or_default();
    let mounts = mounts();
    // The name as it was given, and if that leads to no volume, the name without the links of today.
    for name in [&absolute, &resolve(&absolute)] {
        let innermost = mounts
            .iter()
            .filter(|mount| name.starts_with(&mount.on))
            .max_by_key(|mount| mount.on.as_os_str().len());
        let Some(mount) = innermost else {
            continue;
        };
        let found = on_volume(&volumes, mount)
            .filter(|(volume, _)| which.volume.as_ref().is_none_or(|name| name == volume))
            .filter(|found| which.partition.is_none() || found.1 == which.partition);
        if let Some((volume, partition)) = found {
            let below = name.strip_prefix(&mount.on).unwrap_or(name);
            return Ok(Place {
                volume,
                partition,
                inside: mount.root.join(below),
                named: path.to_path_buf(),
                top_level: mount.kind == "btrfs",
            });
        }
    }
    Ok(Place {
        volume: daemons::volume(context, which.volume.clone())?,
        partition: which.partition,
        inside: path.to_path_buf(),
        named: path.to_path_buf(),
        top_level: false,
    })
}

/// The volume that a mount shows, and the partition of it.
fn on_volume(volumes: &[VolumeInfo], mount: &Mount) -> Option<(String, Option<u32>)> {
    let device = std::fs::canonicalize(&mount.source).ok()?;
    volumes.iter().find_map(|volume| {
        let mapped = std::fs::canonicalize(&volume.mapped).ok()?;
        let partition = partition_of(&device, &mapped);
        let is = device == mapped || partition.is_some();
        is.then(|| (volume.name.clone(), partition))
    })
}

/// The name without links, as far as there is something by that name still.
fn resolve(absolute: &Path) -> PathBuf {
    for there in absolute.ancestors() {
        if let Ok(real) = std::fs::canonicalize(there) {
            let gone = absolute.strip_prefix(there).unwrap_or(Path::new(""));
            // The link itself is meant, not where it leads.
            if gone.as_os_str().is_empty()
                && absolute.is_symlink()
                && let (Some(parent), Some(name)) = (absolute.parent(), absolute.file_name())
                && let Ok(parent) = std::fs::canonicalize(parent)
            {
                return parent.join(name);
            }
            return real.join(gone);
        }
    }
    absolute.to_path_buf()
}

#[cfg(test)]
mod tests {
    use super::resolve;

    #[test]
    fn what_is_gone_is_resolved_as_far_as_it_goes() {
        let base = std::env::temp_dir().join(format!("varve-place-{}", std::process::id()));
        std::fs::create_dir_all(base.join("real")).unwrap();
        std::os::unix::fs::symlink("real", base.join("link")).unwrap();
        let base = std::fs::canonicalize(&base).unwrap();
        assert_eq!(
            resolve(&base.join("link/gone/too")),
            base.join("real/gone/too")
        );
        assert_eq!(resolve(&base.join("link")), base.join("link"));
        std::fs::remove_dir_all(&base).unwrap();
    }
}
