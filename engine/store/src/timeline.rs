//! When: which instants resolve, where history has no single writes, what the points are called.
//!
//! L resolves if a span has ended below it and none is open at it. A span that an epoch leaves open stays open in the next one.

use crate::StoredSegment;
use crate::kept::KeptInstants;
use std::sync::Arc;
use varve_format::{Lsn, PointDetail, RecordKind, RunEntry, SegmentSequence, SpanKind, WallTime};

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
    pub segment: SegmentSequence,
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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outside {
    /// Before.
    pub before: Option<Lsn>,
    /// After.
    pub after: Option<Lsn>,
    /// Why not.
    pub reason: Option<SpanKind>,
    /// It did once: retention has pruned it.
    pub pruned: bool,
}

/// The same with times.
#[derive(Clone, Copy, Debug)]
pub struct Nearest {
    /// Before, with its time.
    pub before: Option<(Lsn, WallTime)>,
    /// After, with its time.
    pub after: Option<(Lsn, WallTime)>,
    /// Why not.
    pub reason: Option<SpanKind>,
    /// It did once: retention has pruned it.
    pub pruned: bool,
}

/// A volume's time. It grows by a segment at the cost of that segment's events.
#[derive(Clone, Debug, Default)]
pub struct Timeline {
    closed: Vec<Closed>,
    /// Recovery points, oldest first.
    pub points: Vec<Event>,
    /// Gaps, oldest first.
    pub gaps: Vec<Event>,
    end: Lsn,
    end_time: WallTime,
    records: u64,
    /// A span that has not ended.
    open: Option<(Lsn, WallTime, SpanKind)>,
    /// The newest span copies everything.
    full_copy: bool,
    /// A segment is missing, and no full copy has made up for it since.
    hole: bool,
    /// What retention has left.
    kept: Arc<KeptInstants>,
}

