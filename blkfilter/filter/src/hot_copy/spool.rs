//! The writing side of the spool: where batches go, when they are written, and which extents may be used again.

use super::memory::{BUFFERS, CopyMemory, Lost, SpoolMemory};
use crate::bitmap::{BITMAP_BLOCK_BYTES, Bitmap};
use crate::volume::TOKEN_HOT;
use std::collections::HashSet;
use varve_format::{
    SPOOL_BATCH_BLOCKS, SPOOL_EXTENT_PAGES, SPOOL_EXTENTS_AT, SavedBlock, SavedKind, SpoolBatch,
    crc32c,
};
use varve_log::{Disk, IoError, Medium, Operation};

pub(crate) const TOKEN_BATCH_WRITE: u64 = TOKEN_HOT | 1 << 32;
pub(crate) const TOKEN_SPOOL_FLUSH: u64 = TOKEN_HOT | 2 << 32;
/// Extents that one turn looks through for what no copy needs any more: 64 × 64 lookups, well below a millisecond.
const SWEEP_EXTENTS: u64 = 64;

/// One hot copy, as the volume sees it.
pub struct HotCopy {
    /// Its memory.
    pub memory: CopyMemory,
    /// It must survive a power cut.
    pub persist: bool,
    pub(crate) generation: u32,
    pub(crate) changed: Bitmap,
}

impl HotCopy {
    /// A copy over its memory.
    #[must_use]
    pub fn new(memory: CopyMemory, persist: bool) -> HotCopy {
        HotCopy {
            generation: memory.generation(),
            changed: memory.changed(),
            memory,
            persist,
        }
    }

    pub(crate) fn is_valid(&self) -> bool {
        self.memory.lost().is_none()
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Free,
    /// Blocks are added.
    Filling,
    /// No more are added; the last reads are under way.
    Closed,
    Writing,
    /// Written; waits for a flush that is submitted from now on.
    Written,
    Flushing,
}

#[derive(Clone, Copy)]
struct Batch {
    stage: Stage,
    count: usize,
    capacity: usize,
    /// Reads that have not come back.
    reads: usize,
    /// When its write or flush was submitted.
    since_ns: u64,
    /// Entries that copies and writers know of, one bit each.
    published: u64,
    /// Blocks of the read that begins at an entry.
    runs: [u8; SPOOL_BATCH_BLOCKS],
}

const NO_BATCH: Batch = Batch {
    stage: Stage::Free,
    count: 0,
    capacity: 0,
    reads: 0,
    since_ns: 0,
    published: 0,
    runs: [0; SPOOL_BATCH_BLOCKS],
};

/// Where blocks were put that are to be saved.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    pub batch: usize,
    pub first: usize,
    pub count: usize,
}

/// Why there was no place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NoPlace {
    /// All buffers are on their way to the spool.
    Now,
    /// The spool is full.
    Ever,
}

/// The hot copies of a volume, and their spool.
pub struct HotCopies {
    pub(crate) memory: SpoolMemory,
    spool: [u8; 16],
    /// Sorted by generation.
    pub(crate) copies: Vec<HotCopy>,
    batches: [Batch; BUFFERS],
    filling: Option<usize>,
    flushing: bool,
    free_extents: Vec<u32>,
    /// The extent in use: its next page, and its end.
    tail: (u64, u64),
    /// Blocks that are being saved.
    pub(crate) saving: HashSet<u64>,
    sweep: Option<u64>,
    /// Copies that had to last were given up: whether that is durable somewhere.
    pub(crate) mark: Mark,
    /// Copies were given up, and nobody was told yet.
    alert: Option<Lost>,
}

/// Whether it is durably known that copies are valid no more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mark {
    NotNeeded,
    /// Since then (monotonic nanoseconds).
    Wanted(u64),
    Done,
}

