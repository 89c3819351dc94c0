//! The writer: turns records into batches, batches into sequential log writes, and flushes into a durable LSN.
//!
//! A batch closes when it is full, at once when somebody waits and the log is idle, else after a millisecond. Several batch
//! writes may be in flight; one flush at a time covers every batch whose write had completed when it was submitted.
//!
//! Crash scenarios (which write, which cache, what remains):
//! * Batches k and k+1 in flight, power cut, only k+1 reached the disk: the chain of hashes breaks at k; recovery ends there.
//!   Nothing at or after k was reported durable, because a flush covers only a prefix of completed batches.
//! * Roll to segment n+1: n is drained and flushed before the header of n+1 is written. Power cut with a torn header of n+1:
//!   recovery uses n, whole. With the header there and the first batches missing: n+1 is valid and empty.
//! * The slot of segment n+1 holds an older lap: its batches name another sequence and are refused by position.
//! * A flush fails: dirty pages may have been dropped and marked clean, so a second flush would lie. The writer is poisoned: nothing becomes
//!   durable any more until a new epoch begins in a new segment.

use crate::buffer::{BatchBuffer, Chunk};
use crate::{Buffer, Disk, IoError, Medium, Now, Operation};
use std::collections::VecDeque;
use varve_format::{
    BATCH_HEADER_BYTES, BATCH_PAYLOAD_BYTES_MAX, BATCH_RECORDS_MAX, BLOCK_BYTES, BatchHeader,
    BatchPosition, Checkpoint, EpochId, Hash128, Lsn, OPEN_REGIONS_MAX, RECORD_PAYLOAD_BYTES_MAX,
    Record, SEGMENT_HEADER_BYTES, SegmentHeader, SegmentSequence, VolumeId, WallTime, crc32c,
    payload_crc,
};
use zerocopy::little_endian::U32;

/// Batch writes in flight at most: enough to keep a disk busy across one flush, few enough that a batch grows meanwhile.
const FLIGHTS_MAX: usize = 4;
/// Places in the ring that only a new epoch may take: so many restarts in a row find one, however far behind the store is.
const EPOCH_PLACES: u64 = 2;
/// A batch nobody waits for closes after this.
const LINGER_NS: u64 = 1_000_000;
/// Header and open set: 4 KiB + 64 + 8192 × 4, padded.
const OPENING_BYTES_MAX: usize =
    SEGMENT_HEADER_BYTES + (64 + OPEN_REGIONS_MAX * 4).next_multiple_of(BLOCK_BYTES as usize);

/// Shape of a log ring and of the volume that it serves.
#[derive(Clone, Copy, Debug)]
pub struct LogGeometry {
    /// The volume.
    pub volume: VolumeId,
    /// Capacity of one segment.
    pub segment_bytes: u64,
    /// Segments in the ring; at least three.
    pub segment_count: u64,
    /// Size of the volume.
    pub volume_bytes: u64,
    /// Logical sector of the volume.
    pub sector_bytes: u32,
    /// Granularity of intents.
    pub region_bytes: u32,
}

/// What a segment header says of what came before it.
#[derive(Clone, Copy, Debug)]
pub struct SegmentOpening {
    /// Epoch of the segment.
    pub epoch: EpochId,
    /// Epoch before.
    pub parent_epoch: EpochId,
    /// Sequence number.
    pub sequence: SegmentSequence,
    /// LSN of its first record.
    pub lsn_start: Lsn,
    /// Where valid records of the previous segment end.
    pub previous_lsn_end: Lsn,
    /// Valid bytes of the previous segment.
    pub previous_bytes: u64,
    /// Hash of the previous segment's last valid batch.
    pub previous_hash: Hash128,
}

/// Figures for `varve status`.
#[derive(Clone, Copy, Debug, Default)]
pub struct WriterStatus {
    /// LSN of the next record.
    pub next_lsn: Lsn,
    /// Records below are durable in the log.
    pub durable_lsn: Lsn,
    /// The open segment.
    pub sequence: SegmentSequence,
    /// Segments that the store has not taken yet, the open one included.
    pub segments_held: u64,
    /// Bytes written to the log since start.
    pub bytes_written: u64,
    /// Flushes of the log since start.
    pub flushes: u64,
    /// Batches since start.
    pub batches: u64,
}

