//! Reads a whole history out of a log ring, and replays it: a second opinion on what an image must be.

use std::collections::BTreeMap;
use varve_format::{Lsn, RecordKind, SegmentSequence, WallTime};
use varve_log::{SegmentReader, read_headers};

/// One record of a history.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Its LSN.
    pub lsn: Lsn,
    /// What it is.
    pub kind: RecordKind,
    /// Flags of the record.
    pub flags: u8,
    /// First byte.
    pub offset: u64,
    /// Length.
    pub length: u64,
    /// Kind-specific.
    pub argument: u64,
    /// Bytes written.
    pub payload: Vec<u8>,
    /// When.
    pub time: WallTime,
}

/// A history: records by LSN.
#[derive(Clone, Debug, Default)]
pub struct History {
    /// All records.
    pub entries: BTreeMap<Lsn, Entry>,
    /// LSN after the last one.
    pub end: Lsn,
}

impl History {
    /// Reads every segment in `log`. Segments end where the next one's header says.
    ///
    /// # Panics
    /// If a segment before the last one is damaged.
    #[must_use]
    pub fn read(log: &[u8], segment_bytes: u64, segment_count: u64) -> History {
        let mut source = log;
        let mut headers = read_headers(&mut source, segment_bytes, segment_count).unwrap();
        // What lies before that was given up.
        if let Some(held) = headers.last().map(|newest| newest.header.oldest_held.get()) {
            headers.retain(|segment| segment.header.sequence.get() >= held);
        }
        let mut history = History::default();
        for (index, segment) in headers.iter().enumerate() {
            let next = headers.get(index + 1);
            let lsn_limit = next.map_or(Lsn(u64::MAX), |n| Lsn(n.header.previous_lsn_end.get()));
            let Ok(mut reader) = SegmentReader::open(log, segment.base, segment_bytes) else {
                // A segment that never became durable: nothing of it counts, as the header behind it must say.
                assert!(
                    next.is_none()
                        || lsn_limit <= history.end
                        || next.is_some_and(
                            |n| n.header.sequence().0 != segment.header.sequence().0 + 1
                        ),
                    "segment {} cannot be opened, but history up to {lsn_limit} should be in it",
                    segment.header.sequence()
                );
                continue;
            };
            history.end = history.end.max(segment.header.lsn_start());
            while reader.tail().2 < lsn_limit {
                match reader.advance() {
                    Ok(true) => {}
                    _ => break,
                }
                reader
                    .each_record(|found| {
                        let entry = Entry {
                            lsn: found.lsn,
                            kind: found.kind,
                            flags: found.record.flags,
                            offset: found.record.offset.get(),
                            length: found.record.length.get(),
                            argument: found.record.argument.get(),
                            payload: found.payload.to_vec(),
                            time: found.time,
                        };
                        assert!(
                            history.entries.insert(found.lsn, entry).is_none(),
                            "LSN {} twice",
                            found.lsn
                        );
                        history.end = found.lsn.plus(1);
                    })
                    .unwrap();
            }
            if let Some(next) = next {
                let wanted = SegmentSequence(segment.header.sequence.get() + 1);
                if next.header.sequence() == wanted {
                    assert!(
                        reader.tail().2 >= lsn_limit,
                        "segment {} ends at {}, not at {lsn_limit}",
                        segment.header.sequence(),
                        reader.tail().2
                    );
                }
            }
        }
        history
    }

    /// The disk as of `lsn`: every record below it applied to zeroes.
    #[must_use]
    pub fn image(&self, lsn: Lsn, volume_bytes: usize) -> Vec<u8> {
        let mut image = vec![0u8; volume_bytes];
        for entry in self.entries.range(..lsn).map(|(_, entry)| entry) {
            apply(&mut image, entry);
        }
        image
    }

    /// Whether `lsn` lies outside all spans (and behind the first one, before which there is no whole image).
    #[must_use]
    pub fn resolves(&self, lsn: Lsn) -> bool {
        let mut open = false;
        let mut complete = false;
        for entry in self.entries.range(..lsn).map(|(_, entry)| entry) {
            match entry.kind {
                RecordKind::SpanBegin => open = true,
                RecordKind::SpanEnd => {
                    open = false;
                    complete = true;
                }
                _ => {}
            }
        }
        complete && !open
    }

    /// Number of records of a kind.
    #[must_use]
    pub fn count(&self, kind: RecordKind) -> usize {
        self.entries
            .values()
            .filter(|entry| entry.kind == kind)
            .count()
    }
}

fn apply(image: &mut [u8], entry: &Entry) {
    let range = entry.offset as usize..(entry.offset + entry.length) as usize;
    match entry.kind {
        RecordKind::Write => image[range].copy_from_slice(&entry.payload),
        RecordKind::Discard | RecordKind::Zero | RecordKind::Undefined => image[range].fill(0),
        _ => {}
    }
}
