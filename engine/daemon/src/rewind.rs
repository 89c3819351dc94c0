//! Rewinds: the device becomes what it was; only blocks that differ are written, through the data path, which records them.
//!
//! Order: the image is read once as a whole; then the span begins in the log and the device is away; what differs is written, recorded; the device is flushed,
//! the span ends, durably; the device is shown.
//!
//! Crash, by where it comes:
//! - before the span: nothing has happened.
//! - in the span, either daemon or the machine: the log says where it goes; the data path does not show the device, and whoever follows the logs computes the
//!   difference anew and finishes it.
//! - after it was taken back, or sent elsewhere: the log knows only where it began to go. A note (`redirection.rs`, before the first block) says
//!   where it goes now; it is removed before the next span begins.
//! - while its end waits for a place or for the disk: all is written. Whoever asks again ends it, or hears that it has ended; nothing is written again.
//! - with its end in surviving memory only: the data path knows once that is in the log, and shows the device.
//!
//! What cannot be written (a block of the image is lost, the store is full) is said with a way back, and rests: another instant can be named meanwhile.

use crate::compare::{open_origin, restore_error};
use crate::service::{Claim, LATE, Service, error, open_rewind, store_error};
use nix::sys::statvfs::statvfs;
use std::sync::Arc;
use std::time::Duration;
use varve_control::{
    ControlError, FilterOp, FilterReply, Instant, Reporter, StoreReply, VolumeInfo,
};
use varve_format::{Lsn, SegmentSequence};
use varve_restore::differences;
use varve_store::Image;

/// A rewind whose instant cannot be read is tried again after this, or after ten times as long as it was tried: in between another one can be asked for.
const REST: Duration = Duration::from_secs(60);
/// One that anything else has stopped (the data path was restarted), after this.
const STOPPED_REST: Duration = Duration::from_secs(5);
/// One of which only the end is not recorded, after this.
const END_REST: Duration = Duration::from_secs(2);
/// How long a rewind waits for the store at a time, and how often it looks.
const FOLLOW_WAIT: Duration = Duration::from_secs(20);
const FOLLOW_LOOK: Duration = Duration::from_millis(20);
/// After so many bytes it looks whether the store follows, if the size of segments is not known.
const LOOK_EVERY: u64 = 1 << 20;

/// Why a rewind could not be finished, and until when it rests.
pub(crate) struct Unfinished {
    why: ControlError,
    until: std::time::Instant,
    /// All is written, of this instant; only that it has ended is not recorded.
    written: Option<Lsn>,
}

/// What the data path answers then.
const UNRECORDED: &str = "V026-bypass";
/// What it answers if what was written may not be on the device.
const LOST: &str = "V025-write";

/// What became of a rewind that was written.
enum Ended {
    Shown(u64),
    /// All is written, and its end is not recorded yet.
    Unrecorded(ControlError),
}

