//! A run: what a sealed segment holds, so that neither the store nor an image needs the segment to know it.
//!
//!   header block (what the segment is) │ 48-byte entries in LSN order │ again those that tell of time: spans, gaps, points
//!
//! A store opens by reading the headers and the tails; whoever needs single records of one segment reads its entries.

use crate::segment::check_head;
use crate::{
    BLOCK_BYTES, EpochId, FormatError, Lsn, RecordKind, SegmentFooter, SegmentSequence, VERSION,
    WallTime, crc32c,
};
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
    /// CRC-32C of the events behind them.
    pub events_crc: U32,
    /// Number of events.
    pub event_count: U64,
    /// The epoch of the segment.
    pub epoch: [u8; 16],
    /// LSN of the segment's first record.
    pub lsn_start: U64,
    /// LSN after its last record.
    pub lsn_end: U64,
    /// Where history ended before the segment: one is missing if what is stored ends elsewhere.
    pub previous_lsn_end: U64,
    /// Wall time of the first entry.
    pub time_start: I64,
    /// Wall time of the last entry.
    pub time_end: I64,
    /// Bytes of the sealed segment before its footer: never 0.
    pub data_bytes: U64,
    /// BLAKE3 of them.
    pub root: [u8; 32],
    /// Size of the volume, by the segment's header.
    pub volume_bytes: U64,
    /// Bytes that the entries of writes cover.
    pub payload_bytes: U64,
    /// Logical sector of the volume.
    pub sector_bytes: U32,
    /// Which instants it was pruned for: a hash of them; 0: it was not. Entries that none of them needs are left out.
    pub pruned_for: U64,
    /// The first of them behind the segment: between its end and this one no instant resolves.
    pub pruned_until: U64,
    /// When the store took the segment, by the store's own clock, in nanoseconds since 1970: by this it ages; 0: it is not known.
    pub stored_at: I64,
    /// Zero.
    pub reserved: [u8; 3892],
}
const _: () = assert!(size_of::<RunHeader>() == BLOCK_BYTES as usize);

impl RunHeader {
    /// The header for a segment with this footer; `entries` and `events` follow it in the file.
    #[must_use]
    pub fn new(
        footer: &SegmentFooter,
        volume_bytes: u64,
        sector_bytes: u32,
        entries: &[RunEntry],
        events: &[RunEntry],
    ) -> RunHeader {
        let mut header: RunHeader = zerocopy::FromZeros::new_zeroed();
        header.magic = MAGIC;
        header.version = U16::new(VERSION);
        header.volume = footer.volume;
        header.sequence = footer.sequence;
        header.entry_count = (entries.len() as u64).into();
        header.entries_crc = crc32c(entries.as_bytes()).into();
        header.event_count = (events.len() as u64).into();
        header.events_crc = crc32c(events.as_bytes()).into();
        header.epoch = footer.epoch;
        header.lsn_start = footer.lsn_start;
        header.lsn_end = footer.lsn_end;
        header.previous_lsn_end = footer.previous_lsn_end;
        header.time_start = footer.time_start;
        header.time_end = footer.time_end;
        header.data_bytes = footer.data_bytes;
        header.root = footer.root;
        header.volume_bytes = volume_bytes.into();
        header.sector_bytes = sector_bytes.into();
        let writes = entries
            .iter()
            .filter(|entry| entry.kind == RecordKind::Write as u8);
        let payload: u64 = writes.map(|entry| entry.length.get()).sum();
        header.payload_bytes = payload.into();
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

    /// Checks and copies a header out of its block. `file_bytes`: the whole run's.
    pub fn parse(block: &[u8], file_bytes: u64) -> Result<RunHeader, FormatError> {
        let (header, _) =
            RunHeader::read_from_prefix(block).map_err(|_| FormatError::Truncated {
                needed: BLOCK_BYTES,
                found: block.len() as u64,
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
            .checked_add(header.event_count.get())
            .and_then(|count| count.checked_mul(RUN_ENTRY_BYTES as u64))
            .and_then(|bytes| bytes.checked_add(BLOCK_BYTES))
            .ok_or(FormatError::Field("run.entry_count"))?;
        if needed != file_bytes {
            return Err(FormatError::Truncated {
                needed,
                found: file_bytes,
            });
        }
        if header.data_bytes.get() == 0
            || !header.data_bytes.get().is_multiple_of(BLOCK_BYTES)
            || header.lsn_end.get() < header.lsn_start.get()
        {
            return Err(FormatError::Field("run.data_bytes"));
        }
        Ok(header)
    }

    /// Checks the entries (the bytes behind the header).
    pub fn entries<'a>(&self, bytes: &'a [u8]) -> Result<&'a [RunEntry], FormatError> {
        let length = self.entry_count.get() as usize * RUN_ENTRY_BYTES;
        checked(bytes.get(..length), self.entries_crc.get())
    }

    /// Checks the events (the bytes behind the entries).
    pub fn events<'a>(&self, bytes: &'a [u8]) -> Result<&'a [RunEntry], FormatError> {
        let length = self.event_count.get() as usize * RUN_ENTRY_BYTES;
        checked(bytes.get(..length), self.events_crc.get())
    }

    /// Where the events begin in the file.
    #[must_use]
    pub fn events_at(&self) -> u64 {
        BLOCK_BYTES + self.entry_count.get() * RUN_ENTRY_BYTES as u64
    }

    /// The segment.
    #[must_use]
    pub fn sequence(&self) -> SegmentSequence {
        SegmentSequence(self.sequence.get())
    }

    /// Its epoch.
    #[must_use]
    pub fn epoch(&self) -> EpochId {
        EpochId(self.epoch)
    }

    /// LSN of its first record.
    #[must_use]
    pub fn lsn_start(&self) -> Lsn {
        Lsn(self.lsn_start.get())
    }

    /// LSN after its last record.
    #[must_use]
    pub fn lsn_end(&self) -> Lsn {
        Lsn(self.lsn_end.get())
    }

    /// Wall time of its first entry.
    #[must_use]
    pub fn time_start(&self) -> WallTime {
        WallTime(self.time_start.get())
    }

    /// Wall time of its last entry.
    #[must_use]
    pub fn time_end(&self) -> WallTime {
        WallTime(self.time_end.get())
    }
}

fn checked(bytes: Option<&[u8]>, crc: u32) -> Result<&[RunEntry], FormatError> {
    let bytes = bytes.ok_or(FormatError::Field("run.entry_count"))?;
    if crc32c(bytes) != crc {
        return Err(FormatError::Checksum);
    }
    <[RunEntry]>::ref_from_bytes(bytes).map_err(|_| FormatError::Field("run.entries"))
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

    /// LSN of the record.
    #[must_use]
    pub fn lsn(&self) -> Lsn {
        Lsn(self.lsn.get())
    }

    /// Wall time of the record.
    #[must_use]
    pub fn time(&self) -> WallTime {
        WallTime(self.wall_time.get())
    }

    /// Whether it changes what an image reads.
    #[must_use]
    pub fn changes_image(&self) -> bool {
        self.kind().is_ok_and(RecordKind::changes_image)
    }

    /// Whether it tells of time: a span's begin or end, a gap, a point. Those stand again at the end of a run.
    #[must_use]
    pub fn is_event(&self) -> bool {
        matches!(
            self.kind(),
            Ok(RecordKind::SpanBegin | RecordKind::SpanEnd | RecordKind::Gap | RecordKind::Point)
        )
    }
}
