//! Which instants a policy keeps. A plan is made without the store's lock, from what the runs say of time; taking it into use strikes what it does not
//! name from the list, and pruning (`prune`) then frees what only that needed.
//!
//! Below the list's limit a plan can only choose among what is listed: what is gone stays gone, whatever the policy says later. Images that are open,
//! pins and what the immutable window covers are never struck.

use crate::kept::KeptInstants;
use crate::ladder::{Ladder, Nanoseconds};
use crate::volume::Segments;
use crate::{StoreError, Timeline, VolumeStore};
use std::collections::BTreeMap;
use std::sync::Arc;
use varve_format::{KeptEntry, Lsn, RecordKind, RunEntry, SegmentSequence, SpanKind, WallTime};

/// Without rungs the limit moves in steps of this: each step looks at everything below it.
const STEP_WITHOUT_RUNGS: Nanoseconds = 3_600_000_000_000;

/// What is to be kept.
#[derive(Clone, Debug)]
pub struct Policy {
    /// How much of the past.
    pub ladder: Ladder,
    /// What is younger is never pruned, whatever the ladder says.
    pub immutable: Nanoseconds,
}

/// A plan to be made. It needs no lock of the store.
pub struct RetentionJob {
    segments: Segments,
    timeline: Timeline,
    policy: Policy,
    now: WallTime,
    _lease: Arc<()>,
}

/// What a policy keeps of a history.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The list as it would be.
    pub kept: KeptInstants,
    /// How many instants each rung keeps, the youngest first.
    pub by_rung: Vec<u64>,
    /// Recovery points that are kept besides.
    pub points: u64,
    /// Instants that are pinned.
    pub pinned: u64,
}

impl VolumeStore {
    /// A plan of what `policy` keeps at `now`, by the store's clock.
    #[must_use]
    pub fn plan(&self, policy: &Policy, now: WallTime) -> RetentionJob {
        RetentionJob {
            segments: self.shared_segments(),
            timeline: self.timeline().clone(),
            policy: policy.clone(),
            now,
            _lease: self.lease(),
        }
    }

    /// Takes a plan into use, durably. Says whether anything changed.
    pub fn keep(&mut self, plan: &Plan) -> Result<bool, StoreError> {
        let old = Arc::clone(self.kept());
        let mut kept = plan.kept.clone();
        // Only what still resolves; and what came since the plan was made: pins, and images that were opened.
        kept.entries
            .retain(|entry| self.timeline().check(entry.lsn()).is_ok());
        for entry in &mut kept.entries {
            let pinned = old.get(entry.lsn()).is_some_and(KeptEntry::is_pinned);
            *entry = KeptEntry::new(entry.lsn(), entry.time(), pinned);
        }
        let pins = old.entries.iter().filter(|entry| entry.is_pinned());
        let mut must: Vec<KeptEntry> = pins.copied().collect();
        // A rewind that was interrupted goes on to where it was going.
        let mut wanted = self.open_instants();
        wanted.extend(self.rewind_target());
        for lsn in wanted {
            let is_free = lsn < kept.below && kept.get(lsn).is_none();
            if is_free && self.timeline().check(lsn).is_ok() {
                must.push(KeptEntry::new(lsn, self.time_of(lsn)?, false));
            }
        }
        must.into_iter().for_each(|entry| kept.insert(entry));
        if kept.below < old.below || self.timeline().check(kept.below).is_err() {
            return Ok(false);
        }
        if kept.below == old.below && kept.entries == old.entries {
            return Ok(false);
        }
        self.set_kept(kept)?;
        Ok(true)
    }

    /// Where the rewind goes that has not ended.
    fn rewind_target(&self) -> Option<Lsn> {
        let closed = self.timeline().closed().last();
        closed.filter(|span| span.open && span.kind == SpanKind::Rewind)?;
        let begins = |entry: &&RunEntry| {
            entry.kind == RecordKind::SpanBegin as u8 && entry.detail == SpanKind::Rewind as u8
        };
        let mut segments = self.segments().rev();
        let begin = segments.find_map(|segment| segment.events.iter().rfind(begins).copied());
        begin.map(|begin| Lsn(begin.offset.get()))
    }

