//! Takes sealed segments out of the log ring: read once, checked record by record and copied, indexed, made durable, named.
//!
//! Crash, step by step (the store's disk keeps what was flushed, nothing else): before the segment has its name, a `.new` file is removed at the next
//! open and the segment is taken again, because the log recycles it only after all of this. After it, before the run has its name: the run is made
//! again from the segment. A run without a segment is never left by a crash: it says that a segment was lost.

use crate::segment::{run_path, segment_path};
use crate::{StoreError, StoredSegment, VolumeStore, durable, run_file};
use std::fs::File;
use std::io::{self, BufWriter, Seek, Write};
use std::path::Path;
use varve_format::{
    Lsn, RecordKind, RunEntry, SEGMENT_FOOTER_BYTES, SegmentFooter, SegmentSequence, SpanKind,
    WallTime,
};
use varve_log::{ReadAt, RingSegment, SegmentError, SegmentReader, read_headers};

/// Bytes that are written at a time.
const COPIED_BYTES: usize = 1 << 20;

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
    let mut headers = read_headers(&mut *log, segment_bytes, segment_count)
        .map_err(StoreError::segment(log_path))?;
    leave_out_given_up(store, &mut headers);
    let mut done = Ingested {
        below: store
            .newest()
            .map_or(SegmentSequence(0), |newest| SegmentSequence(newest.0 + 1)),
        ..Ingested::default()
    };
    for segment in &headers {
        if segment.header.volume() != store.volume() {
            return Err(StoreError::LogDamaged(
                segment.header.sequence(),
                "it belongs to another volume".to_owned(),
            ));
        }
    }
    refuse_another(store, &headers)?;
    let proves_nothing = compared_before_the_hole(store, log, &headers, segment_bytes, below);
    for (index, segment) in headers.iter().enumerate() {
        let sequence = segment.header.sequence();
        if sequence >= below || store.newest().is_some_and(|newest| sequence <= newest) {
            continue;
        }
        let Some(next) = headers.get(index + 1) else {
            break;
        };
        if proves_nothing.is_some_and(|last| sequence <= last) {
            done.problems.push(format!(
                "segment {sequence} of the log goes on where this history has a hole, and tells of a comparison with another one: it is not taken"
            ));
            done.below = SegmentSequence(sequence.0 + 1);
            continue;
        }
        if store
            .newest()
            .is_some_and(|newest| newest.0 + 1 != sequence.0)
            && index == 0
            && Lsn(segment.header.previous_lsn_end.get()) != store.timeline().end()
        {
            // Numbers that were left out hold nothing, if it follows the history's end all the same.
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

/// Leaves out what lies before the segments that the log still holds for the store, and does not belong to the history: another log's that was given up. What
/// goes on where the history ends is taken even if nobody holds it any more: a start in bypass does not know what the log has.
fn leave_out_given_up(store: &VolumeStore, headers: &mut Vec<RingSegment>) {
    let (Some(newest), Some(last)) = (store.newest(), headers.last()) else {
        return;
    };
    let (held, end) = (last.header.oldest_held.get(), store.timeline().end());
    let mut next = newest.0 + 1;
    headers.retain(|segment| {
        let header = &segment.header;
        let sequence = header.sequence.get();
        if sequence >= held {
            return true;
        }
        if sequence <= newest.0 {
            return is_known(store, segment) != Some(false);
        }
        let first = sequence == newest.0 + 1;
        let goes_on = sequence == next && (!first || Lsn(header.previous_lsn_end.get()) == end);
        next += u64::from(goes_on);
        goes_on
    });
}

/// Behind a hole (the store was lost, or is an older one) nothing resolves until a comparison has made up for it: one with the history that has the hole. The log
/// may tell of comparisons that were made with the history before it was lost; what was equal then was not copied, and is not here. So what lies before the
/// last of these is not taken: nothing of it would resolve in any case. Gives that segment.
fn compared_before_the_hole(
    store: &VolumeStore,
    log: &mut dyn ReadAt,
    headers: &[RingSegment],
    segment_bytes: u64,
    below: SegmentSequence,
) -> Option<SegmentSequence> {
    let is_new = |segment: &&RingSegment| {
        let sequence = segment.header.sequence();
        sequence < below && store.newest().is_none_or(|newest| sequence > newest)
    };
    let mut new = headers.iter().filter(is_new).peekable();
    let end = store.timeline().end().max(Lsn::FIRST);
    let first = new.peek()?;
    if Lsn(first.header.previous_lsn_end.get()) == end {
        return None;
    }
    let mut last = None;
    for segment in new {
        if compares(log, segment, segment_bytes) {
            last = Some(segment.header.sequence());
        }
    }
    last
}

/// Whether a comparison begins in a segment of the log, as far as it can be read.
fn compares(log: &mut dyn ReadAt, segment: &RingSegment, segment_bytes: u64) -> bool {
    let Ok(mut reader) = SegmentReader::open(log, segment.base, segment_bytes) else {
        return false;
    };
    let mut compares = false;
    while let Ok(true) = reader.advance() {
        let _ = reader.each_record(|found| {
            let is_comparison = found.record.detail == SpanKind::Verify as u8;
            compares |= found.kind == RecordKind::SpanBegin && is_comparison;
        });
    }
    compares
}

/// Whether a segment of the log is the one that the history has under that number; none: it has none.
fn is_known(store: &VolumeStore, segment: &RingSegment) -> Option<bool> {
    let stored = store.segment(segment.header.sequence())?;
    let (epoch, start) = (segment.header.epoch(), segment.header.lsn_start());
    Some(stored.epoch == epoch && stored.lsn_start == start)
}

/// Refuses a log that does not go on where the history ends. It was put back to an older state (a backup of the system's disk, a snapshot of the machine), or
/// was lost together with the state file: its numbers were all used before, and by them alone its segments would seem to be in the history already, or would
/// be put behind it with LSNs that it has.
fn refuse_another(store: &VolumeStore, headers: &[RingSegment]) -> Result<(), StoreError> {
    let (Some(newest), Some(last)) = (store.newest(), headers.last()) else {
        return Ok(());
    };
    let end = store.timeline().end();
    for segment in headers {
        let header = &segment.header;
        let is_another = match header.sequence() <= newest {
            true => is_known(store, segment) == Some(false),
            false => header.lsn_start() < end,
        };
        if is_another {
            return Err(StoreError::OtherLog(header.sequence()));
        }
    }
    // The open segment lies behind the history; where its header cannot be read, the one before it is the history's last.
    let sequence = last.header.sequence();
    match sequence <= newest && is_known(store, last).is_none() && !store.is_partly_unknown() {
        true => Err(StoreError::OtherLog(sequence)),
        false => Ok(()),
    }
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
    let new = durable::unfinished(&segment_path(store.directory(), sequence));
    let taken = copy(log, (segment, &new), lsn_limit, follows, segment_bytes);
    if taken.is_err() {
        // On a full disk half a file would keep it full.
        let _ = std::fs::remove_file(&new);
    }
    let (footer, entries) = taken?;
    let time_end = WallTime(footer.time_end.get());
    durable::name(&new, &segment_path(store.directory(), sequence))?;
    let (mut head, events) = run_file::head_of(&segment.header, &footer, &entries);
    head.stored_at = store.now.unwrap_or(time_end).0.into();
    run_file::write(
        &run_path(store.directory(), sequence),
        &head,
        &entries,
        &events,
    )?;
    let stored_bytes = footer.data_bytes.get() + SEGMENT_FOOTER_BYTES as u64;
    Ok(Some(StoredSegment::new(
        (store.directory(), store.keys()),
        &head,
        events,
        stored_bytes,
    )))
}

/// The log, whose bytes are kept as they are read, from one end to the other: what was checked is what is stored.
struct Copying<'a> {
    log: &'a mut dyn ReadAt,
    base: u64,
    out: BufWriter<File>,
    path: &'a Path,
    done: u64,
}

impl ReadAt for Copying<'_> {
    fn read_at(&mut self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.log.read_at(offset, bytes)?;
        if offset != self.base + self.done {
            return Err(io::Error::other("it is not read in order"));
        }
        self.done += bytes.len() as u64;
        let written = self.out.write_all(bytes);
        written.map_err(|error| io::Error::other(StoreError::io(self.path)(error)))
    }
}

