//! Which keys a volume's history is encrypted with: a list beside it, so that a key that is missing is known before anything is begun that would want it.
//!
//! Order: a key is listed, durably, before the first file that wants it gets its name. Crash between the two: the list names one more than is used.

use crate::segment_file::key_of;
use crate::{StoreError, VolumeStore, durable};
use std::collections::BTreeSet;
use std::io::Write;
use std::path::Path;
use varve_format::Lsn;

const NAME: &str = "keys-used";

/// Keys, by their names.
pub(crate) type UsedKeys = BTreeSet<[u8; 16]>;

pub(crate) fn load(directory: &Path) -> UsedKeys {
    let text = std::fs::read_to_string(directory.join(NAME)).unwrap_or_default();
    let id = |line: &str| u128::from_str_radix(line, 16).ok().map(u128::to_be_bytes);
    text.lines().filter_map(id).collect()
}

impl VolumeStore {
    /// Lists what a new file is encrypted with, before it gets its name.
    pub(crate) fn note_key_of(&mut self, new: &Path) -> Result<(), StoreError> {
        let Some(id) = key_of(new).filter(|id| !self.used_keys.contains(id)) else {
            return Ok(());
        };
        let mut all = self.used_keys.clone();
        all.insert(id);
        let line = |id: &[u8; 16]| format!("{:032x}\n", u128::from_be_bytes(*id));
        let text: String = all.iter().map(line).collect();
        let path = self.directory().join(NAME);
        durable::create(&path, |file| {
            file.write_all(text.as_bytes())
                .map_err(StoreError::io(&path))
        })?;
        self.used_keys = all;
        Ok(())
    }

    /// Whether all that may be encrypted can be read, as far as keys go: by the list, and, should that be lost, by the newest segment below an LSN.
    pub fn refuse_without_key(&self, lsn: Lsn) -> Result<(), StoreError> {
        self.keys().have(&self.used_keys)?;
        let below = |segment: &&crate::StoredSegment| segment.settled && segment.lsn_start < lsn;
        let newest = self.segments().rev().find(below);
        match newest.and_then(|segment| key_of(&segment.path())) {
            Some(id) => self.keys().have(&UsedKeys::from([id])),
            None => Ok(()), // What is damaged is said when it is read.
        }
    }

    /// Whether what is settled is encrypted; an error if it should be and cannot.
    pub fn encrypts(&self) -> Result<bool, StoreError> {
        self.keys().wanted()
    }
}