struct Flight {
    token: u64,
    /// `None` for a segment header.
    slot: Option<usize>,
    lsn_end: Lsn,
    done: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Roll {
    No,
    /// The open segment takes no more; in-flight writes drain, then a flush.
    Draining,
    /// Drained and flushed; waiting for a free place in the ring and the caller's checkpoint.
    Ready,
}

/// The writer of one volume's log.
pub struct LogWriter {
    geometry: LogGeometry,
    buffer: BatchBuffer,
    token_base: u64,
    next_token: u64,
    epoch: EpochId,
    sequence: SegmentSequence,
    /// Next free byte in the open segment.
    position: u64,
    previous_hash: Hash128,
    next_lsn: Lsn,
    durable_lsn: Lsn,
    written_lsn: Lsn,
    wanted_lsn: Lsn,
    wanted_low: Lsn,
    open: Option<usize>,
    open_since_ns: u64,
    last_time: WallTime,
    closed: VecDeque<usize>,
    flights: VecDeque<Flight>,
    flush: Option<(u64, Lsn)>,
    roll: Roll,
    seal_wanted: bool,
    segment_lsn_start: Lsn,
    oldest_held: SegmentSequence,
    /// The newest segment whose header a flush has covered; no segment is left behind before that.
    flushed_sequence: SegmentSequence,
    failure: Option<IoError>,
    opening: Buffer,
    bytes_written: u64,
    flushes: u64,
    batches: u64,
    /// When the log last made progress, and the last time that `pump` saw.
    progress_ns: u64,
    now_ns: u64,
}

impl LogWriter {
    /// A writer that has no epoch yet; tokens of its operations are `token_base..token_base + 2^32`.
    pub fn new(
        geometry: LogGeometry,
        buffer: BatchBuffer,
        token_base: u64,
    ) -> std::io::Result<LogWriter> {
        Ok(LogWriter {
            geometry,
            buffer,
            token_base,
            next_token: 0,
            epoch: EpochId::default(),
            sequence: SegmentSequence(0),
            position: 0,
            previous_hash: Hash128::default(),
            next_lsn: Lsn::FIRST,
            durable_lsn: Lsn::FIRST,
            written_lsn: Lsn::FIRST,
            wanted_lsn: Lsn::FIRST,
            wanted_low: Lsn::FIRST,
            open: None,
            open_since_ns: 0,
            last_time: WallTime(i64::MIN),
            closed: VecDeque::with_capacity(64),
            flights: VecDeque::with_capacity(FLIGHTS_MAX + 2),
            flush: None,
            roll: Roll::No,
            seal_wanted: false,
            segment_lsn_start: Lsn(0),
            oldest_held: SegmentSequence(0),
            flushed_sequence: SegmentSequence(0),
            failure: None,
            opening: Buffer::anonymous(OPENING_BYTES_MAX)?,
            bytes_written: 0,
            flushes: 0,
            batches: 0,
            progress_ns: 0,
            now_ns: 0,
        })
    }

    fn token(&mut self) -> u64 {
        self.next_token = (self.next_token + 1) & 0xffff_ffff;
        self.token_base + self.next_token
    }

    /// Whether a completion is the log's.
    #[must_use]
    pub fn owns(&self, token: u64) -> bool {
        token >> 32 == self.token_base >> 32
    }

    /// The batch buffer, for origin writes out of it.
    pub fn buffer(&mut self) -> &mut BatchBuffer {
        &mut self.buffer
    }

    /// Goes on with another buffer, emptied first. Nothing may be appended and not yet written.
    pub fn replace_buffer(&mut self, mut buffer: BatchBuffer) {
        while let Some(slot) = self.open.take().or_else(|| self.closed.pop_front()) {
            debug_assert!(
                self.failure.is_some(),
                "only an abandoned epoch may lose records"
            );
            self.buffer.release(slot);
        }
        for flight in &mut self.flights {
            flight.slot = None; // Of an operation that never came back; its buffer belongs to the medium now.
        }
        buffer.clear();
        self.buffer = buffer;
    }

    /// The epoch being written.
    #[must_use]
    pub fn epoch(&self) -> EpochId {
        self.epoch
    }

    /// LSN of the next record.
    #[must_use]
    pub fn next_lsn(&self) -> Lsn {
        self.next_lsn
    }

