//! Settling: a sealed segment becomes a compressed one, in the same place and with the same addresses. In the same way one that was settled before the store
//! had keys becomes an encrypted one.
//!
//!   sealed file ──blocks──▶ zero? seen before? ──kept──▶ frames ──▶ N.new ──flush──▶ read back from the disk, against the root ──▶ N.seg
//!
//! Crash, step by step (the store's disk keeps what was flushed, nothing else): before the rename there is the sealed file, and a `.new` that the next
//! open removes; after it, before the directory is flushed, either of the two comes back whole; later the settled one. At no step does history depend
//! on a file that was not read back from the disk, because the sealed one goes with the rename.
//! It needs no lock of the store but for the rename. Images that have the sealed file open go on reading it.

use crate::segment::segment_path;
use crate::segment_file::{SegmentFile, is_plain};
use crate::settled_file::{self, Kept, root_of};
use crate::{Compression, StoreError, StoredSegment, VolumeKeys, VolumeStore, durable};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use varve_format::{BLOCK_BYTES, SETTLED_BYTES_MAX, SegmentSequence};

/// A segment to be settled.
pub struct SettleJob {
    segment: Arc<StoredSegment>,
    new: PathBuf,
    compression: Compression,
    /// While it is there, nobody deletes the history.
    lease: Arc<()>,
}

/// A segment that is compressed, and not flushed nor proved yet.
pub struct Settling {
    segment: Arc<StoredSegment>,
    written: File,
    /// What it was made of, still open, and the BLAKE3 of that.
    source: SegmentFile,
    root: [u8; 32],
    new: PathBuf,
    lease: Arc<()>,
}

/// A segment whose compressed form came back from the disk as it was.
pub struct Proved {
    segment: Arc<StoredSegment>,
    new: PathBuf,
    stored_bytes: u64,
    _lease: Arc<()>,
}

impl VolumeStore {
    /// The oldest segment that is not settled, but for those in `except`.
    #[must_use]
    pub fn next_to_settle(
        &self,
        compression: Compression,
        except: &dyn Fn(u64) -> bool,
    ) -> Option<SettleJob> {
        let fits = |segment: &&StoredSegment| {
            !segment.settled
                && segment.stored_bytes > 0
                && segment.data_bytes <= SETTLED_BYTES_MAX
                && !except(segment.sequence.0)
        };
        let sequence = self.segments().find(fits)?.sequence;
        Some(SettleJob {
            segment: Arc::clone(self.segment(sequence)?),
            new: durable::unfinished(&segment_path(self.directory(), sequence)),
            compression,
            lease: self.lease(),
        })
    }

    /// The next settled segment from `from` on that is not encrypted and should be, but for those in `except`; and below which all are encrypted. So many
    /// files are looked at; those that were given up (`except` has them, too) hold nothing up.
    pub fn next_to_encrypt(
        &self,
        compression: Compression,
        from: SegmentSequence,
        most: usize,
        except: &dyn Fn(u64) -> bool,
        given_up: &dyn Fn(u64) -> bool,
    ) -> Result<(Option<SettleJob>, SegmentSequence), StoreError> {
        if !self.keys().wanted()? {
            return Ok((None, from));
        }
        let (mut next, mut all) = (from, true);
        let behind = self.segments().filter(|segment| segment.sequence >= from);
        for segment in behind.take(most) {
            let path = segment.path();
            let plain = segment.settled && segment.stored_bytes > 0 && is_plain(&path);
            // One that is not settled yet may still get a plain file: that was on its way.
            all &= segment.settled && !plain || given_up(segment.sequence.0);
            if all {
                next = SegmentSequence(segment.sequence.0 + 1);
            }
            if plain && !except(segment.sequence.0) {
                let job = self.segment(segment.sequence).map(|segment| SettleJob {
                    segment: Arc::clone(segment),
                    new: durable::unfinished(&path),
                    compression,
                    lease: self.lease(),
                });
                return Ok((job, next));
            }
        }
        Ok((None, next))
    }

