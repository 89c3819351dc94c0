//! A stored segment, as the store keeps it in memory: what its run says of it, without its records.

use crate::segment_file::{SegmentFile, key_of};
use crate::{StoreError, VolumeKeys, run_file};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use varve_format::{EpochId, Lsn, RunEntry, RunHeader, SegmentSequence, VolumeId, WallTime};

/// A segment at rest.
#[derive(Clone, Debug)]
pub struct StoredSegment {
    directory: Arc<Path>,
    /// What it may be encrypted with.
    pub(crate) keys: Arc<VolumeKeys>,
    /// The volume.
    pub volume: VolumeId,
    /// Its number.
    pub sequence: SegmentSequence,
    /// Its epoch.
    pub epoch: EpochId,
    /// LSN of its first record.
    pub lsn_start: Lsn,
    /// LSN after its last record.
    pub lsn_end: Lsn,
    /// Where history ended before it.
    pub previous_lsn_end: Lsn,
    /// Time of its first entry.
    pub time_start: WallTime,
    /// Time of its last entry.
    pub time_end: WallTime,
    /// Bytes of the sealed segment before its footer.
    pub data_bytes: u64,
    /// BLAKE3 of them.
    pub root: [u8; 32],
    /// Size of the volume.
    pub volume_bytes: u64,
    /// Logical sector of the volume.
    pub sector_bytes: u32,
    /// Entries of its run.
    pub entry_count: u64,
    /// Bytes that were written to the volume in it.
    pub payload_bytes: u64,
    /// Spans, gaps and points in it.
    pub events: Arc<[RunEntry]>,
    /// Size of its file as it is stored.
    pub stored_bytes: u64,
    /// It is compressed.
    pub settled: bool,
    /// Which instants it was pruned for: a hash of them; 0: it was not.
    pub pruned_for: u64,
    /// The first of them behind it.
    pub pruned_until: Lsn,
    /// When the store took it, by the store's own clock: it ages by this.
    pub stored_at: WallTime,
}

impl StoredSegment {
    pub(crate) fn new(
        (directory, keys): (&Arc<Path>, &Arc<VolumeKeys>),
        run: &RunHeader,
        events: Vec<RunEntry>,
        stored_bytes: u64,
    ) -> StoredSegment {
        let sealed_bytes = run
            .data_bytes
            .get()
            .saturating_add(varve_format::SEGMENT_FOOTER_BYTES as u64);
        StoredSegment {
            directory: Arc::clone(directory),
            keys: Arc::clone(keys),
            volume: VolumeId(run.volume),
            sequence: run.sequence(),
            epoch: run.epoch(),
            lsn_start: run.lsn_start(),
            lsn_end: run.lsn_end(),
            previous_lsn_end: Lsn(run.previous_lsn_end.get()),
            time_start: run.time_start(),
            time_end: run.time_end(),
            data_bytes: run.data_bytes.get(),
            root: run.root,
            volume_bytes: run.volume_bytes.get(),
            sector_bytes: run.sector_bytes.get(),
            entry_count: run.entry_count.get(),
            payload_bytes: run.payload_bytes.get(),
            events: events.into(),
            stored_bytes,
            settled: stored_bytes != sealed_bytes,
            pruned_for: run.pruned_for.get(),
            pruned_until: Lsn(run.pruned_until.get()),
            stored_at: WallTime(run.stored_at.get()),
        }
    }

    /// Its file.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        segment_path(&self.directory, self.sequence)
    }

    /// Whether its file is encrypted, by its first block.
    #[must_use]
    pub fn is_encrypted(&self) -> bool {
        key_of(&self.path()).is_ok_and(|key| key.is_some())
    }

    pub(crate) fn run_path(&self) -> PathBuf {
        run_path(&self.directory, self.sequence)
    }

    /// Its records, without intents and checkpoints, in LSN order; read from its run, or from itself if that is lost.
    pub fn entries(&self) -> Result<Vec<RunEntry>, StoreError> {
        run_file::read_entries(self).or_else(|error| {
            let file = SegmentFile::open(self).map_err(|_| error)?;
            Ok(run_file::of_segment(&file)?.1)
        })
    }
}

pub(crate) fn segment_path(directory: &Path, sequence: SegmentSequence) -> PathBuf {
    let name = format!("{:020}.seg", sequence.0);
    directory.join("segments").join(name)
}

pub(crate) fn run_path(directory: &Path, sequence: SegmentSequence) -> PathBuf {
    let name = format!("{:020}.run", sequence.0);
    directory.join("runs").join(name)
}
