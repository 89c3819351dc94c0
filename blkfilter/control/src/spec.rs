//! What lasts of a protected volume: one TOML file each.

use crate::ControlError;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::io::Write;
use std::path::{Path, PathBuf};

/// When a write is acknowledged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Ack {
    /// When the origin has completed it.
    #[default]
    Async,
    /// When origin and log hold it durably.
    Local,
}

/// How the mapped device is shown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FrontKind {
    /// ublk where the kernel has it, else the fallback.
    #[default]
    Auto,
    /// ublk.
    Ublk,
    /// FUSE file and loop device.
    Fuse,
}

/// A protected volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VolumeSpec {
    /// Short name; also the mapped device's.
    pub name: String,
    /// Volume ID, 32 hex digits.
    pub id: String,
    /// The origin, by a path that lasts.
    pub device: PathBuf,
    /// The log ring.
    pub log: PathBuf,
    /// The state file.
    pub state: PathBuf,
    /// Size in bytes when it was protected.
    pub bytes: u64,
    /// Logical sector.
    pub sector_bytes: u32,
    /// Size of a log segment.
    pub segment_bytes: u64,
    /// Segments in the ring.
    pub segment_count: u64,
    /// When writes are acknowledged.
    #[serde(default)]
    pub ack: Ack,
    /// How it is shown.
    #[serde(default)]
    pub front: FrontKind,
    /// Bytes that may be read again after a power cut, at most.
    #[serde(default = "default_resync_bytes_max")]
    pub resync_bytes_max: u64,
    /// No request waits for the log longer than this.
    #[serde(default = "default_log_wait_max_ms")]
    pub log_wait_max_ms: u64,
    /// Prepared while the device was mounted: protection begins with the first boot that is not this one (its boot ID).
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub begins_after_boot: String,
    /// Log or state file lie on another file system than this file: at a boot it may not be mounted yet, and what is missing is not made anew.
    #[serde(default)]
    pub apart: bool,
}

fn default_resync_bytes_max() -> u64 {
    512 << 20
}

fn default_log_wait_max_ms() -> u64 {
    250
}

/// Why a volume's file was refused.
#[derive(Debug)]
pub enum SpecError {
    /// It cannot be read or written.
    Io(PathBuf, std::io::Error),
    /// It is not what it should be.
    Invalid(PathBuf, String),
}

impl SpecError {
    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        match self {
            SpecError::Io(path, _) | SpecError::Invalid(path, _) => path,
        }
    }
}

impl fmt::Display for SpecError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SpecError::Io(path, error) => write!(f, "{}: {error}", path.display()),
            SpecError::Invalid(path, why) => write!(
                f,
                "{}: {why}. Correct it, or move it away (its device is a plain disk)",
                path.display()
            ),
        }
    }
}

impl std::error::Error for SpecError {}

impl VolumeSpec {
    /// Whether `name` can be a volume's: it becomes part of paths.
    #[must_use]
    pub fn is_valid_name(name: &str) -> bool {
        !name.is_empty()
            && name.len() <= 64
            && !name.starts_with(['.', '-'])
            && name
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
    }

    fn check(&self) -> Result<(), String> {
        if !VolumeSpec::is_valid_name(&self.name) {
            return Err(format!(
                "the name {:?} may hold letters, digits, '-', '_' and '.' only",
                self.name
            ));
        }
        if self.id.len() != 32 || !self.id.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err("`id` must be 32 hex digits".to_owned());
        }
        if !matches!(self.sector_bytes, 512 | 4096) {
            return Err("`sector_bytes` must be 512 or 4096".to_owned());
        }
        if self.segment_bytes < 1 << 20
            || !self.segment_bytes.is_multiple_of(4096)
            || !(6..=4096).contains(&self.segment_count)
        {
            return Err("`segment_bytes` must be at least 1 MiB and a multiple of 4096, `segment_count` from 6 to 4096".to_owned());
        }
        Ok(())
    }
}

/// Reads all volumes' files; each bad one is reported on its own.
#[must_use]
pub fn load_specs(directory: &Path) -> Vec<Result<VolumeSpec, SpecError>> {
    let Ok(entries) = std::fs::read_dir(directory) else {
        return Vec::new();
    };
    let mut paths: Vec<PathBuf> = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|e| e == "toml"))
        .collect();
    paths.sort();
    paths.into_iter().map(load).collect()
}

fn load(path: PathBuf) -> Result<VolumeSpec, SpecError> {
    let text = std::fs::read_to_string(&path).map_err(|e| SpecError::Io(path.clone(), e))?;
    let spec: VolumeSpec =
        toml::from_str(&text).map_err(|e| SpecError::Invalid(path.clone(), e.to_string()))?;
    spec.check().map_err(|why| SpecError::Invalid(path, why))?;
    Ok(spec)
}

/// Writes a volume's file, durably.
pub fn save_spec(directory: &Path, spec: &VolumeSpec) -> Result<(), SpecError> {
    let path = directory.join(format!("{}.toml", spec.name));
    spec.check()
        .map_err(|why| SpecError::Invalid(path.clone(), why))?;
    save_toml(directory, &spec.name, spec)
}

/// Notes a volume that is protected no more, so that its history is found: under its ID, because its name is free again.
pub fn save_former(directory: &Path, spec: &VolumeSpec) -> Result<(), SpecError> {
    save_toml(directory, &spec.id, spec)
}

/// The volume that is protected no more and had this name, or has this ID.
pub fn find_former(directory: &Path, name: &str) -> Result<VolumeSpec, ControlError> {
    let mut known = load_specs(directory);
    known.retain(|spec| {
        spec.as_ref()
            .is_ok_and(|spec| spec.name == name || spec.id == name)
    });
    let mut known: Vec<VolumeSpec> = known.into_iter().flatten().collect();
    match (known.pop(), known.as_slice()) {
        (Some(only), []) => Ok(only),
        (Some(last), others) => {
            let ids = others.iter().chain([&last]).map(|spec| spec.id.as_str());
            let ids: Vec<&str> = ids.collect();
            let message = format!(
                "several volumes were named {name}: say the ID of one of them: {}",
                ids.join(", ")
            );
            Err(ControlError::new("V031-which", message))
        }
        (None, _) => Err(ControlError::new(
            "V019-unknown",
            format!(
                "no volume is named {name}, and none that was has a history; `varve status` lists them"
            ),
        )),
    }
}

/// Writes a file that lasts, durably: a new file, flushed, renamed over the old one, the directory flushed.
pub(crate) fn save_toml<T: Serialize>(
    directory: &Path,
    name: &str,
    value: &T,
) -> Result<(), SpecError> {
    let path = directory.join(format!("{name}.toml"));
    let text =
        toml::to_string(value).map_err(|e| SpecError::Invalid(path.clone(), e.to_string()))?;
    let write = || {
        std::fs::create_dir_all(directory)?;
        let new = directory.join(format!(".{name}.new"));
        let mut file = std::fs::File::create(&new)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        std::fs::rename(&new, &path)?;
        std::fs::File::open(directory)?.sync_all()
    };
    write().map_err(|e| SpecError::Io(path.clone(), e))
}