    /// Puts a settled segment into its place.
    pub fn replace(&mut self, proved: &Proved) -> Result<(), StoreError> {
        let sequence = proved.segment.sequence;
        let now = self.segment(sequence).map(|segment| segment.pruned_for);
        if now != Some(proved.segment.pruned_for) {
            let _ = std::fs::remove_file(&proved.new);
            return match now {
                Some(_) => Ok(()), // Pruned meanwhile, and settled with that.
                None => Err(StoreError::Missing(sequence)),
            };
        }
        self.name_proved(&proved.new, &proved.segment.path())?;
        self.replaced(sequence, proved.stored_bytes);
        Ok(())
    }
}

impl SettleJob {
    /// The segment.
    #[must_use]
    pub fn sequence(&self) -> u64 {
        self.segment.sequence.0
    }

    /// Bytes of the sealed segment.
    #[must_use]
    pub fn data_bytes(&self) -> u64 {
        self.segment.data_bytes
    }

    /// Compresses it into a new file, on so many threads.
    pub fn compress(self, threads: usize) -> Result<Settling, StoreError> {
        let source = SegmentFile::open(&self.segment)?;
        // Without them the blocks lie in the order of time.
        let entries = self.segment.entries().unwrap_or_default();
        let run = source.run()?;
        let count = self.segment.data_bytes / BLOCK_BYTES;
        let blocks: Vec<bool> = (0..count).map(|block| !source.is_gone(block)).collect();
        let kept = run.as_deref().map(|run| Kept {
            blocks: &blocks,
            run,
        });
        let (new, how) = (&self.new, (self.compression, threads));
        let written = settled_file::write(&source, &entries, new, how, kept.as_ref());
        let written = written.inspect_err(|_| {
            let _ = std::fs::remove_file(&self.new);
        })?;
        Ok(Settling {
            written,
            root: source.kept_root().unwrap_or(self.segment.root),
            source,
            segment: self.segment,
            new: self.new,
            lease: self.lease,
        })
    }
}

impl Settling {
    /// Flushes the new file, reads it from the disk, not from memory, and compares it with what was sealed.
    pub fn prove(self) -> Result<Proved, StoreError> {
        let new = self.new.as_path();
        let proof = read_back(&self.segment, &self.source, &self.root, self.written, new);
        let stored_bytes = proof.inspect_err(|_| {
            let _ = std::fs::remove_file(new);
        })?;
        Ok(Proved {
            segment: self.segment,
            new: self.new,
            stored_bytes,
            _lease: self.lease,
        })
    }
}

/// Proves what was written of `source`; gives its stored bytes.
fn read_back(
    segment: &StoredSegment,
    source: &SegmentFile,
    root: &[u8; 32],
    written: File,
    new: &Path,
) -> Result<u64, StoreError> {
    let (settled, stored_bytes) = from_the_disk(written, new, &segment.keys)?;
    let unproved = || StoreError::Proof(new.to_path_buf());
    let same_run = settled.run().ok() == source.run().ok();
    if root_of(&settled).map_err(|_| unproved())? == *root && same_run {
        return Ok(stored_bytes);
    }
    // Which of the two is wrong?
    match root_of(source)? == *root {
        true => Err(unproved()),
        false => Err(StoreError::Root(segment.sequence)),
    }
}

/// Flushes a file that was just written, and opens it so that it is read from the disk, not from memory; and its size.
pub(crate) fn from_the_disk(
    file: File,
    new: &Path,
    keys: &Arc<VolumeKeys>,
) -> Result<(SegmentFile, u64), StoreError> {
    file.sync_all().map_err(StoreError::io(new))?;
    // What is clean leaves memory, and all of it is clean: it was flushed.
    let _ = posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
    let stored_bytes = file.metadata().map_err(StoreError::io(new))?.len();
    let opened = SegmentFile::of(file, new, keys);
    let opened = opened.map_err(|_| StoreError::Proof(new.to_path_buf()))?;
    Ok((opened, stored_bytes))
}
