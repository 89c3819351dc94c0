//! Block devices by number: where sysfs tells of them, and what lies on what.

use crate::Paths;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// The sysfs directory of a block device, by its number.
#[must_use]
pub fn sysfs(number: u64) -> PathBuf {
    // The C library's layout of device numbers: 12 + 20 bits of major, 8 + 12 + 12 of minor.
    let major = ((number >> 8) & 0xfff) | ((number >> 32) & !0xfff);
    let minor = (number & 0xff) | ((number >> 12) & !0xff);
    PathBuf::from(format!("/sys/dev/block/{major}:{minor}"))
}

/// The volume whose mapped device (or a partition of it) `path` is, or lies on: its writes would be recorded by that volume.
#[must_use]
pub fn mapped_volume_under(paths: &Paths, path: &Path) -> Option<String> {
    // What is not there yet will lie where its directory does.
    let metadata = path.ancestors().find_map(|p| std::fs::metadata(p).ok())?;
    let number = if metadata.file_type().is_block_device() {
        metadata.rdev()
    } else {
        metadata.dev()
    };
    let place = std::fs::canonicalize(sysfs(number)).ok()?;
    let links = std::fs::read_dir(paths.devices()).ok()?;
    links.flatten().find_map(|link| {
        let mapped = std::fs::canonicalize(link.path()).ok()?;
        let name = mapped.file_name()?;
        let is_under = place.components().any(|part| part.as_os_str() == name);
        is_under.then(|| link.file_name().to_string_lossy().into_owned())
    })
}
