//! Copying marked blocks from the origin into the log: base copy, resync, catch-up and verification are all this.
//!
//! A run of marked blocks is locked like a write, read, recorded, unmarked, unlocked. A write that wants the range waits for that one read. New
//! writes do not mark blocks while they are logged, so the number of marked blocks only falls: every span ends.
//! When none are marked any more, the span's end is recorded; instants resolve again behind it.

use crate::bitmap::BITMAP_BLOCK_BYTES;
use crate::config::Rules;
use crate::volume::{TOKEN_COPY, Volume};
use varve_format::{
    RECORD_PAYLOAD_BYTES_MAX, Record, RecordFlags, RecordKind, SpanKind, VolumeState,
};
use varve_log::{Buffer, Disk, IoError, Medium, Operation};

/// Copies in flight: one reads while the other is recorded.
const COPIES: usize = 2;

struct Copy {
    offset: u64,
    length: u64,
    lock: u16,
    /// `None` while the read is in flight.
    result: Option<Result<(), IoError>>,
}

/// The copies in flight.
pub struct Copier {
    copies: [Option<Copy>; COPIES],
    buffers: Vec<Buffer>,
    cursor: u64,
}

impl Copier {
    /// A copier that reads `copy_bytes` at a time.
    pub fn new(copy_bytes: u64) -> std::io::Result<Copier> {
        let buffers = (0..COPIES)
            .map(|_| Buffer::anonymous(copy_bytes as usize))
            .collect::<Result<_, _>>()?;
        Ok(Copier {
            copies: [const { None }; COPIES],
            buffers,
            cursor: 0,
        })
    }

    /// Whether a copy is in flight.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        self.copies.iter().any(Option::is_some)
    }
}

impl<R: Rules> Volume<R> {
    pub(crate) fn complete_copy(&mut self, index: usize, result: Result<(), IoError>) {
        if let Some(copy) = self.copier.copies[index].as_mut() {
            copy.result = Some(result);
        }
    }

    pub(crate) fn copy(&mut self, medium: &mut dyn Medium) {
        for index in 0..COPIES {
            if self.copier.copies[index]
                .as_ref()
                .is_some_and(|copy| copy.result.is_some())
            {
                self.record_copy(medium, index);
            }
        }
        let Some((kind, ..)) = self.span else {
            // Blocks were marked when there was no room to say so.
            if !self.bitmap.is_empty() && self.is_logging() && self.writer.has_room(1, 0, true) {
                self.begin_span(medium, SpanKind::Resync, VolumeState::Healing);
            }
            return;
        };
        if self.span_end.is_some() {
            if self
                .span_end
                .is_some_and(|end| self.writer.durable_lsn() > end)
            {
                self.span = None;
                self.span_end = None;
                if self.state != VolumeState::Bypass {
                    self.state = VolumeState::Protected;
                }
            }
            return;
        }
        if !self.is_logging() {
            return;
        }
        if self.bitmap.is_empty() {
            // A rewind ends when whoever writes it says so.
            if kind != SpanKind::Rewind
                && !self.copier.is_busy()
                && self.writer.has_room(1, 0, true)
            {
                self.append_span_end(medium);
            }
            return;
        }
        // The store must keep up with copying; room that it leaves belongs to the applications.
        if self.writer.free_segments() * 2 < self.config.segment_count {
            return;
        }
        for index in 0..COPIES {
            if self.copier.copies[index].is_none() {
                self.start_copy(medium, index);
            }
        }
    }

    fn start_copy(&mut self, medium: &mut dyn Medium, index: usize) {
        let region_room = self.regions.has_room(
            1 + (self.config.copy_bytes / u64::from(self.config.region_bytes)) as usize * COPIES
                + COPIES,
        );
        if !region_room {
            self.regions_wanted = true;
            return;
        }
        let limit = self.verifier.limit(medium.now().monotonic_ns);
        let below_limit = |from: u64| {
            let (offset, length) = self.bitmap.next_run(from, self.config.copy_bytes)?;
            (offset < limit).then(|| (offset, length.min(limit - offset)))
        };
        let run = below_limit(self.copier.cursor).or_else(|| below_limit(0));
        let Some((offset, length)) = run else { return };
        if self.locks.overlaps(offset, offset + length) {
            // Come back to it; meanwhile go on behind it.
            self.copier.cursor = if self.copier.cursor > offset {
                0
            } else {
                offset + BITMAP_BLOCK_BYTES
            };
            return;
        }
        let Some(lock) = self.locks.lock(offset, offset + length) else {
            return;
        };
        self.copier.cursor = offset + length;
        self.copier.copies[index] = Some(Copy {
            offset,
            length,
            lock,
            result: None,
        });
        let buffer = self.copier.buffers[index].slice(0, length as usize);
        medium.submit(
            Disk::Origin,
            TOKEN_COPY | index as u64,
            Operation::Read { offset, buffer },
        );
    }

    fn record_copy(&mut self, medium: &mut dyn Medium, index: usize) {
        let Some(copy) = self.copier.copies[index].as_ref() else {
            return;
        };
        let (offset, length, lock, failed) = (
            copy.offset,
            copy.length,
            copy.lock,
            copy.result != Some(Ok(())),
        );
        if !self.is_logging() {
            // Bypassed meanwhile: the blocks stay marked.
            self.locks.unlock(lock);
            self.copier.copies[index] = None;
            return;
        }
        let records = length.div_ceil(RECORD_PAYLOAD_BYTES_MAX) as usize;
        if !self.writer.has_room(records, length as usize, false) {
            return;
        }
        let buffer = self.copier.buffers[index].slice(0, length as usize);
        let mut done = 0;
        while done < length {
            let part = (length - done).min(RECORD_PAYLOAD_BYTES_MAX);
            let source = buffer.slice(done as usize, part as usize);
            let zero = !failed && source.read_with(|bytes| bytes.iter().all(|byte| *byte == 0));
            let (kind, payload) = match (failed, zero) {
                (true, _) => (RecordKind::Undefined, 0),
                (_, true) => (RecordKind::Zero, 0),
                _ => (RecordKind::Write, part as usize),
            };
            let record = Record::new(kind, offset + done, part, 0).with_flags(RecordFlags::COPIED);
            let (lsn, _) = self.writer.append(medium.now(), record, payload, |target| {
                source.read_with(|bytes| target.copy_from_slice(bytes))
            });
            self.regions.touch(offset + done, part, lsn);
            done += part;
        }
        self.counters.copied_bytes += length;
        self.counters.origin_errors += u64::from(failed);
        self.bitmap.clear(offset, length);
        self.locks.unlock(lock);
        self.copier.copies[index] = None;
    }
}
