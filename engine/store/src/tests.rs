//! Tests of the timeline: what does not resolve, and why. (Images and ingest are tested on real devices in `tests/tests/vm.rs`.)

use crate::{StoredSegment, Timeline};
use std::path::PathBuf;
use varve_format::{Lsn, RecordKind, RunEntry, SegmentFooter, SpanKind, WallTime};
use zerocopy::FromZeros;

/// A record at `lsn` with time `lsn` × 10.
fn entry(lsn: u64, kind: RecordKind, span: Option<SpanKind>, argument: u64) -> RunEntry {
    let mut entry = RunEntry::new_zeroed();
    entry.lsn = lsn.into();
    entry.wall_time = ((lsn * 10) as i64).into();
    entry.kind = kind as u8;
    entry.detail = span.map_or(0, |span| span as u8);
    entry.offset = argument.into();
    entry
}

fn segment(sequence: u64, previous_end: u64, end: u64, entries: Vec<RunEntry>) -> StoredSegment {
    let mut footer = SegmentFooter::empty();
    footer.sequence = sequence.into();
    footer.lsn_start = entries[0].lsn;
    footer.lsn_end = end.into();
    footer.previous_lsn_end = previous_end.into();
    StoredSegment {
        footer,
        path: PathBuf::new(),
        entries,
    }
}

/// Base copy from 2 to 4, writes up to 9.
fn beginning() -> StoredSegment {
    let write = |lsn| entry(lsn, RecordKind::Write, None, 0);
    let begin = entry(2, RecordKind::SpanBegin, Some(SpanKind::BaseCopy), 0);
    let end = entry(4, RecordKind::SpanEnd, None, 2);
    segment(1, 1, 10, vec![begin, write(3), end, write(5), write(9)])
}

#[test]
fn instants_resolve_behind_the_first_copy_and_not_inside() {
    let timeline = Timeline::of([&beginning()].into_iter());
    assert_eq!(timeline.first(), Some(Lsn(5)));
    assert!(timeline.check(Lsn(4)).is_err());
    assert_eq!(timeline.check(Lsn(10)).unwrap(), Lsn(10));
    assert_eq!(timeline.at_time(WallTime(55)), Lsn(6));
}

#[test]
fn a_missing_segment_closes_everything_until_a_full_copy() {
    let write = |lsn| entry(lsn, RecordKind::Write, None, 0);
    let resync = [
        entry(31, RecordKind::SpanBegin, Some(SpanKind::Resync), 0),
        entry(33, RecordKind::SpanEnd, None, 31),
    ];
    let verify = [
        entry(35, RecordKind::SpanBegin, Some(SpanKind::Verify), 0),
        entry(37, RecordKind::SpanEnd, None, 35),
    ];
    let mut entries = vec![write(30)];
    entries.extend(resync);
    entries.push(write(34));
    entries.extend(verify);
    entries.push(write(38));
    // History before this segment ended at 30, what is stored ends at 10.
    let timeline = Timeline::of([&beginning(), &segment(3, 30, 39, entries)].into_iter());
    assert!(timeline.check(Lsn(10)).is_ok());
    assert!(timeline.check(Lsn(31)).is_err(), "behind the hole");
    assert!(
        timeline.check(Lsn(35)).is_err(),
        "a resync does not make up for a missing segment"
    );
    assert!(timeline.check(Lsn(38)).is_ok(), "a full copy does");
}

#[test]
fn a_time_inside_a_gap_does_not_resolve_and_the_nearest_are_named() {
    let gap = entry(20, RecordKind::Gap, None, 95);
    let span = [
        entry(21, RecordKind::SpanBegin, Some(SpanKind::CatchUp), 0),
        entry(23, RecordKind::SpanEnd, None, 21),
    ];
    let timeline = Timeline::of(
        [
            &beginning(),
            &segment(2, 10, 24, vec![gap, span[0], span[1]]),
        ]
        .into_iter(),
    );
    let nearest = timeline
        .gap_at(WallTime(150))
        .expect("a gap from 95 to 200");
    assert_eq!(nearest.before.unwrap().0, Lsn(10));
    assert_eq!(nearest.after.unwrap().0, Lsn(24));
    assert!(timeline.gap_at(WallTime(90)).is_none());
}

#[test]
fn a_full_copy_that_began_before_a_hole_does_not_make_up_for_it() {
    let write = |lsn| entry(lsn, RecordKind::Write, None, 0);
    let begin = entry(2, RecordKind::SpanBegin, Some(SpanKind::BaseCopy), 0);
    let first = segment(1, 1, 10, vec![begin, write(3), write(9)]);
    // The segment with LSN 10 to 29 is lost; the copy ends behind it.
    let end = entry(33, RecordKind::SpanEnd, None, 2);
    let third = segment(3, 30, 40, vec![write(30), end, write(35)]);
    let timeline = Timeline::of([&first, &third].into_iter());
    assert!(
        timeline.check(Lsn(36)).is_err(),
        "copied blocks are missing"
    );
    assert!(timeline.is_incomplete());
    // A lost segment may have begun a span that copies less than everything.
    let end = entry(33, RecordKind::SpanEnd, None, 20);
    let third = segment(3, 30, 40, vec![write(30), end, write(35)]);
    let timeline = Timeline::of([&beginning(), &third].into_iter());
    assert!(timeline.check(Lsn(36)).is_err() && timeline.is_incomplete());
}
