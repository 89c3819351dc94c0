//! How far a copy to a file has come, beside the file: `FILE.hcp-progress`. Everything below what it says is durably there.

use std::io::Write;
use std::path::{Path, PathBuf};
use varve_control::CopyInfo;

/// The record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resume {
    path: PathBuf,
    /// Name of the hot copy that is being copied.
    pub copy: String,
    created_ns: i64,
    bytes: u64,
    /// Bytes from the beginning that are done.
    pub done: u64,
}

fn path_of(target: &Path) -> PathBuf {
    let mut name = target.as_os_str().to_owned();
    name.push(".hcp-progress");
    PathBuf::from(name)
}

impl Resume {
    /// A record of a copy that begins.
    pub fn of(target: &Path, copy: &CopyInfo) -> Resume {
        Resume {
            path: path_of(target),
            copy: copy.name.clone(),
            created_ns: copy.created_ns,
            bytes: copy.bytes,
            done: 0,
        }
    }

    /// What an interrupted command left. Anything but a whole record is none: then all is copied.
    pub fn load(target: &Path) -> Option<Resume> {
        let path = path_of(target);
        let text = std::fs::read_to_string(&path).ok()?;
        let fields: Vec<&str> = text.split_whitespace().collect();
        let ["hcp-1", copy, created, bytes, done, "end"] = fields.as_slice() else {
            return None;
        };
        Some(Resume {
            path,
            copy: (*copy).to_owned(),
            created_ns: created.parse().ok()?,
            bytes: bytes.parse().ok()?,
            done: done.parse().ok()?,
        })
    }

    /// Whether it is of this hot copy, and not of another one that took its name.
    pub fn is_of(&self, copy: &CopyInfo) -> bool {
        self.copy == copy.name && self.created_ns == copy.created_ns && self.bytes == copy.bytes
    }

    /// Notes that everything below is durably there.
    pub fn note(&self, done: u64) -> std::io::Result<()> {
        let mut new = self.path.clone().into_os_string();
        new.push(".new");
        let mut file = std::fs::File::create(&new)?;
        writeln!(
            file,
            "hcp-1 {} {} {} {done} end",
            self.copy, self.created_ns, self.bytes
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
    use super::Resume;
    use varve_control::CopyInfo;

    #[test]
    fn a_torn_record_is_none() {
        let target = std::env::temp_dir().join(format!("hcp-resume-{}", std::process::id()));
        let copy = CopyInfo {
            name: "hcp1".to_owned(),
            created_ns: 5,
            bytes: 4096,
            ..CopyInfo::default()
        };
        let record = Resume::of(&target, &copy);
        record.note(1024).unwrap();
        let loaded = Resume::load(&target).unwrap();
        assert!(loaded.is_of(&copy) && loaded.done == 1024);
        let text = std::fs::read_to_string(&record.path).unwrap();
        for length in 0..text.len() - 1 {
            std::fs::write(&record.path, &text[..length]).unwrap();
            assert_eq!(Resume::load(&target), None, "{length}");
        }
        record.forget();
        assert_eq!(Resume::load(&target), None);
    }
}
