//! Block devices by number: where sysfs tells of them, whether somebody has them to himself, and by which name they are found again.

use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// The sysfs directory of a block device, by its number.
#[must_use]
pub fn sysfs(number: u64) -> PathBuf {
    Path::new("/sys/dev/block").join(number_text(number))
}

/// `MAJOR:MINOR`.
fn number_text(number: u64) -> String {
    let (major, minor) = (nix::sys::stat::major(number), nix::sys::stat::minor(number));
    format!("{major}:{minor}")
}

/// `MAJOR:MINOR` of a device; none if it is none.
pub(crate) fn number_of(node: &Path) -> Option<String> {
    let number = std::fs::metadata(node).ok()?.rdev();
    (number != 0).then(|| number_text(number))
}

/// Whether somebody has a device to himself: it is mounted, or part of something.
pub fn is_busy(node: &Path) -> std::io::Result<bool> {
    const O_EXCL: i32 = 0o200;
    const EBUSY: i32 = 16;
    let exclusive = std::fs::File::options()
        .read(true)
        .custom_flags(O_EXCL)
        .open(node);
    match exclusive {
        Err(error) if error.raw_os_error() == Some(EBUSY) => Ok(true),
        other => other.map(|_| false),
    }
}

/// Whether two paths are (parts of) the same storage: one file, one device, or a partition and its disk.
#[must_use]
pub fn is_same_storage(left: &Path, right: &Path) -> bool {
    let (Ok(a), Ok(b)) = (std::fs::metadata(left), std::fs::metadata(right)) else {
        return std::path::absolute(left).ok() == std::path::absolute(right).ok();
    };
    if !a.file_type().is_block_device() || !b.file_type().is_block_device() {
        return a.dev() == b.dev() && a.ino() == b.ino();
    }
    let place = |metadata: &std::fs::Metadata| std::fs::canonicalize(sysfs(metadata.rdev()));
    match (place(&a), place(&b)) {
        (Ok(a), Ok(b)) => a.starts_with(&b) || b.starts_with(&a),
        _ => a.rdev() == b.rdev(),
    }
}

/// The path by which a device is found again after a reboot: kernel names change, these do not. A file keeps its path.
#[must_use]
pub fn lasting_path(path: &Path) -> PathBuf {
    let Ok(device) = std::fs::canonicalize(path) else {
        return path.to_path_buf();
    };
    if !std::fs::metadata(&device).is_ok_and(|m| m.file_type().is_block_device()) {
        return path.to_path_buf();
    }
    let name = device.file_name().unwrap_or_default();
    let mapper = Path::new("/sys/class/block").join(name).join("dm/name");
    if let Ok(text) = std::fs::read_to_string(mapper) {
        return Path::new("/dev/mapper").join(text.trim());
    }
    for kind in ["by-id", "by-partuuid", "by-path"] {
        let links = std::fs::read_dir(Path::new("/dev/disk").join(kind));
        let mut found: Vec<PathBuf> = links
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.path())
            .filter(|link| std::fs::canonicalize(link).is_ok_and(|path| path == device))
            .collect();
        found.sort();
        if let Some(link) = found.into_iter().next_back() {
            return link; // Among by-id: `wwn-…` sorts last.
        }
    }
    device
}
