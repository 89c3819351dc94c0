//! What hot copies keep in memory that outlives the process: where saved blocks are, batches on their way to the spool, what differs from the device.
//!
//! Two kinds of file in memory. One per spool: batch buffers, and an index (block, generation) → page. One per copy: whether it is valid, which blocks
//! were overwritten since it began, which were written to the copy itself. The volume's thread writes both (but for what is written to a copy); the
//! copies' threads read them through mappings of their own, without locks:
//! * A block's bytes, then its index entry, then its bit, then the write to the origin. Whoever reads the origin and sees the bit clear *afterwards*
//!   has read the block as it was.
//! * Entries are linked in front of their chain; only what no copy needs is ever unlinked, and that moves [`SpoolMemory`]'s sequence count, so that a
//!   reader who was walking the chain walks it again.

use crate::bitmap::Bitmap;
use std::rc::Rc;
use varve_format::{SPOOL_BATCH_BLOCKS, SPOOL_EXTENT_PAGES, SPOOL_GENERATIONS, SavedKind};
use varve_log::{Buffer, Memory};

const PAGE: usize = 4096;
/// Batches on their way to the spool: 8 × 260 KiB.
pub const BUFFERS: usize = 8;
const BUFFER_BYTES: usize = PAGE * (1 + SPOOL_EXTENT_PAGES as usize);

const SPOOL_MAGIC: u64 = u64::from_le_bytes(*b"VSPOOL01");
const COPY_MAGIC: u64 = u64::from_le_bytes(*b"VHCOPY01");
const WORD_MAGIC: usize = 0;
const WORD_IDENTITY: usize = 8;
const WORD_SPOOL: usize = 24;
const WORD_UNLINKS: usize = 40;
const WORD_SEQUENCE: usize = 48;
// A copy's page.
const WORD_GENERATION: usize = 40;
const WORD_STATE: usize = 48;
// A batch buffer's control page.
const BATCH_STATE: usize = 0;
const BATCH_PAGE: usize = 8;
const BATCH_SEQUENCE: usize = 16;
const BATCH_COUNT: usize = 24;
const BATCH_GENERATION: usize = 32;
const BATCH_ENTRIES: usize = 64;
const _: () = assert!(BATCH_ENTRIES + 16 * SPOOL_BATCH_BLOCKS <= PAGE);
/// A block whose read has not come back.
const PENDING: u64 = u64::MAX;
/// An index entry that holds nothing.
const EMPTY: u64 = u64::MAX;
const UNREADABLE_BIT: u64 = 1 << 23;
/// A chain of the index is never longer; more steps mean that the memory is damaged.
const CHAIN_MAX: usize = 1 << 20;

fn words(bytes: [u8; 16]) -> [u64; 2] {
    let mut halves = [[0u8; 8]; 2];
    halves[0].copy_from_slice(&bytes[..8]);
    halves[1].copy_from_slice(&bytes[8..]);
    halves.map(u64::from_le_bytes)
}

/// Where a saved block is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Saved {
    /// Page of the spool, counted from extent 0.
    pub page: u64,
    /// CRC-32C of the page.
    pub crc: u32,
    /// The origin could not read it.
    pub unreadable: bool,
}

/// One block of a batch buffer.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// Block of the volume.
    pub block: u64,
    /// `None` until its read has come back.
    pub outcome: Option<(SavedKind, u32)>,
}

/// The spool's memory.
#[derive(Clone)]
pub struct SpoolMemory {
    memory: Rc<Memory>,
    pages: u64,
}

impl SpoolMemory {
    /// Bytes for a spool of so many extents: 18 bytes a page of 4 KiB, and 2 MiB.
    #[must_use]
    pub fn bytes_needed(extents: u64) -> usize {
        let pages = (extents * SPOOL_EXTENT_PAGES) as usize;
        (Self::entries_base(pages as u64) + pages * 16).next_multiple_of(PAGE)
    }