impl HotCopies {
    /// Copies over memory whose index is right. Batches in it that a dead process left are written again.
    #[must_use]
    pub fn new(memory: SpoolMemory, spool: [u8; 16], mut copies: Vec<HotCopy>) -> HotCopies {
        copies.sort_by_key(|copy| copy.generation);
        let mut hot = HotCopies {
            memory,
            spool,
            copies,
            batches: [NO_BATCH; BUFFERS],
            filling: None,
            flushing: false,
            free_extents: Vec::new(),
            tail: (0, 0),
            saving: HashSet::with_capacity(2 * BUFFERS * SPOOL_BATCH_BLOCKS),
            sweep: None,
            mark: Mark::NotNeeded,
            alert: None,
        };
        hot.take_over_batches();
        hot.find_free_extents();
        // Given up by a process that died before anybody made it known.
        for copy in &hot.copies {
            if let Some(why) = copy.memory.lost() {
                hot.alert = Some(why);
                if copy.persist {
                    hot.mark = Mark::Wanted(0);
                }
            }
        }
        hot
    }

    /// Batches that a dead process left are written (again). What it had not let anybody know of waits for that, if it must last.
    fn take_over_batches(&mut self) {
        for index in 0..BUFFERS {
            let Some((page, _, generation)) = self.memory.batch_in(index) else {
                continue;
            };
            let entries: Vec<_> = self.memory.entries(index).collect();
            let mut published = 0;
            for (position, entry) in entries.iter().enumerate() {
                match entry.outcome {
                    None => self.memory.set_outcome(index, position, SavedKind::Void, 0),
                    Some((SavedKind::Void, _)) => {} // Another death came before this one.
                    Some(_) if self.memory.entry(page + 1 + position as u64).is_some() => {
                        published |= 1 << position;
                        self.set_bits(entry.block, generation);
                    }
                    Some(_) => {
                        self.saving.insert(entry.block);
                    }
                }
            }
            if entries.is_empty() {
                self.memory.end_batch(index);
            } else {
                self.batches[index] = Batch {
                    stage: Stage::Closed,
                    count: entries.len(),
                    published,
                    ..NO_BATCH
                };
            }
        }
        self.publish_what_need_not_last();
    }

    fn find_free_extents(&mut self) {
        let extents = self.memory.pages() / SPOOL_EXTENT_PAGES;
        let buffered: Vec<u64> = (0..BUFFERS)
            .filter_map(|index| self.memory.batch_in(index))
            .map(|(page, ..)| page / SPOOL_EXTENT_PAGES)
            .collect();
        let memory = &self.memory;
        let empty = |extent: &u64| {
            let first = extent * SPOOL_EXTENT_PAGES;
            !buffered.contains(extent)
                && (first..first + SPOOL_EXTENT_PAGES).all(|page| memory.entry(page).is_none())
        };
        // Taken from the end: the lowest first.
        self.free_extents = (0..extents)
            .rev()
            .filter(empty)
            .map(|extent| extent as u32)
            .collect();
    }

    /// Bytes of the spool that are free.
    #[must_use]
    pub fn free_bytes(&self) -> u64 {
        self.free_extents.len() as u64 * SPOOL_EXTENT_PAGES * BITMAP_BLOCK_BYTES
    }

    /// Whether a copy that must survive a power cut is among them.
    #[must_use]
    pub fn must_last(&self) -> bool {
        self.copies
            .iter()
            .any(|copy| copy.persist && copy.is_valid())
    }

    /// The newest copy that is valid: what it does not need, none does.
    pub(crate) fn newest(&self) -> Option<&HotCopy> {
        self.copies.iter().rev().find(|copy| copy.is_valid())
    }

    /// Adds a copy: from here on it is cut.
    pub(crate) fn cut(&mut self, copy: HotCopy) {
        let generation = copy.generation;
        self.copies.push(copy);
        let Some(index) = self.filling else { return };
        if self.batches[index].count == 0 {
            self.memory.set_generation(index, generation);
        } else {
            self.close(index);
        }
    }

    /// Forgets a copy; what only it needed is free again soon.
    pub(crate) fn remove(&mut self, generation: u32) {
        self.copies.retain(|copy| copy.generation != generation);
        self.sweep = Some(0);
        self.publish_what_need_not_last();
    }

    /// No copy that had to last is left: who waited for a flush need not.
    fn publish_what_need_not_last(&mut self) {
        if self.must_last() {
            return;
        }
        for index in 0..BUFFERS {
            self.publish(index, 0..self.batches[index].count);
        }
    }

