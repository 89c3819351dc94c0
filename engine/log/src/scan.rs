//! Finds the end of a log after a crash: which segment is newest, where its valid records end, what they leave open.
//!
//! Only the newest segment with a valid header and checkpoint is read: the one before it was drained and flushed before that
//! header was written, and the checkpoint repeats all that recovery needs to know.

use crate::segment_reader::{ReadAt, SegmentError, SegmentReader};
use crate::{Buffer, Disk, LogGeometry, Medium, Operation, run_blocking};
use std::io;
use varve_format::{
    BATCH_HEADER_BYTES, BATCH_PAYLOAD_BYTES_MAX, Checkpoint, EpochId, FormatError, Hash128, Lsn,
    OPEN_REGIONS_MAX, Record, RecordKind, SegmentHeader, SegmentSequence, SpanKind, VolumeState,
    WallTime,
};

/// A segment that lies in the ring.
#[derive(Clone, Copy, Debug)]
pub struct RingSegment {
    /// Its header.
    pub header: SegmentHeader,
    /// Its offset in the log.
    pub base: u64,
}

/// Where the log ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tail {
    /// The newest segment.
    pub sequence: SegmentSequence,
    /// Its epoch.
    pub epoch: EpochId,
    /// The epoch before, by the segment's header.
    pub parent_epoch: EpochId,
    /// Valid bytes in it.
    pub bytes: u64,
    /// Hash of its last valid batch.
    pub hash: Hash128,
    /// LSN after its last valid record: the next one's.
    pub lsn_end: Lsn,
    /// LSN after the last valid record of the log. Less than `lsn_end` if the newest segment has none, and begins behind numbers that were given up.
    pub durable: Lsn,
    /// Wall time of its last record, or of its opening.
    pub time: WallTime,
}

/// What a scan found.
#[derive(Clone, Debug)]
pub struct ScanResult {
    /// The end of the log.
    pub tail: Tail,
    /// The last checkpoint, brought up to date by the records behind it: regions opened since, spans begun or ended.
    pub checkpoint: Checkpoint,
    /// Ranges of `failed` records since the checkpoint: to be read again.
    pub failed: Vec<(u64, u64)>,
    /// The last record was a clean close.
    pub clean_close: bool,
    /// Oldest segment in the ring that the store may still need: it was not released when the tail's segment was opened. Whether those between can be read says
    /// nothing about that.
    pub oldest: SegmentSequence,
    /// What stopped the scan, for the report.
    pub broke_at: Option<String>,
    /// Size of the volume by the newest header or size change.
    pub volume_bytes: u64,
}

struct MediumReader<'a> {
    medium: &'a mut dyn Medium,
    buffer: Buffer,
}

impl ReadAt for MediumReader<'_> {
    fn read_at(&mut self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        let buffer = self.buffer.slice(0, bytes.len());
        run_blocking(
            self.medium,
            Disk::Log,
            Operation::Read {
                offset,
                buffer: buffer.clone(),
            },
        )?;
        buffer.read_with(|source| bytes.copy_from_slice(source));
        Ok(())
    }
}

fn reader(medium: &mut dyn Medium) -> io::Result<MediumReader<'_>> {
    Ok(MediumReader {
        medium,
        buffer: Buffer::anonymous(BATCH_HEADER_BYTES + BATCH_PAYLOAD_BYTES_MAX)?,
    })
}

/// Reads all segment headers of the ring that belong together, in the order of their sequence. Places without a valid header are left out;
/// a newer version or a read error is an error.
pub fn read_headers(
    source: &mut dyn ReadAt,
    segment_bytes: u64,
    segment_count: u64,
) -> Result<Vec<RingSegment>, SegmentError> {
    let mut found = Vec::new();
    let mut block = vec![0u8; varve_format::SEGMENT_HEADER_BYTES];
    for slot in 0..segment_count {
        let base = slot * segment_bytes;
        source.read_at(base, &mut block)?;
        match SegmentHeader::parse(&block) {
            Ok(header) if header.sequence.get() % segment_count == slot => {
                found.push(RingSegment { header, base })
            }
            Ok(_)
            | Err(FormatError::NotVarve | FormatError::Checksum | FormatError::Truncated { .. }) => {
            }
            Err(error) => return Err(error.into()),
        }
    }
    found.sort_by_key(|segment| segment.header.sequence.get());
    Ok(without_stale(found))
}

/// Leaves out headers that an abandoned epoch left in front of a newer one: a restart gave its own segment the number that they would follow. A header
/// belongs only if the segment before it, where there is one, is of its epoch or of its parent.
fn without_stale(segments: Vec<RingSegment>) -> Vec<RingSegment> {
    let mut kept: Vec<RingSegment> = Vec::with_capacity(segments.len());
    let mut dropped = None;
    for segment in segments {
        let header = &segment.header;
        let before = header.sequence.get().checked_sub(1);
        let previous = kept
            .last()
            .filter(|previous| Some(previous.header.sequence.get()) == before);
        let foreign = previous.is_some_and(|p| {
            p.header.epoch != header.epoch && p.header.epoch != header.parent_epoch
        });
        if foreign || (before.is_some() && dropped == before) {
            dropped = Some(header.sequence.get());
        } else {
            kept.push(segment);
        }
    }
    kept
}