    /// Wraps a mapping of that size.
    #[must_use]
    pub fn new(memory: Rc<Memory>, extents: u64) -> SpoolMemory {
        assert!(memory.bytes() >= Self::bytes_needed(extents));
        SpoolMemory {
            memory,
            pages: extents * SPOOL_EXTENT_PAGES,
        }
    }

    /// Whether it is that of this spool, volume and boot.
    #[must_use]
    pub fn is(&self, identity: [u8; 16], spool: [u8; 16]) -> bool {
        let pair = |at| [self.memory.load(at), self.memory.load(at + 8)];
        self.memory.load(WORD_MAGIC) == SPOOL_MAGIC
            && pair(WORD_IDENTITY) == words(identity)
            && pair(WORD_SPOOL) == words(spool)
    }

    /// Makes it the memory of an empty spool; nobody believes it before [`SpoolMemory::complete`].
    pub fn format(&self, identity: [u8; 16], spool: [u8; 16]) {
        self.memory.store(WORD_MAGIC, 0);
        for (at, bytes) in [(WORD_IDENTITY, identity), (WORD_SPOOL, spool)] {
            let halves = words(bytes);
            self.memory.store(at, halves[0]);
            self.memory.store(at + 8, halves[1]);
        }
        self.memory.store(WORD_UNLINKS, 0);
        self.memory.store(WORD_SEQUENCE, 0);
        for buffer in 0..BUFFERS {
            self.memory.store(self.batch(buffer) + BATCH_STATE, 0);
        }
        self.clear_chains();
        for page in 0..self.pages {
            self.memory.store(self.entry_at(page), EMPTY);
        }
    }

    /// From here on it says all that the spool holds: a process that dies before leaves nothing that looks whole.
    pub fn complete(&self) {
        self.memory.store(WORD_MAGIC, SPOOL_MAGIC);
    }

    fn buckets(pages: u64) -> u64 {
        (pages / 4).max(1)
    }

    fn heads_base() -> usize {
        PAGE + BUFFERS * BUFFER_BYTES
    }

    fn entries_base(pages: u64) -> usize {
        (Self::heads_base() + Self::buckets(pages) as usize * 8).next_multiple_of(PAGE)
    }

    fn head_at(&self, block: u64) -> usize {
        // Fibonacci hashing: neighbours go to different buckets.
        let bucket = (block.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20) % Self::buckets(self.pages);
        Self::heads_base() + bucket as usize * 8
    }

    fn entry_at(&self, page: u64) -> usize {
        Self::entries_base(self.pages) + page as usize * 16
    }

    fn clear_chains(&self) {
        for bucket in 0..Self::buckets(self.pages) as usize {
            self.memory.store(Self::heads_base() + bucket * 8, 0);
        }
    }

    /// Pages of the spool.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Notes that `page` holds `block`. The page must be empty in the index.
    pub fn insert(&self, page: u64, block: u64, generation: u32, kind: SavedKind, crc: u32) {
        let flag = if kind == SavedKind::Unreadable {
            UNREADABLE_BIT
        } else {
            0
        };
        self.store_entry(page, block << 24 | flag | u64::from(generation), crc);
    }

    fn store_entry(&self, page: u64, entry: u64, crc: u32) {
        let (at, head) = (self.entry_at(page), self.head_at(entry >> 24));
        let next = self.memory.load(head);
        self.memory.store(at + 8, next | u64::from(crc) << 32);
        self.memory.store(at, entry);
        self.memory.store(head, page + 1);
    }

    /// The block and generation that a page holds.
    #[must_use]
    pub fn entry(&self, page: u64) -> Option<(u64, u32)> {
        let entry = self.memory.load(self.entry_at(page));
        (entry != EMPTY).then_some((
            entry >> 24,
            (entry & u64::from(SPOOL_GENERATIONS - 1)) as u32,
        ))
    }

    /// The block as the copy of this generation sees it: the oldest saved one that is not older than the copy. `None`: what the origin holds.
    #[must_use]
    pub fn find(&self, block: u64, generation: u32) -> Option<Saved> {
        loop {
            let before = self.memory.load(WORD_UNLINKS);
            let found = self.walk(block, generation);
            if before.is_multiple_of(2) && self.memory.load(WORD_UNLINKS) == before {
                return found;
            }
            std::hint::spin_loop();
        }
    }