    /// No copy is valid from here on. True: a copy that had to last is among them, and that must become durable.
    pub(crate) fn lose_all(&mut self, why: Lost, now_ns: u64) {
        if self.newest().is_none() {
            return;
        }
        let lasting = self.must_last();
        self.alert = Some(why);
        for copy in self.copies.iter().filter(|copy| copy.is_valid()) {
            copy.memory.lose(why);
        }
        if lasting {
            self.mark = Mark::Wanted(now_ns);
        }
        self.publish_what_need_not_last();
    }

    /// Whether the spool's disk does not answer within `limit_ns`.
    pub(crate) fn is_late(&self, now_ns: u64, limit_ns: u64) -> bool {
        self.batches.iter().any(|batch| {
            matches!(batch.stage, Stage::Writing | Stage::Flushing)
                && now_ns.saturating_sub(batch.since_ns) >= limit_ns
        })
    }

    /// Why copies were given up since this was asked last; whoever asks makes it known, and durable.
    pub fn take_alert(&mut self) -> Option<Lost> {
        self.alert.take()
    }

    /// Each copy: generation, bytes that were overwritten since its cut, why it is valid no more.
    pub fn figures(&self) -> impl Iterator<Item = (u32, u64, Option<Lost>)> + '_ {
        self.copies
            .iter()
            .map(|copy| (copy.generation, copy.changed.bytes(), copy.memory.lost()))
    }

    /// Whether it must be made durable that copies are valid no more.
    #[must_use]
    pub fn mark_wanted(&self) -> bool {
        matches!(self.mark, Mark::Wanted(_))
    }

    /// It is durable.
    pub fn marked(&mut self) {
        self.mark = Mark::Done;
    }

    fn set_bits(&mut self, block: u64, generation: u32) {
        let offset = block * BITMAP_BLOCK_BYTES;
        for copy in &mut self.copies {
            if copy.generation <= generation {
                copy.changed.set(offset, 1);
            }
        }
    }

    /// Takes places for up to `wanted` neighbouring blocks.
    pub(crate) fn place(&mut self, block: u64, wanted: usize) -> Result<Place, NoPlace> {
        let index = match self.filling {
            Some(index) => index,
            None => self.open()?,
        };
        let batch = &mut self.batches[index];
        let first = batch.count;
        let count = wanted.min(batch.capacity - first);
        batch.count += count;
        batch.reads += 1;
        batch.runs[first] = count as u8;
        let full = batch.count == batch.capacity;
        for position in 0..count {
            let block = block + position as u64;
            self.memory.add(index, first + position, block);
            self.saving.insert(block);
        }
        if full {
            self.close(index);
        }
        Ok(Place {
            batch: index,
            first,
            count,
        })
    }

    fn open(&mut self) -> Result<usize, NoPlace> {
        let index = (0..BUFFERS)
            .find(|index| self.batches[*index].stage == Stage::Free)
            .ok_or(NoPlace::Now)?;
        if self.tail.1 < self.tail.0 + 2 {
            let extent = u64::from(self.free_extents.pop().ok_or(NoPlace::Ever)?);
            let first = extent * SPOOL_EXTENT_PAGES;
            self.tail = (first, first + SPOOL_EXTENT_PAGES);
        }
        let generation = self.newest().map_or(0, |copy| copy.generation);
        let sequence = self.memory.take_sequence();
        self.memory
            .begin_batch(index, self.tail.0, sequence, generation);
        self.batches[index] = Batch {
            stage: Stage::Filling,
            capacity: (self.tail.1 - self.tail.0 - 1) as usize,
            ..NO_BATCH
        };
        self.filling = Some(index);
        Ok(index)
    }

    fn close(&mut self, index: usize) {
        self.batches[index].stage = Stage::Closed;
        self.tail.0 += 1 + self.batches[index].count as u64;
        self.filling = None;
    }

    /// A read has come back. Gives the blocks that failed together and must be read one by one.
    pub(crate) fn read_done(
        &mut self,
        batch: usize,
        first: usize,
        result: Result<(), IoError>,
    ) -> Option<Place> {
        let count = usize::from(self.batches[batch].runs[first]);
        self.batches[batch].reads -= 1;
        if result.is_err() && count > 1 {
            return Some(Place {
                batch,
                first,
                count,
            });
        }
        for index in first..first + count {
            let bytes = self.memory.block_bytes(batch, index, 1);
            let (kind, crc) = match result {
                Ok(()) => (SavedKind::Saved, bytes.read_with(crc32c)),
                Err(_) => (SavedKind::Unreadable, 0),
            };
            self.memory.set_outcome(batch, index, kind, crc);
        }
        if !self.must_last() {
            self.publish(batch, first..first + count);
        }
        None
    }

    /// One of the blocks that failed together is read alone.
    pub(crate) fn read_again(&mut self, batch: usize, index: usize) {
        self.batches[batch].reads += 1;
        self.batches[batch].runs[index] = 1;
    }

    pub(crate) fn block_of(&self, batch: usize, index: usize) -> u64 {
        self.memory.added(batch, index).block
    }

    /// Lets copies and writers know: index, bits, and who waits may go on.
    fn publish(&mut self, batch: usize, range: std::ops::Range<usize>) {
        let Some((page, _, generation)) = self.memory.batch_in(batch) else {
            return;
        };
        for index in range {
            let entry = self.memory.added(batch, index);
            let bit = 1u64 << index;
            let Some((kind, crc)) = entry
                .outcome
                .filter(|_| self.batches[batch].published & bit == 0)
            else {
                continue;
            };
            self.batches[batch].published |= bit;
            if kind != SavedKind::Void {
                self.saving.remove(&entry.block);
                let at = page + 1 + index as u64;
                self.memory.insert(at, entry.block, generation, kind, crc);
                self.set_bits(entry.block, generation);
            }
        }
    }

    /// Moves batches on: writes what is complete, flushes what must last.
    pub(crate) fn pump(&mut self, medium: &mut dyn Medium, flush: bool) {
        let must_last = self.must_last();
        if must_last
            && let Some(index) = self.filling
            && self.batches[index].count > 0
            && self.is_spool_idle()
        {
            self.close(index); // Somebody waits for it, and nothing else is under way.
        }
        for index in 0..BUFFERS {
            if self.batches[index].stage == Stage::Closed && self.batches[index].reads == 0 {
                self.write(medium, index);
            }
        }
        if !self.flushing
            && self
                .batches
                .iter()
                .any(|batch| batch.stage == Stage::Written)
        {
            if must_last && flush {
                // In the order of their sequence: whoever reads an extent after a power cut stops at the first batch that is not there.
                let unwritten = (0..BUFFERS)
                    .filter(|index| {
                        matches!(self.batches[*index].stage, Stage::Closed | Stage::Writing)
                    })
                    .filter_map(|index| self.memory.batch_in(index))
                    .map(|batch| batch.1)
                    .min()
                    .unwrap_or(u64::MAX);
                for index in 0..BUFFERS {
                    let sequence = self
                        .memory
                        .batch_in(index)
                        .map_or(u64::MAX, |batch| batch.1);
                    if self.batches[index].stage == Stage::Written && sequence < unwritten {
                        self.batches[index].stage = Stage::Flushing;
                        self.batches[index].since_ns = medium.now().monotonic_ns;
                        self.flushing = true;
                    }
                }
                if self.flushing {
                    medium.submit(Disk::Spool, TOKEN_SPOOL_FLUSH, Operation::Flush);
                }
            } else {
                self.finish(Stage::Written);
            }
        }
        self.sweep();
    }

    fn is_spool_idle(&self) -> bool {
        self.batches
            .iter()
            .all(|batch| matches!(batch.stage, Stage::Free | Stage::Filling))
    }

    fn write(&mut self, medium: &mut dyn Medium, index: usize) {
        let Some((page, sequence, generation)) = self.memory.batch_in(index) else {
            return;
        };
        let none = SavedBlock::new(0, 0, SavedKind::Void);
        let mut blocks = [none; SPOOL_BATCH_BLOCKS];
        let count = self.batches[index].count;
        for (block, entry) in blocks.iter_mut().zip(self.memory.entries(index)) {
            let (kind, crc) = entry.outcome.unwrap_or((SavedKind::Void, 0));
            *block = SavedBlock::new(entry.block, crc, kind);
        }
        let header = SpoolBatch::new(self.spool, sequence, page, generation, &blocks[..count]);
        let bytes = self.memory.batch_bytes(index, count);
        bytes
            .slice(0, BITMAP_BLOCK_BYTES as usize)
            .write_with(|target| header.write_to(target));
        self.batches[index].stage = Stage::Writing;
        self.batches[index].since_ns = medium.now().monotonic_ns;
        let operation = Operation::Write {
            offset: SPOOL_EXTENTS_AT + page * BITMAP_BLOCK_BYTES,
            buffer: bytes,
        };
        medium.submit(Disk::Spool, TOKEN_BATCH_WRITE | index as u64, operation);
    }

    pub(crate) fn write_done(&mut self, index: usize, result: Result<(), IoError>, now_ns: u64) {
        self.batches[index].stage = Stage::Written;
        if result.is_err() {
            self.lose_all(Lost::Failed, now_ns);
            // A hole: nothing behind it in its extent would be found after a power cut.
            match self.filling {
                Some(filling) if self.batches[filling].count == 0 => {
                    self.memory.end_batch(filling);
                    self.batches[filling] = NO_BATCH;
                    self.filling = None;
                }
                Some(filling) => self.close(filling),
                None => {}
            }
            self.tail.0 = self.tail.1;
        }
    }

    pub(crate) fn flush_done(&mut self, result: Result<(), IoError>, now_ns: u64) {
        self.flushing = false;
        // A failed flush is never tried again: the kernel may have forgotten what it did not write.
        if result.is_err() {
            self.lose_all(Lost::Failed, now_ns);
        }
        self.finish(Stage::Flushing);
    }

    /// What has come so far is in the spool (or nobody needs it any more).
    fn finish(&mut self, stage: Stage) {
        for index in 0..BUFFERS {
            if self.batches[index].stage == stage {
                self.publish(index, 0..self.batches[index].count);
                self.batches[index] = NO_BATCH;
                self.memory.end_batch(index);
            }
        }
    }

    /// Finds extents that no copy needs any more, a few at a time.
    fn sweep(&mut self) {
        let Some(from) = self.sweep else { return };
        let extents = self.memory.pages() / SPOOL_EXTENT_PAGES;
        let to = (from + SWEEP_EXTENTS).min(extents);
        for extent in from..to {
            let first = extent * SPOOL_EXTENT_PAGES;
            let pages = first..first + SPOOL_EXTENT_PAGES;
            let in_use = |page: u64| {
                self.memory.entry(page).is_some_and(|(block, generation)| {
                    let served = self
                        .copies
                        .iter()
                        .rev()
                        .find(|copy| copy.generation <= generation);
                    served.is_some_and(|copy| {
                        self.memory
                            .find(block, copy.generation)
                            .is_some_and(|saved| saved.page == page)
                    })
                })
            };
            let holds = pages.clone().any(|page| self.memory.entry(page).is_some());
            let is_tail = self.tail.1 == first + SPOOL_EXTENT_PAGES;
            let buffered = (0..BUFFERS).any(|index| {
                self.memory
                    .batch_in(index)
                    .is_some_and(|(page, ..)| page / SPOOL_EXTENT_PAGES == extent)
            });
            if holds && !is_tail && !buffered && !pages.clone().any(in_use) {
                self.memory.remove(pages);
                self.free_extents.push(extent as u32);
            }
        }
        self.sweep = (to < extents).then_some(to);
    }

    /// Whether anything is on its way to the spool or from the origin, or is left to do.
    #[must_use]
    pub(crate) fn is_busy(&self) -> bool {
        self.batches.iter().any(|batch| {
            batch.reads > 0
                || matches!(
                    batch.stage,
                    Stage::Writing | Stage::Flushing | Stage::Closed
                )
        })
    }

    /// Whether extents are still looked through.
    pub(crate) fn is_sweeping(&self) -> bool {
        self.sweep.is_some()
    }
}
