//! An index run: where each change of a sealed segment lies, so that an image opens without reading the segment.
//!
//! A 4 KiB header with the checksum of the entries, then 48-byte entries in LSN order.

use crate::segment::check_head;
use crate::{BLOCK_BYTES, FormatError, RecordKind, VERSION, crc32c};
use zerocopy::little_endian::{I64, U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Size of an entry.
pub const RUN_ENTRY_BYTES: usize = 48;

const MAGIC: [u8; 4] = *b"VRUN";

/// The first block of a run.
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
pub struct RunHeader {
    /// CRC-32C of everything after itself in this block.
    pub crc: U32,
    /// `VRUN`.
    pub magic: [u8; 4],
    /// Format version.
    pub version: U16,
    /// Features that a reader may ignore.
    pub compat: U16,
    /// Features that a reader must know.
    pub incompat: U32,
    /// The volume.
    pub volume: [u8; 16],
    /// The segment that the entries point into.
    pub sequence: U64,
    /// Number of entries.
    pub entry_count: U64,
    /// CRC-32C of all entries.
    pub entries_crc: U32,
    /// Zero.
    pub reserved: [u8; 4044],
}
const _: () = assert!(size_of::<RunHeader>() == BLOCK_BYTES as usize);

impl RunHeader {
    /// The header's block for `entries` (their bytes, one after another).
    #[must_use]
    pub fn encode(volume: [u8; 16], sequence: u64, entries: &[u8]) -> [u8; BLOCK_BYTES as usize] {
        let mut header: RunHeader = zerocopy::FromZeros::new_zeroed();
        header.magic = MAGIC;
        header.version = U16::new(VERSION);
        header.volume = volume;
        header.sequence = U64::new(sequence);
        header.entry_count = U64::new((entries.len() / RUN_ENTRY_BYTES) as u64);
        header.entries_crc = U32::new(crc32c(entries));
        header.crc = U32::new(crc32c(&header.as_bytes()[4..]));
        let mut block = [0u8; BLOCK_BYTES as usize];
        block.copy_from_slice(header.as_bytes());
        block
    }

    /// Checks a whole run and gives its entries.
    pub fn parse(bytes: &[u8]) -> Result<(RunHeader, &[RunEntry]), FormatError> {
        let (header, rest) =
            RunHeader::read_from_prefix(bytes).map_err(|_| FormatError::Truncated {
                needed: BLOCK_BYTES,
                found: bytes.len() as u64,
            })?;
        check_head(
            header.magic == MAGIC,
            header.crc.get(),
            header.as_bytes(),
            header.version.get(),
            header.incompat.get(),
        )?;
        let needed = header
            .entry_count
            .get()
            .checked_mul(RUN_ENTRY_BYTES as u64)
            .ok_or(FormatError::Field("run.entry_count"))?;
        if needed != rest.len() as u64 {
            return Err(FormatError::Truncated {
                needed,
                found: rest.len() as u64,
            });
        }
        if crc32c(rest) != header.entries_crc.get() {
            return Err(FormatError::Checksum);
        }
        let entries =
            <[RunEntry]>::ref_from_bytes(rest).map_err(|_| FormatError::Field("run.entries"))?;
        Ok((header, entries))
    }
}

/// One record of a segment that an image, or the resolution of an instant, needs.
#[repr(C)]
#[derive(
    Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, PartialEq, Eq,
)]
pub struct RunEntry {
    /// LSN of the record.
    pub lsn: U64,
    /// First byte of the volume.
    pub offset: U64,
    /// Length in bytes on the volume.
    pub length: U64,
    /// Wall time of the record.
    pub wall_time: I64,
    /// Offset of the payload in the segment file.
    pub payload: U64,
    /// CRC-32C of payload, epoch and LSN.
    pub payload_crc: U32,
    /// [`RecordKind`].
    pub kind: u8,
    /// Record flags.
    pub flags: u8,
    /// Record detail.
    pub detail: u8,
    /// Zero.
    pub reserved: u8,
}
const _: () = assert!(size_of::<RunEntry>() == RUN_ENTRY_BYTES);

impl RunEntry {
    /// The kind, or the error for an unknown one.
    pub fn kind(&self) -> Result<RecordKind, FormatError> {
        RecordKind::ALL
            .into_iter()
            .find(|kind| *kind as u8 == self.kind)
            .ok_or(FormatError::Field("run.kind"))
    }
}
