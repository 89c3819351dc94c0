//! What is built on what: partitions, LVM, md, dm-crypt and loop devices, from a mapped device upwards and from a path downwards.

use crate::Paths;
use crate::block::{is_busy, number_of, sysfs};
use crate::mounts::{Mount, mounts, nearest_mount, swaps};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

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
            let file = std::fs::read(disk.join("loop/backing_file"));
            left.extend(file.ok().and_then(|file| {
                number_under(Path::new(OsStr::from_bytes(file.trim_ascii_end())))
            }));
        }
        found.push(place);
    }
    found
}

/// The number of the device that a path is, or lies on.
fn number_under(path: &Path) -> Option<String> {
    let is_device = |metadata: std::fs::Metadata| metadata.file_type().is_block_device();
    match std::fs::metadata(path).is_ok_and(is_device) {
        true => number_of(path),
        false => nearest_mount(path)?.device(),
    }
}

/// Where file systems of a mapped device are mounted, of its partitions, or of what is built on them (LVM, md, dm-crypt): one place each.
#[must_use]
pub fn mounts_of(mapped: &str) -> Vec<PathBuf> {
    let parts = parts_of(mapped);
    let mut seen: Vec<String> = Vec::new();
    let mut places = Vec::new();
    let all = mounts();
    for (index, mount) in all.iter().enumerate() {
        if parts.iter().any(|part| is_of(mount, part))
            && !is_covered(&all, index)
            && !seen.contains(&mount.number)
        {
            seen.push(mount.number.clone());
            places.push(mount.on.clone());
        }
    }
    places
}

fn is_of(mount: &Mount, part: &Part) -> bool {
    mount.device().is_some_and(|device| device == part.number)
}

/// Whether another is mounted over it: by its name it cannot be reached.
fn is_covered(all: &[Mount], index: usize) -> bool {
    let mut later = all[index + 1..].iter();
    later.any(|later| later.on == all[index].on)
}

/// Whether freezing what is mounted at `places` leaves something of a mapped device in use: a file system in another namespace, a database without one; or
/// whether a file system has only a part of itself there. Swap space counts as nothing, what is mounted read-only as frozen. What cannot be told counts as yes.
#[must_use]
pub fn is_used_beside(mapped: &str, places: &[PathBuf]) -> bool {
    let all = mounts();
    let is_frozen = |(index, mount): &(usize, &Mount)| {
        mount.read_only || places.contains(&mount.on) && !is_covered(&all, *index)
    };
    let frozen = all.iter().enumerate().filter(is_frozen);
    let swaps = swaps();
    let swaps = swaps.iter().filter_map(|path| number_of(path));
    let known: Vec<String> = frozen
        .filter_map(|(_, mount)| mount.device())
        .chain(swaps)
        .collect();
    parts_of(mapped).iter().any(|part| {
        let is_used = || is_busy(&node(&part.name)).unwrap_or(true);
        part.is_elsewhere || part.is_last && !known.contains(&part.number) && is_used()
    })
}

/// A device, a partition of it, or what is built on these, by the kernel's name.
#[derive(Debug, PartialEq, Eq)]
struct Part {
    name: String,
    /// `MAJOR:MINOR`.
    number: String,
    /// Nothing else of the kernel's is built on it.
    is_last: bool,
    /// It is built on something else, too, or may be.
    is_elsewhere: bool,
}

fn parts_of(mapped: &str) -> Vec<Part> {
    let device = Path::new(mapped);
    let named = || Some(device.file_name()?.to_str()?.to_owned());
    let first = kernel_name(device).or_else(named);
    parts_under(Path::new("/sys/class/block"), first)
}

fn parts_under(class: &Path, first: Option<String>) -> Vec<Part> {
    let names = |folder: &Path| {
        let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.file_name().into_string().ok())
    };
    let mut found: Vec<Part> = Vec::new();
    let mut left: Vec<String> = first.into_iter().collect();
    while let Some(name) = left.pop() {
        if found.iter().any(|part| part.name == name) {
            continue;
        }
        let folder = class.join(&name);
        let before = left.len();
        left.extend(names(&folder.join("holders")));
        left.extend(names(&folder).filter(|part| folder.join(part).join("partition").exists()));
        let number = std::fs::read_to_string(folder.join("dev")).unwrap_or_default();
        found.push(Part {
            name,
            number: number.trim().to_owned(),
            is_last: left.len() == before,
            is_elsewhere: false,
        });
    }
    let all: Vec<String> = found.iter().map(|part| part.name.clone()).collect();
    for part in found.iter_mut().skip(1) {
        let mut under = names(&class.join(&part.name).join("slaves"));
        // bcache does not name its cache there.
        part.is_elsewhere =
            part.name.starts_with("bcache") || under.any(|under| !all.contains(&under));
    }
    found
}

/// What the kernel calls a device: `dm-0` for `/dev/mapper/vg-lv`.
fn kernel_name(node: &Path) -> Option<String> {
    let place = std::fs::read_link(sysfs(std::fs::metadata(node).ok()?.rdev())).ok()?;
    Some(place.file_name()?.to_str()?.to_owned())
}

/// Where the kernel's name is to be opened; it writes a slash as `!`.
fn node(name: &str) -> PathBuf {
    Path::new("/dev").join(name.replace('!', "/"))
}

#[cfg(test)]
mod tests {
    use super::parts_under;

    /// A disk with two partitions; on the second there is LVM with two volumes, on one of them dm-crypt.
    #[test]
    fn what_is_built_on_a_disk_belongs_to_it() {
        let class = std::env::temp_dir().join(format!("varve-class-{}", std::process::id()));
        for folder in [
            "sda/sda1/holders",
            "sda/sda2/holders",
            "sda/holders",
            "sda/queue",
            "sda1/holders",
            "sda2/holders/dm-0",
            "sda2/holders/dm-1",
            "dm-0/holders",
            "dm-1/holders/dm-2",
            "dm-2/holders",
            "dm-0/slaves/sda2",
            "dm-1/slaves/sda2",
            "dm-2/slaves/dm-1",
            "dm-2/slaves/sdb",
            "sdb/holders/dm-2",
        ] {
            std::fs::create_dir_all(class.join(folder)).unwrap();
        }
        for part in ["sda/sda1", "sda/sda2", "sda1", "sda2"] {
            std::fs::write(class.join(part).join("partition"), "1").unwrap();
        }
        let of = |name: &str| {
            let mut parts: Vec<(String, bool, bool)> = parts_under(&class, Some(name.to_owned()))
                .into_iter()
                .map(|part| (part.name, part.is_last, part.is_elsewhere))
                .collect();
            parts.sort();
            parts
        };
        let told = |parts: &[(&str, bool, bool)]| -> Vec<(String, bool, bool)> {
            let own = |part: &(&str, bool, bool)| (part.0.to_owned(), part.1, part.2);
            parts.iter().map(own).collect()
        };
        assert_eq!(
            of("sda"),
            told(&[
                ("dm-0", true, false),
                ("dm-1", false, false),
                ("dm-2", true, true),
                ("sda", false, false),
                ("sda1", true, false),
                ("sda2", false, false)
            ]),
            "dm-2 lies on another disk, too"
        );
        assert_eq!(
            of("sdb"),
            told(&[("dm-2", true, true), ("sdb", false, false)])
        );
        std::fs::remove_dir_all(class).unwrap();
    }
}