    /// Every record below is durable.
    #[must_use]
    pub fn durable_lsn(&self) -> Lsn {
        self.durable_lsn
    }

    /// The error that poisoned this epoch.
    #[must_use]
    pub fn failure(&self) -> Option<IoError> {
        self.failure
    }

    /// Whether no operation of the log is in flight.
    #[must_use]
    pub fn is_quiet(&self) -> bool {
        self.flights.is_empty() && self.flush.is_none()
    }

    /// Figures.
    #[must_use]
    pub fn status(&self) -> WriterStatus {
        WriterStatus {
            next_lsn: self.next_lsn,
            durable_lsn: self.durable_lsn,
            sequence: self.sequence,
            segments_held: self.sequence.0 + 1 - self.oldest_held.0.min(self.sequence.0 + 1),
            bytes_written: self.bytes_written,
            flushes: self.flushes,
            batches: self.batches,
        }
    }

    /// Segments of the ring that are free to be written.
    #[must_use]
    pub fn free_segments(&self) -> u64 {
        self.geometry
            .segment_count
            .saturating_sub(self.status().segments_held)
    }

    /// Valid bytes, end and last hash of the open segment: what the next epoch's first header must say.
    #[must_use]
    pub fn tail(&self) -> (u64, Hash128) {
        (self.position, self.previous_hash)
    }

    /// The store has everything below `sequence`; these segments may be recycled.
    pub fn release_below(&mut self, sequence: SegmentSequence) {
        let limit = sequence.0.min(self.sequence.0);
        self.oldest_held = SegmentSequence(self.oldest_held.0.max(limit));
    }

    /// Whether this epoch may go on in another segment: places for the segments of coming epochs are left over, or a restart while the store is behind
    /// would find none.
    fn may_roll(&self) -> bool {
        self.has_place(SegmentSequence(self.sequence.0 + 1 + EPOCH_PLACES))
    }

    /// Whether the next segment has a place: the ring does not hold `segment_count` segments that the store still needs.
    #[must_use]
    pub fn has_place(&self, next: SegmentSequence) -> bool {
        next.0 - self.oldest_held.0.min(next.0) < self.geometry.segment_count
    }

    /// Begins an epoch: gives up everything not durable, and writes the header of a new segment. `oldest_held` is the oldest segment
    /// that the store may still need. The caller must have seen the log quiet ([`LogWriter::is_quiet`]).
    pub fn begin_epoch(
        &mut self,
        medium: &mut dyn Medium,
        opening: SegmentOpening,
        oldest_held: SegmentSequence,
        checkpoint: &Checkpoint,
    ) {
        assert!(self.is_quiet());
        if let Some(slot) = self.open.take() {
            self.buffer.release(slot);
        }
        while let Some(slot) = self.closed.pop_front() {
            self.buffer.release(slot);
        }
        self.failure = None;
        self.seal_wanted = false;
        self.epoch = opening.epoch;
        self.next_lsn = opening.lsn_start;
        self.durable_lsn = opening.lsn_start;
        self.written_lsn = opening.lsn_start;
        self.wanted_lsn = opening.lsn_start;
        self.wanted_low = opening.lsn_start;
        self.oldest_held = oldest_held;
        self.open_segment(medium, opening, checkpoint);
    }

    /// Takes over the numbers of an epoch that cannot be gone on with, without writing anything.
    pub fn stand_by(
        &mut self,
        epoch: EpochId,
        sequence: SegmentSequence,
        oldest_held: SegmentSequence,
        next_lsn: Lsn,
    ) {
        self.epoch = epoch;
        self.sequence = sequence;
        self.oldest_held = oldest_held;
        self.next_lsn = next_lsn;
        self.durable_lsn = next_lsn;
        self.written_lsn = next_lsn;
    }

