//! Starting a volume: its plan (`plan.rs`) is carried out in a new epoch of the log.
//!
//! Crash scenarios (at any operation of this file; the next start sees):
//! * Before the new epoch's header is durable: what this start saw.
//! * New epoch durable, state file not yet: the log's epoch is a child of the state file's; its checkpoint carries all that was open.
//! * Memory stays as it survived, and claimed by the old epoch, until the log holds its records and the origin was given what it lacked: a kill in
//!   between finds it again (claimed by the parent of the log's newest epoch), and doing all of it twice is harmless, because nobody wrote meanwhile.
//! * Killed, then the power goes: what the dead process wrote into the log may lie in a cache only. The log is flushed before a header says where the old epoch
//!   ended; else the header could outlive what it speaks of, and the store would give up that segment.
//! * Killed in a bypass within a span: the checkpoint that was found tells of the span's blocks, memory of those that bypassed the log. Until both are in a
//!   checkpoint of the new epoch its headers say that everything is open; and each header that is written on the way says as much as the first.
//! * Records that survived are made durable in the log before they are written to the origin again (invariant 2).

use crate::bitmap::Bitmap;
use crate::config::{Rules, VolumeConfig};
use crate::copy::Copier;
use crate::flush::OriginFlusher;
use crate::heal::{Healer, OldEpoch};
use crate::locks::RangeLocks;
use crate::plan::{Found, Mark, Plan, mark_open, old_epoch, plan, resized};
use crate::regions::OpenRegions;
use crate::state_file::{StateError, StateFile, StateWord};
use crate::surviving::SurvivingMemory;
use crate::verify::Verifier;
use crate::volume::{Active, Counters, Phase, TOKEN_LOG, TOKEN_STATE, Volume};
use std::collections::VecDeque;
use std::fmt;
use std::marker::PhantomData;
use varve_format::{
    EpochId, Fingerprint, FormatError, Lsn, Record, RecordKind, SegmentSequence, SpanKind,
    StateKind, VolumeState, WallTime,
};
use varve_log::{
    BatchBuffer, Buffer, Disk, IoError, LogGeometry, LogWriter, Medium, Memory, Operation,
    SLOT_BYTES, SegmentError, SegmentOpening, SurvivingRecord, run_blocking, scan,
};

/// Slots of the buffer that a start writes from.
const START_SLOTS: usize = 4;

/// Asks for a rewind span instead of normal work: the volume takes writes of the rewind only.
#[derive(Clone, Copy, Debug)]
pub struct RewindRequest {
    /// The instant that is written back.
    pub target: Lsn,
}

/// What a start found and did.
#[derive(Clone, Debug, Default)]
pub struct StartReport {
    /// In words.
    pub summary: String,
    /// Bytes that are being read again.
    pub reread_bytes: u64,
    /// Records that survived in memory and were not in the log.
    pub records_survived: u64,
    /// Records that were written to the origin again.
    pub records_redone: u64,
    /// A rewind is open (begun now, or interrupted before): it must be finished before the device is offered.
    pub rewind_target: Option<Lsn>,
    /// The log could not be used: the volume is in bypass, and records that only memory held are lost (a gap says so once the log is back).
    pub in_bypass: bool,
    /// The state file could not be written: a bypass would leave no trace.
    pub state_error: Option<IoError>,
    /// Somebody else may have written to the origin.
    pub origin_in_doubt: bool,
    /// Where the history that was there before ends: higher LSNs that somebody remembers mean nothing any more.
    pub history_end: Lsn,
}

/// Why a volume cannot start.
#[derive(Debug)]
pub enum StartError {
    /// A disk failed.
    Io(&'static str, IoError),
    /// Log or state file hold another's bytes, or a newer version's.
    Format(&'static str, FormatError),
    /// No memory.
    Memory(std::io::Error),
}

impl fmt::Display for StartError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StartError::Io(what, error) => write!(
                f,
                "B001: {what} cannot be read or written: {error}. Nothing was changed. Check the disk"
            ),
            StartError::Format(what, error) => write!(
                f,
                "B002: {what} cannot be used: {error}. Nothing was changed"
            ),
            StartError::Memory(error) => write!(f, "B003: no memory for the volume: {error}"),
        }
    }
}

impl std::error::Error for StartError {}

