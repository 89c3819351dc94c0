//! Which keys a volume's history is encrypted with: a list beside it, so that a key that is missing is known before anything is begun that would want it.
//!
//! Order: a key is listed, durably, before the first file that wants it gets its name. Crash between the two: the list names one more than is used.

use crate::key_list::{self, KeyNames};
use crate::segment_file::key_of;
use crate::{StoreError, VolumeStore};
use std::path::Path;
use varve_format::Lsn;

pub(crate) const NAME: &str = "keys-used";

impl VolumeStore {
    /// Reads the list. What cannot be read, or names a key that nobody has, is asked of the segments themselves.
    pub(crate) fn load_used_keys(&mut self) {
        let path = self.directory().join(NAME);
        let why = match key_list::read(&path) {
            Ok((listed, whole)) => {
                self.used_keys = listed;
                let known = !matches!(self.keys().have(&self.used_keys), Err(StoreError::OtherKey));
                if whole && known {
                    return;
                }
                "it names what is no key of this store".to_owned()
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return,
            Err(error) => error.to_string(),
        };
        let of_segment = |segment: &crate::StoredSegment| key_of(&segment.path()).ok().flatten();
        let used: KeyNames = self.segments().filter_map(of_segment).collect();
        if used != self.used_keys {
            self.healed.push(format!(
                "{}: {why}. The keys were asked of the segments",
                path.display()
            ));
            self.used_keys = used;
        }
    }

    /// Lists what a new file is encrypted with, before it gets its name.
    pub(crate) fn note_key_of(&mut self, new: &Path) -> Result<(), StoreError> {
        let id = key_of(new).map_err(StoreError::io(new))?;
        let Some(id) = id.filter(|id| !self.used_keys.contains(id)) else {
            return Ok(());
        };
        let mut all = self.used_keys.clone();
        all.insert(id);
        key_list::write(&self.directory().join(NAME), &all)?;
        self.used_keys = all;
        Ok(())
    }

    /// Whether all that may be encrypted can be read, as far as keys go: by the list, and, should that be lost, by the newest segment below an LSN.
    pub fn refuse_without_key(&self, lsn: Lsn) -> Result<(), StoreError> {
        self.keys().have(&self.used_keys)?;
        let below = |segment: &&crate::StoredSegment| segment.settled && segment.lsn_start < lsn;
        let newest = self.segments().rev().find(below);
        match newest.and_then(|segment| key_of(&segment.path()).ok()?) {
            Some(id) => self.keys().have(&KeyNames::from([id])),
            None => Ok(()), // What is damaged is said when it is read.
        }
    }

    /// Whether what is settled is encrypted; an error if it should be and cannot.
    pub fn encrypts(&self) -> Result<bool, StoreError> {
        self.keys().wanted()
    }
}
