//! What lasts of a volume's hot copies: one TOML file per volume, which also says when they are valid no more.

use crate::spec::save_toml;
use crate::{Paths, SpecError};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// The hot copies of a volume; all of them share one spool.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CopySet {
    /// Name of the volume.
    pub volume: String,
    /// Its ID.
    pub volume_id: String,
    /// Its size when the first copy was made.
    pub volume_bytes: u64,
    /// Where what is overwritten goes: a file or a device.
    pub spool: PathBuf,
    /// Random name of the spool, 32 hex digits.
    pub spool_id: String,
    /// Its extents of 256 KiB.
    pub extents: u64,
    /// No copy had a higher generation.
    pub generation_last: u32,
    /// The copies.
    #[serde(default)]
    pub copies: Vec<CopySpec>,
}

/// One hot copy.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CopySpec {
    /// Its name.
    pub name: String,
    /// Its number among the volume's copies; later ones have higher ones.
    pub generation: u32,
    /// When it was cut: nanoseconds since 1970.
    pub created_ns: i64,
    /// The volume's LSN at the cut: the same instant in its history.
    pub lsn: u64,
    /// How long file systems were frozen for it, in microseconds; 0: they were not.
    pub frozen_us: u64,
    /// It survives a power cut.
    pub persist: bool,
    /// It can be written to.
    pub writable: bool,
    /// Why it is valid no more; empty: it is. Durable before anything is overwritten that a copy lacks which must last.
    #[serde(default)]
    pub lost: String,
}

impl CopySet {
    /// The set of a volume, if it has one. What cannot be read is said and left out.
    #[must_use]
    pub fn load(paths: &Paths, volume: &str) -> Option<CopySet> {
        let path = paths.copy_sets().join(format!("{volume}.toml"));
        let text = std::fs::read_to_string(&path).ok()?;
        match toml::from_str(&text) {
            Ok(set) => Some(set),
            Err(error) => {
                eprintln!("{}: {error}", path.display());
                None
            }
        }
    }

    /// Writes it, durably; a set without copies goes away.
    pub fn save(&self, paths: &Paths) -> Result<(), SpecError> {
        if self.copies.is_empty() {
            let path = paths.copy_sets().join(format!("{}.toml", self.volume));
            return match std::fs::remove_file(&path) {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
                removed => removed
                    .and_then(|()| std::fs::File::open(paths.copy_sets())?.sync_all())
                    .map_err(|error| SpecError::Io(path, error)),
            };
        }
        save_toml(&paths.copy_sets(), &self.volume, self)
    }
}

/// A hot copy that is asked for.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct NewCopy {
    /// Name of the volume.
    pub volume: String,
    /// Name of the copy; empty: the daemon chooses.
    #[serde(default)]
    pub name: String,
    /// Where what is overwritten goes: a directory or a device; none: the daemon's own place.
    pub store: Option<PathBuf>,
    /// Size of a new spool in bytes; 0: the daemon chooses.
    #[serde(default)]
    pub store_bytes: u64,
    /// Per cent of the store that stay free.
    pub quota: u32,
}

/// A hot copy as its daemon sees it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct CopyInfo {
    /// Its name.
    pub name: String,
    /// The volume.
    pub volume: String,
    /// The origin.
    pub device: String,
    /// The volume's mapped device.
    pub mapped: String,
    /// The copy's own block device; empty: it is not shown.
    pub copy: String,
    /// The spool.
    pub store: String,
    /// Its size.
    pub store_bytes: u64,
    /// What of it is free.
    pub store_free_bytes: u64,
    /// Size of the copy.
    pub bytes: u64,
    /// When it was cut: nanoseconds since 1970.
    pub created_ns: i64,
    /// The volume's LSN at the cut.
    pub lsn: u64,
    /// How long file systems were frozen for it, in microseconds; 0: they were not.
    pub frozen_us: u64,
    /// What was overwritten on the device since.
    pub changed_bytes: u64,
    /// It survives a power cut.
    pub persist: bool,
    /// It can be written to.
    pub writable: bool,
    /// Why it is valid no more; empty: it is.
    pub lost: String,
    /// What there is to know: why nothing was frozen, say.
    pub note: String,
}
