//! Bypass and healing: what happens when the log does not answer.
//!
//!   protected ──log late or failed──▶ bypass (mark) ──mark durable──▶ bypass ──new epoch durable──▶ healing ──all copied──▶ protected
//!
//! Crash scenarios (power cut):
//! * Before the mark is durable: no write has bypassed the log; the log's open set covers all that had started.
//! * In bypass: the state file says so; the bitmap is gone; everything is read again (`unverified`).
//! * The new epoch is durable, the state file still says bypass: everything is read again. More than needed, never less.
//! * The state file speaks for the new epoch, the exact checkpoint is not yet durable: the epoch's first checkpoint said "copy everything".
//! * The mark cannot be written either: production goes on, the volume is `unverified` from then on, and healing reads everything again. A power cut in
//!   this double fault is the one case that leaves no trace on any disk; it is reported while it lasts.
//! * The log is another one than the history's (`go_on_above`): as above, and everything is compared. Before the new epoch is durable the old log is found again,
//!   and with it that it is another one.

use crate::config::Rules;
use crate::state_file::StateWord;
use crate::volume::{Phase, Volume};
use varve_format::{
    Checkpoint, EpochId, Fingerprint, Hash128, Lsn, Record, RecordKind, SegmentSequence, SpanKind,
    StateKind, VolumeState, WallTime,
};
use varve_log::{IoError, Medium, SegmentOpening};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stage {
    /// Not in bypass.
    Normal,
    /// The bypass mark is being written (since).
    Marking(u64),
    /// Writes go past the log; the next attempt to heal is due at this time.
    Bypassed(u64),
    /// A new epoch has been begun (at this time); its span begins at the LSN. Writes still go past the log.
    Probing(u64, Lsn),
    /// The new epoch is durable; the state file is being told.
    Telling,
}

/// The way into bypass and out of it.
pub struct Healer {
    stage: Stage,
    pause_ns: u64,
    /// The mark could not be written: what changed is only known to this process.
    pub(crate) unmarked: bool,
    pub(crate) gap_since: WallTime,
    pub(crate) reason: Option<IoError>,
    /// The abandoned epoch.
    pub(crate) old: OldEpoch,
}

/// Where an abandoned epoch ends: what the next one's first header says of it. Probes that fail reuse the same place in the ring.
#[derive(Clone, Copy, Debug)]
pub(crate) struct OldEpoch {
    pub sequence: SegmentSequence,
    pub epoch: EpochId,
    /// Its records count as history below this LSN.
    pub durable: Lsn,
    /// Its records were numbered up to here.
    pub next: Lsn,
    pub bytes: u64,
    pub hash: Hash128,
    pub oldest_held: SegmentSequence,
}

impl Healer {
    /// Not in bypass.
    #[must_use]
    pub fn new(pause_ns: u64) -> Healer {
        Healer {
            stage: Stage::Normal,
            pause_ns,
            unmarked: false,
            gap_since: WallTime(0),
            reason: None,
            old: OldEpoch {
                sequence: SegmentSequence(0),
                epoch: EpochId([0; 16]),
                durable: Lsn(0),
                next: Lsn(0),
                bytes: 0,
                hash: Hash128::default(),
                oldest_held: SegmentSequence(0),
            },
        }
    }

    /// Begins life in bypass: the log could not be used at the start.
    pub(crate) fn start_bypassed(
        &mut self,
        old: OldEpoch,
        reason: IoError,
        since: WallTime,
        now_ns: u64,
    ) {
        self.old = old;
        self.reason = Some(reason);
        self.gap_since = since;
        self.unmarked = true;
        self.stage = Stage::Bypassed(now_ns + self.pause_ns);
    }

    /// Whether writes may go past the log: the mark is durable, or could not be made.
    #[must_use]
    pub fn may_bypass(&self) -> bool {
        !matches!(self.stage, Stage::Normal | Stage::Marking(_))
    }

    pub(crate) fn is_unsafe(&self) -> bool {
        self.stage != Stage::Normal
    }
}