    fn walk(&self, block: u64, generation: u32) -> Option<Saved> {
        let mut best: Option<(u32, Saved)> = None;
        let mut link = self.memory.load(self.head_at(block)) & 0xffff_ffff;
        for _ in 0..CHAIN_MAX {
            let page = link.checked_sub(1).filter(|page| *page < self.pages)?;
            let at = self.entry_at(page);
            let (entry, rest) = (self.memory.load(at), self.memory.load(at + 8));
            let saved_in = (entry & u64::from(SPOOL_GENERATIONS - 1)) as u32;
            if entry != EMPTY
                && entry >> 24 == block
                && saved_in >= generation
                // Saved twice (a crash came between): the older one, further down the chain, is as good, and cannot be younger than the cut.
                && best.is_none_or(|(other, _)| saved_in <= other)
            {
                let saved = Saved {
                    page,
                    crc: (rest >> 32) as u32,
                    unreadable: entry & UNREADABLE_BIT != 0,
                };
                best = Some((saved_in, saved));
            }
            link = rest & 0xffff_ffff;
            if link == 0 {
                break;
            }
        }
        best.map(|(_, saved)| saved)
    }

    /// Forgets what pages hold; no copy needs them.
    pub fn remove(&self, pages: std::ops::Range<u64>) {
        let count = self.memory.load(WORD_UNLINKS);
        self.memory.store(WORD_UNLINKS, count | 1);
        for page in pages {
            let at = self.entry_at(page);
            let entry = self.memory.load(at);
            if entry == EMPTY {
                continue;
            }
            let next = self.memory.load(at + 8) & 0xffff_ffff;
            let mut link_at = self.head_at(entry >> 24);
            for _ in 0..CHAIN_MAX {
                let word = self.memory.load(link_at);
                let link = word & 0xffff_ffff;
                if link == page + 1 {
                    self.memory.store(link_at, word & !0xffff_ffff | next);
                    break;
                }
                let Some(page) = link.checked_sub(1).filter(|page| *page < self.pages) else {
                    break;
                };
                link_at = self.entry_at(page) + 8;
            }
            self.memory.store(at, EMPTY);
        }
        self.memory.store(WORD_UNLINKS, (count | 1) + 1);
    }

    /// Links every entry anew: a process that was killed may have left one half linked. Readers wait meanwhile. Gives the highest generation.
    pub fn relink(&self) -> u32 {
        let count = self.memory.load(WORD_UNLINKS);
        self.memory.store(WORD_UNLINKS, count | 1);
        let buffered = (0..BUFFERS).filter_map(|buffer| self.batch_in(buffer));
        let mut newest = buffered.map(|batch| batch.2).max().unwrap_or(0);
        self.clear_chains();
        for page in 0..self.pages {
            let at = self.entry_at(page);
            let entry = self.memory.load(at);
            if entry != EMPTY {
                self.store_entry(page, entry, (self.memory.load(at + 8) >> 32) as u32);
                newest = newest.max((entry & u64::from(SPOOL_GENERATIONS - 1)) as u32);
            }
        }
        self.memory.store(WORD_UNLINKS, (count | 1) + 1);
        newest
    }

    /// The number of the next batch.
    pub fn take_sequence(&self) -> u64 {
        let sequence = self.memory.load(WORD_SEQUENCE);
        self.memory.store(WORD_SEQUENCE, sequence + 1);
        sequence
    }

    /// Batches from here on have at least this number.
    pub fn raise_sequence(&self, to: u64) {
        if self.memory.load(WORD_SEQUENCE) < to {
            self.memory.store(WORD_SEQUENCE, to);
        }
    }

    fn batch(&self, buffer: usize) -> usize {
        PAGE + buffer * BUFFER_BYTES
    }

