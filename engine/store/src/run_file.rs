//! Runs on disk: written when a segment is taken, read when a store opens and when single records are asked for, made again from the segment when
//! they are lost.

use crate::segment_file::{SegmentBytes, SegmentFile};
use crate::{StoreError, StoredSegment, durable};
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use varve_format::{
    BLOCK_BYTES, FormatError, Hash128, RecordKind, RunEntry, RunHeader, SegmentFooter,
    SegmentHeader,
};
use varve_log::{ReadAt, SegmentReader};
use zerocopy::IntoBytes;

/// What the run of a segment says, but for its entries: its head and its events.
pub(crate) fn head_of(
    header: &SegmentHeader,
    footer: &SegmentFooter,
    entries: &[RunEntry],
) -> (RunHeader, Vec<RunEntry>) {
    let events: Vec<RunEntry> = entries
        .iter()
        .filter(|entry| entry.is_event())
        .copied()
        .collect();
    let sector = match header.sector_bytes.get() {
        4096 => 4096,
        _ => 512,
    };
    let run = RunHeader::new(footer, header.volume_bytes.get(), sector, entries, &events);
    (run, events)
}

/// Writes the run of a segment, durably.
pub(crate) fn write(
    path: &Path,
    run: &RunHeader,
    entries: &[RunEntry],
    events: &[RunEntry],
) -> Result<(), StoreError> {
    durable::create(path, |file| {
        file.write_all(&encode(run, entries, events))
            .map_err(StoreError::io(path))
    })
}

/// Reads what a run says of its segment, and its events, without its entries.
pub(crate) fn read_head(path: &Path) -> Result<(RunHeader, Vec<RunEntry>), StoreError> {
    let (file, header) = open(path)?;
    let mut bytes = vec![0u8; header.event_count.get() as usize * size_of::<RunEntry>()];
    file.read_exact_at(&mut bytes, header.events_at())
        .map_err(StoreError::io(path))?;
    let events = header.events(&bytes).map_err(damaged(path))?.to_vec();
    Ok((header, events))
}

/// Reads the entries of a segment's run.
pub(crate) fn read_entries(segment: &StoredSegment) -> Result<Vec<RunEntry>, StoreError> {
    let path = &segment.run_path();
    let (file, header) = open(path)?;
    if header.root != segment.root || header.sequence() != segment.sequence {
        return Err(damaged(path)(FormatError::Foreign("segment")));
    }
    let mut bytes = vec![0u8; header.entry_count.get() as usize * size_of::<RunEntry>()];
    file.read_exact_at(&mut bytes, BLOCK_BYTES)
        .map_err(StoreError::io(path))?;
    Ok(header.entries(&bytes).map_err(damaged(path))?.to_vec())
}

fn open(path: &Path) -> Result<(File, RunHeader), StoreError> {
    let file = File::open(path).map_err(StoreError::io(path))?;
    let length = file.metadata().map_err(StoreError::io(path))?.len();
    let mut block = vec![0u8; BLOCK_BYTES.min(length) as usize];
    file.read_exact_at(&mut block, 0)
        .map_err(StoreError::io(path))?;
    let header = RunHeader::parse(&block, length).map_err(damaged(path))?;
    Ok((file, header))
}

fn damaged(path: &Path) -> impl Fn(FormatError) -> StoreError + '_ {
    |error| StoreError::Damaged(path.to_path_buf(), error)
}

/// Adds what a run holds of the batch that `reader` has just read.
pub(crate) fn collect<R: ReadAt>(
    reader: &SegmentReader<R>,
    entries: &mut Vec<RunEntry>,
) -> Result<(), FormatError> {
    reader.each_record(|found| {
        if matches!(found.kind, RecordKind::Intent | RecordKind::Stable) {
            return;
        }
        let (offset, length) = match found.kind {
            // A span's or gap's argument, in the place of an offset.
            RecordKind::SpanBegin | RecordKind::SpanEnd | RecordKind::Gap => {
                (found.record.argument.get(), 0)
            }
            RecordKind::Point => (0, found.payload.len() as u64),
            _ => (found.record.offset.get(), found.record.length.get()),
        };
        entries.push(RunEntry {
            lsn: found.lsn.0.into(),
            offset: offset.into(),
            length: length.into(),
            wall_time: found.time.0.into(),
            payload: found.payload_at.into(),
            payload_crc: found.record.payload_crc,
            kind: found.kind as u8,
            flags: found.record.flags,
            detail: found.record.detail,
            reserved: 0,
        });
    })
}

/// The whole run of a segment, out of the segment itself: read anew, or what a pruned one carries. (head, entries, events).
pub(crate) fn of_segment(
    file: &SegmentFile,
) -> Result<(RunHeader, Vec<RunEntry>, Vec<RunEntry>), StoreError> {
    let path = file.path();
    let footer = file.footer();
    if let Some(bytes) = file.run()? {
        let head = RunHeader::parse(&bytes, bytes.len() as u64).map_err(damaged(path))?;
        let same = head.root == footer.root
            && head.volume == footer.volume
            && head.sequence == footer.sequence;
        if !same {
            return Err(damaged(path)(FormatError::Foreign("segment")));
        }
        let behind = &bytes[BLOCK_BYTES as usize..];
        let entries = head.entries(behind).map_err(damaged(path))?.to_vec();
        let events = &bytes[head.events_at() as usize..];
        let events = head.events(events).map_err(damaged(path))?.to_vec();
        return Ok((head, entries, events));
    }
    let source = SegmentBytes::new(file);
    let (header, entries) = index(path, source, footer.data_bytes.get())?;
    let (head, events) = head_of(&header, footer, &entries);
    Ok((head, entries, events))
}

/// The bytes of a run.
pub(crate) fn encode(run: &RunHeader, entries: &[RunEntry], events: &[RunEntry]) -> Vec<u8> {
    [&run.to_block()[..], entries.as_bytes(), events.as_bytes()].concat()
}

/// Reads all records of a segment: its header, and the entries of its run.
pub(crate) fn index<R: ReadAt>(
    path: &Path,
    source: R,
    data_bytes: u64,
) -> Result<(SegmentHeader, Vec<RunEntry>), StoreError> {
    let (header, entries, _) = index_with_hash(path, source, data_bytes)?;
    Ok((header, entries))
}

/// The same, and the hash of the last batch.
pub(crate) fn index_with_hash<R: ReadAt>(
    path: &Path,
    source: R,
    data_bytes: u64,
) -> Result<(SegmentHeader, Vec<RunEntry>, Hash128), StoreError> {
    let mut reader =
        SegmentReader::open(source, 0, data_bytes).map_err(StoreError::segment(path))?;
    let mut entries = Vec::new();
    while reader.advance().map_err(StoreError::segment(path))? {
        collect(&reader, &mut entries).map_err(damaged(path))?;
    }
    let (_, hash, _) = reader.tail();
    Ok((*reader.header(), entries, hash))
}
