//! What is mounted on this machine, as the kernel tells it.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// A mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Number of the file system: the same for all mounts of it.
    pub number: String,
    /// Which directory of the file system is mounted.
    pub root: PathBuf,
    /// Where.
    pub on: PathBuf,
    /// Kind of file system.
    pub kind: String,
    /// The device, as it was named to `mount`.
    pub source: PathBuf,
    /// Nothing writes to the file system, wherever it is mounted.
    pub read_only: bool,
}

impl Mount {
    fn parse(line: &str) -> Option<Mount> {
        let (left, right) = line.split_once(" - ")?;
        let (left, right): (Vec<&str>, Vec<&str>) =
            (left.split(' ').collect(), right.split(' ').collect());
        Some(Mount {
            number: (*left.get(2)?).to_owned(),
            root: unescaped(left.get(3)?),
            on: unescaped(left.get(4)?),
            kind: (*right.first()?).to_owned(),
            source: unescaped(right.get(1)?),
            read_only: right
                .get(2)
                .is_some_and(|options| options.split(',').any(|option| option == "ro")),
        })
    }

    fn is_of(&self, part: &Part) -> bool {
        self.device().is_some_and(|device| device == part.number)
    }

    /// The number of the device that it is of. Its own says that; or its source, of file systems that make up a number (btrfs).
    fn device(&self) -> Option<String> {
        match self.number.starts_with("0:") {
            true if self.source.is_absolute() => number_of(&self.source),
            true => None,
            false => Some(self.number.clone()),
        }
    }
}

/// All mounts that this process sees.
#[must_use]
pub fn mounts() -> Vec<Mount> {
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    table.lines().filter_map(Mount::parse).collect()
}

/// Where file systems of a mapped device are mounted, of its partitions, or of what is built on them (LVM, md, dm-crypt): one place each.
#[must_use]
pub fn mounts_of(mapped: &str) -> Vec<PathBuf> {
    let parts = parts_of(mapped);
    let mut seen: Vec<String> = Vec::new();
    let mut places = Vec::new();
    let all = mounts();
    for (index, mount) in all.iter().enumerate() {
        if parts.iter().any(|part| mount.is_of(part))
            && !is_covered(&all, index)
            && !seen.contains(&mount.number)
        {
            seen.push(mount.number.clone());
            places.push(mount.on.clone());
        }
    }
    places
}

/// Whether another is mounted over it: by its name it cannot be reached.
fn is_covered(all: &[Mount], index: usize) -> bool {
    let mut later = all[index + 1..].iter();
    later.any(|later| later.on == all[index].on)
}

/// The number of the file system that a path, or the nearest directory above it that exists, lies on; the same for all of its subvolumes.
#[must_use]
pub fn file_system_of(path: &Path) -> Option<String> {
    nearest_mount(path).map(|mount| mount.number)
}

/// The number of the device that a path is, or lies on.
pub(crate) fn number_under(path: &Path) -> Option<String> {
    let is_device = |metadata: std::fs::Metadata| metadata.file_type().is_block_device();
    match std::fs::metadata(path).is_ok_and(is_device) {
        true => number_of(path),
        false => nearest_mount(path)?.device(),
    }
}

/// The mount that a path, or the nearest directory above it that exists, lies on.
fn nearest_mount(path: &Path) -> Option<Mount> {
    let mut above = path.ancestors();
    let place = above.find_map(|above| std::fs::canonicalize(above).ok())?;
    let around = mounts().into_iter();
    let around = around.filter(|mount| place.starts_with(&mount.on));
    around.max_by_key(|mount| mount.on.components().count())
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
    let swaps = std::fs::read_to_string("/proc/swaps").unwrap_or_default();
    let swaps = swaps.lines().skip(1);
    let swaps = swaps.filter_map(|line| number_of(&unescaped(line.split_whitespace().next()?)));
    let known: Vec<String> = frozen
        .filter_map(|(_, mount)| mount.device())
        .chain(swaps)
        .collect();
    parts_of(mapped).iter().any(|part| {
        let is_used = || is_busy(&node(&part.name)).unwrap_or(true);
        part.is_elsewhere || part.is_last && !known.contains(&part.number) && is_used()
    })
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
    let place = Path::new("/sys/dev/block").join(number_of(node)?);
    let place = std::fs::read_link(place).ok()?;
    Some(place.file_name()?.to_str()?.to_owned())
}

/// `MAJOR:MINOR` of a device.
fn number_of(node: &Path) -> Option<String> {
    let number = std::fs::metadata(node).ok()?.rdev();
    let (major, minor) = (nix::sys::stat::major(number), nix::sys::stat::minor(number));
    (number != 0).then(|| format!("{major}:{minor}"))
}

/// Where the kernel's name is to be opened; it writes a slash as `!`.
fn node(name: &str) -> PathBuf {
    Path::new("/dev").join(name.replace('!', "/"))
}

/// The kernel writes a space as `\040`.
fn unescaped(text: &str) -> PathBuf {
    let bytes = text.as_bytes();
    let (mut out, mut at) = (Vec::new(), 0);
    while at < bytes.len() {
        let octal = text
            .get(at + 1..at + 4)
            .filter(|_| bytes[at] == b'\\')
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        out.push(octal.unwrap_or(bytes[at]));
        at += if octal.is_some() { 4 } else { 1 };
    }
    PathBuf::from(OsString::from_vec(out))
}

#[cfg(test)]
mod tests {
    use super::{Mount, parts_under, unescaped};
    use std::path::Path;

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

    #[test]
    fn names_of_the_kernel_are_read() {
        assert_eq!(unescaped(r"/mnt/a\040b\134c"), Path::new(r"/mnt/a b\c"));
        assert_eq!(unescaped(r"/mnt/\9"), Path::new(r"/mnt/\9"));
        assert_eq!(unescaped("/mnt/é\\"), Path::new("/mnt/é\\"));
    }

    #[test]
    fn a_line_of_the_table_is_understood() {
        let line = r"36 35 98:0 /sub /mnt/a\040b rw,noatime master:1 - ext3 /dev/root rw";
        let mount = Mount::parse(line).unwrap();
        assert_eq!(
            (mount.root.as_path(), mount.on.as_path()),
            (Path::new("/sub"), Path::new("/mnt/a b"))
        );
        assert_eq!(
            (mount.kind.as_str(), mount.source.as_path()),
            ("ext3", Path::new("/dev/root"))
        );
        assert_eq!(Mount::parse("36 35"), None);
    }
}
