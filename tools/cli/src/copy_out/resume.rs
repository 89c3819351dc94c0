//! How far a copy to a file has come, beside the file: `FILE.varve-progress`. Everything below what it says is durably there.

use std::io::Write;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use varve_control::sysfs;
/// What is being copied: it never changes, and nothing else is named like this.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Name without white space: of a hot copy, or an instant of a volume.
    pub name: String,
    /// Its time, ns: names are used again.
    pub time_ns: i64,
    /// Its bytes.
    pub bytes: u64,
}

/// The record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resume {
    path: PathBuf,
    /// What is being copied.
    pub source: Identity,
    /// Which file or device is being written; `-`: it was not there yet.
    target: String,
    /// Bytes from the beginning that are done.
    pub done: u64,
}

fn path_of(target: &Path) -> PathBuf {
    let mut name = target.as_os_str().to_owned();
    name.push(".varve-progress");
    PathBuf::from(name)
}

/// Which file or device a path is now.
fn target_of(path: &Path) -> String {
    let Ok(metadata) = std::fs::metadata(path) else {
        return "-".to_owned();
    };
    match metadata.file_type().is_block_device() {
        true => {
            // A partition's number is its disk's.
            let place = sysfs(metadata.rdev());
            let places = ["diskseq", "../diskseq"].into_iter();
            let mut numbers =
                places.filter_map(|name| std::fs::read_to_string(place.join(name)).ok());
            let number = numbers.next().unwrap_or_default();
            format!("device:{}:{}", metadata.rdev(), number.trim())
        }
        false => {
            // A number may be used again once its file is gone.
            let born = metadata.created().ok();
            let born = born.and_then(|time| time.duration_since(std::time::UNIX_EPOCH).ok());
            let born = born.map_or(0, |born| born.as_nanos());
            format!("file:{}:{}:{born}", metadata.dev(), metadata.ino())
        }
    }
}

impl Resume {
    /// A record of a copy that begins.
    #[must_use]
    pub fn of(target: &Path, source: &Identity) -> Resume {
        Resume {
            path: path_of(target),
            source: source.clone(),
            target: target_of(target),
            done: 0,
        }
    }

    /// What an interrupted command left. Anything but a whole record is none: then all is copied.
    #[must_use]
    pub fn load(target: &Path) -> Option<Resume> {
        let path = path_of(target);
        let text = std::fs::read_to_string(&path).ok()?;
        let fields: Vec<&str> = text.split_whitespace().collect();
        let ["copy-2", name, time, bytes, is, done, "end"] = fields.as_slice() else {
            return None;
        };
        // Another one may have its name by now: what that holds is not ours.
        let now = target_of(target);
        if *is != now || now.ends_with(':') {
            return None;
        }
        Some(Resume {
            path,
            target: now,
            source: Identity {
                name: (*name).to_owned(),
                time_ns: time.parse().ok()?,
                bytes: bytes.parse().ok()?,
            },
            done: done.parse().ok()?,
        })
    }

    /// The same record, once the target is there.
    #[must_use]
    pub fn now(&self, target: &Path) -> Resume {
        Resume {
            target: target_of(target),
            ..self.clone()
        }
    }

    /// Notes that everything below is durably there.
    pub fn note(&self, done: u64) -> std::io::Result<()> {
        let mut new = self.path.clone().into_os_string();
        new.push(".new");
        // In a directory that others may write a link could lie there.
        let _ = std::fs::remove_file(&new);
        let mut options = std::fs::File::options();
        let mut file = options
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&new)?;
        writeln!(
            file,
            "copy-2 {} {} {} {} {done} end",
            self.source.name, self.source.time_ns, self.source.bytes, self.target
        )?;
        file.sync_all()?;
        std::fs::rename(&new, &self.path)
    }

    /// All is done.
    pub fn forget(&self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::{Identity, Resume};

    #[test]
    fn a_torn_record_is_none() {
        let target = std::env::temp_dir().join(format!("varve-resume-{}", std::process::id()));
        let copy = Identity {
            name: "hcp1".to_owned(),
            time_ns: 5,
            bytes: 4096,
        };
        let record = Resume::of(&target, &copy);
        record.note(1024).unwrap();
        let loaded = Resume::load(&target).unwrap();
        assert!(loaded.source == copy && loaded.done == 1024);
        // Another file took its name.
        std::fs::write(&target, "mine").unwrap();
        assert_eq!(Resume::load(&target), None);
        let record = record.now(&target);
        record.note(2048).unwrap();
        assert_eq!(Resume::load(&target).unwrap().done, 2048);
        let other = target.with_extension("other");
        std::fs::write(&other, "mine").unwrap();
        std::fs::rename(&other, &target).unwrap();
        assert_eq!(Resume::load(&target), None);
        std::fs::remove_file(&target).unwrap();
        let record = record.now(&target);
        record.note(1024).unwrap();
        let text = std::fs::read_to_string(&record.path).unwrap();
        for length in 0..text.len() - 1 {
            std::fs::write(&record.path, &text[..length]).unwrap();
            assert_eq!(Resume::load(&target), None, "{length}");
        }
        record.forget();
        assert_eq!(Resume::load(&target), None);
    }
}
