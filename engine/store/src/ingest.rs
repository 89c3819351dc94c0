//! Takes sealed segments out of the log ring: checked record by record, copied, indexed, made durable, named.
//!
//! Crash, step by step (the store's disk keeps what was flushed, nothing else): before the segment has its name, a `.new` file is removed at the next
//! open and the segment is taken again, because the log recycles it only after all of this. After it, before the run has its name: the run is made
//! again from the segment. A run without a segment is never left by a crash: it says that a segment was lost.

use crate::segment::{run_path, segment_path};
use crate::{StoreError, StoredSegment, VolumeStore, durable, run_file};
use std::fs::File;
use std::io::Write;
use std::path::Path;
use varve_format::{Lsn, RunEntry, SEGMENT_FOOTER_BYTES, SegmentFooter, SegmentSequence};
use varve_log::{ReadAt, RingSegment, SegmentError, SegmentReader, read_headers};

/// What an ingest has done.
#[derive(Clone, Debug, Default)]
pub struct Ingested {
    /// Segments taken.
    pub segments: u64,
    /// Everything below is in the store (or was given up): the log may recycle it.
    pub below: SegmentSequence,
    /// What could not be taken, in words.
    pub problems: Vec<String>,
}

/// Takes every segment below `below` that the store lacks.
pub fn ingest(
    store: &mut VolumeStore,
    log: &mut dyn ReadAt,
    segment_bytes: u64,
    segment_count: u64,
    below: SegmentSequence,
) -> Result<Ingested, StoreError> {
    let log_path = Path::new("the log");
    let headers = read_headers(&mut *log, segment_bytes, segment_count)
        .map_err(StoreError::segment(log_path))?;
    let mut done = Ingested {
        below: store
            .newest()
            .map_or(SegmentSequence(0), |newest| SegmentSequence(newest.0 + 1)),
        ..Ingested::default()
    };
    for (index, segment) in headers.iter().enumerate() {
        let sequence = segment.header.sequence();
        if segment.header.volume() != store.volume() {
            return Err(StoreError::LogDamaged(
                sequence,
                "it belongs to another volume".to_owned(),
            ));
        }
        if sequence >= below || store.newest().is_some_and(|newest| sequence <= newest) {
            continue;
        }
        let Some(next) = headers.get(index + 1) else {
            break;
        };
        if store
            .newest()
            .is_some_and(|newest| newest.0 + 1 != sequence.0)
            && index == 0
        {
            done.problems
                .push(StoreError::Missing(SegmentSequence(sequence.0 - 1)).to_string());
        }
        match take(store, log, segment, next, segment_bytes) {
            Ok(Some(taken)) => {
                store.add(taken);
                done.segments += 1;
            }
            Ok(None) => {}
            Err(StoreError::LogDamaged(sequence, why)) => done
                .problems
                .push(StoreError::LogDamaged(sequence, why).to_string()),
            Err(error) => return Err(error),
        }
        done.below = SegmentSequence(sequence.0 + 1);
    }
    Ok(done)
}

