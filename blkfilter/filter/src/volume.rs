//! A volume at work: requests and completions come in, operations and answers go out.
//!
//! Crash scenarios that shape the order of everything below (power cut unless said otherwise):
//! * A write is on the origin and nothing durable in the log says so: the image at the end would differ from the origin for ever. Hence the
//!   gate: a cold region's first record is durable before any write to the region starts on the origin.
//! * The record is durable, the origin's cache loses the write: hence open regions stay open until a checkpoint that follows an origin flush
//!   which was *submitted* after the region's last write had completed. All open regions are read again after a crash.
//! * Two overlapping writes are in flight; log order and device order differ: hence overlapping writes wait.
//! * A span copies a block while a write to it is in flight: hence copying locks its range like a write.
//! * A copied block's record is durable, but what was copied lay in the origin's cache only: hence copying opens the region too.
//! * The log stops answering: after `log_wait_max` the bypass mark goes to the state file, and only when it is durable does any waiting or new write
//!   go on. Power cut before the mark is durable: the log still speaks, and every write that had started was in an open region.
//! * Power cut in bypass: the state file says so; everything is read again.
//! * A checkpoint retires region R and is itself lost: the older checkpoint still lists R; it is read again, harmlessly.

use crate::bitmap::Bitmap;
use crate::config::{AckPolicy, Law, Rules, VolumeConfig};
use crate::copy::Copier;
use crate::flush::OriginFlusher;
use crate::heal::Healer;
use crate::hot_copy::HotCopies;
use crate::locks::RangeLocks;
use crate::regions::OpenRegions;
use crate::state_file::StateFile;
use crate::surviving::SurvivingMemory;
use crate::verify::Verifier;
use std::collections::VecDeque;
use std::marker::PhantomData;
use varve_format::{
    Checkpoint, EpochId, Lsn, Record, RecordKind, SegmentSequence, SpanKind, VolumeState, WallTime,
};
use varve_front::{Request, RequestKind};
use varve_log::{BLOCKING_TOKENS, Chunk, Completion, Disk, IoError, LogWriter, Medium, Operation};

pub(crate) const TOKEN_LOG: u64 = 1 << 40;
pub(crate) const TOKEN_REQUEST: u64 = 2 << 40;
pub(crate) const TOKEN_ORIGIN_FLUSH: u64 = 3 << 40;
pub(crate) const TOKEN_COPY: u64 = 4 << 40;
pub(crate) const TOKEN_STATE: u64 = 5 << 40;
pub(crate) const TOKEN_HOT: u64 = 6 << 40;
const TOKEN_CLASS: u64 = 0xff << 40;

/// The end of a request.
#[derive(Clone, Copy, Debug)]
pub struct Answer {
    /// The request's tag.
    pub tag: u32,
    /// How it went.
    pub result: Result<(), IoError>,
}

/// Where a request stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Waits for admission.
    Pending,
    /// Admitted; waits until the log durably holds everything below the LSN.
    Gated(Lsn),
    /// On its way to or from the origin.
    Origin,
    /// The origin has it; waits for a flush of the origin (generation) and of the log (LSN).
    Durable { origin: u64, log: Lsn },
    /// A place in the table that is not in use.
    Free,
}

/// One origin write out of the batch buffer.
#[derive(Clone, Copy)]
pub(crate) struct OriginWrite {
    pub chunk: Chunk,
    pub payload_offset: usize,
    pub offset: u64,
    pub length: usize,
}

pub(crate) struct Active {
    pub request: Option<Request>,
    pub phase: Phase,
    pub writes: Vec<OriginWrite>,
    pub outstanding: u16,
    pub lsn_first: Lsn,
    pub lock: Option<u16>,
    pub error: Option<IoError>,
    pub logged: bool,
    pub since_ns: u64,
    /// Since when it waits for blocks to be saved for hot copies; 0: it does not.
    pub saving_since_ns: u64,
    /// Its place in the order of admission, from 1; 0: not admitted.
    pub admitted_as: u64,
}

