//! The spool of hot copies: blocks as they were before they were overwritten, appended in batches.
//!
//!   page 0: head │ extent 0: batch header, blocks, batch header, blocks … │ extent 1: …          (pages and blocks of 4 KiB, extents of 256 KiB)
//!
//! A batch lies in one extent. Extents are used again; what an earlier use left behind a batch has a lower sequence and is not read. A saved block of
//! generation G is what the block held when it was first overwritten after hot copy G began: it belongs to that copy, and to every older one that has
//! no saved block of its own.

use crate::segment::check_head;
use crate::{BLOCK_BYTES, FormatError, VERSION, VolumeId, crc32c};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Pages of one extent.
pub const SPOOL_EXTENT_PAGES: u64 = 64;
/// Blocks of one batch at most: an extent without its header.
pub const SPOOL_BATCH_BLOCKS: usize = SPOOL_EXTENT_PAGES as usize - 1;
/// Where extent 0 begins.
pub const SPOOL_EXTENTS_AT: u64 = SPOOL_EXTENT_PAGES * BLOCK_BYTES;
/// Generations are smaller than this.
pub const SPOOL_GENERATIONS: u32 = 1 << 23;

const PAGE: usize = BLOCK_BYTES as usize;
const HEAD_MAGIC: [u8; 4] = *b"VSPO";
const BATCH_MAGIC: [u8; 4] = *b"VSPB";

/// Page 0: whose spool this is.
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
pub struct SpoolHead {
    /// CRC-32C of everything after itself.
    pub crc: U32,
    /// `VSPO`.
    pub magic: [u8; 4],
    /// Format version.
    pub version: U16,
    /// Zero.
    pub reserved: U16,
    /// Features that a reader must know.
    pub incompat: U32,
    /// Random name of this spool: batches of another one that lay here before are not read.
    pub spool: [u8; 16],
    /// The volume.
    pub volume: [u8; 16],
    /// Size of the volume when the spool was made.
    pub volume_bytes: U64,
    /// Extents.
    pub extents: U64,
    /// Zero.
    pub reserved_2: [u8; 4032],
}
const _: () = assert!(size_of::<SpoolHead>() == PAGE);

impl SpoolHead {
    /// A head with its checksum.
    #[must_use]
    pub fn new(spool: [u8; 16], volume: VolumeId, volume_bytes: u64, extents: u64) -> SpoolHead {
        let mut head: SpoolHead = zerocopy::FromZeros::new_zeroed();
        head.magic = HEAD_MAGIC;
        head.version = U16::new(VERSION);
        head.spool = spool;
        head.volume = volume.0;
        head.volume_bytes = U64::new(volume_bytes);
        head.extents = U64::new(extents);
        head.crc = U32::new(crc32c(&head.as_bytes()[4..]));
        head
    }

    /// Writes it into its page.
    pub fn write_to(&self, page: &mut [u8]) {
        page[..PAGE].copy_from_slice(self.as_bytes());
    }

    /// Checks and copies a head out of its page.
    pub fn parse(page: &[u8]) -> Result<SpoolHead, FormatError> {
        let (head, _) = SpoolHead::read_from_prefix(page).map_err(|_| truncated(page))?;
        let magic = head.magic == HEAD_MAGIC;
        let crc = head.crc.get();
        check_head(
            magic,
            crc,
            head.as_bytes(),
            head.version.get(),
            head.incompat.get(),
        )?;
        Ok(head)
    }
}

fn truncated(page: &[u8]) -> FormatError {
    FormatError::Truncated {
        needed: BLOCK_BYTES,
        found: page.len() as u64,
    }
}

/// What became of a saved block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum SavedKind {
    /// The page holds nothing.
    Void = 0,
    /// The page holds the block.
    Saved = 1,
    /// The origin could not read the block before it was overwritten: the copy lacks it.
    Unreadable = 2,
}

/// One block of a batch.
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
pub struct SavedBlock {
    /// Index of the block in the volume.
    pub block: U64,
    /// CRC-32C of its page.
    pub crc: U32,
    /// [`SavedKind`].
    pub kind: U32,
}
const _: () = assert!(size_of::<SavedBlock>() == 16);

