//! What a device is, and who holds it, from sysfs and procfs.

use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use varve_control::{ControlError, sysfs};

/// Size and logical sector of a block device, from sysfs.
pub fn shape(metadata: &std::fs::Metadata) -> Result<(u64, u32), ControlError> {
    let directory = sysfs(metadata.rdev());
    let number = |name: &str| {
        std::fs::read_to_string(directory.join(name))
            .ok()
            .and_then(|text| text.trim().parse::<u64>().ok())
    };
    let sectors = number("size").ok_or_else(|| {
        ControlError::new(
            "V013-device",
            format!("{} has no size", directory.display()),
        )
    })?;
    let logical = number("queue/logical_block_size")
        .or_else(|| number("../queue/logical_block_size"))
        .unwrap_or(512);
    Ok((sectors * 512, logical as u32))
}

/// Names what holds the device, before the daemon's exclusive open would only say "busy".
pub fn refuse_in_use(device: &Path) -> Result<(), ControlError> {
    let metadata = std::fs::metadata(device)?;
    if !metadata.file_type().is_block_device() {
        return Ok(());
    }
    let busy = |what: String| {
        Err(ControlError::new(
            "V012-busy",
            format!("{} {what}", device.display()),
        ))
    };
    if let Some(place) = mounted_on(device).first() {
        return busy(format!(
            "is mounted on {place}. Unmount it (`umount {place}`), protect it, and mount the mapped device instead; or let it begin with the next boot: `varve protect --at-next-boot {}`",
            device.display()
        ));
    }
    refuse_used_parts(device)
}

/// Whether both lie on one disk.
pub fn same_disk(left: &Path, right: &Path) -> bool {
    let disk = |path: &Path| {
        let metadata = path.ancestors().find_map(|p| std::fs::metadata(p).ok())?;
        Some(if metadata.file_type().is_block_device() {
            metadata.rdev()
        } else {
            metadata.dev()
        })
    };
    disk(left).is_some() && disk(left) == disk(right)
}

/// Size of a device or file in bytes, if it is there.
pub fn size(path: &Path) -> Option<u64> {
    let metadata = std::fs::metadata(path).ok()?;
    if metadata.file_type().is_block_device() {
        shape(&metadata).ok().map(|shape| shape.0)
    } else {
        Some(metadata.len())
    }
}

/// Where the device is mounted.
pub fn mounted_on(device: &Path) -> Vec<String> {
    let Ok(metadata) = std::fs::metadata(device) else {
        return Vec::new();
    };
    let directory = sysfs(metadata.rdev());
    let number = directory.file_name().map(|name| name.to_string_lossy());
    let mounts = varve_control::mounts().into_iter();
    let ours =
        mounts.filter(|mount| mount.device() == number.as_ref().map(|name| name.to_string()));
    ours.map(|mount| mount.on.display().to_string()).collect()
}

/// For a device that may be mounted itself: refuses it if a part of it, or something that is built on it, is in use, or if it is swap.
pub fn refuse_used_parts(device: &Path) -> Result<(), ControlError> {
    let refuse = |what: String| {
        Err(ControlError::new(
            "V012-busy",
            format!("{} {what}. Nothing was changed", device.display()),
        ))
    };
    let swaps = varve_control::swaps();
    let is_swap = |path: &Path| {
        let mut swaps = swaps.iter();
        swaps.any(|swap| std::fs::canonicalize(swap).is_ok_and(|swap| swap == path))
    };
    if is_swap(device) {
        return refuse(format!(
            "is swap. `swapoff {}` first; swap itself is not worth protecting",
            device.display()
        ));
    }
    let Ok(metadata) = std::fs::metadata(device) else {
        return Ok(());
    };
    let directory = sysfs(metadata.rdev());
    let names = |path: PathBuf| {
        std::fs::read_dir(path)
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .collect::<Vec<_>>()
    };
    let holders = names(directory.join("holders"));
    if !holders.is_empty() {
        return refuse(format!(
            "belongs to {} (LVM, md or dm). Protect that device instead",
            holders.join(", ")
        ));
    }
    for part in names(directory.clone()) {
        if !directory.join(&part).join("partition").exists() {
            continue;
        }
        let path = Path::new("/dev").join(&part);
        let held = !names(directory.join(&part).join("holders")).is_empty();
        if held || is_swap(&path) || !mounted_on(&path).is_empty() {
            return refuse(format!(
                "is a disk of which {} is in use. Protect that partition instead",
                path.display()
            ));
        }
    }
    Ok(())
}

/// The number of a partition, if `path` is one of `disk`.
#[must_use]
pub fn partition_of(path: &Path, disk: &Path) -> Option<u32> {
    let number = |path: &Path| {
        let metadata = std::fs::metadata(path).ok()?;
        metadata
            .file_type()
            .is_block_device()
            .then(|| metadata.rdev())
    };
    let place = std::fs::canonicalize(sysfs(number(path)?)).ok()?;
    let parent = std::fs::canonicalize(sysfs(number(disk)?)).ok()?;
    if place.parent() != Some(parent.as_path()) {
        return None;
    }
    let text = std::fs::read_to_string(place.join("partition")).ok()?;
    text.trim().parse().ok()
}
