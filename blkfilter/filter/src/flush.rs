//! Flushes of the origin, one at a time, shared by all who wait; and the checkpoints that they allow.
//!
//! Each flush has a generation. Whoever asks waits for a flush that is *submitted* after the question: one that is already in flight may have
//! begun before the asker's write completed.
//!
//! Some flushes are our own, for checkpoints. If one of them fails, the disk has told of it, once, and nobody who wrote has heard it: the next who asks for a
//! flush is told.

use crate::config::Rules;
use crate::volume::{Phase, TOKEN_ORIGIN_FLUSH, Volume};
use varve_format::{Lsn, Record, RecordKind, SpanKind, VolumeState};
use varve_log::{Disk, IoError, Medium, Operation};

/// The origin's flushes.
#[derive(Default)]
pub struct OriginFlusher {
    started: u64,
    finished: u64,
    wanted: u64,
    /// Writes below this LSN had completed when the flush in flight was submitted.
    covers: Lsn,
    /// Writes below this LSN are durable on the origin.
    flushed: Lsn,
    /// A flush that nobody had asked for has failed: the next who asks is told, as he would have been without us. A disk says it once.
    owed: Option<IoError>,
}

impl OriginFlusher {
    /// Asks for a flush; the answer is the generation to wait for. `completed_below`: what a flush submitted now would cover.
    pub fn want(&mut self, medium: &mut dyn Medium, completed_below: Lsn) -> u64 {
        self.wanted = self.started + 1;
        let generation = self.wanted;
        self.start(medium, completed_below);
        generation
    }

    /// Asks for a flush for a checkpoint: one in flight will do, because another follows if it did not cover enough.
    pub fn want_stable(&mut self, medium: &mut dyn Medium, completed_below: Lsn) {
        if !self.is_busy() && completed_below > self.flushed {
            self.want(medium, completed_below);
        }
    }

    fn start(&mut self, medium: &mut dyn Medium, completed_below: Lsn) {
        if self.started == self.finished && self.wanted > self.started {
            self.started += 1;
            self.covers = completed_below;
            medium.submit(Disk::Origin, TOKEN_ORIGIN_FLUSH, Operation::Flush);
        }
    }

    /// Whether a flush is in flight.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        self.started != self.finished
    }

    /// Whether a generation has ended. How, its waiters have been told when it did.
    #[must_use]
    pub fn has_ended(&self, generation: u64) -> bool {
        generation <= self.finished
    }

    /// Writes below this LSN are durable on the origin.
    #[must_use]
    pub fn flushed(&self) -> Lsn {
        self.flushed
    }

    /// At the start of an epoch: nothing below is known to be durable.
    pub fn reset(&mut self, lsn: Lsn) {
        self.flushed = lsn;
        self.covers = lsn;
    }
}

impl<R: Rules> Volume<R> {
    pub(crate) fn complete_origin_flush(
        &mut self,
        medium: &mut dyn Medium,
        result: Result<(), IoError>,
    ) {
        self.flusher.finished = self.flusher.started;
        let finished = self.flusher.finished;
        if let Some(error) = result.err().or(self.flusher.owed) {
            self.flusher.owed = Some(error);
            for active in &mut self.table {
                if matches!(active.phase, Phase::Durable { origin, .. } if origin == finished) {
                    active.error.get_or_insert(error);
                    self.flusher.owed = None;
                }
            }
        }
        match result {
            Ok(()) => self.flusher.flushed = self.flusher.flushed.max(self.flusher.covers),
            Err(_) => {
                // The origin may have dropped any write since the last flush: all open regions are read again.
                self.counters.origin_errors += 1;
                self.doubt_again();
                let open: Vec<(u64, u64)> = self.regions.touched_since(Lsn(0)).collect();
                for (offset, length) in open {
                    self.bitmap
                        .set(offset, length.min(self.config.volume_bytes - offset));
                }
                if self.is_logging() && self.writer.has_room(1, 0, true) {
                    self.begin_span(medium, SpanKind::Resync, VolumeState::Healing);
                }
            }
        }
        self.release_durable();
        let stable = self.completed_below();
        self.flusher.start(medium, stable);
    }

    /// Makes a checkpoint when enough was written since the last one, flushing the origin for it if no application did.
    pub(crate) fn make_stable(&mut self, medium: &mut dyn Medium) {
        if !self.is_logging() {
            return;
        }
        let now_ns = medium.now().monotonic_ns;
        let status = self.writer.status();
        let due = status.bytes_written - self.stable_bytes_mark >= self.config.stable_bytes
            || (now_ns.saturating_sub(self.stable_time_ns) >= self.config.stable_interval_ns
                && self.writer.next_lsn() > self.stable_lsn.plus(1))
            || self.regions.is_crowded()
            || self.regions_wanted;
        if !due {
            return;
        }
        let completed = self.completed_below();
        let target = if R::STABLE_AFTER_FLUSH {
            self.flusher.flushed()
        } else {
            completed
        };
        if target > self.stable_lsn
            || (self.regions_wanted
                && self
                    .regions
                    .can_retire(target.min(self.writer.durable_lsn())))
        {
            self.append_checkpoint(medium, target);
        } else {
            self.flusher.want_stable(medium, completed);
            self.writer.want_durable(completed);
        }
    }

    /// Appends a checkpoint that retires what is below `stable`.
    pub(crate) fn append_checkpoint(&mut self, medium: &mut dyn Medium, stable: Lsn) {
        let size = 64 + 4 * self.config.open_regions_max;
        if !self.writer.has_room(1, size, true) {
            return;
        }
        self.stable_before = self.stable_lsn;
        self.stable_lsn = stable;
        // Regions in use stay hot over one checkpoint, unless somebody waits for their places.
        // A region whose records the log could still lose stays, too: if the log fails, the open set says what it does not hold.
        let both = stable.min(self.writer.durable_lsn());
        self.regions.retire(
            both,
            if self.regions_wanted {
                both
            } else {
                self.stable_before
            },
        );
        self.regions_wanted = false;
        let mut payload = Vec::new();
        self.checkpoint().encode_into(&mut payload);
        self.append(
            medium,
            Record::new(RecordKind::Stable, 0, 0, stable.0),
            &payload,
        );
        self.stable_bytes_mark = self.writer.status().bytes_written;
        self.stable_time_ns = medium.now().monotonic_ns;
    }
}