impl Timeline {
    /// Reads the time of all segments, oldest first.
    #[must_use]
    pub fn of<'a>(segments: impl Iterator<Item = &'a StoredSegment>) -> Timeline {
        let mut timeline = Timeline::default();
        segments.for_each(|segment| timeline.add(segment));
        timeline
    }

    /// What retention has left now. An automatic point that it has struck is none any more: with one a second they would fill memory.
    pub(crate) fn set_kept(&mut self, kept: Arc<KeptInstants>) {
        self.points.retain(|point| {
            point.entry.detail & PointDetail::AUTOMATIC == 0 || kept.resolves(point.lsn)
        });
        self.kept = kept;
    }

    /// Goes on with the next segment.
    pub fn add(&mut self, segment: &StoredSegment) {
        if self.open.is_some() {
            self.closed.pop(); // As far as it was known until now.
        }
        let end = self.end.max(Lsn::FIRST);
        if segment.previous_lsn_end != end {
            // A segment is missing: nothing resolves until everything was read again.
            self.hole = true;
            self.full_copy = false; // A copy that is under way lacks what was in it.
            let since = (self.end, self.end_time, SpanKind::Verify);
            self.open.get_or_insert(since);
        }
        if segment.lsn_start > end && self.open.is_none() {
            // Records were given up before it: up to where a copy makes up for them nothing resolves, least of all their own numbers.
            let begins = |entry: &RunEntry| entry.kind == RecordKind::SpanBegin as u8;
            if segment.events.iter().any(begins) {
                self.open = Some((self.end, self.end_time, SpanKind::Verify));
            } else {
                self.closed.push(Closed {
                    from: self.end,
                    to: segment.lsn_start,
                    from_time: self.end_time,
                    to_time: segment.time_start,
                    kind: SpanKind::Verify,
                    open: false,
                });
            }
        }
        for entry in segment.events.iter() {
            self.event(segment, entry);
        }
        self.end = segment.lsn_end;
        self.records += segment.entry_count;
        if segment.entry_count > 0 {
            self.end_time = segment.time_end;
        }
        if let Some((from, from_time, kind)) = self.open {
            self.closed.push(Closed {
                from,
                to: self.end,
                from_time,
                to_time: self.end_time,
                kind,
                open: true,
            });
        }
    }

    fn event(&mut self, segment: &StoredSegment, entry: &RunEntry) {
        let (lsn, time) = (entry.lsn(), entry.time());
        let event = || Event {
            lsn,
            time,
            entry: *entry,
            segment: segment.sequence,
        };
        match entry.kind() {
            Ok(RecordKind::Point) => self.points.push(event()),
            Ok(RecordKind::Gap) => {
                // Records that were given up are missing, too: it begins behind the last one that is there.
                let mut gap = event();
                if self.end > Lsn(0) {
                    let since = (gap.entry.offset.get() as i64).min(self.end_time.0);
                    gap.entry.offset = (since as u64).into();
                }
                self.gaps.push(gap);
            }
            Ok(RecordKind::SpanBegin) => {
                // A new span takes over one that was never ended: from its beginning on nothing resolves.
                let kind = SpanKind::from_code(entry.detail).unwrap_or(SpanKind::Verify);
                self.full_copy = matches!(kind, SpanKind::BaseCopy | SpanKind::Verify);
                let (from, since) = self
                    .open
                    .map_or((lsn, time), |(from, since, _)| (from, since));
                self.open = Some((from, since, kind));
            }
            // Only a full copy makes up for a missing segment.
            Ok(RecordKind::SpanEnd) if self.hole && !self.full_copy => {}
            Ok(RecordKind::SpanEnd) => {
                self.hole = false;
                if let Some((from, from_time, kind)) = self.open.take() {
                    self.closed.push(Closed {
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
        let copied = self.closed.first().filter(|closed| !closed.open);
        let copied = copied.map(|closed| closed.to.plus(1))?;
        Some(self.kept.first().map_or(copied, |kept| kept.max(copied)))
    }

    /// What retention has left.
    #[must_use]
    pub fn kept(&self) -> &Arc<KeptInstants> {
        &self.kept
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
        self.records
    }

    /// Whether single writes are missing at `time`: since when, and the first LSN behind the gap.
    #[must_use]
    pub fn gap_at(&self, time: WallTime) -> Option<(WallTime, Lsn)> {
        let since = |gap: &Event| WallTime(gap.entry.offset.get() as i64);
        let gap = self
            .gaps
            .iter()
            .find(|gap| since(gap) < time && time < gap.time)?;
        let after = self
            .closed
            .iter()
            .find(|closed| closed.to > gap.lsn && !closed.open)
            .map_or(gap.lsn.plus(1), |closed| closed.to.plus(1));
        Some((since(gap), after))
    }

    /// Whether `lsn` resolves; if not, what does.
    pub fn check(&self, lsn: Lsn) -> Result<Lsn, Outside> {
        let outside = |before, after, reason| {
            Err(Outside {
                before,
                after,
                reason,
                pruned: false,
            })
        };
        let (Some(first), Some(last)) = (self.first(), self.last()) else {
            return outside(None, None, self.closed.first().map(|closed| closed.kind));
        };
        if lsn < first {
            return outside(None, Some(first), None).map_err(|outside: Outside| Outside {
                pruned: self.kept.first() == Some(first),
                ..outside
            });
        }
        if lsn > self.end {
            return outside(Some(last), None, None);
        }
        if !self.kept.resolves(lsn) {
            let (before, after) = self.kept.around(lsn);
            return outside(before, Some(after), None).map_err(|outside: Outside| Outside {
                pruned: true,
                ..outside
            });
        }
        match self
            .closed
            .iter()
            .find(|closed| closed.from < lsn && lsn <= closed.to)
        {
            Some(closed) => outside(
                (closed.from >= first).then_some(closed.from),
                (!closed.open).then(|| closed.to.plus(1)),
                Some(closed.kind),
            ),
            None => Ok(lsn),
        }
    }

    /// The instant that lies nearest to the middle of two, by records; none if there is none between them.
    #[must_use]
    pub fn middle(&self, after: Lsn, before: Lsn) -> Option<Lsn> {
        let between = |lsn: &Lsn| *lsn > after && *lsn < before;
        let middle = Lsn(after.0 + before.0.saturating_sub(after.0) / 2);
        // From one closed interval to the next, first towards the older end.
        let walk = |step: fn(Outside) -> Option<Lsn>| {
            let mut at = Some(middle).filter(between)?;
            loop {
                match self.check(at) {
                    Ok(lsn) => return Some(lsn),
                    Err(outside) => {
                        at = step(outside).filter(between).filter(|next| *next != at)?
                    }
                }
            }
        };
        walk(|outside| outside.before).or_else(|| walk(|outside| outside.after))
    }
}