impl<R: Rules> Volume<R> {
    /// Starts a volume; blocks until its new epoch is durable. `kernel`: the device's write counter and boot, for the fingerprint.
    pub fn start(
        medium: &mut dyn Medium,
        config: VolumeConfig,
        surviving: SurvivingMemory,
        kernel: Fingerprint,
        rewind: Option<RewindRequest>,
    ) -> Result<(Volume<R>, StartReport), StartError> {
        let (state_file, slot) =
            StateFile::open(medium, config.volume, TOKEN_STATE).map_err(|error| match error {
                StateError::Io(error) => StartError::Io("the state file", error),
                StateError::Format(error) => StartError::Format("the state file", error),
            })?;
        let geometry = config.geometry();
        let (scan, log_error) = match scan(medium, &geometry) {
            Ok(scan) => (scan, None),
            Err(SegmentError::Io(error)) => (
                None,
                Some(IoError(error.raw_os_error().unwrap_or(libc::EIO))),
            ),
            Err(SegmentError::Format(error)) => return Err(StartError::Format("the log", error)),
        };
        // What was found counts from here on: the new epoch's header says where it ends. A process that died may have written some of it and flushed nothing;
        // a power cut must not take that from under the header.
        let flushed = match &scan {
            Some(_) => run_blocking(medium, Disk::Log, Operation::Flush),
            None => Ok(()),
        };
        let log_error = log_error.or(flushed.err());
        let found = Found {
            slot,
            scan,
            log_error,
        };
        let buffer = BatchBuffer::new(
            surviving.memory(),
            SurvivingMemory::slots_base(),
            config.slots,
            config.sector_bytes as usize,
        );
        let mut plan = plan(medium, &config, &surviving, &buffer, &found, kernel)?;
        // The start itself writes out of memory of its own, so that what survived stays as it is until it is safe.
        let own = Memory::anonymous(START_SLOTS * SLOT_BYTES).map_err(StartError::Memory)?;
        let own = BatchBuffer::new(&own, 0, START_SLOTS, config.sector_bytes as usize);
        let mut volume = Volume::<R>::assemble(config, surviving, state_file, own, geometry)
            .map_err(StartError::Memory)?;
        if let Some(request) = rewind {
            plan.checkpoint
                .span
                .get_or_insert((SpanKind::Rewind, Lsn(0), request.target.0));
        }
        let warm = matches!(plan.mark, Mark::Kept(_));
        let mut report = volume.carry_out(medium, &found, plan, rewind)?;
        report.history_end = if warm {
            volume.writer.next_lsn()
        } else {
            volume.epoch_start.0
        };
        volume.writer.replace_buffer(buffer);
        volume.surviving.claim(volume.writer.epoch());
        Ok((volume, report))
    }

    fn assemble(
        config: VolumeConfig,
        surviving: SurvivingMemory,
        state_file: StateFile,
        buffer: BatchBuffer,
        geometry: LogGeometry,
    ) -> std::io::Result<Volume<R>> {
        let bitmap = Bitmap::new(
            surviving.memory(),
            SurvivingMemory::bitmap_base(&config),
            config.volume_bytes,
        );
        let places = config.depth + 8;
        let idle = || Active {
            request: None,
            phase: Phase::Free,
            writes: Vec::with_capacity(16),
            outstanding: 0,
            lsn_first: Lsn(0),
            lock: None,
            error: None,
            logged: false,
            since_ns: 0,
            saving_since_ns: 0,
            admitted_as: 0,
        };
        Ok(Volume {
            surviving,
            writer: LogWriter::new(geometry, buffer, TOKEN_LOG)?,
            state: VolumeState::Synchronising,
            state_file,
            epoch_start: (Lsn::FIRST, SegmentSequence(1)),
            span: None,
            span_end: None,
            regions: OpenRegions::new(config.region_bytes, config.open_regions_max),
            bitmap,
            locks: RangeLocks::new(places + 4),
            flusher: OriginFlusher::default(),
            copier: Copier::new(config.copy_bytes)?,
            healer: Healer::new(config.heal_interval_ns),
            verifier: Verifier::default(),
            hot: None,
            admitted: 0,
            held_until_ns: 0,
            table: (0..places).map(|_| idle()).collect(),
            free: (0..places as u16).rev().collect(),
            pending: VecDeque::with_capacity(places),
            answers: VecDeque::with_capacity(places),
            last_write_end: 0,
            regions_wanted: false,
            stable_lsn: Lsn(0),
            stable_before: Lsn(0),
            stable_bytes_mark: 0,
            stable_time_ns: 0,
            last_record_time: WallTime(0),
            counters: Counters::default(),
            rules: PhantomData,
            config,
        })
    }

