//! Admission with hot copies: a write that would overwrite what a copy still needs waits until that is saved, and no other write waits with it.

use super::memory::Lost;
use super::spool::{HotCopies, HotCopy, Mark, NoPlace, Place};
use crate::bitmap::BITMAP_BLOCK_BYTES;
use crate::config::Rules;
use crate::volume::{Phase, TOKEN_HOT, Volume};
use varve_format::SPOOL_BATCH_BLOCKS;
use varve_front::RequestKind;
use varve_log::{Disk, IoError, Medium, Operation};

const TOKEN_SAVE_READ: u64 = TOKEN_HOT;
/// No write waits longer for the spool than so many times `log_wait_max`: then the copies are given up.
const COPY_WAITS: u64 = 4;

/// Nor so many times that for its turn, with a disk that answers but is slow.
const COPY_QUEUES: u64 = 4;

/// Where a write stands with the hot copies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Saving {
    /// Nothing that a copy needs will be lost.
    Done,
    /// Blocks are being saved.
    Waits,
    /// A discard that would lose what a copy needs: nothing is discarded, which a discard allows.
    Dropped,
}

impl<R: Rules> Volume<R> {
    /// Begins to save what a write to `[start, end)` would overwrite.
    pub(crate) fn save_for_copies(
        &mut self,
        medium: &mut dyn Medium,
        id: u16,
        kind: RequestKind,
        (start, end): (u64, u64),
    ) -> Saving {
        let Some(hot) = self.hot.as_mut().filter(|_| R::SAVE_BEFORE_OVERWRITE) else {
            return Saving::Done;
        };
        let now = medium.now().monotonic_ns;
        let wait_max = COPY_WAITS * self.config.log_wait_max_ns;
        if let Mark::Wanted(since) = hot.mark {
            let since = if since == 0 { now } else { since };
            hot.mark = Mark::Wanted(since);
            if R::MARK_BEFORE_LOSING_COPIES && now.saturating_sub(since) < wait_max {
                return Saving::Waits;
            }
        }
        let Some(newest) = hot.newest() else {
            return Saving::Done;
        };
        let (first, last) = (start / BITMAP_BLOCK_BYTES, end.div_ceil(BITMAP_BLOCK_BYTES));
        if (first..last).all(|block| newest.changed.contains(block)) {
            self.table[id as usize].saving_since_ns = 0;
            return Saving::Done;
        }
        if kind == RequestKind::Discard {
            return Saving::Dropped;
        }
        let waiting_since = &mut self.table[id as usize].saving_since_ns;
        if *waiting_since == 0 {
            *waiting_since = now;
        } else {
            let waited = now.saturating_sub(*waiting_since);
            if waited >= wait_max && hot.is_late(now, wait_max) || waited >= COPY_QUEUES * wait_max
            {
                hot.lose_all(Lost::Late, now);
                return Saving::Waits;
            }
        }
        let mut block = first;
        while block < last {
            let Some(hot) = self.hot.as_mut() else { break };
            let needs = |hot: &HotCopies, block: u64| {
                let changed = hot.newest().is_none_or(|copy| copy.changed.contains(block));
                !changed && !hot.saving.contains(&block)
            };
            if !needs(hot, block) {
                block += 1;
                continue;
            }
            let mut run = 1;
            while block + run < last && run < SPOOL_BATCH_BLOCKS as u64 && needs(hot, block + run) {
                run += 1;
            }
            // What was admitted before the cut and is still on its way belongs to the copy: it must land first.
            let (offset, length) = (block * BITMAP_BLOCK_BYTES, run * BITMAP_BLOCK_BYTES);
            if self.locks.overlaps(offset, offset + length) {
                run = 1;
                if self.locks.overlaps(offset, offset + BITMAP_BLOCK_BYTES) {
                    block += 1;
                    continue;
                }
            }
            match hot.place(block, run as usize) {
                Ok(place) => {
                    block += place.count as u64;
                    self.read_to_save(medium, place);
                }
                Err(NoPlace::Now) => break,
                Err(NoPlace::Ever) => {
                    hot.lose_all(Lost::Full, now);
                    break;
                }
            }
        }
        Saving::Waits
    }

