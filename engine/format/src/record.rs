//! One record: 48 bytes in a batch header that say what happened to which bytes of the volume.
//!
//! A request of more than 64 KiB becomes several records, each with its own LSN and CRC, all but the last flagged
//! `CONTINUES`. That is crash-consistent: a disk, too, may hold any part of a large write after a power cut.

use crate::FormatError;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Size of a record in a batch header.
pub const RECORD_BYTES: usize = 48;

/// Most payload of one record: damage is located to this size, and one CRC covers it.
pub const RECORD_PAYLOAD_BYTES_MAX: u64 = 64 * 1024;

/// What a record says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum RecordKind {
    /// Bytes were written: offset, length, payload.
    Write = 1,
    /// A range was discarded: its content is undefined from here on; images read zeroes.
    Discard = 2,
    /// A range was set to zero, exactly.
    Zero = 3,
    /// Writes to this range may be under way (and may be on the origin without a record).
    Intent = 4,
    /// A checkpoint: the origin was flushed after every write below the `stable` LSN had completed; payload: [`crate::Checkpoint`].
    Stable = 5,
    /// The origin refused the write with LSN `argument`: the range is undefined until it is written again.
    Failed = 6,
    /// A span begins ([`SpanKind`] in `detail`): no instant resolves inside. `argument`: a rewind's target LSN.
    SpanBegin = 7,
    /// The span that began at LSN `argument` has ended.
    SpanEnd = 8,
    /// A recovery point; payload: its name in UTF-8; `detail`: [`PointDetail`].
    Point = 9,
    /// History has no single writes between the wall time `argument` (nanoseconds) and this record.
    Gap = 10,
    /// An epoch begins; `detail`: 1 after a clean close, 2 after a warm restart, 0 otherwise.
    Epoch = 11,
    /// The volume is `length` bytes from here on.
    SizeChange = 12,
    /// The volume was closed cleanly: nothing follows in this epoch.
    CleanClose = 13,
    /// The content of a range cannot be known (the origin cannot read it).
    Undefined = 14,
}

impl RecordKind {
    /// All kinds, in the order of their codes.
    pub const ALL: [RecordKind; 14] = [
        RecordKind::Write,
        RecordKind::Discard,
        RecordKind::Zero,
        RecordKind::Intent,
        RecordKind::Stable,
        RecordKind::Failed,
        RecordKind::SpanBegin,
        RecordKind::SpanEnd,
        RecordKind::Point,
        RecordKind::Gap,
        RecordKind::Epoch,
        RecordKind::SizeChange,
        RecordKind::CleanClose,
        RecordKind::Undefined,
    ];

    /// Whether the record changes what an image reads.
    #[must_use]
    pub fn changes_image(self) -> bool {
        matches!(
            self,
            RecordKind::Write | RecordKind::Discard | RecordKind::Zero | RecordKind::Undefined
        )
    }
}

/// Why a span is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum SpanKind {
    /// The first full copy of an origin.
    BaseCopy = 1,
    /// Ranges that were in doubt after a crash are read again.
    Resync = 2,
    /// Blocks that changed while the log was bypassed are copied.
    CatchUp = 3,
    /// Everything is read again, because the origin may have changed behind our back.
    Verify = 4,
    /// An image is being written back over the origin.
    Rewind = 5,
}

impl SpanKind {
    /// Reads the code in a record's `detail`.
    #[must_use]
    pub fn from_code(code: u8) -> Option<SpanKind> {
        [
            SpanKind::BaseCopy,
            SpanKind::Resync,
            SpanKind::CatchUp,
            SpanKind::Verify,
            SpanKind::Rewind,
        ]
        .into_iter()
        .find(|kind| *kind as u8 == code)
    }
}

/// Bits of the `detail` of a recovery point. None: it is what a power cut would leave.
pub struct PointDetail;

impl PointDetail {
    /// File systems were frozen, or not mounted: they are clean.
    pub const FILE_SYSTEM: u8 = 1;
    /// A command of the user's had said before that applications are ready.
    pub const APPLICATION: u8 = 2;
    /// It was made by itself (on a schedule, at a mount): it thins out as other instants do.
    pub const AUTOMATIC: u8 = 4;
}