    fn carry_out(
        &mut self,
        medium: &mut dyn Medium,
        found: &Found,
        mut plan: Plan,
        rewind: Option<RewindRequest>,
    ) -> Result<StartReport, StartError> {
        let mut report = StartReport {
            summary: plan.summary.clone(),
            origin_in_doubt: plan.origin_in_doubt,
            ..StartReport::default()
        };
        if !matches!(plan.mark, Mark::Kept(_)) {
            self.surviving.disclaim();
        }
        let now = medium.now();
        self.stable_time_ns = now.monotonic_ns;
        self.last_record_time = found.scan.as_ref().map_or(now.wall, |scan| scan.tail.time);
        let old = old_epoch(found);
        if let Mark::Kept(ranges) = &plan.mark {
            for (offset, length) in ranges {
                self.bitmap.set(*offset, *length);
            }
        }
        match &plan.mark {
            // Marked blocks without a span: a start in bypass was cut short. Its records are lost, its marks are not.
            Mark::Kept(_) if !self.bitmap.is_empty() && plan.checkpoint.span.is_none() => {
                plan.span = Some(SpanKind::CatchUp);
                plan.gap = true;
            }
            Mark::Kept(_) => {}
            Mark::All => self.bitmap.set(0, self.config.volume_bytes),
            Mark::Open(failed) => {
                self.bitmap.clear_all();
                mark_open(&mut self.bitmap, &plan.checkpoint, failed, &self.config);
            }
        }
        let checkpoint = &plan.checkpoint;
        let mut opened = checkpoint.clone();
        if plan.span.is_some() && opened.span.is_none() {
            // Until the span's begin record is durable the header itself must say that things are open.
            opened.copy_cursor = if matches!(plan.mark, Mark::All | Mark::Kept(_)) {
                0
            } else {
                u64::MAX
            };
            opened.span = plan.span.map(|kind| (kind, old.next, 0));
        }
        if plan.gap && matches!(plan.mark, Mark::Kept(_)) {
            // What bypassed the log is known to memory alone; a span that goes on tells of other blocks. Until a checkpoint names them, everything is open.
            opened.copy_cursor = 0;
        }
        let opening = SegmentOpening {
            epoch: EpochId(medium.random_id()),
            parent_epoch: old.epoch,
            sequence: SegmentSequence(old.sequence.0 + 1),
            lsn_start: old.next,
            previous_lsn_end: old.durable,
            previous_bytes: old.bytes,
            previous_hash: old.hash,
        };
        // A rewind that is open stays open, whatever becomes of the log.
        let rewinding = opened.span.filter(|span| span.0 == SpanKind::Rewind);
        if let Some(error) = found.log_error {
            self.start_in_bypass(medium, old, error, rewinding, &mut report);
            return Ok(report);
        }
        if !self.writer_has_place(&old, opening.sequence) {
            self.start_in_bypass(medium, old, IoError(libc::ENOSPC), rewinding, &mut report);
            return Ok(report);
        }
        self.writer
            .begin_epoch(medium, opening, old.oldest_held, &opened);
        // A segment may fill up with what survived: the next one's header must say as much as this one's.
        (self.span, self.state) = (opened.span, opened.state);
        self.epoch_start = (opening.lsn_start, opening.sequence);
        self.flusher.reset(old.next);
        self.stable_lsn = old.next;
        self.stable_before = old.next;
        for region in &checkpoint.regions {
            self.regions.reopen(*region, old.next);
        }
        for survivor in plan
            .records
            .iter()
            .filter(|survivor| survivor.lsn >= old.next)
        {
            report.records_survived += 1;
            self.make_room(medium)?;
            let record = Record {
                payload_offset: 0.into(),
                payload_bytes: 0.into(),
                payload_crc: 0.into(),
                ..survivor.record
            };
            self.append(medium, record, &survivor.payload);
            self.regions
                .touch(record.offset.get(), record.length.get(), survivor.lsn);
        }
        let recorded = plan
            .records
            .iter()
            .any(|r| Some(r.lsn) == plan.checkpoint.span.map(|span| span.1));
        let resized = resized(found, &self.config).is_some();
        self.append_beginning(medium, &plan, rewind, recorded, resized)?;
        if let Err(error) = self.settle_log(medium) {
            self.start_in_bypass(medium, old, error, rewinding, &mut report);
            return Ok(report);
        }
        let word = self.word(StateKind::LogSpeaks);
        report.state_error = self.state_file.write_blocking(medium, &word).err();
        for survivor in plan.records.iter().filter(|survivor| !survivor.done) {
            let failed = match redo(medium, survivor) {
                Ok(done) => {
                    report.records_redone += u64::from(done);
                    continue;
                }
                // One that hangs may still land, behind whatever comes next.
                Err(late @ IoError(libc::ETIMEDOUT)) => {
                    return Err(StartError::Io("the device", late));
                }
                Err(failed) => failed,
            };
            // As while it runs: what the device holds there is read again, and the volume goes on.
            eprintln!("blkfilter: writing again what was in flight: {failed}");
            let (offset, length) = (survivor.record.offset.get(), survivor.record.length.get());
            self.counters.origin_errors += 1;
            self.bitmap.set(offset, length);
            self.make_room(medium)?;
            let failed = Record::new(RecordKind::Failed, offset, length, survivor.lsn.0);
            self.append(medium, failed, &[]);
            self.begin_span(medium, SpanKind::Resync, VolumeState::Healing);
        }
        report.reread_bytes = self.bitmap.bytes();
        self.ask_for_verification(medium.now().monotonic_ns);
        if let Some((SpanKind::Rewind, _, target)) = self.span {
            report.rewind_target = Some(Lsn(target));
        }
        Ok(report)
    }

