//! The batch buffer: a ring of slots in memory that outlives the process. Records live here from admission until the origin
//! and the log both have them.
//!
//! A slot: a control page, the batch's 4 KiB header block, 256 KiB of payload. The control page is not part of the log; it says
//! which records are whole and which have reached the origin.
//!
//! Crash scenarios (the process dies, the kernel lives on; stores reach the page in program order):
//! * Killed while a record is copied in: the slot's record count was not yet raised; the record never happened, and its
//!   request was not yet on its way to the origin.
//! * Killed between the origin write and its completion: the record is here and not marked done; the next process writes
//!   it again. That is safe, because overlapping writes are never in flight together: no newer write to the range exists.
//! * Killed before the log has the batch: the next process appends it to the log, under the same LSNs in a new epoch.
//! * Machine loses power: this memory is gone; the log's intents say what to read again.

use crate::{Buffer, Memory};
use std::rc::Rc;
use varve_format::{
    BATCH_HEADER_BYTES, BATCH_PAYLOAD_BYTES_MAX, BATCH_RECORDS_MAX, BatchHeader, Hash128, Lsn,
    RECORD_BYTES, Record, WallTime,
};
use zerocopy::{FromBytes, IntoBytes};

const PAGE: usize = 4096;
/// Memory of one slot.
pub const SLOT_BYTES: usize = PAGE + BATCH_HEADER_BYTES + BATCH_PAYLOAD_BYTES_MAX;

// Control page: 8-byte words.
const WORD_STATE: usize = 0;
const WORD_ORDER: usize = 8;
const WORD_LSN_FIRST: usize = 16;
const WORD_TIME: usize = 24;
const WORD_RECORDS: usize = 32;
const WORD_PAYLOAD: usize = 40;
const DONE_FLAGS: usize = 64;
const _: () = assert!(DONE_FLAGS + BATCH_RECORDS_MAX <= PAGE);

const STATE_FREE: u64 = 0;
const STATE_USED: u64 = 1;

/// Records of one slot that one origin write carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// The slot.
    pub slot: u16,
    /// Index of the first record.
    pub first: u8,
    /// Number of records.
    pub count: u8,
}

/// A record found in the buffer after the process that wrote it died.
#[derive(Clone, Debug)]
pub struct SurvivingRecord {
    /// Its LSN.
    pub lsn: Lsn,
    /// Its wall time.
    pub time: WallTime,
    /// The record; payload CRC and offset as the dead process set them.
    pub record: Record,
    /// Its payload.
    pub payload: Vec<u8>,
    /// Whether the origin has it.
    pub done: bool,
}

/// The ring of slots.
pub struct BatchBuffer {
    memory: Rc<Memory>,
    base: usize,
    slots: usize,
    /// Holders of each slot: its log write, and each origin write from it. Zero = free.
    holds: Vec<u16>,
    next_order: u64,
    free: usize,
    /// Payloads begin at multiples of this, the origin's sector: its direct I/O reads them where they lie.
    align: usize,
}

impl BatchBuffer {
    /// A buffer of `slots` slots at `base` of `memory`. What is in it is kept until [`BatchBuffer::clear`].
    #[must_use]
    pub fn new(memory: &Rc<Memory>, base: usize, slots: usize, align: usize) -> BatchBuffer {
        assert!(base + slots * SLOT_BYTES <= memory.bytes() && base.is_multiple_of(PAGE));
        BatchBuffer {
            memory: Rc::clone(memory),
            base,
            slots,
            holds: vec![0; slots],
            next_order: 1,
            free: slots,
            align,
        }
    }

    fn word(&self, slot: usize, word: usize) -> usize {
        self.base + slot * SLOT_BYTES + word
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        for slot in 0..self.slots {
            self.memory.store(self.word(slot, WORD_STATE), STATE_FREE);
        }
        self.holds.fill(0);
        self.free = self.slots;
    }

    /// What payloads are aligned to.
    #[must_use]
    pub fn align(&self) -> usize {
        self.align
    }

    /// Slots that are free.
    #[must_use]
    pub fn free_slots(&self) -> usize {
        self.free
    }

    /// All slots.
    #[must_use]
    pub fn slots(&self) -> usize {
        self.slots
    }

    /// Opens a slot for a batch; the caller holds it once (for the log).
    pub fn open(&mut self, lsn_first: Lsn, time: WallTime) -> Option<usize> {
        let slot = (0..self.slots)
            .map(|i| (self.next_order as usize + i) % self.slots)
            .find(|slot| self.holds[*slot] == 0)?;
        self.memory
            .write_with(self.word(slot, DONE_FLAGS), BATCH_RECORDS_MAX, |flags| {
                flags.fill(0)
            });
        self.memory
            .store(self.word(slot, WORD_ORDER), self.next_order);
        self.memory
            .store(self.word(slot, WORD_LSN_FIRST), lsn_first.0);
        self.memory.store(self.word(slot, WORD_TIME), time.0 as u64);
        self.memory.store(self.word(slot, WORD_RECORDS), 0);
        self.memory.store(self.word(slot, WORD_PAYLOAD), 0);
        self.memory.store(self.word(slot, WORD_STATE), STATE_USED);
        self.next_order += 1;
        self.holds[slot] = 1;
        self.free -= 1;
        Some(slot)
    }

    /// One more holder.
    pub fn hold(&mut self, slot: usize) {
        self.holds[slot] += 1;
    }

    /// One holder less; the last one frees the slot.
    pub fn release(&mut self, slot: usize) {
        self.holds[slot] -= 1;
        if self.holds[slot] == 0 {
            self.memory.store(self.word(slot, WORD_STATE), STATE_FREE);
            self.free += 1;
        }
    }

