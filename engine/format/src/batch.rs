//! A batch: what reaches the log with one sequential write. A 4 KiB header with up to 82 records, then their payload.
//!
//! The header's CRC covers the whole 4 KiB; each payload has its own CRC in its record. A batch names its epoch, segment
//! and place, so that stale bytes of an earlier lap of the ring or a misdirected read are recognised, and the hash of
//! the batch before it, so that the tail of a log ends at the first break whatever lies behind it.

use crate::{
    BLOCK_BYTES, EpochId, FormatError, Hash128, Lsn, RECORD_BYTES, Record, SegmentSequence,
    VERSION, VolumeId, WallTime, crc32c, payload_crc,
};
use zerocopy::little_endian::{I64, U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Size of a batch header with its record table.
pub const BATCH_HEADER_BYTES: usize = BLOCK_BYTES as usize;

/// Most payload in a batch: at this size the fixed cost of a flush is already below a tenth of the transfer.
pub const BATCH_PAYLOAD_BYTES_MAX: usize = 256 * 1024;

/// Records that fit behind the fixed fields: (4096 − 128) / 48.
pub const BATCH_RECORDS_MAX: usize = (BATCH_HEADER_BYTES - FIXED_BYTES) / RECORD_BYTES;

const FIXED_BYTES: usize = 128;
const MAGIC: [u8; 4] = *b"VBAT";

/// Where a batch belongs; the reader's expectation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchPosition {
    /// The volume.
    pub volume: VolumeId,
    /// The epoch.
    pub epoch: EpochId,
    /// The segment.
    pub segment: SegmentSequence,
    /// Offset of the batch in its segment, in 4 KiB blocks.
    pub block: u32,
}

/// The first 128 bytes of a batch.
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
pub struct BatchHeader {
    /// CRC-32C of bytes 4 to 4096 of the header block: a torn header.
    pub crc: U32,
    /// `VBAT`.
    pub magic: [u8; 4],
    /// Format version.
    pub version: U16,
    /// Features that a reader may ignore.
    pub compat: U16,
    /// Features that a reader must know.
    pub incompat: U32,
    /// A misdirected read from another volume's log.
    pub volume: [u8; 16],
    /// Stale bytes of an earlier epoch in a recycled segment.
    pub epoch: [u8; 16],
    /// Stale bytes of an earlier lap of the ring.
    pub segment: U64,
    /// A misdirected write or read inside the segment: offset in 4 KiB blocks.
    pub block: U32,
    /// Payload behind the header, without the padding to 4 KiB.
    pub payload_bytes: U32,
    /// LSN of the first record.
    pub lsn_first: U64,
    /// Number of records.
    pub record_count: U32,
    /// Zero.
    pub reserved: U32,
    /// Wall time of the first record.
    pub wall_time: I64,
    /// [`Hash128`] of the header block of the batch before this one: a lost or replaced batch.
    pub previous_hash: [u8; 16],
    /// Zero; readers refuse other values, so that it can gain meaning.
    pub reserved_2: [u8; 24],
}
const _: () = assert!(size_of::<BatchHeader>() == FIXED_BYTES);
const _: () = assert!(BATCH_RECORDS_MAX == 82);

impl BatchHeader {
    /// A header for `position`; counts are set by [`BatchHeader::seal`].
    #[must_use]
    pub fn new(
        position: BatchPosition,
        lsn_first: Lsn,
        wall_time: WallTime,
        previous_hash: Hash128,
    ) -> BatchHeader {
        BatchHeader {
            crc: U32::new(0),
            magic: MAGIC,
            version: U16::new(VERSION),
            compat: U16::new(0),
            incompat: U32::new(0),
            volume: position.volume.0,
            epoch: position.epoch.0,
            segment: U64::new(position.segment.0),
            block: U32::new(position.block),
            payload_bytes: U32::new(0),
            lsn_first: U64::new(lsn_first.0),
            record_count: U32::new(0),
            reserved: U32::new(0),
            wall_time: I64::new(wall_time.0),
            previous_hash: previous_hash.0,
            reserved_2: [0; 24],
        }
    }

    /// Writes the header over the fixed part of `block` (4 KiB; the record table already stands behind it, and what the
    /// table does not use is zeroed), with its checksum. Returns the hash by which the next batch names this one.
    pub fn seal(mut self, block: &mut [u8], record_count: usize, payload_bytes: usize) -> Hash128 {
        assert!(block.len() == BATCH_HEADER_BYTES && record_count <= BATCH_RECORDS_MAX);
        self.record_count = U32::new(record_count as u32);
        self.payload_bytes = U32::new(payload_bytes as u32);
        block[FIXED_BYTES + record_count * RECORD_BYTES..].fill(0);
        block[..FIXED_BYTES].copy_from_slice(self.as_bytes());
        let crc = crc32c(&block[4..]);
        block[..4].copy_from_slice(&crc.to_le_bytes());
        Hash128::of(block)
    }

    /// Byte range of record `index` inside a header block.
    #[must_use]
    pub fn record_range(index: usize) -> std::ops::Range<usize> {
        let start = FIXED_BYTES + index * RECORD_BYTES;
        start..start + RECORD_BYTES
    }
}

/// A batch header that has been checked, with its records.
#[derive(Clone, Copy)]
pub struct BatchView<'a> {
    header: &'a BatchHeader,
    records: &'a [Record],
    hash: Hash128,
}