impl<R: Rules> Volume<R> {
    /// Looks at the clock: enters bypass when the log is late or broken, heals when it may be back.
    pub(crate) fn watch(&mut self, medium: &mut dyn Medium) {
        let now = medium.now().monotonic_ns;
        match self.healer.stage {
            Stage::Normal => {
                if let Some(error) = self.writer.failure() {
                    self.enter_bypass(medium, error);
                } else if self
                    .waits_for_log_since()
                    .is_some_and(|since| now.saturating_sub(since) >= self.config.log_wait_max_ns)
                {
                    self.enter_bypass(medium, IoError(libc::ETIMEDOUT));
                }
            }
            Stage::Marking(since) => {
                if now.saturating_sub(since) >= self.config.log_wait_max_ns {
                    self.healer.unmarked = true;
                    self.healer.stage = Stage::Bypassed(now + self.healer.pause_ns);
                }
            }
            Stage::Bypassed(due) => {
                let place = self
                    .writer
                    .has_place(SegmentSequence(self.healer.old.sequence.0 + 1));
                if now >= due
                    && place
                    && self.writer.is_quiet()
                    && !self.state_file.is_busy()
                    && !self.has_gated()
                {
                    self.begin_probe(medium, now);
                }
            }
            Stage::Probing(since, span_begin) => {
                if self.writer.failure().is_some()
                    || now.saturating_sub(since) >= self.config.log_wait_max_ns
                {
                    self.writer.poison(IoError(libc::ETIMEDOUT));
                    self.pause_longer(now);
                } else if self.writer.durable_lsn() > span_begin {
                    self.healer.stage = Stage::Telling;
                    let word = self.word(StateKind::LogSpeaks);
                    self.state_file.write(medium, &word);
                }
            }
            // The answer comes through `complete_state`. Whatever happens until then, the new epoch's checkpoint says "copy everything".
            Stage::Telling => {}
        }
    }

    fn pause_longer(&mut self, now: u64) {
        self.healer.pause_ns = (self.healer.pause_ns * 2).min(self.config.heal_interval_ns * 30);
        self.healer.stage = Stage::Bypassed(now + self.healer.pause_ns);
    }

    fn has_gated(&self) -> bool {
        self.table
            .iter()
            .any(|active| active.logged && matches!(active.phase, Phase::Gated(_) | Phase::Origin))
    }

    /// Since when the request that has waited longest has waited for the log.
    fn waits_for_log_since(&self) -> Option<u64> {
        let durable = self.writer.durable_lsn();
        // A write that waits for room waits for the log only if the log itself makes no progress (a slow origin holds room, too).
        let starved = self
            .writer
            .stuck_since()
            .filter(|_| !self.pending.is_empty());
        self.table
            .iter()
            .filter(|active| match active.phase {
                Phase::Gated(gate) => gate > durable,
                Phase::Durable { log, .. } => log > durable,
                Phase::Pending | Phase::Origin | Phase::Free => false,
            })
            .map(|active| active.since_ns)
            .chain(starved)
            .min()
    }

    pub(crate) fn word(&self, kind: StateKind) -> StateWord {
        StateWord {
            kind,
            epoch: self.writer.epoch(),
            start: self.epoch_start,
            fingerprint: Fingerprint::default(),
        }
    }

    fn mark(&mut self, medium: &mut dyn Medium, now: u64) {
        self.healer.stage = Stage::Marking(now);
        let word = self.word(StateKind::Bypass);
        self.state_file.write(medium, &word);
    }

    fn enter_bypass(&mut self, medium: &mut dyn Medium, error: IoError) {
        let now = medium.now().monotonic_ns;
        self.counters.bypasses += 1;
        self.writer.poison(error);
        self.state = VolumeState::Bypass;
        self.doubt_again();
        self.healer.reason = Some(error);
        self.healer.gap_since = self.last_record_time;
        let durable = self.writer.durable_lsn();
        let status = self.writer.status();
        let (bytes, hash) = self.writer.tail();
        self.healer.old = OldEpoch {
            sequence: status.sequence,
            epoch: self.writer.epoch(),
            durable,
            next: self.writer.next_lsn(),
            bytes,
            hash,
            oldest_held: self.writer.oldest_held(),
        };
        // Whatever the log does not durably hold is marked, by whole regions: it over-reports.
        let lost: Vec<(u64, u64)> = self.regions.touched_since(durable).collect();
        for (offset, length) in lost {
            self.bitmap
                .set(offset, length.min(self.config.volume_bytes - offset));
        }
        if self.span_end.is_some_and(|end| end >= durable) {
            self.span_end = None;
        }
        if self.state_file.is_busy() {
            self.healer.unmarked = true;
            self.healer.stage = Stage::Bypassed(now + self.healer.pause_ns);
        } else {
            self.mark(medium, now);
        }
    }

