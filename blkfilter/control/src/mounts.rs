//! What is mounted on this machine, as the kernel tells it.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::OpenOptionsExt;
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
        })
    }
}

/// All mounts that this process sees.
#[must_use]
pub fn mounts() -> Vec<Mount> {
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    table.lines().filter_map(Mount::parse).collect()
}

/// Where file systems of a mapped device (or of its partitions) are mounted: one place each.
#[must_use]
pub fn mounts_of(mapped: &str) -> Vec<PathBuf> {
    let Some(name) = Path::new(mapped).file_name().and_then(|name| name.to_str()) else {
        return Vec::new();
    };
    let mut seen: Vec<String> = Vec::new();
    let mut places = Vec::new();
    let all = mounts();
    for (index, mount) in all.iter().enumerate() {
        // What another is mounted over cannot be reached by its name.
        let covered = all[index + 1..].iter().any(|later| later.on == mount.on);
        if is_part(name, &mount.source) && !seen.contains(&mount.number) && !covered {
            seen.push(mount.number.clone());
            places.push(mount.on.clone());
        }
    }
    places
}

/// How many partitions of a device are mounted, or held by somebody.
#[must_use]
pub fn busy_parts(mapped: &str) -> usize {
    const O_EXCL: i32 = 0o200;
    const EBUSY: i32 = 16;
    let is_busy = |number: &u32| {
        let node = format!("{mapped}p{number}");
        let exclusive = std::fs::File::options()
            .read(true)
            .custom_flags(O_EXCL)
            .open(node);
        exclusive.is_err_and(|error| error.raw_os_error() == Some(EBUSY))
    };
    (1..=128).filter(is_busy).count()
}

/// Whether a device or one of its partitions has something built on it: LVM, md, dm-crypt.
#[must_use]
pub fn has_holders(mapped: &str) -> bool {
    let Some(name) = Path::new(mapped).file_name().and_then(|name| name.to_str()) else {
        return false;
    };
    let directory = Path::new("/sys/class/block").join(name);
    let holds = |directory: &Path| {
        std::fs::read_dir(directory.join("holders"))
            .is_ok_and(|mut holders| holders.next().is_some())
    };
    let parts = std::fs::read_dir(&directory)
        .into_iter()
        .flatten()
        .flatten();
    holds(&directory) || parts.into_iter().any(|part| holds(&part.path()))
}

/// Whether `source` is the disk called `name`, or a partition of it.
fn is_part(name: &str, source: &Path) -> bool {
    let Ok(path) = std::fs::canonicalize(source) else {
        return false;
    };
    let node = path.file_name().and_then(|node| node.to_str());
    let Some(rest) = node.and_then(|node| node.strip_prefix(name)) else {
        return false;
    };
    let is_number = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    rest.is_empty() || rest.strip_prefix('p').is_some_and(is_number)
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
    use super::{Mount, unescaped};
    use std::path::Path;

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
