//! A settled segment: a sealed one, compressed. Addresses stay: byte N of the sealed segment is byte N of the settled one, so runs, maps and the
//! root go on meaning what they meant.
//!
//!   header block │ frames │ tables │ the sealed segment's footer block
//!
//! The segment is seen as blocks of 4 KiB. A block is zero, or a copy of an earlier one, or it is kept. Kept blocks, so many in a row as the header
//! says, make a frame; each frame is compressed by itself. The tables (frames, then one number for each block) have a checksum in the header.
//!
//! Frames of an encrypted segment are compressed, then encrypted; checksums are of what is stored, so that a store can be looked after without its keys.
//!
//! A pruned segment is a settled one that has lost what no instant needs that is still kept: blocks are gone. Its tables are compressed, and behind
//! them lies a copy of its run, which nothing could make again:
//!
//!   header block │ frames │ tables, one Zstandard frame │ run │ the sealed segment's footer block

use crate::segment::check_head;
use crate::{BLOCK_BYTES, FormatError, VERSION, crc32c};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Kept blocks in a frame of new files: 16 KiB. A random read pays for a whole one; frames of 64 KiB would be 1 to 5 % smaller and four times as dear.
pub const FRAME_BLOCKS: u32 = 4;
/// Most of them: bounds what a reader allocates for a frame (256 KiB).
pub const FRAME_BLOCKS_MAX: u32 = 64;
/// Kept blocks in a frame of files that do not say it.
const FRAME_BLOCKS_UNSAID: u32 = 16;
/// In the block table: the block is zero.
pub const BLOCK_IS_ZERO: u32 = u32::MAX;
/// In the block table of a pruned segment: nobody needs the block any more.
pub const BLOCK_IS_GONE: u32 = u32::MAX - 1;
/// Feature that a reader must know: the segment is pruned.
pub const SETTLED_IS_PRUNED: u32 = 1;
/// Feature that a reader must know: the frames are encrypted.
pub const SETTLED_IS_ENCRYPTED: u32 = 2;
/// Feature that a reader must know: the header says how many blocks a frame has; without it they are 16.
pub const SETTLED_SAYS_FRAMES: u32 = 4;
/// Bytes that encryption adds to a frame, at its end.
pub const FRAME_TAG_BYTES: usize = 16;
/// Largest segment that can be settled, in bytes: bounds what a reader allocates for its tables (a million blocks: 4 MiB, and 24 bytes for each frame).
pub const SETTLED_BYTES_MAX: u64 = 4 << 30;

const MAGIC: [u8; 4] = *b"VSET";
const FEATURES: u32 = SETTLED_IS_PRUNED | SETTLED_IS_ENCRYPTED | SETTLED_SAYS_FRAMES;

/// How a frame is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Codec {
    /// As it is.
    Plain = 0,
    /// LZ4 block.
    Lz4 = 1,
    /// Zstandard frame.
    Zstd = 2,
}

impl Codec {
    /// Reads the code.
    #[must_use]
    pub fn from_code(code: u8) -> Option<Codec> {
        [Codec::Plain, Codec::Lz4, Codec::Zstd]
            .into_iter()
            .find(|codec| *codec as u8 == code)
    }
}

/// The first block of a settled segment.
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
pub struct SettledHeader {
    /// CRC-32C of everything after itself in this block.
    pub crc: U32,
    /// `VSET`.
    pub magic: [u8; 4],
    /// Format version.
    pub version: U16,
    /// Features that a reader may ignore.
    pub compat: U16,
    /// Features that a reader must know.
    pub incompat: U32,
    /// The volume.
    pub volume: [u8; 16],
    /// The segment.
    pub sequence: U64,
    /// Bytes of the sealed segment before its footer.
    pub data_bytes: U64,
    /// Kept blocks.
    pub kept_blocks: U64,
    /// Where the tables begin in this file; the frames lie between the header and them.
    pub tables_at: U64,
    /// CRC-32C of the tables, before compression.
    pub tables_crc: U32,
    /// Of a pruned segment: stored bytes of the tables; else 0.
    pub tables_bytes: U64,
    /// Of a pruned segment: bytes of the run behind the tables; else 0.
    pub run_bytes: U64,
    /// Of a pruned segment: BLAKE3 of the blocks that are not gone, one behind the other.
    pub kept_root: [u8; 32],
    /// Of an encrypted segment: which of the volume's keys; else 0.
    pub key: [u8; 16],
    /// Of an encrypted segment: with this the key of this file is made; else 0.
    pub salt: [u8; 32],
    /// Of an encrypted segment: the tag of tables, run and sizes; else 0.
    pub tables_tag: [u8; 16],
    /// Kept blocks in a frame, 1 to 64; 0 without the feature that says so.
    pub frame_blocks: U32,
    /// Zero.
    pub reserved: [u8; 3912],
}
const _: () = assert!(size_of::<SettledHeader>() == BLOCK_BYTES as usize);

