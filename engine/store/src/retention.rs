//! Which instants a policy keeps. A plan is made without the store's lock, from what the runs say of time; taking it into use strikes what it does not
//! name from the list, and pruning (`prune`) then frees what only that needed.
//!
//! Below the list's limit a plan can only choose among what is listed: what is gone stays gone, whatever the policy says later. Images that are open,
//! pins and what the immutable window covers are never struck.

use crate::kept::KeptInstants;
use crate::ladder::{Ladder, Nanoseconds};
use crate::volume::Segments;
use crate::{StoreError, StoredSegment, Timeline, VolumeStore};
use std::collections::BTreeMap;
use std::sync::Arc;
use varve_format::{KeptEntry, Lsn, PointDetail, RecordKind, RunEntry, SpanKind, WallTime};

/// A record that seems so much older than the store's clock said when it was taken was recorded while the machine's clock was wrong.
const WRONG_CLOCK_NS: Nanoseconds = 86_400_000_000_000;

/// Without rungs the limit moves in steps of this: each step looks at everything below it.
const STEP_WITHOUT_RUNGS: Nanoseconds = 3_600_000_000_000;

/// What is to be kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// How much of the past.
    pub ladder: Ladder,
    /// What is younger is never pruned, whatever the ladder says.
    pub immutable: Nanoseconds,
}

