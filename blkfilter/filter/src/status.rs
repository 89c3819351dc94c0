//! What a volume says of itself.

use crate::config::Rules;
use crate::hot_copy::{HotCopies, Lost};
use crate::volume::Volume;
use varve_format::{EpochId, VolumeState, WallTime};
use varve_log::WriterStatus;

/// Figures for `varve status` and metrics.
#[derive(Clone, Debug)]
pub struct VolumeStatus {
    /// The state.
    pub state: VolumeState,
    /// The epoch being written.
    pub epoch: EpochId,
    /// The log's figures.
    pub log: WriterStatus,
    /// Bytes still to be copied, or changed while bypassed.
    pub marked_bytes: u64,
    /// Regions that would be read again after a power cut, in bytes.
    pub open_bytes: u64,
    /// Wall time of the last record.
    pub last_record_time: WallTime,
    /// In bypass: since when, why, and whether the mark could not be made.
    pub bypass: Option<(WallTime, String, bool)>,
    /// Requests waiting for admission.
    pub pending: u64,
    /// Writes recorded since the start, their bytes, reads, flushes, writes that waited for the log first.
    pub writes: u64,
    /// Bytes of them.
    pub write_bytes: u64,
    /// Reads.
    pub reads: u64,
    /// Flushes.
    pub flushes: u64,
    /// Writes to cold regions.
    pub cold_writes: u64,
    /// Times that bypass was entered.
    pub bypasses: u64,
    /// Bytes that bypassed the log.
    pub bypassed_bytes: u64,
    /// Bytes copied by spans.
    pub copied_bytes: u64,
    /// Bytes that a comparison found equal to the history.
    pub verified_bytes: u64,
    /// Number of the comparison with the history that is wanted; 0: none.
    pub verify_wanted: u64,
    /// Errors of the origin.
    pub origin_errors: u64,
    /// Whether the surviving memory is locked in RAM.
    pub memory_locked: bool,
    /// Hot copies: generation, bytes overwritten since the cut, why it is valid no more.
    pub copies: Vec<(u32, u64, Option<&'static str>)>,
    /// Free bytes of their spool.
    pub spool_free_bytes: u64,
}

impl<R: Rules> Volume<R> {
    /// The volume's figures now.
    #[must_use]
    pub fn status(&self) -> VolumeStatus {
        let counters = &self.counters;
        VolumeStatus {
            state: self.state,
            epoch: self.writer.epoch(),
            log: self.writer.status(),
            marked_bytes: self.bitmap.bytes(),
            open_bytes: self.regions.len() as u64 * u64::from(self.config.region_bytes),
            last_record_time: self.last_record_time,
            bypass: (self.state == VolumeState::Bypass).then(|| {
                let reason = self
                    .healer
                    .reason
                    .map_or_else(String::new, |error| error.to_string());
                (self.healer.gap_since, reason, self.healer.unmarked)
            }),
            pending: self.pending.len() as u64,
            writes: counters.writes,
            write_bytes: counters.write_bytes,
            reads: counters.reads,
            flushes: counters.flushes,
            cold_writes: counters.cold_writes,
            bypasses: counters.bypasses,
            bypassed_bytes: counters.bypassed_bytes,
            copied_bytes: counters.copied_bytes,
            verified_bytes: counters.verified_bytes,
            verify_wanted: self.verifier.wanted(),
            origin_errors: counters.origin_errors,
            memory_locked: self.surviving.memory().is_locked(),
            copies: self
                .hot
                .iter()
                .flat_map(HotCopies::figures)
                .map(|(generation, bytes, lost)| (generation, bytes, lost.map(Lost::name)))
                .collect(),
            spool_free_bytes: self.hot.as_ref().map_or(0, HotCopies::free_bytes),
        }
    }
}