    fn writer_has_place(&mut self, old: &OldEpoch, sequence: SegmentSequence) -> bool {
        sequence.0 - old.oldest_held.0.min(sequence.0) < self.config.segment_count
    }

    /// The epoch's first records of its own: epoch, gap, span.
    fn append_beginning(
        &mut self,
        medium: &mut dyn Medium,
        plan: &Plan,
        rewind: Option<RewindRequest>,
        recorded: bool,
        resized: bool,
    ) -> Result<(), StartError> {
        self.make_room(medium)?;
        if resized {
            let size = Record::new(RecordKind::SizeChange, 0, self.config.volume_bytes, 0);
            self.append(medium, size, &[]);
        }
        let gap_since = self.last_record_time;
        self.append(
            medium,
            Record::new(RecordKind::Epoch, 0, 0, 0).with_detail(plan.epoch_detail),
            &[],
        );
        if plan.gap {
            self.append(
                medium,
                Record::new(RecordKind::Gap, 0, 0, gap_since.0 as u64),
                &[],
            );
        }
        self.state = plan.checkpoint.state;
        self.span = plan.checkpoint.span;
        // A span that only a header tells of has no begin record yet: its epoch was cut short before that record was durable.
        let unrecorded = |begin: Lsn| begin == Lsn(0) || (begin >= self.epoch_start.0 && !recorded);
        let begin = match (self.span, rewind, plan.span) {
            (Some((kind, begin, argument)), _, _) if unrecorded(begin) => Some((kind, argument)),
            (None, Some(request), _) => Some((SpanKind::Rewind, request.target.0)),
            (None, None, Some(kind)) => Some((kind, 0)),
            _ => None,
        };
        if let Some((kind, argument)) = begin {
            let record = Record::new(RecordKind::SpanBegin, 0, 0, argument).with_detail(kind as u8);
            let (lsn, _) = self.append(medium, record, &[]);
            self.span = Some((kind, lsn, argument));
        }
        self.state = match self.span {
            Some((SpanKind::BaseCopy, ..)) => VolumeState::Synchronising,
            Some((SpanKind::Resync | SpanKind::CatchUp, ..)) => VolumeState::Healing,
            Some((SpanKind::Verify, ..)) => VolumeState::Unverified,
            Some((SpanKind::Rewind, ..)) => VolumeState::Rewinding,
            None => VolumeState::Protected,
        };
        Ok(())
    }

    /// Runs the log until there is room again (many survivors, few slots).
    fn make_room(&mut self, medium: &mut dyn Medium) -> Result<(), StartError> {
        while !self
            .writer
            .has_room(4, varve_format::RECORD_PAYLOAD_BYTES_MAX as usize, true)
        {
            self.settle_log(medium)
                .map_err(|error| StartError::Io("the log", error))?;
        }
        Ok(())
    }

    /// Makes everything appended so far durable, waiting for it.
    pub(crate) fn settle_log(&mut self, medium: &mut dyn Medium) -> Result<(), IoError> {
        let target = self.writer.next_lsn();
        self.writer.want_durable(target);
        while self.writer.durable_lsn() < target {
            if let Some(error) = self.writer.failure() {
                while !self.writer.is_quiet() {
                    let completion = medium.poll(true).ok_or(error)?;
                    self.writer.complete(completion.token, completion.result);
                }
                return Err(error);
            }
            self.writer.pump(medium);
            if self.writer.wants_roll() {
                let checkpoint = self.checkpoint();
                self.writer.roll(medium, &checkpoint);
                self.writer.pump(medium);
            }
            if self.writer.is_full() && self.writer.is_quiet() {
                return Err(IoError(libc::ENOSPC));
            }
            let completion = medium.poll(true).ok_or(IoError(libc::ETIMEDOUT))?;
            self.writer.complete(completion.token, completion.result);
        }
        self.quiet_log(medium)
    }

