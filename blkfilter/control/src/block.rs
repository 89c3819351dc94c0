//! Block devices by number: where sysfs tells of them, and what lies on what.

use crate::Paths;
use crate::mounts::number_under;
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

/// The volume whose mapped device (or a partition of it) `path` is, or lies on, be it through LVM, md, dm-crypt or a loop device: its writes would be recorded
/// by that volume.
#[must_use]
pub fn mapped_volume_under(paths: &Paths, path: &Path) -> Option<String> {
    let under = devices_under(path);
    let links = std::fs::read_dir(paths.devices()).ok()?;
    links.flatten().find_map(|link| {
        let mapped = std::fs::canonicalize(link.path()).ok()?;
        let name = mapped.file_name()?;
        let is_under = |place: &PathBuf| place.components().any(|part| part.as_os_str() == name);
        let name_of = |link: std::fs::DirEntry| link.file_name().to_string_lossy().into_owned();
        under.iter().any(is_under).then(|| name_of(link))
    })
}

/// Where sysfs tells of the device that a path is, or lies on, and of all that is under it.
fn devices_under(path: &Path) -> Vec<PathBuf> {
    let mut left: Vec<String> = number_under(path).into_iter().collect();
    let mut found: Vec<PathBuf> = Vec::new();
    while let Some(number) = left.pop() {
        let place = std::fs::canonicalize(Path::new("/sys/dev/block").join(number));
        let Some(place) = place.ok().filter(|place| !found.contains(place)) else {
            continue;
        };
        let slaves = std::fs::read_dir(place.join("slaves"));
        for slave in slaves.into_iter().flatten().flatten() {
            let number = std::fs::read_to_string(slave.path().join("dev"));
            left.extend(number.map(|number| number.trim().to_owned()));
        }
        // A partition's disk is the directory around it.
        for disk in place.ancestors().take(2) {
            let file = std::fs::read_to_string(disk.join("loop/backing_file"));
            left.extend(
                file.ok()
                    .and_then(|file| number_under(Path::new(file.trim_end()))),
            );
        }
        found.push(place);
    }
    found
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