/// A protected volume. `R` is [`Law`] everywhere but in tests that show what a missing protection breaks.
pub struct Volume<R: Rules = Law> {
    pub(crate) config: VolumeConfig,
    pub(crate) surviving: SurvivingMemory,
    pub(crate) writer: LogWriter,
    pub(crate) state: VolumeState,
    pub(crate) state_file: StateFile,
    pub(crate) epoch_start: (Lsn, SegmentSequence),
    pub(crate) span: Option<(SpanKind, Lsn, u64)>,
    /// The span's end record, once appended.
    pub(crate) span_end: Option<Lsn>,
    pub(crate) regions: OpenRegions,
    pub(crate) bitmap: Bitmap,
    pub(crate) locks: RangeLocks,
    pub(crate) flusher: OriginFlusher,
    pub(crate) copier: Copier,
    pub(crate) healer: Healer,
    pub(crate) verifier: Verifier,
    pub(crate) hot: Option<HotCopies>,
    /// Writes admitted so far.
    pub(crate) admitted: u64,
    /// New writes wait until then (monotonic), for a cut over several volumes.
    pub(crate) held_until_ns: u64,
    pub(crate) table: Vec<Active>,
    pub(crate) free: Vec<u16>,
    pub(crate) pending: VecDeque<u16>,
    pub(crate) answers: VecDeque<Answer>,
    pub(crate) last_write_end: u64,
    /// A write or a copy waits for a place in the open set.
    pub(crate) regions_wanted: bool,
    pub(crate) stable_lsn: Lsn,
    pub(crate) stable_before: Lsn,
    pub(crate) stable_bytes_mark: u64,
    pub(crate) stable_time_ns: u64,
    pub(crate) last_record_time: WallTime,
    pub(crate) counters: Counters,
    pub(crate) rules: PhantomData<R>,
}

/// What happened since the start.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counters {
    pub writes: u64,
    pub write_bytes: u64,
    pub reads: u64,
    pub flushes: u64,
    pub cold_writes: u64,
    pub overlaps: u64,
    pub bypasses: u64,
    pub bypassed_bytes: u64,
    pub copied_bytes: u64,
    pub verified_bytes: u64,
    pub origin_errors: u64,
}

impl<R: Rules> Volume<R> {
    /// Takes a request from the front end. Its answer comes through [`Volume::take_answer`].
    pub fn submit(&mut self, medium: &mut dyn Medium, request: Request) {
        let tag = request.tag;
        let end = request.offset.checked_add(request.length);
        if request.kind != RequestKind::Flush
            && (end.is_none_or(|end| end > self.config.volume_bytes)
                || !(request.offset | request.length)
                    .is_multiple_of(u64::from(self.config.sector_bytes)))
        {
            self.answers.push_back(Answer {
                tag,
                result: Err(IoError(libc::EINVAL)),
            });
            return;
        }
        if request.length / u64::from(self.config.region_bytes) + 2
            > self.config.open_regions_max as u64 / 2
        {
            // It could never be admitted; front ends cut such ranges.
            self.answers.push_back(Answer {
                tag,
                result: Err(IoError(libc::EINVAL)),
            });
            return;
        }
        let Some(id) = self.free.pop() else {
            self.answers.push_back(Answer {
                tag,
                result: Err(IoError(libc::EAGAIN)),
            });
            return;
        };
        let active = &mut self.table[id as usize];
        active.writes.clear();
        active.outstanding = 0;
        active.lock = None;
        active.error = None;
        active.logged = false;
        active.saving_since_ns = 0;
        active.admitted_as = 0;
        active.phase = Phase::Pending;
        active.since_ns = medium.now().monotonic_ns;
        let (kind, offset, buffer) = (request.kind, request.offset, request.buffer.clone());
        active.request = Some(request);
        match kind {
            RequestKind::Read => {
                self.counters.reads += 1;
                active.phase = Phase::Origin;
                active.outstanding = 1;
                match buffer {
                    Some(buffer) => medium.submit(
                        Disk::Origin,
                        request_token(id, 0),
                        Operation::Read { offset, buffer },
                    ),
                    None => self.finish(id, Err(IoError(libc::EINVAL))),
                }
            }
            RequestKind::Flush => {
                self.counters.flushes += 1;
                self.wait_durable(medium, id);
            }
            RequestKind::Write | RequestKind::Discard | RequestKind::Zero => {
                self.pending.push_back(id)
            }
        }
    }