/// A plan to be made. It needs no lock of the store.
pub struct RetentionJob {
    segments: Segments,
    /// Where segments end, and when the store took them, in order.
    taken: Vec<(Lsn, WallTime)>,
    timeline: Timeline,
    policy: Policy,
    now: WallTime,
    machine: WallTime,
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
        self.plan_by(policy, now, now)
    }

    /// The same where the machine's clock, whose time records carry, may say otherwise: if the store's is ahead of it, they are no older for that.
    #[must_use]
    pub fn plan_by(&self, policy: &Policy, now: WallTime, machine: WallTime) -> RetentionJob {
        let taken = |segment: &StoredSegment| (segment.lsn_end, segment.stored_at);
        RetentionJob {
            segments: self.shared_segments(),
            taken: self.segments().map(taken).collect(),
            timeline: self.timeline().clone(),
            policy: policy.clone(),
            now,
            machine: machine.min(now),
            _lease: self.lease(),
        }
    }

    /// Takes a plan into use, durably. Says whether anything changed.
    pub fn keep(&mut self, plan: &Plan) -> Result<bool, StoreError> {
        self.take_list(plan.kept.clone())
    }

    /// Puts a list into the place of the one that is there, but for what must stay.
    pub(crate) fn take_list(&mut self, mut kept: KeptInstants) -> Result<bool, StoreError> {
        if self.kept_is_lost {
            return Err(StoreError::KeptLost(self.directory().join("kept")));
        }
        let old = Arc::clone(self.kept());
        // Only what still resolves; and what came since the plan was made: pins, and images that were opened.
        kept.entries
            .retain(|entry| self.timeline().check(entry.lsn()).is_ok());
        for entry in &mut kept.entries {
            let pinned = old.get(entry.lsn()).is_some_and(KeptEntry::is_pinned);
            *entry = KeptEntry::new(entry.lsn(), entry.time(), pinned);
        }
        let pins = old.entries.iter().filter(|entry| entry.is_pinned());
        let mut must: Vec<KeptEntry> = pins.copied().collect();
        for lsn in self.needed_instants() {
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

    /// Instants that are in use: images are open at them, or a rewind that was interrupted goes on to them, or is taken back to them.
    pub(crate) fn needed_instants(&self) -> Vec<Lsn> {
        let mut needed = self.open_instants();
        if let Some(target) = self.rewind_target() {
            needed.push(target);
            // What it is taken back to, if it cannot be finished.
            needed.extend(self.timeline().closed().last().map(|span| span.from));
        }
        needed
    }

    /// Where the rewind goes that has not ended.
    #[must_use]
    pub fn rewind_target(&self) -> Option<Lsn> {
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

/// The step that an instant of this time belongs to: the newest instant of a step is the one that is kept.
fn bucket(time: i64, step: Nanoseconds) -> i64 {
    time.saturating_add(step - 1).div_euclid(step)
}

impl RetentionJob {
    /// Makes it. None: nothing would be pruned.
    ///
    /// Records' times are the machine's, whose clock may be wrong, for a moment or for long. So nothing here looks instants up by their time: the limit
    /// goes by when the store took a segment, and a rung keeps the last instant of each run of instants that belong to one step, in the order of the
    /// LSN. Where a clock jumps, that is one more.
    pub fn run(&self) -> Result<Option<Plan>, StoreError> {
        let ladder = &self.policy.ladder;
        let Some(all) = ladder.all else {
            return Ok(None);
        };
        let old = self.timeline.kept();
        let now = self.now.0;
        let step = ladder
            .rungs
            .first()
            .map_or(STEP_WITHOUT_RUNGS.min(all), |rung| rung.step);
        let young = floor(now.saturating_sub(all.max(self.policy.immutable)), step);
        let (below, below_time) = match limit_behind(&self.segments, &self.timeline, |segment| {
            // By when the store took it, whatever its records say.
            segment.stored_at.0 <= young
        }) {
            Some((lsn, time)) if lsn > old.below => {
                // Between the last limit and what is young, whatever a record says: times are compared with it.
                let most = young.max(old.below_time.0);
                (lsn, WallTime(time.0.clamp(old.below_time.0, most)))
            }
            _ => (old.below, old.below_time),
        };
        if below == Lsn(0) {
            return Ok(None);
        }
        let mut found: BTreeMap<Lsn, KeptEntry> = BTreeMap::new();
        let mut by_rung = vec![0; ladder.rungs.len()];
        let mut last: Option<((usize, i64), KeptEntry)> = None;
        let mut keep = |(rung, _): (usize, i64), entry: KeptEntry| {
            by_rung[rung] += 1;
            found.insert(entry.lsn(), entry);
        };
        for entry in self.candidates(below, step)? {
            let Some(place) = self.place(entry.lsn(), entry.time()) else {
                continue;
            };
            if let Some((before, kept)) = last.replace((place, entry))
                && before != place
            {
                keep(before, kept);
            }
        }
        if let Some((place, kept)) = last {
            keep(place, kept);
        }
        // A policy that keeps more than the last one does not lose what is left.
        for entry in &old.entries {
            if entry.lsn() < below && entry.time().0 > young {
                found.entry(entry.lsn()).or_insert(*entry);
            }
        }
        // Points live as long as the last rung; of those that were made by themselves, one of each step does.
        let oldest = ladder.rungs.last().map_or(all, |rung| rung.age);
        let without_points = found.len();
        let mut automatic: Option<((usize, i64), u8, KeptEntry)> = None;
        for point in &self.timeline.points {
            if point.lsn >= below
                || self.ages_by(point.lsn, point.time).0 <= self.machine.0.saturating_sub(oldest)
                || self.timeline.check(point.lsn).is_err()
            {
                continue;
            }
            let mut keep = |entry: KeptEntry| {
                found.entry(entry.lsn()).or_insert(entry);
            };
            let entry = KeptEntry::new(point.lsn, point.time, false);
            if point.entry.detail & PointDetail::AUTOMATIC == 0 {
                keep(entry);
            } else if let Some(place) = self.place(point.lsn, point.time) {
                // The best of a step: applications were told, file systems are clean; of equals the last one.
                let worth =
                    point.entry.detail & (PointDetail::APPLICATION | PointDetail::FILE_SYSTEM);
                match &mut automatic {
                    Some((at, best, kept)) if *at == place => {
                        if worth >= *best {
                            (*best, *kept) = (worth, entry);
                        }
                    }
                    other => {
                        if let Some((_, _, kept)) = other.replace((place, worth, entry)) {
                            keep(kept);
                        }
                    }
                }
            }
        }
        if let Some((_, _, kept)) = automatic {
            found.entry(kept.lsn()).or_insert(kept);
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

    /// Instants below `below` that may be kept, in order: what is listed, and behind the last limit the last one of each `step`.
    fn candidates(&self, below: Lsn, step: Nanoseconds) -> Result<Vec<KeptEntry>, StoreError> {
        let old = self.timeline.kept();
        let listed = old.entries.iter().filter(|entry| entry.lsn() < old.below);
        let mut candidates: Vec<KeptEntry> = listed.copied().collect();
        let mut push = |lsn: Lsn, time: WallTime| {
            if lsn >= old.below && lsn < below && self.timeline.check(lsn).is_ok() {
                candidates.push(KeptEntry::new(lsn, time, false));
            }
        };
        if old.below > Lsn(0) && old.below < below {
            push(old.below, old.below_time);
        }
        let mut before: Option<WallTime> = None;
        for segment in self.segments.values() {
            if segment.lsn_end <= old.below || segment.lsn_start >= below {
                continue;
            }
            // A segment of which nothing can be read has no instants to choose from; it holds up nothing.
            let entries = match segment.entries() {
                Err(StoreError::Damaged(..)) => continue,
                entries => entries?,
            };
            for entry in entries {
                if let Some(time) = before
                    && bucket(time.0, step) != bucket(entry.wall_time.get(), step)
                {
                    push(entry.lsn(), time);
                }
                before = Some(entry.time());
            }
        }
        Ok(candidates)
    }

    /// The time that an instant ages by: its record's, unless the machine's clock was far behind the store's then. Nothing goes because a clock was set back.
    fn ages_by(&self, lsn: Lsn, time: WallTime) -> WallTime {
        // The store's clock may be ahead of the machine's, which ages are told by.
        let ahead = self.now.0.saturating_sub(self.machine.0);
        // Numbers of segments and LSNs grow together; an instant is the end of the record before it.
        let index = self.taken.partition_point(|(end, _)| *end < lsn);
        let stored_at = self
            .taken
            .get(index)
            .map_or(time.0, |(_, stored_at)| stored_at.0.saturating_sub(ahead));
        match stored_at.saturating_sub(time.0) > WRONG_CLOCK_NS {
            true => WallTime(stored_at),
            false => time,
        }
    }

    /// The rung and the step of it that an instant belongs to; none: it is too old for all of them.
    fn place(&self, lsn: Lsn, time: WallTime) -> Option<(usize, i64)> {
        let age = self.ages_by(lsn, time);
        let rungs = &self.policy.ladder.rungs;
        let now = self.machine.0;
        let rung = rungs.iter().enumerate().position(|(index, rung)| {
            // Where the next rung takes over, in whole steps of that: then a segment is not written anew for each instant that goes.
            let next = rungs.get(index + 1).map_or(rung.step, |next| next.step);
            age.0 > floor(now.saturating_sub(rung.age), next)
        })?;
        Some((rung, bucket(time.0, rungs[rung].step)))
    }
}

/// The first LSN behind the first segments that are `old`, or of the span around it; and the time of the last record before it.
pub(crate) fn limit_behind(
    segments: &Segments,
    timeline: &Timeline,
    old: impl Fn(&StoredSegment) -> bool,
) -> Option<(Lsn, WallTime)> {
    let mut limit = None;
    for segment in segments.values() {
        if !old(segment) {
            break;
        }
        let before = limit.map_or(segment.time_start, |(_, time)| time);
        let told = segment.entry_count > 0;
        limit = Some((
            segment.lsn_end,
            if told { segment.time_end } else { before },
        ));
    }
    let (lsn, time) = limit?;
    match timeline.check(lsn) {
        Ok(lsn) => Some((lsn, time)),
        Err(outside) => {
            let spans = timeline.closed().iter();
            let span = spans.rev().find(|span| Some(span.from) == outside.before)?;
            let resolves = timeline.check(span.from).is_ok();
            resolves.then_some((span.from, span.from_time))
        }
    }
}