impl Service {
    pub(crate) fn rewind(
        self: &Arc<Self>,
        volume: &str,
        instant: &Instant,
        dry_run: bool,
        reporter: &mut Reporter<'_>,
    ) -> Result<StoreReply, ControlError> {
        let info = self.shown_if_ended(volume, dry_run)?;
        let (image, time_ns) = self.image(volume, instant)?;
        let target = image.lsn();
        if image.bytes() != info.bytes {
            return Err(error(
                "R002-size",
                format!(
                    "{volume} was {} bytes at that instant and is {} now: it cannot be written back as it was. Nothing was changed. `varve mount` or \
                     `varve export` gives it beside the device",
                    image.bytes(),
                    info.bytes
                ),
            ));
        }
        let is_open = open_rewind(&info).is_some();
        // Before all of it is read: the interrupted one is not tried again meanwhile.
        let mut claim = match is_open && !dry_run {
            true => Some(self.claim_rewind(volume)?),
            false => None,
        };
        if !dry_run {
            refuse_in_state(&info, is_open)?;
        }
        // Before the device is taken away it is known that all of the image can be read.
        let parts = if dry_run { 1 } else { 2 };
        let differing = differences(
            &image,
            &open_origin(&info.device)?,
            |_, _| Ok(()),
            |done, total| reporter.report(done, total * parts),
        );
        let differing = differing.map_err(|why| {
            let why = restore_error(&why);
            error(
                &why.code,
                format!(
                    "{}. So {volume} cannot become what it was at LSN {target}; nothing was changed. `varve mount lsn:{target}` gives what can be read of it; `varve scrub` \
                     says which instants are whole",
                    why.message
                ),
            )
        })?;
        if !is_open {
            self.refuse_without_room(&info, differing)?;
        }
        if dry_run {
            return Ok(StoreReply::Rewound {
                lsn: target.0,
                time_ns,
                written_bytes: differing,
                undo_lsn: 0,
            });
        }
        if !is_open {
            // A store that takes nothing more could not take what undoes it either, nor end it.
            self.refresh(volume)?;
        }
        // While it is open its instant is kept: until the span is in the history, and says where it goes.
        let held = image;
        if claim.is_none() {
            claim = Some(self.claim_rewind(volume)?);
        }
        let now = self.info(volume)?;
        if now.state != info.state || now.rewind_target != info.rewind_target {
            let message = format!(
                "{volume} was {} and is {} by now; look at `varve status`, and say it again",
                info.state, now.state
            );
            return Err(error("V030-state", message));
        }
        // Nothing is pruned until it has ended: the store may not yet know where it goes.
        self.note_taken(&info.id, false);
        self.unfinished_rewinds().remove(&info.id);
        match info.rewind_target {
            // From now on it goes here, also if that is interrupted in its turn.
            Some(old) if is_open => self.note_redirected(&info.id, Lsn(old), target)?,
            _ => {
                self.forget_redirected(&info.id);
                self.filter()?
                    .call::<_, FilterReply>(&FilterOp::RewindBegin {
                        name: volume.to_owned(),
                        target: target.0,
                    })?;
            }
        }
        // The span has begun: what is below it is the present before the rewind.
        let (begun, _) = self.refresh_if_possible(volume)?;
        let undo_lsn = self.undo_lsn(&begun.id)?;
        let mut report = |done, total| {
            let _ = reporter.report(total + done, total * 2);
        };
        let began = std::time::Instant::now();
        let written = self
            .write_back(&begun, target, &mut report)
            .map_err(|why| self.note_unfinished(&begun, target, &why, began))?;
        let written_bytes = match self.end(&begun, written) {
            Ok(Ended::Shown(bytes)) => bytes,
            Ok(Ended::Unrecorded(why)) => return Err(self.note_unrecorded(&begun, target, &why)),
            Err(lost) if lost.code == LOST => {
                return Err(self.note_unfinished(&begun, target, &lost, began));
            }
            Err(why) => return Err(why),
        };
        drop((held, claim));
        Ok(StoreReply::Rewound {
            lsn: target.0,
            time_ns,
            written_bytes,
            undo_lsn,
        })
    }

    /// A volume. If a rewind of it was written, and only its end was not recorded by then, that is done first: what comes then is another one.
    fn shown_if_ended(
        self: &Arc<Self>,
        volume: &str,
        dry_run: bool,
    ) -> Result<VolumeInfo, ControlError> {
        let info = self.info(volume)?;
        let is_written = |known: &Unfinished| known.written.is_some();
        let written = self
            .unfinished_rewinds()
            .get(&info.id)
            .is_some_and(is_written);
        let ended = !matches!(info.state.as_str(), "rewinding" | "bypass");
        if dry_run || open_rewind(&info).is_none() || !(written || ended) {
            return Ok(info);
        }
        let _claim = self.claim_rewind(volume)?;
        match self.end(&info, 0) {
            Ok(Ended::Shown(_)) => self.info(volume),
            // Its span is open, and nothing of it waits to be recorded: what is written from now on belongs to it.
            Ok(Ended::Unrecorded(why)) if why.code == UNRECORDED && !ended => Ok(info),
            Ok(Ended::Unrecorded(why)) => Err(unrecorded(&info, &why)),
            Err(lost) if lost.code == LOST => {
                let target = self.redirected(&info.id, Lsn(info.rewind_target.unwrap_or(0)));
                Err(self.note_unfinished(&info, target, &lost, std::time::Instant::now()))
            }
            Err(other) => Err(other),
        }
    }

    fn claim_rewind(self: &Arc<Self>, volume: &str) -> Result<Claim, ControlError> {
        self.claim(volume).ok_or_else(|| {
            error(
                "V023-rewinding",
                format!(
                    "{volume} is being rewound already, or an interrupted rewind is being finished; wait for it (`varve status`)"
                ),
            )
        })
    }

    /// What is written is recorded, too: there must be room for it, in the store or in the log.
    fn refuse_without_room(&self, info: &VolumeInfo, differing: u64) -> Result<(), ControlError> {
        let spec = self.specs().into_iter().find(|spec| spec.id == info.id);
        let free = info.segment_count.saturating_sub(info.segments_held + 2);
        let log = spec.map_or(0, |spec| spec.segment_bytes.saturating_mul(free));
        let disk = statvfs(&self.paths().store());
        let free = disk.map_or(u64::MAX, |disk| {
            disk.blocks_available() * disk.fragment_size()
        });
        let room = free.saturating_add(log);
        if differing <= room {
            return Ok(());
        }
        let message = format!(
            "{} MiB differ, and what is written is recorded: there is room for {} MiB only, in the store and in the log. Nothing was changed. Make room there first (`varve policy set --keep`, or \
             another disk), or take the instant beside the device: `varve export INSTANT --to TARGET`",
            differing >> 20,
            room >> 20
        );
        Err(error("R004-room", message))
    }