    /// The history ends behind this log, at `end`: the log was put back to an older state, or is new. A bypass that is as short as can be: a new epoch begins
    /// behind the history, what this log holds is given up, and the device is compared. The gap begins where the history ends, at `since`. False: not now.
    pub fn go_on_above(
        &mut self,
        medium: &mut dyn Medium,
        end: (SegmentSequence, Lsn),
        since: WallTime,
    ) -> bool {
        if !self.is_logging() || self.healer.stage != Stage::Normal {
            return false;
        }
        self.enter_bypass(medium, IoError(libc::ESTALE));
        let old = self.healer.old;
        let (sequence, next) = (old.sequence.max(end.0), old.next.max(end.1));
        let oldest_held = SegmentSequence(sequence.0 + 1);
        self.healer.old = OldEpoch {
            sequence,
            durable: end.1,
            next,
            bytes: 0,
            hash: Hash128::default(),
            oldest_held,
            ..old
        };
        self.writer.stand_by(old.epoch, sequence, oldest_held, next);
        self.healer.gap_since = since;
        // What the device and the history differ in is not known: also to a daemon that takes over before this is over.
        self.healer.unmarked = true;
        self.bitmap.set(0, self.config.volume_bytes);
        true
    }

    pub(crate) fn complete_state(&mut self, medium: &mut dyn Medium, result: Result<(), IoError>) {
        let now = medium.now().monotonic_ns;
        match (self.healer.stage, result) {
            (Stage::Marking(_), outcome) => {
                self.healer.unmarked |= outcome.is_err();
                self.healer.stage = Stage::Bypassed(now + self.healer.pause_ns);
            }
            (Stage::Telling, Ok(())) if self.writer.failure().is_none() => self.healed(medium),
            (Stage::Telling, _) => {
                self.writer.poison(IoError::EIO);
                self.pause_longer(now);
            }
            // A late answer to a mark that was given up.
            _ => {}
        }
    }

    /// Begins a new epoch in a new segment and sees whether it becomes durable in time.
    fn begin_probe(&mut self, medium: &mut dyn Medium, now: u64) {
        let old = self.healer.old;
        let sequence = SegmentSequence(old.sequence.0 + 1);
        // Numbers that a failed probe used are not used again.
        let lsn_start = old.next.max(self.writer.next_lsn());
        let opening = SegmentOpening {
            epoch: EpochId(medium.random_id()),
            parent_epoch: old.epoch,
            sequence,
            lsn_start,
            previous_lsn_end: old.durable,
            previous_bytes: old.bytes,
            previous_hash: old.hash,
        };
        // A rewind stays one: its end is known only to whoever writes it.
        let (kind, argument) = match self.span {
            Some((SpanKind::Rewind, _, target)) => (SpanKind::Rewind, target),
            _ if self.healer.unmarked => (SpanKind::Verify, 0),
            _ => (SpanKind::CatchUp, 0),
        };
        let checkpoint = Checkpoint {
            stable_lsn: lsn_start,
            span: Some((kind, lsn_start, argument)),
            copy_cursor: 0,
            state: VolumeState::Healing,
            regions: Vec::new(),
        };
        self.writer.begin_epoch(
            medium,
            opening,
            old.oldest_held.max(self.writer.oldest_held()),
            &checkpoint,
        );
        self.epoch_start = (lsn_start, sequence);
        self.append(medium, Record::new(RecordKind::Epoch, 0, 0, 0), &[]);
        let gap = Record::new(RecordKind::Gap, 0, 0, self.healer.gap_since.0 as u64);
        self.append(medium, gap, &[]);
        let record = Record::new(RecordKind::SpanBegin, 0, 0, argument).with_detail(kind as u8);
        let (begin, _) = self.append(medium, record, &[]);
        self.span = Some((kind, begin, argument));
        self.span_end = None;
        self.writer.want_durable(begin.plus(1));
        self.healer.stage = Stage::Probing(now, begin);
        self.writer.pump(medium);
    }

    /// The new epoch and the state file are durable: writes are recorded again, and what bypassed the log is copied.
    fn healed(&mut self, medium: &mut dyn Medium) {
        self.healer.stage = Stage::Normal;
        self.healer.pause_ns = self.config.heal_interval_ns;
        self.healer.reason = None;
        self.surviving.claim(self.writer.epoch());
        if self.healer.unmarked {
            self.bitmap.set(0, self.config.volume_bytes);
            self.healer.unmarked = false;
        }
        self.state = match self.span {
            Some((SpanKind::Verify, ..)) => VolumeState::Unverified,
            Some((SpanKind::Rewind, ..)) => VolumeState::Rewinding,
            _ => VolumeState::Healing,
        };
        self.ask_for_verification(medium.now().monotonic_ns);
        // Regions that the old epoch left open stay open: the origin may still lose writes that only the old epoch's records tell of.
        let stable = self.flusher.flushed();
        self.append_checkpoint(medium, stable);
        self.writer.want_durable(self.writer.next_lsn());
    }
}