    fn open_segment(
        &mut self,
        medium: &mut dyn Medium,
        opening: SegmentOpening,
        checkpoint: &Checkpoint,
    ) {
        let mut payload = Vec::with_capacity(64 + checkpoint.regions.len() * 4);
        checkpoint.encode_into(&mut payload);
        let mut header = SegmentHeader::empty();
        header.volume = self.geometry.volume.0;
        header.epoch = opening.epoch.0;
        header.parent_epoch = opening.parent_epoch.0;
        header.sequence = opening.sequence.0.into();
        header.lsn_start = opening.lsn_start.0.into();
        header.previous_lsn_end = opening.previous_lsn_end.0.into();
        header.previous_bytes = opening.previous_bytes.into();
        header.previous_hash = opening.previous_hash.0;
        header.wall_time = medium.now().wall.0.into();
        header.volume_bytes = self.geometry.volume_bytes.into();
        header.segment_bytes = self.geometry.segment_bytes.into();
        header.sector_bytes = self.geometry.sector_bytes.into();
        header.region_bytes = self.geometry.region_bytes.into();
        header.oldest_held = self.oldest_held.0.into();
        header.checkpoint_bytes = (payload.len() as u32).into();
        header.checkpoint_crc = crc32c(&payload).into();
        let total = header.data_offset() as usize;
        self.opening.slice(0, total).write_with(|bytes| {
            bytes.fill(0);
            bytes[..SEGMENT_HEADER_BYTES].copy_from_slice(&header.to_block());
            bytes[SEGMENT_HEADER_BYTES..SEGMENT_HEADER_BYTES + payload.len()]
                .copy_from_slice(&payload);
        });
        self.sequence = opening.sequence;
        self.segment_lsn_start = opening.lsn_start;
        self.flushed_sequence = SegmentSequence(opening.sequence.0.wrapping_sub(1));
        self.position = total as u64;
        self.previous_hash = opening.previous_hash;
        self.roll = Roll::No;
        let token = self.token();
        let offset =
            (opening.sequence.0 % self.geometry.segment_count) * self.geometry.segment_bytes;
        self.flights.push_back(Flight {
            token,
            slot: None,
            lsn_end: opening.lsn_start,
            done: false,
        });
        self.bytes_written += total as u64;
        medium.submit(
            Disk::Log,
            token,
            Operation::Write {
                offset,
                buffer: self.opening.slice(0, total),
            },
        );
    }

    /// Slots that appending records with these payload lengths would take at most.
    fn slots_needed(&self, records: usize, payload: usize) -> usize {
        let payload = payload.next_multiple_of(self.buffer.align());
        let room = self.open.map_or((0, 0), |slot| {
            (
                BATCH_RECORDS_MAX - self.buffer.record_count(slot),
                BATCH_PAYLOAD_BYTES_MAX - self.buffer.payload_bytes(slot),
            )
        });
        if records <= room.0 && payload <= room.1 {
            return 0;
        }
        1 + payload / (BATCH_PAYLOAD_BYTES_MAX - RECORD_PAYLOAD_BYTES_MAX as usize)
            + records / BATCH_RECORDS_MAX
    }

    /// Whether `records` records with `payload` bytes in all can be appended now. Two slots are kept for records of our own.
    #[must_use]
    pub fn has_room(&self, records: usize, payload: usize, own: bool) -> bool {
        self.failure.is_none()
            && self.slots_needed(records, payload) + if own { 0 } else { 2 }
                <= self.buffer.free_slots()
    }

    /// Appends one record; `copy` fills its payload of `payload_bytes`. Returns its LSN and place. The caller has asked [`LogWriter::has_room`].
    pub fn append(
        &mut self,
        now: Now,
        mut record: Record,
        payload_bytes: usize,
        copy: impl FnOnce(&mut [u8]),
    ) -> (Lsn, Chunk) {
        assert!(payload_bytes as u64 <= RECORD_PAYLOAD_BYTES_MAX);
        if let Some(slot) = self.open
            && (self.buffer.record_count(slot) == BATCH_RECORDS_MAX
                || self.buffer.payload_bytes(slot) + payload_bytes > BATCH_PAYLOAD_BYTES_MAX)
        {
            self.close_batch();
        }
        let time = WallTime(now.wall.0.max(self.last_time.0));
        self.last_time = time;
        let slot = match self.open {
            Some(slot) => slot,
            None => {
                let slot = self
                    .buffer
                    .open(self.next_lsn, time)
                    .expect("has_room was asked");
                self.open = Some(slot);
                self.open_since_ns = now.monotonic_ns;
                slot
            }
        };
        let lsn = self.next_lsn;
        let delta_us = (time.0 - self.buffer.time(slot).0) / 1000;
        record.time_delta_us = U32::new(u32::try_from(delta_us).unwrap_or(u32::MAX));
        if payload_bytes > 0 {
            let at = self.buffer.push_payload(slot, copy, payload_bytes);
            record.payload_offset = U32::new(at as u32);
            record.payload_bytes = U32::new(payload_bytes as u32);
            let epoch = self.epoch;
            let crc = self.buffer.read_payload(slot, at, payload_bytes, |bytes| {
                payload_crc(epoch, lsn, bytes)
            });
            record.payload_crc = U32::new(crc);
        }
        let index = self.buffer.push_record(slot, &record);
        self.next_lsn = lsn.plus(1);
        (
            lsn,
            Chunk {
                slot: slot as u16,
                first: index as u8,
                count: 1,
            },
        )
    }

