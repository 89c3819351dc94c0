//! Reads one segment, batch by batch, checking everything. Recovery and the store read with the same code.
//!
//! In the open segment of a log the first break is the tail; in a sealed one it is damage. The reader only says where it is.

use std::io;
use varve_format::{
    BATCH_HEADER_BYTES, BATCH_PAYLOAD_BYTES_MAX, BLOCK_BYTES, BatchPosition, BatchView,
    CHECKPOINT_BYTES_MAX, Checkpoint, EpochId, FormatError, Hash128, Lsn, Record, RecordKind,
    SEGMENT_HEADER_BYTES, SegmentHeader, WallTime,
};

/// Anything that can be read by offset.
pub trait ReadAt {
    /// Fills `bytes` from `offset`, or fails.
    fn read_at(&mut self, offset: u64, bytes: &mut [u8]) -> io::Result<()>;
}

impl ReadAt for std::fs::File {
    fn read_at(&mut self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        std::os::unix::fs::FileExt::read_exact_at(self, bytes, offset)
    }
}

impl ReadAt for &[u8] {
    fn read_at(&mut self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        let source = usize::try_from(offset)
            .ok()
            .and_then(|start| self.get(start..start.checked_add(bytes.len())?));
        bytes.copy_from_slice(source.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

/// A record with all that its batch says of it.
#[derive(Clone, Copy)]
pub struct SegmentRecord<'a> {
    /// Its LSN.
    pub lsn: Lsn,
    /// Its wall time.
    pub time: WallTime,
    /// What kind.
    pub kind: RecordKind,
    /// The record.
    pub record: &'a Record,
    /// Its payload, checked.
    pub payload: &'a [u8],
    /// Where the payload lies in the segment.
    pub payload_at: u64,
}

/// Reads a segment from its start.
pub struct SegmentReader<R> {
    source: R,
    base: u64,
    header: SegmentHeader,
    checkpoint: Checkpoint,
    position: u64,
    end: u64,
    previous_hash: Hash128,
    next_lsn: Lsn,
    block: Vec<u8>,
    payload: Vec<u8>,
    batch_at: u64,
}

/// Why a segment could not be opened.
#[derive(Debug)]
pub enum SegmentError {
    /// The disk or file failed.
    Io(io::Error),
    /// The bytes are not a segment.
    Format(FormatError),
}

impl std::fmt::Display for SegmentError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            SegmentError::Io(error) => error.fmt(f),
            SegmentError::Format(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for SegmentError {}

impl From<io::Error> for SegmentError {
    fn from(error: io::Error) -> SegmentError {
        SegmentError::Io(error)
    }
}

impl From<FormatError> for SegmentError {
    fn from(error: FormatError) -> SegmentError {
        SegmentError::Format(error)
    }
}

impl<R: ReadAt> SegmentReader<R> {
    /// Opens the segment at `base` of `source`: header and checkpoint are read and checked. `segment_bytes` bounds it.
    pub fn open(
        mut source: R,
        base: u64,
        segment_bytes: u64,
    ) -> Result<SegmentReader<R>, SegmentError> {
        let mut block = vec![0u8; SEGMENT_HEADER_BYTES];
        source.read_at(base, &mut block)?;
        let header = SegmentHeader::parse(&block)?;
        let mut rest = vec![0u8; CHECKPOINT_BYTES_MAX.next_multiple_of(BLOCK_BYTES) as usize];
        let length = (header.data_offset() - SEGMENT_HEADER_BYTES as u64) as usize;
        if length > 0 {
            source.read_at(base + SEGMENT_HEADER_BYTES as u64, &mut rest[..length])?;
        }
        let checkpoint = header.checkpoint(&rest[..length])?;
        Ok(SegmentReader {
            source,
            base,
            checkpoint,
            position: header.data_offset(),
            end: segment_bytes,
            previous_hash: header.previous_hash(),
            next_lsn: header.lsn_start(),
            header,
            block,
            payload: vec![0u8; BATCH_PAYLOAD_BYTES_MAX],
            batch_at: 0,
        })
    }

    /// The header.
    pub fn header(&self) -> &SegmentHeader {
        &self.header
    }

    /// The checkpoint behind the header.
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }

    /// Stops at `bytes` of the segment: what lies behind is not history.
    pub fn limit(&mut self, bytes: u64) {
        self.end = self.end.min(bytes);
    }

    /// Bytes read so far that were valid, and the hash and LSN that follow.
    pub fn tail(&self) -> (u64, Hash128, Lsn) {
        (self.position, self.previous_hash, self.next_lsn)
    }

    /// Reads and checks the next batch. `Ok(false)`: the limit is reached. An error is the first break.
    pub fn advance(&mut self) -> Result<bool, SegmentError> {
        if self.position + BATCH_HEADER_BYTES as u64 > self.end {
            return Ok(false);
        }
        self.source
            .read_at(self.base + self.position, &mut self.block)?;
        let view = BatchView::parse(&self.block)?;
        view.check_position(BatchPosition {
            volume: self.header.volume(),
            epoch: EpochId(self.header.epoch),
            segment: self.header.sequence(),
            block: (self.position / BLOCK_BYTES) as u32,
        })?;
        if view.previous_hash() != self.previous_hash {
            return Err(
                FormatError::Foreign("chain: the batch before it is missing or another").into(),
            );
        }
        if view.lsn_first() != self.next_lsn {
            return Err(FormatError::Foreign("LSN").into());
        }
        if self.position + view.stored_bytes() > self.end {
            return Err(FormatError::Truncated {
                needed: view.stored_bytes(),
                found: self.end - self.position,
            }
            .into());
        }
        let length = view.payload_bytes().next_multiple_of(BLOCK_BYTES as usize);
        if length > 0 {
            self.source.read_at(
                self.base + self.position + BATCH_HEADER_BYTES as u64,
                &mut self.payload[..length],
            )?;
        }
        view.check_payload(&self.payload[..view.payload_bytes()])
            .map_err(|(_, error)| error)?;
        self.batch_at = self.position;
        self.position += view.stored_bytes();
        self.previous_hash = view.hash();
        self.next_lsn = view.lsn_end();
        Ok(true)
    }

    /// The records of the batch that [`SegmentReader::advance`] has just read.
    pub fn each_record(&self, mut visit: impl FnMut(SegmentRecord<'_>)) -> Result<(), FormatError> {
        let view = BatchView::parse(&self.block)?;
        for (index, record) in view.records().iter().enumerate() {
            visit(SegmentRecord {
                lsn: view.lsn_first().plus(index as u64),
                time: view.time_of(record),
                kind: record.kind()?,
                record,
                payload: view.payload_of(record, &self.payload)?,
                payload_at: self.batch_at
                    + BATCH_HEADER_BYTES as u64
                    + u64::from(record.payload_offset.get()),
            });
        }
        Ok(())
    }
}
