//! The changed-block bitmap: 4 KiB blocks whose content the log does not hold yet. May over-report, never under-report.
//!
//! It lies in memory that outlives the process: a killed daemon forgets nothing. A bit is set before the write that it stands for starts,
//! and cleared only when the block's record is in the batch buffer.

use std::rc::Rc;
use varve_log::Memory;

/// Bytes that one bit stands for.
pub const BITMAP_BLOCK_BYTES: u64 = 4096;

/// One bit per block.
pub struct Bitmap {
    memory: Rc<Memory>,
    base: usize,
    blocks: u64,
    volume_bytes: u64,
    /// Bits that are set.
    count: u64,
}

impl Bitmap {
    /// Memory that a volume's bitmap needs.
    #[must_use]
    pub fn memory_bytes(volume_bytes: u64) -> usize {
        (volume_bytes.div_ceil(BITMAP_BLOCK_BYTES).div_ceil(64) * 8) as usize
    }

    /// A bitmap over what `memory` holds at `base`.
    #[must_use]
    pub fn new(memory: &Rc<Memory>, base: usize, volume_bytes: u64) -> Bitmap {
        let mut bitmap = Bitmap {
            memory: Rc::clone(memory),
            base,
            blocks: volume_bytes.div_ceil(BITMAP_BLOCK_BYTES),
            volume_bytes,
            count: 0,
        };
        bitmap.count = (0..bitmap.words())
            .map(|word| u64::from(bitmap.word(word).count_ones()))
            .sum();
        bitmap
    }

    fn words(&self) -> u64 {
        self.blocks.div_ceil(64)
    }

    fn word(&self, index: u64) -> u64 {
        self.memory.load(self.base + index as usize * 8)
    }

    fn change(&mut self, start: u64, end: u64, set: bool) {
        let mut block = start;
        while block < end {
            let word = block / 64;
            let low = block % 64;
            let high = (end - word * 64).min(64);
            let mask = (u64::MAX << low) & (u64::MAX >> (64 - high));
            let old = self.word(word);
            let new = if set { old | mask } else { old & !mask };
            if new != old {
                self.memory.store(self.base + word as usize * 8, new);
                self.count = self.count + u64::from(new.count_ones()) - u64::from(old.count_ones());
            }
            block = (word + 1) * 64;
        }
    }

    /// Marks every block that the range touches.
    pub fn set(&mut self, offset: u64, length: u64) {
        if length > 0 {
            let end = (offset + length)
                .div_ceil(BITMAP_BLOCK_BYTES)
                .min(self.blocks);
            self.change(offset / BITMAP_BLOCK_BYTES, end, true);
        }
    }

    /// Clears the blocks of a range that begins and ends on block boundaries (or at the end of the volume).
    pub fn clear(&mut self, offset: u64, length: u64) {
        debug_assert!(offset.is_multiple_of(BITMAP_BLOCK_BYTES));
        self.change(
            offset / BITMAP_BLOCK_BYTES,
            (offset + length).div_ceil(BITMAP_BLOCK_BYTES),
            false,
        );
    }

    /// Whether a block is marked.
    #[must_use]
    pub fn contains(&self, block: u64) -> bool {
        self.word(block / 64) >> (block % 64) & 1 == 1
    }

    /// Clears everything.
    pub fn clear_all(&mut self) {
        self.change(0, self.blocks, false);
    }

    /// Whether no block is marked.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Bytes that are marked.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        (self.count * BITMAP_BLOCK_BYTES).min(self.volume_bytes)
    }

    /// The first run of marked blocks at or after `offset`, at most `length_max` long: (offset, length).
    #[must_use]
    pub fn next_run(&self, offset: u64, length_max: u64) -> Option<(u64, u64)> {
        let start = self.find(offset.div_ceil(BITMAP_BLOCK_BYTES), true)?;
        let end = self
            .find(start, false)
            .unwrap_or(self.blocks)
            .min(start + length_max / BITMAP_BLOCK_BYTES);
        let first = start * BITMAP_BLOCK_BYTES;
        Some((
            first,
            (end * BITMAP_BLOCK_BYTES).min(self.volume_bytes) - first,
        ))
    }

    fn find(&self, from: u64, set: bool) -> Option<u64> {
        let mut block = from;
        while block < self.blocks {
            let word = if set {
                self.word(block / 64)
            } else {
                !self.word(block / 64)
            } & (u64::MAX << (block % 64));
            if word != 0 {
                let found = block / 64 * 64 + u64::from(word.trailing_zeros());
                return (found < self.blocks).then_some(found);
            }
            block = (block / 64 + 1) * 64;
        }
        None
    }
}