impl SettledHeader {
    /// A header with magic and version set and everything else zero.
    #[must_use]
    pub fn empty() -> SettledHeader {
        let mut header: SettledHeader = zerocopy::FromZeros::new_zeroed();
        header.magic = MAGIC;
        header.version = U16::new(VERSION);
        header.incompat = SETTLED_SAYS_FRAMES.into();
        header.frame_blocks = FRAME_BLOCKS.into();
        header
    }

    /// The header's block with its checksum.
    #[must_use]
    pub fn to_block(mut self) -> [u8; BLOCK_BYTES as usize] {
        self.crc = U32::new(crc32c(&self.as_bytes()[4..]));
        let mut block = [0u8; BLOCK_BYTES as usize];
        block.copy_from_slice(self.as_bytes());
        block
    }

    /// Whether a file begins like a settled segment (and not like a sealed one).
    #[must_use]
    pub fn is_settled(block: &[u8]) -> bool {
        block.get(4..8) == Some(&MAGIC[..])
    }

    /// Checks and copies a header out of its block. `file_bytes`: the whole file's, footer block included.
    pub fn parse(block: &[u8], file_bytes: u64) -> Result<SettledHeader, FormatError> {
        let (header, _) =
            SettledHeader::read_from_prefix(block).map_err(|_| FormatError::Truncated {
                needed: BLOCK_BYTES,
                found: block.len() as u64,
            })?;
        check_head(
            header.magic == MAGIC,
            header.crc.get(),
            header.as_bytes(),
            header.version.get(),
            header.incompat.get() & !FEATURES,
        )?;
        if header.data_bytes.get() > SETTLED_BYTES_MAX
            || !header.data_bytes.get().is_multiple_of(BLOCK_BYTES)
            || header.kept_blocks.get() > header.block_count()
        {
            return Err(FormatError::Field("settled.data_bytes"));
        }
        if header.says_frames() && !(1..=FRAME_BLOCKS_MAX).contains(&header.frame_blocks.get()) {
            return Err(FormatError::Field("settled.frame_blocks"));
        }
        // More than a segment of this size can say: a reader allocates by these.
        let (whole, records) = (header.tables_whole_bytes(), header.block_count() * 82);
        if header.tables_bytes.get() > whole + whole / 64 + BLOCK_BYTES
            || header.run_bytes.get() > BLOCK_BYTES + records * 96
        {
            return Err(FormatError::Field("settled.run_bytes"));
        }
        let needed = header
            .run_at()
            .and_then(|at| at.checked_add(header.run_bytes.get()))
            .and_then(|end| end.checked_add(BLOCK_BYTES))
            .ok_or(FormatError::Field("settled.tables_at"))?;
        if header.tables_at.get() < BLOCK_BYTES || needed != file_bytes {
            return Err(FormatError::Truncated {
                needed,
                found: file_bytes,
            });
        }
        Ok(header)
    }

    /// Whether what nobody needs any more is gone.
    #[must_use]
    pub fn is_pruned(&self) -> bool {
        self.incompat.get() & SETTLED_IS_PRUNED != 0
    }

    /// Whether the frames are encrypted.
    #[must_use]
    pub fn is_encrypted(&self) -> bool {
        self.incompat.get() & SETTLED_IS_ENCRYPTED != 0
    }

    fn says_frames(&self) -> bool {
        self.incompat.get() & SETTLED_SAYS_FRAMES != 0
    }

    /// Kept blocks in a frame.
    #[must_use]
    pub fn blocks_in_frame(&self) -> u64 {
        let said = self.says_frames().then(|| self.frame_blocks.get());
        said.unwrap_or(FRAME_BLOCKS_UNSAID).into()
    }

    /// Most stored bytes of frame number `frame`.
    #[must_use]
    pub fn frame_stored_max(&self, frame: u64) -> usize {
        let tag = if self.is_encrypted() {
            FRAME_TAG_BYTES
        } else {
            0
        };
        self.frame_bytes(frame) + tag
    }

    /// What the tag of the tables is about, beside the context: sizes and features, then the tables before compression, then the run.
    #[must_use]
    pub fn tagged(&self, tables: &[u8], run: &[u8]) -> Vec<u8> {
        let mut tagged = Vec::with_capacity(32 + tables.len() + run.len());
        tagged.extend(self.incompat.get().to_le_bytes());
        for size in [self.data_bytes, self.kept_blocks, self.tables_at] {
            tagged.extend(size.get().to_le_bytes());
        }
        if self.says_frames() {
            tagged.extend(self.frame_blocks.get().to_le_bytes());
        }
        tagged.extend_from_slice(tables);
        tagged.extend_from_slice(run);
        tagged
    }