    /// The present before a rewind that is open, or the last instant.
    fn undo_lsn(&self, id: &str) -> Result<u64, ControlError> {
        self.with_store(id, |store| {
            let timeline = store.timeline();
            let open = timeline.closed().last().filter(|span| span.open);
            let before = open.map(|span| span.from).or(timeline.last());
            Ok(before.map_or(0, |lsn| lsn.0))
        })
    }

    /// What is to be said, and done, where a rewind cannot go on.
    fn unfinished(&self, info: &VolumeInfo, target: Lsn, why: &ControlError) -> ControlError {
        let name = &info.name;
        let undo = self.undo_lsn(&info.id).unwrap_or_default();
        let back = match undo {
            0 => "name another instant".to_owned(),
            undo => format!(
                "`varve rewind lsn:{undo} --yes` makes it what it was before, or name another instant"
            ),
        };
        error(
            "R003-unfinished",
            format!(
                "{name} could not become what it was at LSN {target}: {} [{}]. It is partly written, and not offered until it is whole. It is tried again; {back}",
                why.message, why.code
            ),
        )
    }

    /// The span is open: writes what differs and ends it.
    fn write_back(
        &self,
        info: &VolumeInfo,
        target: Lsn,
        report: &mut dyn FnMut(u64, u64),
    ) -> Result<u64, ControlError> {
        let image = self.with_store(&info.id, |store| {
            let end = store.timeline().end();
            if target > end {
                let message = format!("the store holds nothing behind LSN {end} yet");
                return Err(error("S007-full", message));
            }
            Image::open(store, target).map_err(|e| store_error(&e))
        })?;
        let origin = open_origin(&info.device)?;
        let errors = self.info(&info.name)?.origin_errors;
        let mut filter = self.filter()?;
        let name = info.name.clone();
        let spec = self.specs().into_iter().find(|spec| spec.id == info.id);
        let look_every = spec.map_or(LOOK_EVERY, |spec| spec.segment_bytes);
        let mut unlooked = 0;
        let write = |offset: u64, bytes: &[u8]| {
            unlooked += bytes.len() as u64;
            if unlooked >= look_every {
                unlooked = 0;
                self.let_the_store_follow(&name);
            }
            let op = FilterOp::RewindWrite {
                name: name.clone(),
                offset,
            };
            filter
                .call_with::<_, FilterReply>(&op, bytes, |_| {})
                .map(|_| ())
                .map_err(|e| e.to_string())
        };
        // A client that goes away does not leave a rewind half done.
        let go_on = |done, total| {
            report(done, total);
            true
        };
        let written = differences(&image, &origin, write, go_on).map_err(|e| restore_error(&e))?;
        // A flush of its own that has failed tells nobody else: what was written before it may not be there.
        match self.info(&info.name)?.origin_errors == errors {
            true => Ok(written),
            false => Err(error(LOST, "the device has reported errors meanwhile")),
        }
    }

    /// What is written is recorded. A rewind can wait, so that it does not fill its log: that would be a bypass, and its end could be told only after all was
    /// read again. A store that takes nothing is not waited for.
    fn let_the_store_follow(&self, name: &str) {
        let since = std::time::Instant::now();
        while let Ok(info) = self.info(name)
            && info.segments_held * 2 > info.segment_count
            && info.state != "bypass"
            && since.elapsed() < FOLLOW_WAIT
        {
            if self.take(&info, SegmentSequence(info.sequence)).is_err() {
                return;
            }
            std::thread::sleep(FOLLOW_LOOK);
        }
    }

    /// All is written: the span ends, and the device is shown.
    fn end(&self, info: &VolumeInfo, written: u64) -> Result<Ended, ControlError> {
        let name = info.name.clone();
        let ended = self
            .filter()?
            .call::<_, FilterReply>(&FilterOp::RewindEnd { name });
        match ended {
            Err(why) if why.code == UNRECORDED || why.code == LATE || why.code.starts_with('C') => {
                return Ok(Ended::Unrecorded(why));
            }
            // What was written may not be there.
            Err(lost) if lost.code == LOST => return Err(lost),
            // It has ended; that the device cannot be shown is another matter.
            Err(other) => {
                self.unfinished_rewinds().remove(&info.id);
                return Err(other);
            }
            Ok(_) => {}
        }
        self.unfinished_rewinds().remove(&info.id);
        self.forget_redirected(&info.id);
        Ok(Ended::Shown(written))
    }

