//! When: which instants resolve, where history has no single writes, what the points are called.
//!
//! L resolves if a span has ended below it and none is open at it. A span that an epoch leaves open stays open in the next one.

use crate::StoredSegment;
use varve_format::{Lsn, RecordKind, RunEntry, SpanKind, WallTime};

/// Something that happened, at an LSN and a time.
#[derive(Clone, Debug)]
pub struct Event {
    /// LSN of the record.
    pub lsn: Lsn,
    /// Its time.
    pub time: WallTime,
    /// For a point: where its name lies; for a gap: since when.
    pub entry: RunEntry,
    /// The segment.
    pub segment: u64,
}

/// An interval in which no instant resolves: behind `from`, up to and with `to`.
#[derive(Clone, Copy, Debug)]
pub struct Closed {
    /// LSN of the span's begin record.
    pub from: Lsn,
    /// LSN of its end record; the end of history if it is open.
    pub to: Lsn,
    /// Time of the begin record.
    pub from_time: WallTime,
    /// Time of the end record.
    pub to_time: WallTime,
    /// Why.
    pub kind: SpanKind,
    /// It has not ended yet.
    pub open: bool,
}

/// An instant that does not resolve, and the nearest that do.
#[derive(Clone, Copy, Debug)]
pub struct Nearest {
    /// Before, with its time.
    pub before: Option<(Lsn, WallTime)>,
    /// After, with its time.
    pub after: Option<(Lsn, WallTime)>,
    /// Why not.
    pub reason: Option<SpanKind>,
}

/// A volume's time.
#[derive(Clone, Debug, Default)]
pub struct Timeline {
    /// LSN and time of every record that a run holds, in order.
    records: Vec<(Lsn, WallTime)>,
    closed: Vec<Closed>,
    /// Recovery points, oldest first.
    pub points: Vec<Event>,
    /// Gaps, oldest first.
    pub gaps: Vec<Event>,
    end: Lsn,
    /// A segment is missing, and no full copy has made up for it since.
    hole: bool,
}

