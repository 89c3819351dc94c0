//! Which volume a name is on, and where within it.

use crate::{Context, daemons};
use clap::Args;
use std::path::{Path, PathBuf};
use varve_cli::device::partition_of;
use varve_control::{ControlError, mounts};

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

/// A mount of a volume on this machine.
struct Mounted {
    on: PathBuf,
    /// Which directory of the file system is mounted.
    root: PathBuf,
    is_btrfs: bool,
    volume: String,
    partition: Option<u32>,
}

/// Finds it: on a volume that is mounted on this machine, or in the file system of the volume that is named.
pub fn find(context: &Context, which: &Which, path: &Path) -> Result<Place, ControlError> {
    let real = resolve(path);
    let mounts = mounted(context);
    let fits = |mounted: &&Mounted| {
        real.starts_with(&mounted.on)
            && which
                .volume
                .as_ref()
                .is_none_or(|name| *name == mounted.volume)
            && which
                .partition
                .is_none_or(|number| mounted.partition == Some(number))
    };
    if let Some(mounted) = mounts
        .iter()
        .filter(fits)
        .max_by_key(|mounted| mounted.on.as_os_str().len())
    {
        let below = real.strip_prefix(&mounted.on).unwrap_or(&real);
        return Ok(Place {
            volume: mounted.volume.clone(),
            partition: mounted.partition,
            inside: mounted.root.join(below),
            named: path.to_path_buf(),
            top_level: mounted.is_btrfs,
        });
    }
    Ok(Place {
        volume: daemons::volume(context, which.volume.clone())?,
        partition: which.partition,
        inside: path.to_path_buf(),
        named: path.to_path_buf(),
        top_level: false,
    })
}

/// The name without links, as far as there is something by that name still.
fn resolve(path: &Path) -> PathBuf {
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf());
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
    absolute
}

fn mounted(context: &Context) -> Vec<Mounted> {
    let volumes = daemons::volumes(context).unwrap_or_default();
    let mut all = Vec::new();
    for mount in mounts() {
        let Ok(device) = std::fs::canonicalize(&mount.source) else {
            continue;
        };
        for volume in &volumes {
            let Ok(mapped) = std::fs::canonicalize(&volume.mapped) else {
                continue;
            };
            let partition = partition_of(&device, &mapped);
            if device == mapped || partition.is_some() {
                all.push(Mounted {
                    on: mount.on.clone(),
                    root: mount.root.clone(),
                    is_btrfs: mount.kind == "btrfs",
                    volume: volume.name.clone(),
                    partition,
                });
            }
        }
    }
    all
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