impl<'a> BatchView<'a> {
    /// Checks a header block: checksum, version, fields, records. Says nothing of the payload (see [`BatchView::check_payload`]).
    pub fn parse(block: &'a [u8]) -> Result<BatchView<'a>, FormatError> {
        if block.len() < BATCH_HEADER_BYTES {
            return Err(FormatError::Truncated {
                needed: BATCH_HEADER_BYTES as u64,
                found: block.len() as u64,
            });
        }
        let block = &block[..BATCH_HEADER_BYTES];
        let (header, rest) =
            BatchHeader::ref_from_prefix(block).map_err(|_| FormatError::NotVarve)?;
        if header.magic != MAGIC {
            return Err(FormatError::NotVarve);
        }
        if crc32c(&block[4..]) != header.crc.get() {
            return Err(FormatError::Checksum);
        }
        if header.version.get() > VERSION || header.incompat.get() != 0 {
            return Err(FormatError::Newer {
                version: header.version.get(),
                incompat: header.incompat.get(),
            });
        }
        let count = header.record_count.get() as usize;
        if count > BATCH_RECORDS_MAX {
            return Err(FormatError::Field("batch.record_count"));
        }
        if header.payload_bytes.get() as usize > BATCH_PAYLOAD_BYTES_MAX {
            return Err(FormatError::Field("batch.payload_bytes"));
        }
        if header.reserved.get() != 0 || header.reserved_2 != [0; 24] {
            return Err(FormatError::Field("batch.reserved"));
        }
        let (records, _) = <[Record]>::ref_from_prefix_with_elems(rest, count)
            .map_err(|_| FormatError::Field("batch.record_count"))?;
        let payload_bytes = u64::from(header.payload_bytes.get());
        records
            .iter()
            .try_for_each(|record| record.check(payload_bytes))?;
        Ok(BatchView {
            header,
            records,
            hash: Hash128::of(block),
        })
    }

    /// Refuses a batch that does not belong where it was found.
    pub fn check_position(&self, expected: BatchPosition) -> Result<(), FormatError> {
        if self.header.volume != expected.volume.0 {
            return Err(FormatError::Foreign("volume"));
        }
        if self.header.epoch != expected.epoch.0 {
            return Err(FormatError::Foreign("epoch"));
        }
        if self.header.segment.get() != expected.segment.0 {
            return Err(FormatError::Foreign("segment"));
        }
        if self.header.block.get() != expected.block {
            return Err(FormatError::Foreign("place in its segment"));
        }
        Ok(())
    }

    /// Checks every record's payload CRC; `payload` is what follows the header. The error names the first bad record's index.
    pub fn check_payload(&self, payload: &[u8]) -> Result<(), (usize, FormatError)> {
        for (index, record) in self.records.iter().enumerate() {
            let bytes = self.payload_of(record, payload).map_err(|e| (index, e))?;
            let lsn = self.lsn_first().plus(index as u64);
            if !bytes.is_empty()
                && payload_crc(self.epoch(), lsn, bytes) != record.payload_crc.get()
            {
                return Err((index, FormatError::Checksum));
            }
        }
        Ok(())
    }

    /// The payload of one of this batch's records.
    pub fn payload_of<'p>(
        &self,
        record: &Record,
        payload: &'p [u8],
    ) -> Result<&'p [u8], FormatError> {
        let start = record.payload_offset.get() as usize;
        let end = start + record.payload_bytes.get() as usize;
        payload.get(start..end).ok_or(FormatError::Truncated {
            needed: end as u64,
            found: payload.len() as u64,
        })
    }

    /// The records in LSN order.
    #[must_use]
    pub fn records(&self) -> &'a [Record] {
        self.records
    }

    /// The hash that the next batch must name.
    #[must_use]
    pub fn hash(&self) -> Hash128 {
        self.hash
    }

    /// The hash of the batch before this one.
    #[must_use]
    pub fn previous_hash(&self) -> Hash128 {
        Hash128(self.header.previous_hash)
    }

    /// The epoch that wrote it.
    #[must_use]
    pub fn epoch(&self) -> EpochId {
        EpochId(self.header.epoch)
    }

    /// LSN of the first record.
    #[must_use]
    pub fn lsn_first(&self) -> Lsn {
        Lsn(self.header.lsn_first.get())
    }

    /// LSN after the last record.
    #[must_use]
    pub fn lsn_end(&self) -> Lsn {
        self.lsn_first().plus(self.records.len() as u64)
    }

    /// Wall time of a record of this batch.
    #[must_use]
    pub fn time_of(&self, record: &Record) -> WallTime {
        WallTime(
            self.header
                .wall_time
                .get()
                .saturating_add(i64::from(record.time_delta_us.get()) * 1000),
        )
    }

    /// Payload bytes behind the header, without padding.
    #[must_use]
    pub fn payload_bytes(&self) -> usize {
        self.header.payload_bytes.get() as usize
    }

    /// Bytes that the batch occupies in its segment: header and payload, padded to 4 KiB.
    #[must_use]
    pub fn stored_bytes(&self) -> u64 {
        BATCH_HEADER_BYTES as u64 + (self.payload_bytes() as u64).next_multiple_of(BLOCK_BYTES)
    }
}