    /// Waits until nothing of the log is in flight: whatever waits for something else next would take its completions.
    pub(crate) fn quiet_log(&mut self, medium: &mut dyn Medium) -> Result<(), IoError> {
        while !self.writer.is_quiet() {
            let completion = medium.poll(true).ok_or(IoError(libc::ETIMEDOUT))?;
            self.writer.complete(completion.token, completion.result);
        }
        Ok(())
    }

    /// The log cannot be used: production must start all the same. Everything is marked.
    fn start_in_bypass(
        &mut self,
        medium: &mut dyn Medium,
        old: OldEpoch,
        error: IoError,
        rewinding: Option<(SpanKind, Lsn, u64)>,
        report: &mut StartReport,
    ) {
        let begun = self.writer.epoch();
        self.writer
            .stand_by(old.epoch, old.sequence, old.oldest_held, old.next);
        let mut old = old;
        if !self.writer.is_quiet() {
            // What hangs may still land in the place that comes next: leave that out. Its header, if it lands, is of the epoch that was begun: what comes behind
            // it descends from that, else it would not seem to belong to the log.
            self.writer.forget_flights();
            old.sequence.0 += 1;
            old.epoch = begun;
        }
        self.writer.poison(error);
        self.state = VolumeState::Bypass;
        self.bitmap.set(0, self.config.volume_bytes);
        self.span = rewinding;
        report.rewind_target = rewinding.map(|(_, _, target)| Lsn(target));
        self.epoch_start = (old.next, SegmentSequence(old.sequence.0 + 1));
        let word = StateWord {
            kind: StateKind::Bypass,
            epoch: old.epoch,
            start: self.epoch_start,
            fingerprint: Fingerprint::default(),
        };
        report.state_error = self.state_file.write_blocking(medium, &word).err();
        self.healer
            .start_bypassed(old, error, self.last_record_time, medium.now().monotonic_ns);
        self.counters.bypasses += 1;
        report.in_bypass = true;
        report.reread_bytes = self.bitmap.bytes();
        report.summary = format!(
            "the log cannot be used ({error}): started in bypass; everything is read again once it can"
        );
    }
}

impl VolumeConfig {
    /// The shape of this volume's log.
    #[must_use]
    pub fn geometry(&self) -> LogGeometry {
        LogGeometry {
            volume: self.volume,
            segment_bytes: self.segment_bytes,
            segment_count: self.segment_count,
            volume_bytes: self.volume_bytes,
            sector_bytes: self.sector_bytes,
            region_bytes: self.region_bytes,
        }
    }
}

/// Writes a surviving record to the origin again. Whether it had anything to write.
fn redo(medium: &mut dyn Medium, survivor: &SurvivingRecord) -> Result<bool, IoError> {
    let (offset, length) = (survivor.record.offset.get(), survivor.record.length.get());
    let copied = survivor.record.flags & varve_format::RecordFlags::COPIED != 0;
    let operation = match survivor.record.kind() {
        _ if copied => return Ok(false),
        Ok(RecordKind::Write) => {
            let buffer = Buffer::anonymous(survivor.payload.len())
                .map_err(|e| IoError(e.raw_os_error().unwrap_or(libc::ENOMEM)))?;
            buffer.write_with(|target| target.copy_from_slice(&survivor.payload));
            Operation::Write { offset, buffer }
        }
        Ok(RecordKind::Zero) => Operation::Zero { offset, length },
        Ok(RecordKind::Discard) => Operation::Discard { offset, length },
        _ => return Ok(false),
    };
    let may_do_nothing = matches!(operation, Operation::Discard { .. });
    match run_blocking(medium, Disk::Origin, operation) {
        // A discard promises nothing: its record is undefined content.
        Err(IoError(libc::EOPNOTSUPP | libc::EINVAL)) if may_do_nothing => Ok(false),
        done => done.map(|()| true),
    }
}

/// The target of a rewind that the log has not seen the end of.
pub fn peek_rewind(medium: &mut dyn Medium, config: &VolumeConfig) -> Option<Lsn> {
    let scan = scan(medium, &config.geometry()).ok()??;
    if scan.volume_bytes != config.volume_bytes {
        return None; // It cannot be finished.
    }
    match scan.checkpoint.span {
        Some((SpanKind::Rewind, _, target)) => Some(Lsn(target)),
        _ => None,
    }
}
