//! Which instants of a pruned history are kept: below `pruned_below` only those that are listed resolve.
//!
//!   header block │ 24-byte entries in LSN order

use crate::segment::check_head;
use crate::{BLOCK_BYTES, FormatError, Lsn, VERSION, WallTime, crc32c};
use zerocopy::little_endian::{I64, U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

const MAGIC: [u8; 4] = *b"VKPT";
/// Entries that a file may have: a reader allocates for no more (384 MiB).
const KEPT_MAX: u64 = 1 << 24;

/// The first block of the file.
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
pub struct KeptHeader {
    /// CRC-32C of everything after itself in this block.
    pub crc: U32,
    /// `VKPT`.
    pub magic: [u8; 4],
    /// Format version.
    pub version: U16,
    /// Features that a reader may ignore.
    pub compat: U16,
    /// Features that a reader must know.
    pub incompat: U32,
    /// The volume.
    pub volume: [u8; 16],
    /// Below this LSN only what is listed resolves.
    pub pruned_below: U64,
    /// Its time.
    pub pruned_below_time: I64,
    /// Number of entries.
    pub count: U64,
    /// CRC-32C of all entries.
    pub entries_crc: U32,
    /// Zero.
    pub reserved: [u8; 4036],
}
const _: () = assert!(size_of::<KeptHeader>() == BLOCK_BYTES as usize);

/// Size of an entry.
pub const KEPT_ENTRY_BYTES: usize = 24;
/// Flag of an entry: it stays until it is unpinned.
pub const KEPT_IS_PINNED: u8 = 1;

/// An instant that is kept.
#[repr(C)]
#[derive(
    Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, PartialEq, Eq,
)]
pub struct KeptEntry {
    /// Its LSN.
    pub lsn: U64,
    /// Time of the last record below it.
    pub time: I64,
    /// [`KEPT_IS_PINNED`].
    pub flags: u8,
    /// Zero.
    pub reserved: [u8; 7],
}
const _: () = assert!(size_of::<KeptEntry>() == KEPT_ENTRY_BYTES);

impl KeptEntry {
    /// An entry.
    #[must_use]
    pub fn new(lsn: Lsn, time: WallTime, pinned: bool) -> KeptEntry {
        KeptEntry {
            lsn: lsn.0.into(),
            time: time.0.into(),
            flags: if pinned { KEPT_IS_PINNED } else { 0 },
            reserved: [0; 7],
        }
    }

    /// Its LSN.
    #[must_use]
    pub fn lsn(&self) -> Lsn {
        Lsn(self.lsn.get())
    }

    /// Its time.
    #[must_use]
    pub fn time(&self) -> WallTime {
        WallTime(self.time.get())
    }

    /// Whether it stays until it is unpinned.
    #[must_use]
    pub fn is_pinned(&self) -> bool {
        self.flags & KEPT_IS_PINNED != 0
    }
}

/// The whole file.
#[must_use]
pub fn encode_kept(
    volume: [u8; 16],
    pruned_below: Lsn,
    pruned_below_time: WallTime,
    entries: &[KeptEntry],
) -> Vec<u8> {
    let mut header: KeptHeader = zerocopy::FromZeros::new_zeroed();
    header.magic = MAGIC;
    header.version = U16::new(VERSION);
    header.volume = volume;
    header.pruned_below = pruned_below.0.into();
    header.pruned_below_time = pruned_below_time.0.into();
    header.count = (entries.len() as u64).into();
    header.entries_crc = crc32c(entries.as_bytes()).into();
    header.crc = U32::new(crc32c(&header.as_bytes()[4..]));
    let mut bytes = header.as_bytes().to_vec();
    bytes.extend_from_slice(entries.as_bytes());
    bytes
}

/// Checks a whole file.
pub fn parse_kept(bytes: &[u8]) -> Result<(KeptHeader, &[KeptEntry]), FormatError> {
    let truncated = |needed| FormatError::Truncated {
        needed,
        found: bytes.len() as u64,
    };
    let (header, rest) = KeptHeader::read_from_prefix(bytes).map_err(|_| truncated(BLOCK_BYTES))?;
    check_head(
        header.magic == MAGIC,
        header.crc.get(),
        header.as_bytes(),
        header.version.get(),
        header.incompat.get(),
    )?;
    if header.count.get() > KEPT_MAX {
        return Err(FormatError::Field("kept.count"));
    }
    let needed = header.count.get() * KEPT_ENTRY_BYTES as u64;
    if needed != rest.len() as u64 {
        return Err(truncated(BLOCK_BYTES + needed));
    }
    if crc32c(rest) != header.entries_crc.get() {
        return Err(FormatError::Checksum);
    }
    let entries =
        <[KeptEntry]>::ref_from_bytes(rest).map_err(|_| FormatError::Field("kept.entries"))?;
    if !entries.is_sorted_by(|a, b| a.lsn.get() < b.lsn.get()) {
        return Err(FormatError::Field("kept.lsn"));
    }
    Ok((header, entries))
}