impl SavedBlock {
    /// A block; `crc` is that of its page.
    #[must_use]
    pub fn new(block: u64, crc: u32, kind: SavedKind) -> SavedBlock {
        SavedBlock {
            block: U64::new(block),
            crc: U32::new(crc),
            kind: U32::new(kind as u32),
        }
    }

    /// What became of it; what a newer version may say of a page is nothing to us.
    #[must_use]
    pub fn kind(&self) -> SavedKind {
        match self.kind.get() {
            1 => SavedKind::Saved,
            2 => SavedKind::Unreadable,
            _ => SavedKind::Void,
        }
    }
}

/// The page before a batch's blocks.
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
pub struct SpoolBatch {
    /// CRC-32C of everything after itself.
    pub crc: U32,
    /// `VSPB`.
    pub magic: [u8; 4],
    /// Format version.
    pub version: U16,
    /// Blocks that follow.
    pub count: U16,
    /// Features that a reader must know.
    pub incompat: U32,
    /// The spool: a batch of another one is not read.
    pub spool: [u8; 16],
    /// Number of the batch, +1 per batch: within an extent a lower one is what an earlier use left.
    pub sequence: U64,
    /// Own page in the spool, counted from extent 0: catches a misdirected write.
    pub page: U64,
    /// Generation of all its blocks.
    pub generation: U32,
    /// Zero.
    pub reserved: U32,
    /// The blocks, in the order of their pages.
    pub blocks: [SavedBlock; SPOOL_BATCH_BLOCKS],
    /// Zero.
    pub reserved_2: [u8; 3032],
}
const _: () = assert!(size_of::<SpoolBatch>() == PAGE);

impl SpoolBatch {
    /// A batch header with its checksum.
    #[must_use]
    pub fn new(
        spool: [u8; 16],
        sequence: u64,
        page: u64,
        generation: u32,
        blocks: &[SavedBlock],
    ) -> SpoolBatch {
        let mut batch: SpoolBatch = zerocopy::FromZeros::new_zeroed();
        batch.magic = BATCH_MAGIC;
        batch.version = U16::new(VERSION);
        batch.count = U16::new(blocks.len() as u16);
        batch.spool = spool;
        batch.sequence = U64::new(sequence);
        batch.page = U64::new(page);
        batch.generation = U32::new(generation);
        batch.blocks[..blocks.len()].copy_from_slice(blocks);
        batch.crc = U32::new(crc32c(&batch.as_bytes()[4..]));
        batch
    }

    /// Writes it into its page.
    pub fn write_to(&self, page: &mut [u8]) {
        page[..PAGE].copy_from_slice(self.as_bytes());
    }

    /// Checks and copies a batch header out of its page; `at` is where it was read.
    pub fn parse(page: &[u8], spool: [u8; 16], at: u64) -> Result<SpoolBatch, FormatError> {
        let (batch, _) = SpoolBatch::read_from_prefix(page).map_err(|_| truncated(page))?;
        let magic = batch.magic == BATCH_MAGIC;
        let crc = batch.crc.get();
        check_head(
            magic,
            crc,
            batch.as_bytes(),
            batch.version.get(),
            batch.incompat.get(),
        )?;
        if batch.spool != spool {
            return Err(FormatError::Foreign("spool"));
        }
        if batch.page.get() != at {
            return Err(FormatError::Foreign("place"));
        }
        let count = u64::from(batch.count.get());
        if count == 0 || at % SPOOL_EXTENT_PAGES + count >= SPOOL_EXTENT_PAGES {
            return Err(FormatError::Field("spool_batch.count"));
        }
        if batch.generation.get() >= SPOOL_GENERATIONS {
            return Err(FormatError::Field("spool_batch.generation"));
        }
        Ok(batch)
    }

    /// The blocks that it holds.
    #[must_use]
    pub fn blocks(&self) -> &[SavedBlock] {
        &self.blocks[..usize::from(self.count.get()).min(SPOOL_BATCH_BLOCKS)]
    }
}