/// Checks the segment's records and copies them into a new file, durably.
fn copy(
    log: &mut dyn ReadAt,
    (segment, new): (&RingSegment, &Path),
    lsn_limit: Lsn,
    follows: bool,
    segment_bytes: u64,
) -> Result<(SegmentFooter, Vec<RunEntry>), StoreError> {
    let sequence = segment.header.sequence();
    let damaged = |why: String| StoreError::LogDamaged(sequence, why);
    // A disk that fails to read now may read later: nothing is given up.
    let unread = StoreError::io(Path::new("the log"));
    let file = durable::begin(new)?;
    let mut source = Copying {
        log,
        base: segment.base,
        out: BufWriter::with_capacity(COPIED_BYTES, file),
        path: new,
        done: 0,
    };
    let opened = SegmentReader::open(&mut source as &mut dyn ReadAt, segment.base, segment_bytes);
    let mut reader = match opened {
        Ok(reader) => reader,
        Err(SegmentError::Io(error)) => return Err(unread(error)),
        Err(error) => return Err(damaged(error.to_string())),
    };
    let mut entries: Vec<RunEntry> = Vec::new();
    let (mut time_start, mut time_end) = (segment.header.wall_time(), segment.header.wall_time());
    while reader.tail().2 < lsn_limit {
        match reader.advance() {
            Ok(true) => {}
            Ok(false) => break,
            Err(SegmentError::Io(error)) => return Err(unread(error)),
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
    let mut file = source
        .out
        .into_inner()
        .map_err(|error| StoreError::io(new)(error.into_error()))?;
    // What was read behind the end is none of it.
    file.set_len(data_bytes).map_err(StoreError::io(new))?;
    file.rewind().map_err(StoreError::io(new))?;
    let mut hasher = blake3::Hasher::new();
    hasher
        .update_reader(&mut file)
        .map_err(StoreError::io(new))?;
    footer.root = *hasher.finalize().as_bytes();
    file.write_all(&footer.to_block())
        .map_err(StoreError::io(new))?;
    file.sync_all().map_err(StoreError::io(new))?;
    Ok((footer, entries))
}
