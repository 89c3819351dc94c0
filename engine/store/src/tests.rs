//! Tests of the timeline: what does not resolve, and why. (Images, settling and damage: `tests/tests/store.rs` and `damage.rs`.)

use crate::{Outside, StoredSegment, Timeline};
use std::path::Path;
use std::sync::Arc;
use varve_format::{Lsn, RecordKind, RunEntry, RunHeader, SegmentFooter, SpanKind, WallTime};
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
    footer.time_start = entries[0].wall_time;
    footer.time_end = entries[entries.len() - 1].wall_time;
    let events: Vec<RunEntry> = entries.iter().filter(|e| e.is_event()).copied().collect();
    let run = RunHeader::new(&footer, 1 << 20, 512, &entries, &events);
    let nowhere: Arc<Path> = Path::new("nowhere").into();
    StoredSegment::new((&nowhere, &Arc::default()), &run, events, 0)
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
    assert_eq!(
        timeline.gap_at(WallTime(150)),
        Some((WallTime(90), Lsn(24))),
        "a gap from the last record that is there to 200; the catch-up ends at 23"
    );
    assert_eq!(
        timeline.check(Lsn(22)),
        Err(Outside {
            before: Some(Lsn(10)),
            after: Some(Lsn(24)),
            reason: Some(SpanKind::CatchUp),
            pruned: false
        })
    );
    // What was recorded as 10 to 19 was given up: no number of it is an instant, nor is what comes before the copy that makes up for it.
    for lsn in 11..=23 {
        assert!(timeline.check(Lsn(lsn)).is_err(), "{lsn}");
    }
    assert!(timeline.check(Lsn(24)).is_ok());
    assert!(timeline.gap_at(WallTime(90)).is_none());
}

#[test]
fn records_that_were_given_up_are_no_instants_even_without_a_copy() {
    let write = |lsn| entry(lsn, RecordKind::Write, None, 0);
    let later = segment(2, 10, 22, vec![write(20), write(21)]);
    let timeline = Timeline::of([&beginning(), &later].into_iter());
    for lsn in 11..=20 {
        assert!(timeline.check(Lsn(lsn)).is_err(), "{lsn}");
    }
    assert_eq!(timeline.check(Lsn(21)).unwrap(), Lsn(21));
    assert_eq!(timeline.check(Lsn(10)).unwrap(), Lsn(10));
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

#[test]
fn the_middle_of_two_instants_is_an_instant_between_them() {
    let span = [
        entry(21, RecordKind::SpanBegin, Some(SpanKind::CatchUp), 0),
        entry(29, RecordKind::SpanEnd, None, 21),
    ];
    let write = entry(10, RecordKind::Write, None, 0);
    let later = segment(2, 10, 40, vec![write, span[0], span[1]]);
    let timeline = Timeline::of([&beginning(), &later].into_iter());
    let middle = |after, before| timeline.middle(Lsn(after), Lsn(before)).map(|lsn| lsn.0);
    assert_eq!(middle(5, 10), Some(7));
    // 22 to 29 lie inside the span.
    assert_eq!(middle(10, 40), Some(21));
    assert_eq!(middle(21, 40), Some(30));
    assert_eq!(middle(21, 30), None);
    assert_eq!(
        (middle(7, 8), middle(7, 7), middle(8, 7)),
        (None, None, None)
    );
}

#[test]
fn a_timeline_that_grew_is_the_one_of_all_segments() {
    let gap = entry(20, RecordKind::Gap, None, 95);
    let begin = entry(21, RecordKind::SpanBegin, Some(SpanKind::CatchUp), 0);
    let end = entry(30, RecordKind::SpanEnd, None, 21);
    let write = |lsn| entry(lsn, RecordKind::Write, None, 0);
    let segments = [
        beginning(),
        segment(2, 10, 24, vec![gap, begin, write(23)]),
        segment(3, 24, 28, vec![write(25)]),
        segment(4, 28, 33, vec![write(29), end, write(31)]),
    ];
    for count in 1..=segments.len() {
        let mut grown = Timeline::default();
        segments[..count].iter().for_each(|s| grown.add(s));
        let whole = Timeline::of(segments[..count].iter());
        assert_eq!(format!("{grown:?}"), format!("{whole:?}"));
        let inside = grown.check(Lsn(26));
        assert!(inside.is_err(), "inside the span, with {count} segments");
    }
    let whole = Timeline::of(segments.iter());
    assert!(whole.check(Lsn(31)).is_ok() && whole.closed().len() == 2);
}