    /// Somebody waits until everything below `lsn` is durable.
    pub fn want_durable(&mut self, lsn: Lsn) {
        if self.wanted_low <= self.durable_lsn {
            self.wanted_low = lsn;
        }
        self.wanted_lsn = self.wanted_lsn.max(lsn);
    }

    /// Asks for the open segment to be sealed soon, so that the store can take it.
    pub fn want_seal(&mut self) {
        self.seal_wanted |= !self.segment_is_empty();
    }

    /// Whether the open segment has no record: nothing for the store.
    #[must_use]
    pub fn segment_is_empty(&self) -> bool {
        self.next_lsn == self.segment_lsn_start
    }

    fn close_batch(&mut self) {
        if let Some(slot) = self.open.take() {
            self.closed.push_back(slot);
        }
    }

    fn batch_bytes(&self, slot: usize) -> u64 {
        BATCH_HEADER_BYTES as u64
            + (self.buffer.payload_bytes(slot) as u64).next_multiple_of(BLOCK_BYTES)
    }

    /// Whether the next segment must be opened: the caller then gives its checkpoint to [`LogWriter::roll`].
    #[must_use]
    pub fn wants_roll(&self) -> bool {
        self.roll == Roll::Ready && self.failure.is_none() && self.may_roll()
    }

    /// Whether the ring is full: the store has not taken its segments, and records wait for a place.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.roll == Roll::Ready && !self.may_roll()
    }

    /// Opens the next segment of this epoch.
    pub fn roll(&mut self, medium: &mut dyn Medium, checkpoint: &Checkpoint) {
        assert!(self.wants_roll());
        let lsn_start = self.durable_lsn;
        let opening = SegmentOpening {
            epoch: self.epoch,
            parent_epoch: self.epoch,
            sequence: SegmentSequence(self.sequence.0 + 1),
            lsn_start,
            previous_lsn_end: lsn_start,
            previous_bytes: self.position,
            previous_hash: self.previous_hash,
        };
        self.open_segment(medium, opening, checkpoint);
    }

    /// Starts whatever can be started: closes a batch, writes closed ones, flushes. Call after every change.
    pub fn pump(&mut self, medium: &mut dyn Medium) {
        if self.failure.is_some() {
            return;
        }
        let now = medium.now();
        self.now_ns = now.monotonic_ns;
        if self.flights.is_empty() && self.closed.is_empty() {
            self.progress_ns = self.now_ns;
        }
        if let Some(slot) = self.open {
            let waited = self.wanted_lsn > self.written_lsn || self.seal_wanted;
            let old = now.monotonic_ns.saturating_sub(self.open_since_ns) >= LINGER_NS;
            let full = self.buffer.payload_bytes(slot)
                >= BATCH_PAYLOAD_BYTES_MAX - RECORD_PAYLOAD_BYTES_MAX as usize;
            if full
                || (self.closed.is_empty()
                    && self.flights.len() < FLIGHTS_MAX
                    && ((waited && self.flights.is_empty()) || old))
            {
                self.close_batch();
            }
        }
        self.submit_batches(medium);
        if self.seal_wanted
            && self.roll == Roll::No
            && self.closed.is_empty()
            && self.open.is_none()
        {
            self.seal_wanted = false;
            self.roll = Roll::Draining;
        }
        if self.roll == Roll::Draining && self.flights.is_empty() && self.flush.is_none() {
            if self.durable_lsn == self.written_lsn && self.flushed_sequence == self.sequence {
                self.roll = Roll::Ready;
            } else {
                self.submit_flush(medium);
            }
        }
        let wanted = self.wanted_low > self.durable_lsn && self.written_lsn >= self.wanted_low;
        let wanted =
            wanted || (self.wanted_lsn > self.durable_lsn && self.written_lsn >= self.wanted_lsn);
        if wanted && self.flush.is_none() {
            self.submit_flush(medium);
        }
    }