/// Scans a log. `Ok(None)`: the log is empty.
pub fn scan(
    medium: &mut dyn Medium,
    geometry: &LogGeometry,
) -> Result<Option<ScanResult>, SegmentError> {
    let mut source = reader(medium)?;
    let headers = read_headers(&mut source, geometry.segment_bytes, geometry.segment_count)?;
    if let Some(foreign) = headers
        .iter()
        .find(|s| s.header.volume() != geometry.volume)
    {
        let _ = foreign;
        return Err(FormatError::Foreign("volume").into());
    }
    for segment in headers.iter().rev() {
        // A header whose checkpoint is torn was never flushed: nothing in that segment was durable, the one before it is whole.
        match SegmentReader::open(
            &mut source as &mut dyn ReadAt,
            segment.base,
            geometry.segment_bytes,
        ) {
            Ok(opened) => {
                let released = opened.header().oldest_held.get();
                let (tail, count) = (opened.header().sequence.get(), geometry.segment_count);
                let first_place = (tail + 1).saturating_sub(count);
                let oldest = SegmentSequence(released.max(first_place).min(tail));
                return scan_segment(opened, oldest).map(Some);
            }
            Err(SegmentError::Format(
                FormatError::Checksum | FormatError::Field(_) | FormatError::Truncated { .. },
            )) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}

impl ReadAt for &mut dyn ReadAt {
    fn read_at(&mut self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        (**self).read_at(offset, bytes)
    }
}

fn scan_segment(
    mut reader: SegmentReader<&mut dyn ReadAt>,
    oldest: SegmentSequence,
) -> Result<ScanResult, SegmentError> {
    let header = *reader.header();
    let region_bytes = u64::from(header.region_bytes.get());
    let mut checkpoint = reader.checkpoint().clone();
    let mut failed = Vec::new();
    let mut clean_close = false;
    let mut time = header.wall_time();
    let mut volume_bytes = header.volume_bytes.get();
    let mut too_long = false;
    let broke_at = loop {
        match reader.advance() {
            Ok(true) => {}
            Ok(false) => break None,
            Err(SegmentError::Io(error)) => return Err(error.into()),
            Err(SegmentError::Format(error)) => break Some(error.to_string()),
        }
        reader.each_record(|found| {
            time = found.time;
            clean_close = found.kind == RecordKind::CleanClose;
            match found.kind {
                RecordKind::Stable => failed.clear(),
                RecordKind::Failed => {
                    failed.push((found.record.offset.get(), found.record.length.get()))
                }
                RecordKind::SizeChange => volume_bytes = found.record.length.get(),
                _ => {}
            }
            too_long |= !note_record(
                &mut checkpoint,
                found.kind,
                found.lsn,
                found.record,
                found.payload,
                region_bytes,
            );
        })?;
        if too_long {
            return Err(FormatError::Field("record.length").into());
        }
    };
    let (bytes, hash, lsn_end) = reader.tail();
    let durable = match lsn_end == header.lsn_start() {
        true => Lsn(header.previous_lsn_end.get()),
        false => lsn_end,
    };
    let tail = Tail {
        sequence: header.sequence(),
        epoch: header.epoch(),
        parent_epoch: EpochId(header.parent_epoch),
        bytes,
        hash,
        lsn_end,
        durable,
        time,
    };
    Ok(ScanResult {
        tail,
        checkpoint,
        failed,
        clean_close,
        oldest,
        broke_at,
        volume_bytes,
    })
}

/// Brings a checkpoint up to date with a record behind it. False: it is longer than any record of ours, and opens nothing.
pub fn note_record(
    checkpoint: &mut Checkpoint,
    kind: RecordKind,
    lsn: Lsn,
    record: &Record,
    payload: &[u8],
    region_bytes: u64,
) -> bool {
    match kind {
        RecordKind::Stable => {
            if let Ok(newer) = Checkpoint::parse(payload) {
                *checkpoint = newer;
            }
        }
        RecordKind::Write
        | RecordKind::Discard
        | RecordKind::Zero
        | RecordKind::Intent
        | RecordKind::Undefined
        | RecordKind::Failed => {
            return open_regions(
                checkpoint,
                record.offset.get(),
                record.length.get(),
                region_bytes,
            );
        }
        RecordKind::SpanBegin => {
            if let Some(kind) = SpanKind::from_code(record.detail) {
                let told = checkpoint.span.is_some();
                checkpoint.span = Some((kind, lsn, record.argument.get()));
                // A header may have told of the span already, and of what it copies; the record adds nothing then.
                if !told {
                    checkpoint.copy_cursor = if matches!(kind, SpanKind::Resync | SpanKind::Rewind)
                    {
                        u64::MAX
                    } else {
                        0
                    };
                }
                checkpoint.state = state_of(kind);
            }
        }
        RecordKind::SpanEnd => {
            checkpoint.span = None;
            checkpoint.copy_cursor = u64::MAX;
            checkpoint.state = VolumeState::Protected;
        }
        RecordKind::Point
        | RecordKind::Gap
        | RecordKind::Epoch
        | RecordKind::SizeChange
        | RecordKind::CleanClose => {}
    }
    true
}

fn state_of(kind: SpanKind) -> VolumeState {
    match kind {
        SpanKind::BaseCopy => VolumeState::Synchronising,
        SpanKind::Resync | SpanKind::CatchUp => VolumeState::Healing,
        SpanKind::Verify => VolumeState::Unverified,
        SpanKind::Rewind => VolumeState::Rewinding,
    }
}

fn open_regions(checkpoint: &mut Checkpoint, offset: u64, length: u64, region_bytes: u64) -> bool {
    if length == 0 {
        return true;
    }
    let first = offset / region_bytes;
    let last = offset.saturating_add(length - 1) / region_bytes;
    let (Ok(first), Ok(last)) = (u32::try_from(first), u32::try_from(last)) else {
        return false;
    };
    if (last - first) as usize >= OPEN_REGIONS_MAX {
        return false;
    }
    for region in first..=last {
        if let Err(at) = checkpoint.regions.binary_search(&region) {
            checkpoint.regions.insert(at, region);
        }
    }
    true
}