/// Copies one segment. `Ok(None)`: it never counted.
fn take(
    store: &VolumeStore,
    log: &mut dyn ReadAt,
    segment: &RingSegment,
    next: &RingSegment,
    segment_bytes: u64,
) -> Result<Option<StoredSegment>, StoreError> {
    let sequence = segment.header.sequence();
    let follows = next.header.sequence().0 == sequence.0 + 1;
    let lsn_limit = if follows {
        Lsn(next.header.previous_lsn_end.get())
    } else {
        Lsn(u64::MAX)
    };
    if lsn_limit <= segment.header.lsn_start() {
        return Ok(None);
    }
    let damaged = |why: String| StoreError::LogDamaged(sequence, why);
    let mut reader =
        match SegmentReader::open(&mut *log as &mut dyn ReadAt, segment.base, segment_bytes) {
            Ok(reader) => reader,
            // A disk that fails to read now may read later: nothing is given up.
            Err(SegmentError::Io(error)) => {
                return Err(StoreError::Io(Path::new("the log").to_path_buf(), error));
            }
            Err(error) => return Err(damaged(error.to_string())),
        };
    let mut entries: Vec<RunEntry> = Vec::new();
    let (mut time_start, mut time_end) = (segment.header.wall_time(), segment.header.wall_time());
    while reader.tail().2 < lsn_limit {
        match reader.advance() {
            Ok(true) => {}
            Ok(false) => break,
            // A disk that fails to read now may read later: nothing is given up.
            Err(SegmentError::Io(error)) => {
                return Err(StoreError::Io(Path::new("the log").to_path_buf(), error));
            }
            // Behind the end of an abandoned epoch anything may lie; before it, a break is damage.
            Err(error) if follows => {
                return Err(damaged(format!(
                    "at LSN {} of {lsn_limit}: {error}",
                    reader.tail().2
                )));
            }
            Err(_) => break,
        }
        run_file::collect(&reader, &mut entries).map_err(|error| damaged(error.to_string()))?;
    }
    if let (Some(first), Some(last)) = (entries.first(), entries.last()) {
        (time_start, time_end) = (first.time(), last.time());
    }
    let (data_bytes, _, lsn_end) = reader.tail();
    if follows && lsn_end < lsn_limit {
        return Err(damaged(format!(
            "it ends at LSN {lsn_end}, the next one says {lsn_limit}"
        )));
    }
    let mut footer = SegmentFooter::empty();
    footer.volume = segment.header.volume;
    footer.epoch = segment.header.epoch;
    footer.sequence = sequence.0.into();
    footer.lsn_start = segment.header.lsn_start().0.into();
    footer.lsn_end = lsn_end.0.into();
    footer.time_start = time_start.0.into();
    footer.time_end = time_end.0.into();
    footer.data_bytes = data_bytes.into();
    footer.previous_lsn_end = segment.header.previous_lsn_end;
    let path = segment_path(store.directory(), sequence);
    let run = run_path(store.directory(), sequence);
    let new = durable::unfinished(&path);
    footer.root = copy(log, segment.base, data_bytes, &new, footer).inspect_err(|_| {
        // On a full disk half a file would keep it full.
        let _ = std::fs::remove_file(&new);
    })?;
    durable::name(&new, &path)?;
    let (mut head, events) = run_file::head_of(&segment.header, &footer, &entries);
    head.stored_at = store.now.unwrap_or(time_end).0.into();
    run_file::write(&run, &head, &entries, &events)?;
    let stored_bytes = data_bytes + SEGMENT_FOOTER_BYTES as u64;
    Ok(Some(StoredSegment::new(
        (store.directory(), store.keys()),
        &head,
        events,
        stored_bytes,
    )))
}

/// Copies the segment's bytes and its footer into a new file, durably. Returns the root.
fn copy(
    log: &mut dyn ReadAt,
    base: u64,
    data_bytes: u64,
    new: &Path,
    mut footer: SegmentFooter,
) -> Result<[u8; 32], StoreError> {
    let mut file = File::create(new).map_err(StoreError::io(new))?;
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0u8; 1 << 20];
    let mut done = 0;
    while done < data_bytes {
        let part = (data_bytes - done).min(buffer.len() as u64) as usize;
        log.read_at(base + done, &mut buffer[..part])
            .map_err(StoreError::io(Path::new("the log")))?;
        hasher.update(&buffer[..part]);
        file.write_all(&buffer[..part])
            .map_err(StoreError::io(new))?;
        done += part as u64;
    }
    footer.root = *hasher.finalize().as_bytes();
    file.write_all(&footer.to_block())
        .map_err(StoreError::io(new))?;
    file.sync_all().map_err(StoreError::io(new))?;
    Ok(footer.root)
}