    fn read_to_save(&mut self, medium: &mut dyn Medium, place: Place) {
        let Some(hot) = self.hot.as_ref() else { return };
        let offset = hot.block_of(place.batch, place.first) * BITMAP_BLOCK_BYTES;
        let buffer = hot
            .memory
            .block_bytes(place.batch, place.first, place.count);
        let length = (self.config.volume_bytes - offset).min(buffer.len() as u64) as usize;
        if length < buffer.len() {
            // The last block of an odd volume: what is behind its end reads zero.
            buffer
                .slice(length, buffer.len() - length)
                .write_with(|rest| rest.fill(0));
        }
        medium.submit(
            Disk::Origin,
            TOKEN_SAVE_READ | (place.batch as u64) << 8 | place.first as u64,
            Operation::Read {
                offset,
                buffer: buffer.slice(0, length),
            },
        );
    }

    /// A completion of the hot copies' own operations.
    pub(crate) fn complete_hot(
        &mut self,
        medium: &mut dyn Medium,
        token: u64,
        result: Result<(), IoError>,
    ) {
        let now = medium.now().monotonic_ns;
        let Some(hot) = self.hot.as_mut() else { return };
        match (token >> 32) & 0xff {
            0 => {
                let (batch, first) = ((token >> 8) as usize & 0xff, token as usize & 0xff);
                if let Some(failed) = hot.read_done(batch, first, result) {
                    for index in failed.first..failed.first + failed.count {
                        if let Some(hot) = self.hot.as_mut() {
                            hot.read_again(batch, index);
                        }
                        let alone = Place {
                            batch,
                            first: index,
                            count: 1,
                        };
                        self.read_to_save(medium, alone);
                    }
                }
            }
            1 => hot.write_done(token as usize & 0xff, result, now),
            _ => hot.flush_done(result, now),
        }
    }

    pub(crate) fn pump_hot(&mut self, medium: &mut dyn Medium) {
        if let Some(hot) = self.hot.as_mut() {
            hot.pump(medium, R::SPOOL_FLUSH_BEFORE_OVERWRITE);
        }
    }

    /// From here on there can be hot copies.
    pub fn attach_copies(&mut self, hot: HotCopies) {
        self.hot = Some(hot);
    }

    /// There are none any more; nothing may be in flight to the spool.
    pub fn detach_copies(&mut self) -> bool {
        let free = self
            .hot
            .as_ref()
            .is_none_or(|hot| hot.copies.is_empty() && !hot.is_busy());
        if free {
            self.hot = None;
        }
        free
    }

    /// The hot copies.
    #[must_use]
    pub fn copies(&self) -> Option<&HotCopies> {
        self.hot.as_ref()
    }

    /// The hot copies, to tell them something.
    pub fn copies_mut(&mut self) -> Option<&mut HotCopies> {
        self.hot.as_mut()
    }

    /// Cuts: every write that was admitted before belongs to the copy, none that comes later. Gives what [`Volume::is_settled`] is asked with.
    pub fn cut_copy(&mut self, copy: HotCopy) -> Option<u64> {
        self.hot.as_mut()?.cut(copy);
        Some(self.admitted)
    }

    /// Whether everything that was admitted before a cut has landed on the origin: only now may the copy be read.
    #[must_use]
    pub fn is_settled(&self, cut: u64) -> bool {
        !self.table.iter().any(|active| {
            active.admitted_as != 0
                && active.admitted_as <= cut
                && matches!(active.phase, Phase::Gated(_) | Phase::Origin)
        })
    }

    /// Holds new writes back until [`Volume::release_writes`], or until `until_ns` (monotonic) at the latest.
    pub fn hold_writes(&mut self, until_ns: u64) {
        self.held_until_ns = until_ns;
    }

    /// Lets writes go on.
    pub fn release_writes(&mut self) {
        self.held_until_ns = 0;
    }

    /// Asks for a flush of the origin; gives what [`Volume::is_flushed`] is asked with.
    pub fn flush_origin(&mut self, medium: &mut dyn Medium) -> u64 {
        let completed = self.completed_below();
        self.flusher.want(medium, completed)
    }

    /// Whether that flush has come back. Its failure is the volume's trouble, which says so.
    #[must_use]
    pub fn is_flushed(&self, generation: u64) -> bool {
        self.flusher.has_ended(generation)
    }

    /// Forgets a copy.
    pub fn remove_copy(&mut self, generation: u32) {
        if let Some(hot) = self.hot.as_mut() {
            hot.remove(generation);
        }
    }
}
