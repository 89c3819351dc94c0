//! What is mounted on this machine, as the kernel tells it.

use crate::block::number_of;
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
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

    /// The number of the device that it is of. Its own says that; or its source, of file systems that make up a number (btrfs).
    #[must_use]
    pub fn device(&self) -> Option<String> {
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

/// The number of the file system that a path, or the nearest directory above it that exists, lies on; the same for all of its subvolumes.
#[must_use]
pub fn file_system_of(path: &Path) -> Option<String> {
    nearest_mount(path).map(|mount| mount.number)
}

/// The mount that a path, or the nearest directory above it that exists, lies on.
pub(crate) fn nearest_mount(path: &Path) -> Option<Mount> {
    let mut above = path.ancestors();
    let place = above.find_map(|above| std::fs::canonicalize(above).ok())?;
    let around = mounts().into_iter();
    let around = around.filter(|mount| place.starts_with(&mount.on));
    around.max_by_key(|mount| mount.on.components().count())
}

/// The kernel writes a space as `\040`.
pub(crate) fn unescaped(text: &str) -> PathBuf {
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