/// Bits of [`Record::flags`].
pub struct RecordFlags;

impl RecordFlags {
    /// More records of the same request follow.
    pub const CONTINUES: u8 = 1;
    /// Copied from the origin by a span, not written by an application.
    pub const COPIED: u8 = 2;
}

/// A record as it lies in a batch header. Its LSN is the batch's first LSN plus its index.
#[repr(C)]
#[derive(
    Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, PartialEq, Eq,
)]
pub struct Record {
    /// [`RecordKind`]; an unknown one ends the reading of a batch.
    pub kind: u8,
    /// [`RecordFlags`].
    pub flags: u8,
    /// Meaning depends on the kind (span kind, epoch's beginning, consistency of a point).
    pub detail: u8,
    /// Zero.
    pub reserved: u8,
    /// Microseconds after the batch's wall time.
    pub time_delta_us: U32,
    /// First byte of the volume that the record speaks of; a multiple of the logical sector.
    pub offset: U64,
    /// Length in bytes on the volume.
    pub length: U64,
    /// Where the payload begins, in bytes after the batch header.
    pub payload_offset: U32,
    /// CRC-32C of payload, epoch and LSN; zero without a payload.
    pub payload_crc: U32,
    /// Meaning depends on the kind.
    pub argument: U64,
    /// Payload length in bytes; zero for most kinds.
    pub payload_bytes: U32,
    /// Zero.
    pub reserved_2: U16,
    /// Zero.
    pub reserved_3: U16,
}
const _: () = assert!(size_of::<Record>() == RECORD_BYTES);

impl Record {
    /// A record without payload.
    #[must_use]
    pub fn new(kind: RecordKind, offset: u64, length: u64, argument: u64) -> Record {
        Record {
            kind: kind as u8,
            flags: 0,
            detail: 0,
            reserved: 0,
            time_delta_us: U32::new(0),
            offset: U64::new(offset),
            length: U64::new(length),
            payload_offset: U32::new(0),
            payload_crc: U32::new(0),
            argument: U64::new(argument),
            payload_bytes: U32::new(0),
            reserved_2: U16::new(0),
            reserved_3: U16::new(0),
        }
    }

    /// The same record with `detail` set.
    #[must_use]
    pub fn with_detail(mut self, detail: u8) -> Record {
        self.detail = detail;
        self
    }

    /// The same record with flags set.
    #[must_use]
    pub fn with_flags(mut self, flags: u8) -> Record {
        self.flags = flags;
        self
    }

    /// The record's kind, or the error for a code that this version does not know.
    pub fn kind(&self) -> Result<RecordKind, FormatError> {
        RecordKind::ALL
            .into_iter()
            .find(|kind| *kind as u8 == self.kind)
            .ok_or(FormatError::Field("record.kind"))
    }

    /// End of the range on the volume, exclusive; `None` if it overflows.
    #[must_use]
    pub fn end(&self) -> Option<u64> {
        self.offset.get().checked_add(self.length.get())
    }

    /// Refuses fields that no writer produces; `payload_bytes_total` is the payload of the record's batch.
    pub fn check(&self, payload_bytes_total: u64) -> Result<(), FormatError> {
        let kind = self.kind()?;
        self.end().ok_or(FormatError::Field("record.length"))?;
        let payload = u64::from(self.payload_bytes.get());
        if u64::from(self.payload_offset.get()) + payload > payload_bytes_total {
            return Err(FormatError::Field("record.payload_offset"));
        }
        if payload > RECORD_PAYLOAD_BYTES_MAX {
            return Err(FormatError::Field("record.payload_bytes"));
        }
        match kind {
            RecordKind::Write if payload != self.length.get() || payload == 0 => {
                Err(FormatError::Field("record.length"))
            }
            RecordKind::SpanBegin if SpanKind::from_code(self.detail).is_none() => {
                Err(FormatError::Field("record.detail"))
            }
            _ => Ok(()),
        }
    }
}