    /// Records in a slot.
    #[must_use]
    pub fn record_count(&self, slot: usize) -> usize {
        self.memory.load(self.word(slot, WORD_RECORDS)) as usize
    }

    /// Payload bytes in a slot.
    #[must_use]
    pub fn payload_bytes(&self, slot: usize) -> usize {
        self.memory.load(self.word(slot, WORD_PAYLOAD)) as usize
    }

    /// LSN of the first record in a slot.
    #[must_use]
    pub fn lsn_first(&self, slot: usize) -> Lsn {
        Lsn(self.memory.load(self.word(slot, WORD_LSN_FIRST)))
    }

    /// Wall time of the slot's batch.
    #[must_use]
    pub fn time(&self, slot: usize) -> WallTime {
        WallTime(self.memory.load(self.word(slot, WORD_TIME)) as i64)
    }

    fn header_offset(&self, slot: usize) -> usize {
        self.word(slot, PAGE)
    }

    fn payload_offset(&self, slot: usize) -> usize {
        self.word(slot, PAGE + BATCH_HEADER_BYTES)
    }

    /// Copies a payload in behind what is there; the record that names it comes next.
    pub fn push_payload(&self, slot: usize, copy: impl FnOnce(&mut [u8]), bytes: usize) -> usize {
        let at = self.payload_bytes(slot);
        assert!(at.is_multiple_of(self.align) && at + bytes <= BATCH_PAYLOAD_BYTES_MAX);
        self.memory
            .write_with(self.payload_offset(slot) + at, bytes, copy);
        at
    }

    /// Runs `reader` on a range of the slot's payload.
    pub fn read_payload<R>(
        &self,
        slot: usize,
        offset: usize,
        bytes: usize,
        reader: impl FnOnce(&[u8]) -> R,
    ) -> R {
        self.memory
            .read_with(self.payload_offset(slot) + offset, bytes, reader)
    }

    /// Adds a record, whose payload (if any) was pushed just before. From here on it survives us.
    pub fn push_record(&self, slot: usize, record: &Record) -> usize {
        let index = self.record_count(slot);
        assert!(index < BATCH_RECORDS_MAX);
        self.memory.copy_in(
            self.header_offset(slot) + BatchHeader::record_range(index).start,
            record.as_bytes(),
        );
        let (at, bytes) = (
            self.payload_bytes(slot),
            record.payload_bytes.get() as usize,
        );
        let padded = bytes.next_multiple_of(self.align);
        self.memory.write_with(
            self.payload_offset(slot) + at + bytes,
            padded - bytes,
            |tail| tail.fill(0),
        );
        self.memory
            .store(self.word(slot, WORD_PAYLOAD), (at + padded) as u64);
        self.memory
            .store(self.word(slot, WORD_RECORDS), index as u64 + 1);
        index
    }

    /// Marks records as held by the origin.
    pub fn mark_done(&self, chunk: Chunk) {
        let start = self.word(chunk.slot as usize, DONE_FLAGS) + chunk.first as usize;
        self.memory
            .write_with(start, chunk.count as usize, |flags| flags.fill(1));
    }

    /// A range of a slot's payload as an I/O buffer.
    #[must_use]
    pub fn payload_buffer(&self, slot: usize, offset: usize, bytes: usize) -> Buffer {
        Buffer::new(&self.memory, self.payload_offset(slot) + offset, bytes)
    }

    /// Seals the slot's batch with `header` and gives the bytes for the log, padded with zeroes to 4 KiB, and the batch's hash.
    pub fn seal(&self, slot: usize, header: BatchHeader) -> (Buffer, Hash128) {
        let payload = self.payload_bytes(slot);
        let padded = payload.next_multiple_of(PAGE);
        self.memory.write_with(
            self.payload_offset(slot) + payload,
            padded - payload,
            |tail| tail.fill(0),
        );
        let records = self.record_count(slot);
        let hash = self
            .memory
            .write_with(self.header_offset(slot), BATCH_HEADER_BYTES, |block| {
                header.seal(block, records, payload)
            });
        (
            Buffer::new(
                &self.memory,
                self.header_offset(slot),
                BATCH_HEADER_BYTES + padded,
            ),
            hash,
        )
    }

    /// Everything a dead process left, in LSN order.
    #[must_use]
    pub fn survivors(&self) -> Vec<SurvivingRecord> {
        let mut used: Vec<usize> = (0..self.slots)
            .filter(|s| self.memory.load(self.word(*s, WORD_STATE)) == STATE_USED)
            .collect();
        used.sort_by_key(|slot| self.memory.load(self.word(*slot, WORD_ORDER)));
        let mut found = Vec::new();
        for slot in used {
            let count = self.record_count(slot).min(BATCH_RECORDS_MAX);
            for index in 0..count {
                let at = self.header_offset(slot) + BatchHeader::record_range(index).start;
                let Some(record) = self.memory.read_with(at, RECORD_BYTES, |bytes| {
                    Record::read_from_bytes(bytes).ok()
                }) else {
                    continue;
                };
                if record.check(BATCH_PAYLOAD_BYTES_MAX as u64).is_err() {
                    break;
                }
                let start = self.payload_offset(slot) + record.payload_offset.get() as usize;
                let payload = self.memory.read_with(
                    start,
                    record.payload_bytes.get() as usize,
                    <[u8]>::to_vec,
                );
                let done = self
                    .memory
                    .read_with(self.word(slot, DONE_FLAGS) + index, 1, |flag| flag[0] == 1);
                let time =
                    WallTime(self.time(slot).0 + i64::from(record.time_delta_us.get()) * 1000);
                found.push(SurvivingRecord {
                    lsn: self.lsn_first(slot).plus(index as u64),
                    time,
                    record,
                    payload,
                    done,
                });
            }
        }
        found
    }
}
