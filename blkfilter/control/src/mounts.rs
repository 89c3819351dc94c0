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
    fn parse(line: &[u8]) -> Option<Mount> {
        let middle = line.windows(3).position(|part| part == b" - ")?;
        let words = |part: &'_ [u8]| -> Vec<Vec<u8>> {
            part.split(|byte| *byte == b' ')
                .map(<[u8]>::to_vec)
                .collect()
        };
        let text = |word: &Vec<u8>| String::from_utf8_lossy(word).into_owned();
        let (left, right) = (words(&line[..middle]), words(&line[middle + 3..]));
        Some(Mount {
            number: text(left.get(2)?),
            root: unescaped(left.get(3)?),
            on: unescaped(left.get(4)?),
            kind: text(right.first()?),
            source: unescaped(right.get(1)?),
            read_only: right
                .get(2)
                .is_some_and(|options| options.split(|byte| *byte == b',').any(|o| o == b"ro")),
        })
    }

    /// The number of the device that it is of. Its own says that; or its source, of file systems that make up a number (btrfs).
    #[must_use]
    pub fn device(&self) -> Option<String> {
        match self.number.starts_with("0:") {
            // What a user's file system calls its source means nothing.
            true if self.source.is_absolute() && !self.kind.starts_with("fuse") => {
                number_of(&self.source)
            }
            true => None,
            false => Some(self.number.clone()),
        }
    }
}

/// All mounts that this process sees. Names are bytes: anybody may mount something on a directory whose name is no text.
#[must_use]
pub fn mounts() -> Vec<Mount> {
    let table = std::fs::read("/proc/self/mountinfo").unwrap_or_default();
    let lines = table.split(|byte| *byte == b'\n');
    lines.filter_map(Mount::parse).collect()
}

/// The devices and files that this machine swaps to.
#[must_use]
pub fn swaps() -> Vec<PathBuf> {
    let table = std::fs::read("/proc/swaps").unwrap_or_default();
    let lines = table.split(|byte| *byte == b'\n').skip(1);
    let first = |line: &[u8]| {
        let mut words = line.split(|byte| byte.is_ascii_whitespace());
        words.next().filter(|word| !word.is_empty()).map(unescaped)
    };
    lines.filter_map(first).collect()
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
fn unescaped(bytes: impl AsRef<[u8]>) -> PathBuf {
    let bytes = bytes.as_ref();
    let (mut out, mut at) = (Vec::new(), 0);
    while at < bytes.len() {
        let octal = bytes
            .get(at + 1..at + 4)
            .filter(|_| bytes[at] == b'\\')
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        out.push(octal.unwrap_or(bytes[at]));
        at += if octal.is_some() { 4 } else { 1 };
    }
    PathBuf::from(OsString::from_vec(out))
}

#[cfg(test)]
mod tests {
    use super::{Mount, unescaped};
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
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
        let mount = Mount::parse(line.as_bytes()).unwrap();
        assert_eq!(
            (mount.root.as_path(), mount.on.as_path()),
            (Path::new("/sub"), Path::new("/mnt/a b"))
        );
        assert_eq!(
            (mount.kind.as_str(), mount.source.as_path()),
            ("ext3", Path::new("/dev/root"))
        );
        assert_eq!(Mount::parse(b"36 35"), None);
    }
    /// Whoever may mount something may name the directory as he likes: that must cost nobody else's mounts.
    #[test]
    fn a_name_that_is_no_text_is_a_name() {
        let line = b"36 35 0:40 / /home/m/\xff\\040x rw - fuse.x m\xfe rw";
        let mount = Mount::parse(line).unwrap();
        assert_eq!(mount.on, Path::new(OsStr::from_bytes(b"/home/m/\xff x")));
        assert_eq!(mount.source, Path::new(OsStr::from_bytes(b"m\xfe")));
        assert!(!mount.read_only);
        let line = b"36 35 0:40 / /home/m rw - fuse.x /dev/null rw";
        assert_eq!(Mount::parse(line).unwrap().device(), None);
    }
}