    /// All is written, and the log does not take yet that it has ended.
    fn note_unrecorded(&self, info: &VolumeInfo, target: Lsn, why: &ControlError) -> ControlError {
        let why = unrecorded(info, why);
        let known = Unfinished {
            why: why.clone(),
            until: std::time::Instant::now() + END_REST,
            written: Some(target),
        };
        self.unfinished_rewinds().insert(info.id.clone(), known);
        why
    }

    /// A daemon died in a rewind: it is finished before the device is offered again. A store that takes nothing more may still have what it goes to.
    pub(crate) fn finish_rewind(&self, name: &str) {
        // What was known before the claim may be of a rewind that has ended since.
        let Ok(info) = self.info(name) else { return };
        let Some(target) = open_rewind(&info).filter(|_| info.state != "bypass") else {
            return;
        };
        let target = self.redirected(&info.id, Lsn(target));
        let began = std::time::Instant::now();
        let is_written = |known: &Unfinished| known.written == Some(target);
        // Where no span is open any more, or all is written, only its end is missing.
        let ended = info.state != "rewinding"
            || self
                .unfinished_rewinds()
                .get(&info.id)
                .is_some_and(is_written);
        let written = match ended {
            true => Ok(0),
            false => self
                .refresh_if_possible(name)
                .and_then(|_| self.write_back(&info, target, &mut |_, _| {})),
        };
        let written = match written {
            Ok(written) => written,
            Err(why) => {
                let why = self.note_unfinished(&info, target, &why, began);
                eprintln!("varved: {why}");
                return;
            }
        };
        match self.end(&info, written) {
            Ok(Ended::Shown(written)) => eprintln!(
                "varved: {name}: the interrupted rewind to LSN {target} is finished ({written} bytes were still to be written)"
            ),
            Ok(Ended::Unrecorded(why)) => {
                let first = !self
                    .unfinished_rewinds()
                    .get(&info.id)
                    .is_some_and(is_written);
                let why = self.note_unrecorded(&info, target, &why);
                if first {
                    eprintln!("varved: {why}");
                }
            }
            Err(lost) if lost.code == LOST => {
                let why = self.note_unfinished(&info, target, &lost, began);
                eprintln!("varved: {why}");
            }
            Err(why) => eprintln!("varved: {name}: {why}"),
        }
    }

    /// Whether a rewind that could not be finished is left alone for now.
    pub(crate) fn rewind_rests(&self, id: &str) -> bool {
        let rests = |known: &Unfinished| known.until > std::time::Instant::now();
        self.unfinished_rewinds().get(id).is_some_and(rests)
    }

    /// Notes that it could not be finished, and gives what is to be said of that.
    fn note_unfinished(
        &self,
        info: &VolumeInfo,
        target: Lsn,
        why: &ControlError,
        began: std::time::Instant,
    ) -> ControlError {
        let rest = match why.code.starts_with('S') {
            true => REST.max(began.elapsed() * 10),
            false => STOPPED_REST,
        };
        let why = self.unfinished(info, target, why);
        let until = std::time::Instant::now() + rest;
        let known = Unfinished {
            why: why.clone(),
            until,
            written: None,
        };
        self.unfinished_rewinds().insert(info.id.clone(), known);
        why
    }

    /// Why a rewind could not be finished that is still open.
    pub(crate) fn why_unfinished(&self, id: &str) -> Option<ControlError> {
        self.unfinished_rewinds()
            .get(id)
            .map(|known| known.why.clone())
    }
}

fn refuse_in_state(info: &VolumeInfo, is_open: bool) -> Result<(), ControlError> {
    let (name, state) = (&info.name, info.state.as_str());
    match state {
        "bypass" if is_open => Err(error(
            UNRECORDED,
            format!(
                "{name} is being rewound, and in bypass ({}): its end could not be recorded. Make room, or mend the log (`varve doctor`); once it records again, say this again",
                info.bypass_reason
            ),
        )),
        // Nothing is written outside a span: where it has ended, it is shown first.
        state if state != if is_open { "rewinding" } else { "protected" } => Err(error(
            "V030-state",
            format!(
                "{name} is {state}: a rewind could not be undone from here. Wait until `varve status` says protected"
            ),
        )),
        _ => Ok(()),
    }
}

fn unrecorded(info: &VolumeInfo, why: &ControlError) -> ControlError {
    let message = format!(
        "{}: all of the rewind is written, but that it has ended is not recorded yet: {} [{}]. It is tried again until it is; then the device is shown: `varve status --wait 600`",
        info.name, why.message, why.code
    );
    error("R005-end", message)
}