    /// Keeps an instant until it is unpinned.
    pub fn pin(&mut self, lsn: Lsn) -> Result<(), StoreError> {
        let time = self.time_of(lsn)?;
        let mut kept = (**self.kept()).clone();
        kept.insert(KeptEntry::new(lsn, time, true));
        self.set_kept(kept)
    }

    /// The policy decides about the instant again. Says whether it was pinned.
    pub fn unpin(&mut self, lsn: Lsn) -> Result<bool, StoreError> {
        let mut kept = (**self.kept()).clone();
        let Some(entry) = kept.get(lsn).copied().filter(KeptEntry::is_pinned) else {
            return Ok(false);
        };
        kept.insert(KeptEntry::new(lsn, entry.time(), false));
        self.set_kept(kept)?;
        Ok(true)
    }
}

impl KeptInstants {
    /// Adds an instant, or replaces it.
    fn insert(&mut self, entry: KeptEntry) {
        match self
            .entries
            .binary_search_by_key(&entry.lsn(), KeptEntry::lsn)
        {
            Ok(index) => self.entries[index] = entry,
            Err(index) => self.entries.insert(index, entry),
        }
    }
}

fn floor(time: i64, step: Nanoseconds) -> i64 {
    time.div_euclid(step).saturating_mul(step)
}

impl RetentionJob {
    /// Makes it. None: nothing would be pruned.
    pub fn run(&self) -> Result<Option<Plan>, StoreError> {
        let ladder = &self.policy.ladder;
        let Some(all) = ladder.all else {
            return Ok(None);
        };
        let old = &self.timeline.kept;
        let now = self.now.0;
        let youngest = now.saturating_sub(all.max(self.policy.immutable));
        let step = ladder
            .rungs
            .first()
            .map_or(STEP_WITHOUT_RUNGS.min(all), |rung| rung.step);
        let horizon = floor(youngest, step);
        let mut finder = Finder::new(&self.segments);
        let limit = self.resolving(&mut finder, WallTime(horizon))?;
        // Records' times are the machine's, whose clock may be wrong. What the store took since then is young, whatever they say.
        let limit = match self.first_young(WallTime(youngest)) {
            Some((bound, time)) if limit.is_some_and(|(lsn, _)| lsn > bound) => {
                let resolves = self.timeline.check(bound).is_ok();
                resolves.then_some((bound, time))
            }
            _ => limit,
        };
        let (below, below_time) = match limit.filter(|(lsn, _)| *lsn > old.below) {
            Some(found) => found,
            None => (old.below, old.below_time),
        };
        if below == Lsn(0) {
            return Ok(None);
        }
        let mut found: BTreeMap<Lsn, KeptEntry> = BTreeMap::new();
        let mut by_rung = Vec::new();
        let mut upper = horizon;
        for (index, rung) in ladder.rungs.iter().enumerate() {
            // Where the next rung takes over, in whole steps of that: then a segment is not written anew for each instant that goes.
            let next = ladder
                .rungs
                .get(index + 1)
                .map_or(rung.step, |next| next.step);
            let lower =
                floor(now.saturating_sub(rung.age), next).max(self.first_time().0 - rung.step);
            let mut count = 0;
            let mut time = floor(upper, rung.step);
            while time > lower {
                let entry = self.resolving(&mut finder, WallTime(time))?;
                if let Some((lsn, at)) = entry
                    && at.0 > time - rung.step
                    && lsn < below
                {
                    count += u64::from(found.insert(lsn, KeptEntry::new(lsn, at, false)).is_none());
                }
                let next = time - rung.step;
                // Nothing was written for a while: on to where something was; but not past the list, whose times are another clock's, perhaps.
                let listed = old.below_time.0;
                time = match entry {
                    Some((_, at)) if at.0 <= next => {
                        let there = floor(at.0 + rung.step - 1, rung.step).min(next);
                        match there < listed && listed <= next {
                            true => floor(listed, rung.step).min(next),
                            false => there,
                        }
                    }
                    Some(_) => next,
                    None => break,
                };
            }
            by_rung.push(count);
            upper = upper.min(lower);
        }
        // A policy that keeps more than the last one does not lose what is left.
        for entry in &old.entries {
            if entry.lsn() < below && entry.time().0 > horizon {
                found.entry(entry.lsn()).or_insert(*entry);
            }
        }
        // Points live as long as the last rung.
        let oldest = ladder.rungs.last().map_or(all, |rung| rung.age);
        let without_points = found.len();
        for point in &self.timeline.points {
            if point.lsn < below
                && point.time.0 > now.saturating_sub(oldest)
                && self.timeline.check(point.lsn).is_ok()
            {
                found
                    .entry(point.lsn)
                    .or_insert(KeptEntry::new(point.lsn, point.time, false));
            }
        }
        let points = (found.len() - without_points) as u64;
        let pins = old.entries.iter().filter(|entry| entry.is_pinned());
        found.extend(pins.clone().map(|entry| (entry.lsn(), *entry)));
        Ok(Some(Plan {
            pinned: pins.count() as u64,
            kept: KeptInstants {
                below,
                below_time,
                entries: found.into_values().collect(),
            },
            by_rung,
            points,
        }))
    }