    /// Takes a completion from the medium.
    pub fn complete(&mut self, medium: &mut dyn Medium, completion: Completion) {
        let Completion { token, result } = completion;
        match token & TOKEN_CLASS {
            TOKEN_LOG => self.writer.complete(token, result),
            TOKEN_REQUEST => self.complete_request(
                medium,
                ((token >> 8) & 0xffff) as u16,
                (token & 0xff) as usize,
                result,
            ),
            TOKEN_ORIGIN_FLUSH => self.complete_origin_flush(medium, result),
            TOKEN_COPY => self.complete_copy((token & 0xff) as usize, result),
            TOKEN_HOT => self.complete_hot(medium, token, result),
            TOKEN_STATE => {
                if let Some(result) = self.state_file.complete(medium, result) {
                    self.complete_state(medium, result);
                }
            }
            _ => debug_assert!(
                token >= BLOCKING_TOKENS,
                "a completion that nobody asked for"
            ),
        }
    }

    /// Does all that can be done now. Call after every batch of requests and completions, and at [`Volume::deadline_ns`].
    pub fn run(&mut self, medium: &mut dyn Medium) {
        self.admit(medium);
        self.pump_hot(medium);
        self.writer.pump(medium);
        // Not before a new epoch counts: its header says that everything is open, and writes go past the log.
        if self.writer.wants_roll() && !self.healer.is_unsafe() {
            let checkpoint = self.checkpoint();
            self.writer.roll(medium, &checkpoint);
            self.writer.pump(medium);
        }
        self.release_gates(medium);
        self.release_durable();
        self.make_stable(medium);
        self.copy(medium);
        self.watch(medium);
        self.writer.pump(medium);
    }

    /// The next answer for the front end.
    pub fn take_answer(&mut self) -> Option<Answer> {
        self.answers.pop_front()
    }

    /// When [`Volume::run`] must be called at the latest if nothing happens before: monotonic nanoseconds.
    #[must_use]
    pub fn deadline_ns(&self, now_ns: u64) -> u64 {
        if self.hot.as_ref().is_some_and(HotCopies::is_sweeping) {
            return now_ns;
        }
        let watch = if self.table.len() == self.free.len() && self.span.is_none() {
            200_000_000
        } else {
            10_000_000
        };
        self.writer
            .deadline_ns()
            .unwrap_or(u64::MAX)
            .min(now_ns + watch)
    }