    fn submit_batches(&mut self, medium: &mut dyn Medium) {
        while self.roll == Roll::No && self.flights.len() < FLIGHTS_MAX {
            let Some(&slot) = self.closed.front() else {
                break;
            };
            let bytes = self.batch_bytes(slot);
            if self.position + bytes > self.geometry.segment_bytes {
                self.roll = Roll::Draining;
                break;
            }
            self.closed.pop_front();
            let lsn_first = self.buffer.lsn_first(slot);
            let lsn_end = lsn_first.plus(self.buffer.record_count(slot) as u64);
            let place = BatchPosition {
                volume: self.geometry.volume,
                epoch: self.epoch,
                segment: self.sequence,
                block: (self.position / BLOCK_BYTES) as u32,
            };
            let header =
                BatchHeader::new(place, lsn_first, self.buffer.time(slot), self.previous_hash);
            let (buffer, hash) = self.buffer.seal(slot, header);
            self.previous_hash = hash;
            let offset = (self.sequence.0 % self.geometry.segment_count)
                * self.geometry.segment_bytes
                + self.position;
            self.position += bytes;
            self.bytes_written += bytes;
            self.batches += 1;
            let token = self.token();
            self.flights.push_back(Flight {
                token,
                slot: Some(slot),
                lsn_end,
                done: false,
            });
            medium.submit(Disk::Log, token, Operation::Write { offset, buffer });
        }
    }

    fn submit_flush(&mut self, medium: &mut dyn Medium) {
        let token = self.token();
        self.flush = Some((token, self.written_lsn));
        self.flushes += 1;
        medium.submit(Disk::Log, token, Operation::Flush);
    }

    /// Takes a completion of the log's.
    pub fn complete(&mut self, token: u64, result: Result<(), IoError>) {
        if self.flush.is_some_and(|(flush, _)| flush == token) {
            let (_, lsn) = self.flush.take().expect("checked above");
            match result {
                Ok(()) if self.failure.is_none() => {
                    self.durable_lsn = self.durable_lsn.max(lsn);
                    self.flushed_sequence = self.sequence;
                    if self.wanted_low <= self.durable_lsn {
                        self.wanted_low = self.wanted_lsn;
                    }
                }
                Ok(()) => {}
                Err(error) => self.failure = Some(error),
            }
            return;
        }
        let Some(flight) = self.flights.iter_mut().find(|flight| flight.token == token) else {
            return;
        };
        flight.done = true;
        self.progress_ns = self.now_ns;
        if let Err(error) = result {
            self.failure = Some(error);
        }
        while let Some(flight) = self.flights.front()
            && flight.done
        {
            let flight = self.flights.pop_front().expect("checked above");
            if self.failure.is_none() {
                self.written_lsn = self.written_lsn.max(flight.lsn_end);
            }
            if let Some(slot) = flight.slot {
                self.buffer.release(slot);
            }
        }
    }

    /// Since when batches have waited without any log write completing; `None` if none wait.
    #[must_use]
    pub fn stuck_since(&self) -> Option<u64> {
        (!self.flights.is_empty() || !self.closed.is_empty()).then_some(self.progress_ns)
    }

    /// The oldest segment that the store may still need.
    #[must_use]
    pub fn oldest_held(&self) -> SegmentSequence {
        self.oldest_held
    }

    /// Forgets operations that never came back. Their place in the ring must not be used again: they may still land.
    pub fn forget_flights(&mut self) {
        self.flights.clear();
        self.flush = None;
    }

    /// Gives up the epoch: nothing becomes durable any more.
    pub fn poison(&mut self, error: IoError) {
        self.failure.get_or_insert(error);
    }

    /// When [`LogWriter::pump`] wants to be called again, if nothing else happens.
    #[must_use]
    pub fn deadline_ns(&self) -> Option<u64> {
        let could_write = self.failure.is_none()
            && self.roll == Roll::No
            && self.closed.is_empty()
            && self.flights.len() < FLIGHTS_MAX;
        self.open
            .filter(|_| could_write)
            .map(|_| self.open_since_ns + LINGER_NS)
    }
}