    /// Bytes of the tables before compression; bounded by [`SETTLED_BYTES_MAX`].
    #[must_use]
    pub fn tables_whole_bytes(&self) -> u64 {
        self.frame_count() * FRAME_ENTRY_BYTES as u64 + self.block_count() * 4
    }

    /// Bytes of the tables as they are stored.
    #[must_use]
    pub fn tables_stored_bytes(&self) -> u64 {
        match self.is_pruned() {
            true => self.tables_bytes.get(),
            false => self.tables_whole_bytes(),
        }
    }

    /// Where the run of a pruned segment begins.
    fn run_at(&self) -> Option<u64> {
        self.tables_at.get().checked_add(self.tables_stored_bytes())
    }

    /// Where the run of a pruned segment lies in the file: (first byte, bytes).
    #[must_use]
    pub fn run_place(&self) -> Option<(u64, u64)> {
        let at = self.run_at().filter(|_| self.is_pruned())?;
        Some((at, self.run_bytes.get()))
    }

    /// Blocks of the sealed segment.
    #[must_use]
    pub fn block_count(&self) -> u64 {
        self.data_bytes.get() / BLOCK_BYTES
    }

    /// Frames.
    #[must_use]
    pub fn frame_count(&self) -> u64 {
        self.kept_blocks.get().div_ceil(self.blocks_in_frame())
    }

    /// Bytes of frame number `frame` before compression: whole but for the last one.
    #[must_use]
    pub fn frame_bytes(&self, frame: u64) -> usize {
        let (kept, whole) = (self.kept_blocks.get(), self.blocks_in_frame());
        let before = frame.saturating_mul(whole).min(kept);
        ((kept - before).min(whole) * BLOCK_BYTES) as usize
    }
}

/// Size of an entry of the frame table.
pub const FRAME_ENTRY_BYTES: usize = 24;

/// Where a frame lies.
#[repr(C)]
#[derive(
    Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, PartialEq, Eq,
)]
pub struct FrameEntry {
    /// First byte in the file.
    pub offset: U64,
    /// Stored bytes.
    pub length: U32,
    /// CRC-32C of the stored bytes, then segment (8 bytes) and frame number (8 bytes).
    pub crc: U32,
    /// [`Codec`].
    pub codec: u8,
    /// Zero.
    pub reserved: [u8; 7],
}
const _: () = assert!(size_of::<FrameEntry>() == FRAME_ENTRY_BYTES);

/// The checksum of a stored frame: a frame of another place does not match.
#[must_use]
pub fn frame_crc(stored: &[u8], sequence: u64, frame: u64) -> u32 {
    crate::checksum::crc32c_of([
        stored,
        &sequence.to_le_bytes()[..],
        &frame.to_le_bytes()[..],
    ])
}

/// Checks the tables and gives (frames, blocks). Every number in them is bounded here: a reader may index by them.
pub fn parse_settled_tables<'a>(
    header: &SettledHeader,
    bytes: &'a [u8],
) -> Result<(&'a [FrameEntry], &'a [U32]), FormatError> {
    if crc32c(bytes) != header.tables_crc.get() {
        return Err(FormatError::Checksum);
    }
    let frames = header.frame_count() as usize * FRAME_ENTRY_BYTES;
    let (frames, blocks) = bytes.split_at_checked(frames).ok_or({
        FormatError::Truncated {
            needed: frames as u64,
            found: bytes.len() as u64,
        }
    })?;
    let frames =
        <[FrameEntry]>::ref_from_bytes(frames).map_err(|_| FormatError::Field("settled.frames"))?;
    let blocks =
        <[U32]>::ref_from_bytes(blocks).map_err(|_| FormatError::Field("settled.blocks"))?;
    let kept = header.kept_blocks.get();
    let in_frame = |block: &U32| match block.get() {
        BLOCK_IS_ZERO => true,
        BLOCK_IS_GONE => header.is_pruned(),
        number => u64::from(number) < kept,
    };
    if blocks.len() as u64 != header.block_count() || !blocks.iter().all(in_frame) {
        return Err(FormatError::Field("settled.blocks"));
    }
    // One behind the other, so that who reads them all reads the file once.
    let mut at = BLOCK_BYTES;
    for (index, frame) in frames.iter().enumerate() {
        let whole = frame.offset.get() == at
            && frame.length.get() as usize <= header.frame_stored_max(index as u64);
        if !whole || Codec::from_code(frame.codec).is_none() {
            return Err(FormatError::Field("settled.frame"));
        }
        at = at.saturating_add(frame.length.get().into());
    }
    if at != header.tables_at.get() {
        return Err(FormatError::Field("settled.frame"));
    }
    Ok((frames, blocks))
}