    /// Begins a batch in a free buffer; `page` is where its header will lie.
    pub fn begin_batch(&self, buffer: usize, page: u64, sequence: u64, generation: u32) {
        let at = self.batch(buffer);
        self.memory.store(at + BATCH_PAGE, page);
        self.memory.store(at + BATCH_SEQUENCE, sequence);
        self.memory.store(at + BATCH_COUNT, 0);
        self.memory
            .store(at + BATCH_GENERATION, u64::from(generation));
        self.memory.store(at + BATCH_STATE, 1);
    }

    /// A batch that nothing was added to yet becomes one of another generation.
    pub fn set_generation(&self, buffer: usize, generation: u32) {
        let at = self.batch(buffer);
        self.memory
            .store(at + BATCH_GENERATION, u64::from(generation));
    }

    /// The spool has the batch, or it is not needed: the buffer is free.
    pub fn end_batch(&self, buffer: usize) {
        self.memory.store(self.batch(buffer) + BATCH_STATE, 0);
    }

    /// Page, sequence and generation of the batch in a buffer, if there is one.
    #[must_use]
    pub fn batch_in(&self, buffer: usize) -> Option<(u64, u64, u32)> {
        let at = self.batch(buffer);
        (self.memory.load(at + BATCH_STATE) != 0).then(|| {
            (
                self.memory.load(at + BATCH_PAGE),
                self.memory.load(at + BATCH_SEQUENCE),
                self.memory.load(at + BATCH_GENERATION) as u32,
            )
        })
    }

    /// Adds a block whose bytes are still to come.
    pub fn add(&self, buffer: usize, index: usize, block: u64) {
        let at = self.batch(buffer);
        self.memory.store(at + BATCH_ENTRIES + index * 16, block);
        self.memory
            .store(at + BATCH_ENTRIES + index * 16 + 8, PENDING);
        self.memory.store(at + BATCH_COUNT, index as u64 + 1);
    }

    /// Its bytes are there, or will never be.
    pub fn set_outcome(&self, buffer: usize, index: usize, kind: SavedKind, crc: u32) {
        let at = self.batch(buffer) + BATCH_ENTRIES + index * 16 + 8;
        self.memory
            .store(at, u64::from(kind as u32) << 32 | u64::from(crc));
    }

    /// One block of a buffer's batch.
    #[must_use]
    pub fn added(&self, buffer: usize, index: usize) -> Entry {
        let at = self.batch(buffer) + BATCH_ENTRIES + index * 16;
        let (block, word) = (self.memory.load(at), self.memory.load(at + 8));
        let kind = match word >> 32 {
            1 => SavedKind::Saved,
            2 => SavedKind::Unreadable,
            _ => SavedKind::Void,
        };
        Entry {
            block,
            outcome: (word != PENDING).then_some((kind, word as u32)),
        }
    }

    /// The blocks of a buffer's batch.
    pub fn entries(&self, buffer: usize) -> impl Iterator<Item = Entry> + '_ {
        let count = self.memory.load(self.batch(buffer) + BATCH_COUNT) as usize;
        (0..count.min(SPOOL_BATCH_BLOCKS)).map(move |index| self.added(buffer, index))
    }

    /// The header page of a buffer's batch and its blocks, as the spool will hold them.
    #[must_use]
    pub fn batch_bytes(&self, buffer: usize, blocks: usize) -> Buffer {
        Buffer::new(&self.memory, self.batch(buffer) + PAGE, (1 + blocks) * PAGE)
    }

    /// The bytes of some blocks of a buffer's batch.
    #[must_use]
    pub fn block_bytes(&self, buffer: usize, first: usize, blocks: usize) -> Buffer {
        Buffer::new(
            &self.memory,
            self.batch(buffer) + (2 + first) * PAGE,
            blocks * PAGE,
        )
    }

    /// Copies a page out of a batch buffer, if it is (still) in one.
    #[must_use]
    pub fn read_buffered(&self, page: u64, target: &mut [u8]) -> bool {
        for buffer in 0..BUFFERS {
            let Some((header, sequence, _)) = self.batch_in(buffer) else {
                continue;
            };
            // The next batch may lie in the same extent, right behind.
            let count = self.memory.load(self.batch(buffer) + BATCH_COUNT);
            if page <= header || page > header + count.min(SPOOL_BATCH_BLOCKS as u64) {
                continue;
            }
            let at = self.batch(buffer) + (1 + (page - header) as usize) * PAGE;
            self.memory
                .read_with(at, PAGE, |bytes| target.copy_from_slice(bytes));
            // The buffer may have been given to another batch meanwhile: then the spool has ours.
            if self.batch_in(buffer).is_some_and(|now| now.1 == sequence) {
                return true;
            }
        }
        false
    }
}

