//! A segment: the log's unit of sealing. A 4 KiB header, then batches; a sealed one in a store ends with a footer.
//!
//! The header says what came before (epoch, end of the previous segment, hash of its last batch), so that a reader knows
//! where the previous segment ends even if stale batches lie behind that place.

use crate::{
    BLOCK_BYTES, CHECKPOINT_BYTES_MAX, Checkpoint, EpochId, FormatError, Hash128, Lsn,
    SegmentSequence, VERSION, VolumeId, WallTime, crc32c,
};
use zerocopy::little_endian::{I64, U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Size of a segment header.
pub const SEGMENT_HEADER_BYTES: usize = BLOCK_BYTES as usize;
/// Size of a sealed segment's footer.
pub const SEGMENT_FOOTER_BYTES: usize = BLOCK_BYTES as usize;

const MAGIC: [u8; 4] = *b"VSEG";
const FOOTER_MAGIC: [u8; 4] = *b"VEND";

/// The first block of a segment.
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
pub struct SegmentHeader {
    /// CRC-32C of everything after itself.
    pub crc: U32,
    /// `VSEG`.
    pub magic: [u8; 4],
    /// Format version.
    pub version: U16,
    /// Features that a reader may ignore.
    pub compat: U16,
    /// Features that a reader must know.
    pub incompat: U32,
    /// The volume: a log of another volume in the same place.
    pub volume: [u8; 16],
    /// The epoch that writes this segment.
    pub epoch: [u8; 16],
    /// The epoch before, if this segment begins one; else the same.
    pub parent_epoch: [u8; 16],
    /// +1 per segment of the volume, over all epochs.
    pub sequence: U64,
    /// LSN of the first record in this segment.
    pub lsn_start: U64,
    /// Where the previous segment's records end: it counts as history up to here and no further. Greater `lsn_start`: records
    /// in between were given up (a gap).
    pub previous_lsn_end: U64,
    /// Bytes of the previous segment that are valid, header included.
    pub previous_bytes: U64,
    /// Hash of the previous segment's last batch: the chain goes on across segments.
    pub previous_hash: [u8; 16],
    /// Wall time of opening.
    pub wall_time: I64,
    /// Size of the volume.
    pub volume_bytes: U64,
    /// Capacity of this segment.
    pub segment_bytes: U64,
    /// Logical sector of the volume.
    pub sector_bytes: U32,
    /// Granularity of intents.
    pub region_bytes: U32,
    /// Length of the [`crate::Checkpoint`] behind the header: recovery reads from here, not from before.
    pub checkpoint_bytes: U32,
    /// CRC-32C of the checkpoint.
    pub checkpoint_crc: U32,
    /// Segments below this one were in the store when this one was opened: their places are free, whatever still lies there.
    pub oldest_held: U64,
    /// Zero.
    pub reserved: [u8; 3936],
}
const _: () = assert!(size_of::<SegmentHeader>() == SEGMENT_HEADER_BYTES);

impl SegmentHeader {
    /// A header with magic and version set and everything else zero.
    #[must_use]
    pub fn empty() -> SegmentHeader {
        let mut header: SegmentHeader = zerocopy::FromZeros::new_zeroed();
        header.magic = MAGIC;
        header.version = U16::new(VERSION);
        header
    }

    /// The header's block with its checksum.
    #[must_use]
    pub fn to_block(mut self) -> [u8; SEGMENT_HEADER_BYTES] {
        self.crc = U32::new(crc32c(&self.as_bytes()[4..]));
        let mut block = [0u8; SEGMENT_HEADER_BYTES];
        block.copy_from_slice(self.as_bytes());
        block
    }

    /// Checks and copies a header out of its block.
    pub fn parse(block: &[u8]) -> Result<SegmentHeader, FormatError> {
        let (header, _) =
            SegmentHeader::read_from_prefix(block).map_err(|_| FormatError::Truncated {
                needed: SEGMENT_HEADER_BYTES as u64,
                found: block.len() as u64,
            })?;
        check_head(
            header.magic == MAGIC,
            header.crc.get(),
            header.as_bytes(),
            header.version.get(),
            header.incompat.get(),
        )?;
        if header.region_bytes.get() == 0 || !header.region_bytes.get().is_power_of_two() {
            return Err(FormatError::Field("segment.region_bytes"));
        }
        if header.segment_bytes.get() % BLOCK_BYTES != 0
            || header.previous_lsn_end.get() > header.lsn_start.get()
        {
            return Err(FormatError::Field("segment.lsn_start"));
        }
        if u64::from(header.checkpoint_bytes.get()) > CHECKPOINT_BYTES_MAX {
            return Err(FormatError::Field("segment.checkpoint_bytes"));
        }
        Ok(header)
    }

    /// Where the first batch begins, in bytes from the start of the segment.
    #[must_use]
    pub fn data_offset(&self) -> u64 {
        SEGMENT_HEADER_BYTES as u64
            + u64::from(self.checkpoint_bytes.get()).next_multiple_of(BLOCK_BYTES)
    }

    /// Checks and reads the checkpoint; `rest` is what follows the header block.
    pub fn checkpoint(&self, rest: &[u8]) -> Result<Checkpoint, FormatError> {
        let length = self.checkpoint_bytes.get() as usize;
        let payload = rest.get(..length).ok_or(FormatError::Truncated {
            needed: length as u64,
            found: rest.len() as u64,
        })?;
        if crc32c(payload) != self.checkpoint_crc.get() {
            return Err(FormatError::Checksum);
        }
        Checkpoint::parse(payload)
    }

    /// The volume.
    #[must_use]
    pub fn volume(&self) -> VolumeId {
        VolumeId(self.volume)
    }

    /// The epoch.
    #[must_use]
    pub fn epoch(&self) -> EpochId {
        EpochId(self.epoch)
    }

    /// The sequence number.
    #[must_use]
    pub fn sequence(&self) -> SegmentSequence {
        SegmentSequence(self.sequence.get())
    }

    /// LSN of the first record.
    #[must_use]
    pub fn lsn_start(&self) -> Lsn {
        Lsn(self.lsn_start.get())
    }

    /// Hash of the batch before this segment's first.
    #[must_use]
    pub fn previous_hash(&self) -> Hash128 {
        Hash128(self.previous_hash)
    }

    /// Wall time of opening.
    #[must_use]
    pub fn wall_time(&self) -> WallTime {
        WallTime(self.wall_time.get())
    }
}

/// The last block of a sealed segment in a store.
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
pub struct SegmentFooter {
    /// CRC-32C of everything after itself.
    pub crc: U32,
    /// `VEND`.
    pub magic: [u8; 4],
    /// Format version.
    pub version: U16,
    /// Features that a reader may ignore.
    pub compat: U16,
    /// Features that a reader must know.
    pub incompat: U32,
    /// The volume.
    pub volume: [u8; 16],
    /// The epoch.
    pub epoch: [u8; 16],
    /// The segment's sequence number.
    pub sequence: U64,
    /// LSN of the first record.
    pub lsn_start: U64,
    /// LSN after the last record.
    pub lsn_end: U64,
    /// Wall time of the first record.
    pub time_start: I64,
    /// Wall time of the last record.
    pub time_end: I64,
    /// Bytes before this footer: header and batches.
    pub data_bytes: U64,
    /// BLAKE3 of the bytes before this footer.
    pub root: [u8; 32],
    /// Where history ended before this segment, by its header: a segment is missing if what is stored ends elsewhere.
    pub previous_lsn_end: U64,
    /// Zero.
    pub reserved: [u8; 3960],
}
const _: () = assert!(size_of::<SegmentFooter>() == SEGMENT_FOOTER_BYTES);

impl SegmentFooter {
    /// A footer with magic and version set and everything else zero.
    #[must_use]
    pub fn empty() -> SegmentFooter {
        let mut footer: SegmentFooter = zerocopy::FromZeros::new_zeroed();
        footer.magic = FOOTER_MAGIC;
        footer.version = U16::new(VERSION);
        footer
    }

    /// The footer's block with its checksum.
    #[must_use]
    pub fn to_block(mut self) -> [u8; SEGMENT_FOOTER_BYTES] {
        self.crc = U32::new(crc32c(&self.as_bytes()[4..]));
        let mut block = [0u8; SEGMENT_FOOTER_BYTES];
        block.copy_from_slice(self.as_bytes());
        block
    }

    /// Checks and copies a footer out of its block.
    pub fn parse(block: &[u8]) -> Result<SegmentFooter, FormatError> {
        let (footer, _) =
            SegmentFooter::read_from_prefix(block).map_err(|_| FormatError::Truncated {
                needed: SEGMENT_FOOTER_BYTES as u64,
                found: block.len() as u64,
            })?;
        check_head(
            footer.magic == FOOTER_MAGIC,
            footer.crc.get(),
            footer.as_bytes(),
            footer.version.get(),
            footer.incompat.get(),
        )?;
        if footer.lsn_end.get() < footer.lsn_start.get() {
            return Err(FormatError::Field("footer.lsn_end"));
        }
        Ok(footer)
    }
}

/// The order in which every structure is judged: is it ours, is it whole, can we read it.
pub(crate) fn check_head(
    magic: bool,
    crc: u32,
    bytes: &[u8],
    version: u16,
    incompat: u32,
) -> Result<(), FormatError> {
    if !magic {
        return Err(FormatError::NotVarve);
    }
    if crc32c(&bytes[4..]) != crc {
        return Err(FormatError::Checksum);
    }
    if version > VERSION || incompat != 0 {
        return Err(FormatError::Newer { version, incompat });
    }
    Ok(())
}