    /// Whether nothing is in flight or waiting.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.free.len() == self.table.len()
            && !self.flusher.is_busy()
            && !self.copier.is_busy()
            && !self.hot.as_ref().is_some_and(HotCopies::is_busy)
            && self.answers.is_empty()
    }

    /// Whether new writes are recorded in the log.
    pub(crate) fn is_logging(&self) -> bool {
        self.state != VolumeState::Bypass && !self.healer.is_unsafe()
    }

    /// The epoch being written.
    #[must_use]
    pub fn epoch(&self) -> EpochId {
        self.writer.epoch()
    }

    /// The state.
    #[must_use]
    pub fn state(&self) -> VolumeState {
        self.state
    }

    /// Everything below is durable in the log.
    #[must_use]
    pub fn durable_lsn(&self) -> Lsn {
        self.writer.durable_lsn()
    }

    /// LSN of the next record.
    #[must_use]
    pub fn next_lsn(&self) -> Lsn {
        self.writer.next_lsn()
    }

    /// The store has everything below this segment.
    pub fn release_segments_below(&mut self, sequence: SegmentSequence) {
        self.writer.release_below(sequence);
    }

    /// Seals the open segment soon, so that the store can take all that was written so far.
    pub fn seal(&mut self) {
        self.writer.want_seal();
        self.writer.want_durable(self.writer.next_lsn());
    }

    /// Whether the open segment holds no record: there is nothing to seal.
    #[must_use]
    pub fn segment_is_empty(&self) -> bool {
        self.writer.segment_is_empty()
    }

    /// Appends a recovery point. Returns the instant: every record before the point is below it. `None`: nothing is being recorded, or no room now.
    pub fn mark_point(&mut self, medium: &dyn Medium, name: &str, detail: u8) -> Option<Lsn> {
        if !self.is_logging() || !self.writer.has_room(1, name.len(), false) || name.len() > 255 {
            return None;
        }
        let (lsn, _) = self.append(
            medium,
            Record::new(RecordKind::Point, 0, 0, 0).with_detail(detail),
            name.as_bytes(),
        );
        self.writer.want_durable(lsn.plus(1));
        Some(lsn)
    }

    /// Whether the state is one in which an instant can be marked.
    #[must_use]
    pub fn in_span(&self) -> bool {
        self.span.is_some()
    }

    /// Ends a rewind: from here on instants resolve again. The caller has written everything.
    pub fn end_rewind(&mut self, medium: &dyn Medium) -> bool {
        match self.span {
            Some((SpanKind::Rewind, ..))
                if self.span_end.is_none()
                    && self.bitmap.is_empty()
                    && self.writer.has_room(1, 0, true) =>
            {
                self.append_span_end(medium);
                true
            }
            _ => false,
        }
    }

    pub(crate) fn append(
        &mut self,
        medium: &dyn Medium,
        record: Record,
        payload: &[u8],
    ) -> (Lsn, Chunk) {
        let now = medium.now();
        self.last_record_time = now.wall;
        self.writer.append(now, record, payload.len(), |target| {
            target.copy_from_slice(payload)
        })
    }

    pub(crate) fn append_span_end(&mut self, medium: &dyn Medium) {
        if let Some((_, begin, _)) = self.span {
            let (lsn, _) =
                self.append(medium, Record::new(RecordKind::SpanEnd, 0, 0, begin.0), &[]);
            self.writer.want_durable(lsn.plus(1));
            self.span_end = Some(lsn);
        }
    }

    /// What recovery would need to know if everything before this were lost.
    pub(crate) fn checkpoint(&self) -> Checkpoint {
        let mut regions = self.regions.indexes();
        let mut copy_cursor = u64::MAX;
        if self.span.is_some() && self.span_end.is_none() {
            (copy_cursor, regions) = self.pending_regions(regions);
        }
        let span = self.span.filter(|_| self.span_end.is_none());
        Checkpoint {
            stable_lsn: self.stable_lsn,
            span,
            copy_cursor,
            state: self.state,
            regions,
        }
    }

    /// What is still to be copied: as regions if they fit, else as everything from the first marked block.
    fn pending_regions(&self, mut regions: Vec<u32>) -> (u64, Vec<u32>) {
        let region_bytes = u64::from(self.config.region_bytes);
        let open = regions.clone();
        let mut at = 0;
        while let Some((offset, _)) = self.bitmap.next_run(at, region_bytes) {
            let region = (offset / region_bytes) as u32;
            if let Err(place) = regions.binary_search(&region) {
                if regions.len() >= self.config.open_regions_max {
                    let first = self
                        .bitmap
                        .next_run(0, region_bytes)
                        .map_or(u64::MAX, |run| run.0);
                    return (first, open);
                }
                regions.insert(place, region);
            }
            at = (u64::from(region) + 1) * region_bytes;
        }
        (u64::MAX, regions)
    }

    /// Lowest LSN of a logged write that the origin has not completed; everything below is on the origin, if only in its cache.
    pub(crate) fn completed_below(&self) -> Lsn {
        self.table
            .iter()
            .filter(|active| {
                active.logged && matches!(active.phase, Phase::Gated(_) | Phase::Origin)
            })
            .map(|active| active.lsn_first)
            .min()
            .unwrap_or(self.writer.next_lsn())
    }

    /// The origin has the write, or the request is a flush: waits for what durability it asks for.
    pub(crate) fn wait_durable(&mut self, medium: &mut dyn Medium, id: u16) {
        let log = if self.is_logging() {
            self.writer.next_lsn()
        } else {
            Lsn(0)
        };
        let stable = self.completed_below();
        let origin = self.flusher.want(medium, stable);
        self.writer.want_durable(log);
        let active = &mut self.table[id as usize];
        active.since_ns = medium.now().monotonic_ns;
        active.phase = Phase::Durable { origin, log };
    }

    pub(crate) fn wants_durability(&self, id: u16) -> bool {
        let active = &self.table[id as usize];
        let Some(request) = &active.request else {
            return false;
        };
        request.force_unit_access || (self.config.ack == AckPolicy::Local && active.logged)
    }

    pub(crate) fn finish(&mut self, id: u16, result: Result<(), IoError>) {
        let active = &mut self.table[id as usize];
        if let Some(place) = active.lock.take() {
            self.locks.unlock(place);
        }
        active.phase = Phase::Free;
        if let Some(request) = active.request.take() {
            self.answers.push_back(Answer {
                tag: request.tag,
                result,
            });
        }
        self.free.push(id);
    }
}

pub(crate) fn request_token(id: u16, write: usize) -> u64 {
    TOKEN_REQUEST | (u64::from(id) << 8) | write as u64
}
