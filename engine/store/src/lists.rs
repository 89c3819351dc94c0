//! The small files beside a history, read again: the lists of kept instants, and of the keys that it is encrypted with. They are in memory for as long as
//! the history is open, so what has spoilt meanwhile is written anew.

use crate::scrub::Damage;
use crate::{VolumeStore, durable, kept, key_list, used_keys};
use std::io::ErrorKind;
use std::path::Path;
use varve_format::{FormatError, encode_kept, parse_kept};

impl VolumeStore {
    /// Compares the lists on the disk with what is in use, and writes anew what differs. Says what was wrong.
    #[must_use]
    pub fn mend_lists(&self) -> Vec<Damage> {
        self.mend_lists_in(self.directory())
    }

    /// The same with the lists of a copy of this history, in another directory.
    #[must_use]
    pub fn mend_lists_in(&self, directory: &Path) -> Vec<Damage> {
        let wrong = self.wrong_kept(directory).into_iter();
        let wrong = wrong.chain(self.wrong_used_keys(directory));
        wrong.map(|what| Damage::without_place(&what)).collect()
    }

    fn wrong_kept(&self, directory: &Path) -> Vec<String> {
        // What is not known cannot be written anew; that is said elsewhere.
        if self.kept_is_lost || self.lists_differ {
            return Vec::new();
        }
        let kept = self.kept();
        let (below, time) = (kept.below, kept.below_time);
        let right = encode_kept(self.volume().0, below, time, &kept.entries);
        let never_written = **kept == kept::KeptInstants::default();
        let mut wrong = Vec::new();
        for name in kept::NAMES {
            let path = directory.join(name);
            durable::forget_cached(&path);
            let why = match std::fs::read(&path) {
                Ok(bytes) if bytes == right => continue,
                Ok(bytes) => match parse_kept(&bytes) {
                    Err(error @ FormatError::Newer { .. }) => {
                        wrong.push(format!("{}: {error}. It is left as it is", path.display()));
                        continue;
                    }
                    Err(error) => error.to_string(),
                    Ok(_) => "it says something else than what is in use".to_owned(),
                },
                Err(error) if error.kind() == ErrorKind::NotFound && never_written => continue,
                Err(error) => error.to_string(),
            };
            wrong.push(mended(&path, &why, kept::write_one(&path, &right)));
        }
        wrong
    }

    fn wrong_used_keys(&self, directory: &Path) -> Option<String> {
        let path = directory.join(used_keys::NAME);
        durable::forget_cached(&path);
        let why = match key_list::read(&path) {
            Ok((listed, true)) if listed == self.used_keys => return None,
            Ok(_) => "it does not name the keys that are used".to_owned(),
            Err(error) if error.kind() == ErrorKind::NotFound && self.used_keys.is_empty() => {
                return None;
            }
            Err(error) => error.to_string(),
        };
        Some(mended(&path, &why, key_list::write(&path, &self.used_keys)))
    }
}

/// What is said of a file that was wrong and was to be written anew.
pub(crate) fn mended(path: &Path, why: &str, written: Result<(), crate::StoreError>) -> String {
    match written {
        Ok(()) => format!("{}: {why}. It was written anew", path.display()),
        Err(error) => format!(
            "{}: {why}. It could not be written anew: {error}",
            path.display()
        ),
    }
}