    /// The beginning of what the store took after `time`; and the time of the last record before it.
    fn first_young(&self, time: WallTime) -> Option<(Lsn, WallTime)> {
        let mut before = WallTime(i64::MIN);
        for segment in self.segments.values() {
            if segment.stored_at > time {
                return Some((segment.lsn_start, before));
            }
            if segment.entry_count > 0 {
                before = segment.time_end;
            }
        }
        None
    }

    fn first_time(&self) -> WallTime {
        let first = self
            .segments
            .values()
            .find(|segment| segment.entry_count > 0);
        first.map_or(WallTime(0), |segment| segment.time_start)
    }

    /// The newest instant that resolves and is not newer than `time`; and the time of its last record.
    fn resolving(
        &self,
        finder: &mut Finder<'_>,
        time: WallTime,
    ) -> Result<Option<(Lsn, WallTime)>, StoreError> {
        let kept = &self.timeline.kept;
        if time < kept.below_time {
            return Ok(kept.at_time(time).map(|entry| (entry.lsn(), entry.time())));
        }
        let Some((lsn, at)) = finder.at(time)? else {
            return Ok(None);
        };
        match self.timeline.check(lsn) {
            Ok(lsn) => Ok(Some((lsn, at))),
            Err(outside) => {
                let span = self
                    .timeline
                    .closed()
                    .iter()
                    .find(|c| Some(c.from) == outside.before);
                Ok(span.map(|span| (span.from, span.from_time)))
            }
        }
    }
}

/// Looks times up; those of one segment read its run once.
struct Finder<'a> {
    segments: &'a Segments,
    last: Option<(SegmentSequence, Vec<RunEntry>)>,
}

impl<'a> Finder<'a> {
    fn new(segments: &'a Segments) -> Finder<'a> {
        Finder {
            segments,
            last: None,
        }
    }

    /// The LSN behind the last record that is not newer than `time`, and that record's time.
    fn at(&mut self, time: WallTime) -> Result<Option<(Lsn, WallTime)>, StoreError> {
        let newest = self
            .segments
            .values()
            .rev()
            .find(|segment| segment.entry_count > 0 && segment.time_start <= time);
        let Some(segment) = newest else {
            return Ok(None);
        };
        if segment.time_end <= time {
            return Ok(Some((segment.lsn_end, segment.time_end)));
        }
        let known = self.last.take().filter(|(s, _)| *s == segment.sequence);
        let entries = match known {
            Some((_, entries)) => entries,
            None => segment.entries()?,
        };
        let last = entries.iter().rev().find(|entry| entry.time() <= time);
        let found = last.map_or((segment.lsn_start, segment.time_start), |entry| {
            (entry.lsn().plus(1), entry.time())
        });
        self.last = Some((segment.sequence, entries));
        Ok(Some(found))
    }
}
