//! The instants that are kept of a pruned history, as the store holds them: below a limit only these resolve.
//!
//! Two files, written one after the other, with the same content: what one crash or one bad sector takes, the other has. If both are lost the pruned
//! segments still say up to where nothing resolves without them.
//!
//! Order: an instant is struck from the list, durably, before anything is deleted that only it needed. Crash between the two: the list is shorter than
//! what is there, and pruning goes on from it.

use crate::{StoreError, durable};
use std::io::Write;
use std::path::Path;
use varve_format::{KeptEntry, Lsn, VolumeId, WallTime, encode_kept, parse_kept};

pub(crate) const NAMES: [&str; 2] = ["kept", "kept-copy"];
/// More than a policy can name.
const KEPT_FILE_BYTES_MAX: u64 = 512 << 20;

/// What is kept.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KeptInstants {
    /// Below this only the instants that are listed resolve.
    pub below: Lsn,
    /// Its time.
    pub below_time: WallTime,
    /// In LSN order. Those that are pinned may lie above the limit, too.
    pub entries: Vec<KeptEntry>,
}

impl KeptInstants {
    /// Whether `lsn` is one of them, or above the limit.
    #[must_use]
    pub fn resolves(&self, lsn: Lsn) -> bool {
        lsn >= self.below || self.index_of(lsn).is_ok()
    }

    fn index_of(&self, lsn: Lsn) -> Result<usize, usize> {
        self.entries.binary_search_by_key(&lsn, KeptEntry::lsn)
    }

    /// An instant of the list.
    #[must_use]
    pub fn get(&self, lsn: Lsn) -> Option<&KeptEntry> {
        self.entries.get(self.index_of(lsn).ok()?)
    }

    /// The nearest that resolve before and after an instant that does not.
    #[must_use]
    pub fn around(&self, lsn: Lsn) -> (Option<Lsn>, Lsn) {
        let index = self.index_of(lsn).unwrap_or_else(|index| index);
        let before = index.checked_sub(1).map(|index| self.entries[index].lsn());
        let after = self.entries.get(index).map_or(self.below, KeptEntry::lsn);
        (before, after.min(self.below))
    }

    /// The first instant that resolves, if anything was pruned.
    #[must_use]
    pub fn first(&self) -> Option<Lsn> {
        let first = self.entries.first().map_or(self.below, KeptEntry::lsn);
        (self.below > Lsn(0)).then_some(first.min(self.below))
    }

    /// The newest that is not newer than `time`, among those below the limit.
    #[must_use]
    pub fn at_time(&self, time: WallTime) -> Option<&KeptEntry> {
        // A clock may have been wrong between two: they need not be in the order of time.
        let below = self.entries.iter().filter(|entry| entry.lsn() < self.below);
        let not_newer = below.filter(|entry| entry.time() <= time);
        not_newer.max_by_key(|entry| (entry.time(), entry.lsn()))
    }

    /// Reads the list of a volume. An error is in words; what can be known is what the other file says, or nothing.
    pub(crate) fn load(directory: &Path, volume: VolumeId) -> (Option<KeptInstants>, Vec<String>) {
        let mut problems = Vec::new();
        let mut newest: Option<KeptInstants> = None;
        let mut missing = Vec::new();
        for name in NAMES {
            let path = directory.join(name);
            let bounded = |path: &Path| {
                let length = std::fs::metadata(path)?.len();
                match length > KEPT_FILE_BYTES_MAX {
                    true => Err(std::io::Error::other(format!(
                        "{length} bytes are too many"
                    ))),
                    false => std::fs::read(path),
                }
            };
            let bytes = match bounded(&path) {
                Ok(bytes) => bytes,
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                    missing.push(path);
                    continue;
                }
                Err(error) => {
                    problems.push(format!("{}: {error}", path.display()));
                    continue;
                }
            };
            match parse_kept(&bytes) {
                Ok((header, _)) if header.volume != volume.0 => {
                    problems.push(format!("{}: it is another volume's", path.display()));
                }
                Ok((header, entries)) => {
                    let found = KeptInstants {
                        below: Lsn(header.pruned_below.get()),
                        below_time: WallTime(header.pruned_below_time.get()),
                        entries: entries.to_vec(),
                    };
                    // The first is written first: where they differ it is the newer one.
                    match &newest {
                        Some(first) if *first != found => {
                            problems
                                .push(format!("{}: it is older than the other", path.display()));
                        }
                        Some(_) => {}
                        None => newest = Some(found),
                    }
                }
                Err(error) => problems.push(format!("{}: {error}", path.display())),
            }
        }
        if newest.is_some() {
            problems.extend(
                missing
                    .iter()
                    .map(|path| format!("{} is missing", path.display())),
            );
        }
        (newest, problems)
    }

    /// Writes it, durably, twice.
    pub(crate) fn write(&self, directory: &Path, volume: VolumeId) -> Result<(), StoreError> {
        let bytes = encode_kept(volume.0, self.below, self.below_time, &self.entries);
        for name in NAMES {
            write_one(&directory.join(name), &bytes)?;
        }
        Ok(())
    }
}

/// Writes one of the files, durably.
pub(crate) fn write_one(path: &Path, bytes: &[u8]) -> Result<(), StoreError> {
    durable::create(path, |file| {
        file.write_all(bytes).map_err(StoreError::io(path))
    })
}
