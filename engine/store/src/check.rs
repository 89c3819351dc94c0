//! What is remembered beside the history: the last comparison of the device with it, and how far a scrub has come. Lines of numbers, replaced at once.

use crate::{StoreError, VolumeStore};
use varve_format::SegmentSequence;

const NAME: &str = "last-check";
const SCRUB: &str = "scrub";

/// When device and history were compared last, and what came of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Check {
    /// Wall time, nanoseconds.
    pub time_ns: i64,
    /// The history was taken up to here.
    pub lsn: u64,
    /// Bytes that differed.
    pub differing_bytes: u64,
}

impl VolumeStore {
    /// The last check that was noted. What cannot be read counts as none.
    #[must_use]
    pub fn last_check(&self) -> Option<Check> {
        let text = std::fs::read_to_string(self.directory().join(NAME)).ok()?;
        let mut words = text.split_whitespace();
        Some(Check {
            time_ns: words.next()?.parse().ok()?,
            lsn: words.next()?.parse().ok()?,
            differing_bytes: words.next()?.parse().ok()?,
        })
    }

    /// Notes a check.
    pub fn note_check(&self, check: &Check) -> Result<(), StoreError> {
        let path = self.directory().join(NAME);
        let new = path.with_extension("new");
        let text = format!(
            "{} {} {}\n",
            check.time_ns, check.lsn, check.differing_bytes
        );
        std::fs::write(&new, text).map_err(StoreError::io(&new))?;
        std::fs::rename(&new, &path).map_err(StoreError::io(&path))
    }

    /// The segment that a scrub which was broken off would have read next.
    #[must_use]
    pub fn scrub_position(&self) -> Option<SegmentSequence> {
        let text = std::fs::read_to_string(self.directory().join(SCRUB)).ok()?;
        text.trim().parse().ok().map(SegmentSequence)
    }

    /// Notes how far a scrub has come; `None`: to the end.
    pub fn note_scrub(&self, next: Option<SegmentSequence>) -> Result<(), StoreError> {
        let path = self.directory().join(SCRUB);
        let written = match next {
            Some(next) => std::fs::write(&path, format!("{}\n", next.0)),
            None => match std::fs::remove_file(&path) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
                _ => Ok(()),
            },
        };
        written.map_err(StoreError::io(&path))
    }
}