impl Timeline {
    /// Reads the time of all segments.
    #[must_use]
    pub fn of<'a>(segments: impl Iterator<Item = &'a StoredSegment>) -> Timeline {
        let mut timeline = Timeline::default();
        let mut open: Option<(Lsn, WallTime, SpanKind)> = None;
        let (mut hole, mut full_copy) = (false, false);
        for segment in segments {
            let before = Lsn(segment.footer.previous_lsn_end.get());
            if timeline.end > Lsn(0) && before != timeline.end {
                // A segment is missing: nothing resolves until everything was read again.
                hole = true;
                full_copy = false; // A copy that is under way lacks what was in it.
                let since = timeline
                    .records
                    .last()
                    .map_or(WallTime(0), |record| record.1);
                open.get_or_insert((timeline.end, since, SpanKind::Verify));
            }
            timeline.end = Lsn(segment.footer.lsn_end.get());
            for entry in &segment.entries {
                let (lsn, time) = (Lsn(entry.lsn.get()), WallTime(entry.wall_time.get()));
                timeline.records.push((lsn, time));
                let event = || Event {
                    lsn,
                    time,
                    entry: *entry,
                    segment: segment.footer.sequence.get(),
                };
                match entry.kind() {
                    Ok(RecordKind::Point) => timeline.points.push(event()),
                    Ok(RecordKind::Gap) => timeline.gaps.push(event()),
                    Ok(RecordKind::SpanBegin) => {
                        // A new span takes over one that was never ended: from its beginning on nothing resolves.
                        let kind = SpanKind::from_code(entry.detail).unwrap_or(SpanKind::Verify);
                        full_copy = matches!(kind, SpanKind::BaseCopy | SpanKind::Verify);
                        open = Some(
                            open.map_or((lsn, time, kind), |(from, since, _)| (from, since, kind)),
                        );
                    }
                    // Only a full copy makes up for a missing segment.
                    Ok(RecordKind::SpanEnd) if hole && !full_copy => {}
                    Ok(RecordKind::SpanEnd) => {
                        hole = false;
                        if let Some((from, from_time, kind)) = open.take() {
                            timeline.closed.push(Closed {
                                from,
                                to: lsn,
                                from_time,
                                to_time: time,
                                kind,
                                open: false,
                            });
                        }
                    }
                    _ => {}
                }
            }
        }
        timeline.hole = hole;
        if let Some((from, from_time, kind)) = open {
            let to_time = timeline.records.last().map_or(from_time, |record| record.1);
            timeline.closed.push(Closed {
                from,
                to: timeline.end,
                from_time,
                to_time,
                kind,
                open: true,
            });
        }
        timeline
    }

    /// Intervals in which nothing resolves, oldest first; the first is the base copy.
    #[must_use]
    pub fn closed(&self) -> &[Closed] {
        &self.closed
    }

    /// Whether only a full copy can make it whole again: a segment is missing, or its beginning is not there.
    #[must_use]
    pub fn is_incomplete(&self) -> bool {
        self.hole || (self.end > Lsn(0) && self.closed.is_empty())
    }

    /// LSN after the last record.
    #[must_use]
    pub fn end(&self) -> Lsn {
        self.end
    }

    /// First LSN that resolves.
    #[must_use]
    pub fn first(&self) -> Option<Lsn> {
        self.closed
            .first()
            .filter(|closed| !closed.open)
            .map(|closed| closed.to.plus(1))
    }

    /// Last LSN that resolves.
    #[must_use]
    pub fn last(&self) -> Option<Lsn> {
        self.first()?;
        Some(
            self.closed
                .last()
                .filter(|closed| closed.open)
                .map_or(self.end, |closed| closed.from),
        )
    }

    /// Number of records.
    #[must_use]
    pub fn records(&self) -> u64 {
        self.records.len() as u64
    }

    /// Time of the last record below `lsn`.
    #[must_use]
    pub fn time_of(&self, lsn: Lsn) -> WallTime {
        let index = self.records.partition_point(|record| record.0 < lsn);
        index
            .checked_sub(1)
            .and_then(|i| self.records.get(i))
            .or_else(|| self.records.first())
            .map_or(WallTime(0), |record| record.1)
    }

    /// The LSN whose image holds every record up to `time`.
    #[must_use]
    pub fn at_time(&self, time: WallTime) -> Lsn {
        // Times never run backwards within an epoch; where the clock was set back between two, the later record counts.
        let index = self.records.iter().rposition(|record| record.1 <= time);
        index.map_or(Lsn(0), |i| self.records[i].0.plus(1))
    }

    /// Whether single writes are missing at `time`: the gap around it, with the nearest instants on both sides.
    #[must_use]
    pub fn gap_at(&self, time: WallTime) -> Option<Nearest> {
        let since = |gap: &Event| WallTime(gap.entry.offset.get() as i64);
        let gap = self
            .gaps
            .iter()
            .find(|gap| since(gap) < time && time < gap.time)?;
        let before = self.at_time(since(gap));
        let after = self
            .closed
            .iter()
            .find(|closed| closed.to > gap.lsn && !closed.open)
            .map_or(gap.lsn.plus(1), |closed| closed.to.plus(1));
        let with_time = |lsn: Lsn| (lsn, self.time_of(lsn));
        Some(Nearest {
            before: self.check(before).is_ok().then(|| with_time(before)),
            after: self.check(after).is_ok().then(|| with_time(after)),
            reason: None,
        })
    }

    /// Whether `lsn` resolves; if not, what does.
    pub fn check(&self, lsn: Lsn) -> Result<Lsn, Nearest> {
        let with_time = |lsn: Lsn| (lsn, self.time_of(lsn));
        let (Some(first), Some(last)) = (self.first(), self.last()) else {
            return Err(Nearest {
                before: None,
                after: None,
                reason: self.closed.first().map(|closed| closed.kind),
            });
        };
        if lsn < first {
            return Err(Nearest {
                before: None,
                after: Some(with_time(first)),
                reason: None,
            });
        }
        if lsn > self.end {
            return Err(Nearest {
                before: Some(with_time(last)),
                after: None,
                reason: None,
            });
        }
        match self
            .closed
            .iter()
            .find(|closed| closed.from < lsn && lsn <= closed.to)
        {
            Some(closed) => Err(Nearest {
                before: (closed.from >= first).then(|| with_time(closed.from)),
                after: (!closed.open).then(|| with_time(closed.to.plus(1))),
                reason: Some(closed.kind),
            }),
            None => Ok(lsn),
        }
    }
}