/// Why a hot copy is not valid any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lost {
    /// The spool has no room left.
    Full,
    /// The spool's disk failed.
    Failed,
    /// The spool's disk was too slow.
    Late,
    /// Something wrote to the origin that Varve did not see.
    Doubt,
    /// It was not made to survive a reboot.
    Reboot,
}

impl Lost {
    /// All reasons.
    pub const ALL: [Lost; 5] = [
        Lost::Full,
        Lost::Failed,
        Lost::Late,
        Lost::Doubt,
        Lost::Reboot,
    ];

    /// A word for it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Lost::Full => "full",
            Lost::Failed => "failed",
            Lost::Late => "late",
            Lost::Doubt => "doubt",
            Lost::Reboot => "reboot",
        }
    }
}

/// One copy's memory.
#[derive(Clone)]
pub struct CopyMemory {
    memory: Rc<Memory>,
    volume_bytes: u64,
}

impl CopyMemory {
    /// Bytes for a copy of a volume: two bits a block of 4 KiB.
    #[must_use]
    pub fn bytes_needed(volume_bytes: u64) -> usize {
        (PAGE + 2 * Bitmap::memory_bytes(volume_bytes)).next_multiple_of(PAGE)
    }

    /// Wraps a mapping of that size.
    #[must_use]
    pub fn new(memory: Rc<Memory>, volume_bytes: u64) -> CopyMemory {
        CopyMemory {
            memory,
            volume_bytes,
        }
    }

    /// Whether it is that of this copy, in this boot.
    #[must_use]
    pub fn is(&self, identity: [u8; 16], generation: u32) -> bool {
        let pair = [
            self.memory.load(WORD_IDENTITY),
            self.memory.load(WORD_IDENTITY + 8),
        ];
        self.memory.load(WORD_MAGIC) == COPY_MAGIC
            && pair == words(identity)
            && self.memory.load(WORD_GENERATION) == u64::from(generation)
    }

    /// Makes fresh (zeroed) memory that of a valid copy.
    pub fn format(&self, identity: [u8; 16], generation: u32) {
        let halves = words(identity);
        self.memory.store(WORD_IDENTITY, halves[0]);
        self.memory.store(WORD_IDENTITY + 8, halves[1]);
        self.memory.store(WORD_GENERATION, u64::from(generation));
        self.memory.store(WORD_STATE, 0);
        self.memory.store(WORD_MAGIC, COPY_MAGIC);
    }

    /// Its generation.
    #[must_use]
    pub fn generation(&self) -> u32 {
        self.memory.load(WORD_GENERATION) as u32
    }

    /// Why it is not valid any more; `None`: it is.
    #[must_use]
    pub fn lost(&self) -> Option<Lost> {
        let word = self.memory.load(WORD_STATE) as usize;
        word.checked_sub(1)
            .map(|index| Lost::ALL.get(index).copied().unwrap_or(Lost::Doubt))
    }

    /// From here on it is not valid.
    pub fn lose(&self, why: Lost) {
        self.memory.store(WORD_STATE, why as u64 + 1);
    }

    /// Blocks that were overwritten on the device since the copy began.
    #[must_use]
    pub fn changed(&self) -> Bitmap {
        Bitmap::new(&self.memory, PAGE, self.volume_bytes)
    }

    /// Blocks that were written to the copy.
    #[must_use]
    pub fn overlaid(&self) -> Bitmap {
        let base = PAGE + Bitmap::memory_bytes(self.volume_bytes);
        Bitmap::new(&self.memory, base, self.volume_bytes)
    }
}
