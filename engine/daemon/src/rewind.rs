//! Rewinds: the device becomes what it was; only blocks that differ are written, through the data path, which records them.
//!
//! A crash leaves the span open: the data path does not offer the device, and whoever follows the logs finishes the rewind.

use crate::compare::{open_origin, restore_error};
use crate::service::{Claim, Service, error, open_rewind, store_error};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use varve_control::{
    ControlError, FilterOp, FilterReply, Instant, Reporter, StoreReply, VolumeInfo,
};
use varve_format::Lsn;
use varve_restore::differences;
use varve_store::Image;

/// A rewind that cannot be finished is tried again after this, or after ten times as long as it was tried: in between another instant can be asked for.
const REST: Duration = Duration::from_secs(60);

/// Why a rewind could not be finished, and until when it rests.
pub(crate) struct Unfinished {
    why: ControlError,
    until: std::time::Instant,
}

impl Service {
    pub(crate) fn rewind(
        self: &Arc<Self>,
        volume: &str,
        instant: &Instant,
        dry_run: bool,
        reporter: &mut Reporter<'_>,
    ) -> Result<StoreReply, ControlError> {
        let info = self.info(volume)?;
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
        if !dry_run && !is_open && info.state != "protected" {
            return Err(error(
                "V030-state",
                format!(
                    "{volume} is {}: a rewind could not be undone from here. Wait until `varve status` says protected",
                    info.state
                ),
            ));
        }
        if !dry_run && is_open && info.state == "bypass" {
            return Err(error(
                "V026-bypass",
                format!(
                    "{volume} is being rewound, and in bypass ({}): its end could not be recorded. Make room, or mend the log (`varve doctor`); once it records again, say this again",
                    info.bypass_reason
                ),
            ));
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
        if dry_run {
            return Ok(StoreReply::Rewound {
                lsn: target.0,
                time_ns,
                written_bytes: differing,
                undo_lsn: 0,
            });
        }
        if !is_open {
            self.refuse_without_room(&info, differing)?;
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
            Some(old) if is_open => self.note_redirected(&info.id, Lsn(old), target),
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
        let written_bytes = self
            .write_back(&begun, target, &mut report)
            .map_err(|why| self.note_unfinished(&begun, target, &why, began))?;
        self.forget_redirected(&begun.id);
        drop((held, claim));
        Ok(StoreReply::Rewound {
            lsn: target.0,
            time_ns,
            written_bytes,
            undo_lsn,
        })
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
        let room = self.space("").free_bytes.saturating_add(log);
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
                "{name} could not become what it was at LSN {target}: {} [{}]. It is partly written, and not offered until it is whole: {back}",
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
        let mut filter = self.filter()?;
        let name = info.name.clone();
        let write = |offset: u64, bytes: &[u8]| {
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
        self.filter()?
            .call::<_, FilterReply>(&FilterOp::RewindEnd {
                name: info.name.clone(),
            })?;
        Ok(written)
    }

    /// A daemon died in a rewind: it is finished before the device is offered again. A store that takes nothing more may still have what it goes to.
    pub(crate) fn finish_rewind(&self, name: &str) {
        // What was known before the claim may be of a rewind that has ended since.
        let Ok(info) = self.info(name) else { return };
        let rests = |known: &Unfinished| known.until > std::time::Instant::now();
        let Some(target) = open_rewind(&info).filter(|_| info.state != "bypass") else {
            return;
        };
        if self.unfinished_rewinds().get(&info.id).is_some_and(rests) {
            return;
        }
        let target = self.redirected(&info.id, Lsn(target));
        let began = std::time::Instant::now();
        let written = self
            .refresh_if_possible(name)
            .and_then(|_| self.write_back(&info, target, &mut |_, _| {}));
        match written {
            Ok(written) => {
                self.unfinished_rewinds().remove(&info.id);
                self.forget_redirected(&info.id);
                eprintln!(
                    "varved: {name}: the interrupted rewind to LSN {target} is finished ({written} bytes were still to be written)"
                );
            }
            Err(why) => eprintln!(
                "varved: {}",
                self.note_unfinished(&info, target, &why, began)
            ),
        }
    }

    /// Notes that it could not be finished, and gives what is to be said of that.
    fn note_unfinished(
        &self,
        info: &VolumeInfo,
        target: Lsn,
        why: &ControlError,
        began: std::time::Instant,
    ) -> ControlError {
        let why = self.unfinished(info, target, why);
        let until = std::time::Instant::now() + REST.max(began.elapsed() * 10);
        let known = Unfinished {
            why: why.clone(),
            until,
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

    /// Where it is noted that a rewind goes somewhere else than it began to: the log says only the latter.
    fn redirection(&self, id: &str) -> PathBuf {
        self.paths().store().join(format!("rewind-{id}"))
    }

    /// Where a full disk does not take it, the rewind goes on all the same; interrupted, it would go where it began to.
    fn note_redirected(&self, id: &str, from: Lsn, to: Lsn) {
        let path = self.redirection(id);
        let new = path.with_extension("new");
        let write = || {
            let mut file = std::fs::File::create(&new)?;
            std::io::Write::write_all(&mut file, format!("{from} {to} end\n").as_bytes())?;
            file.sync_all()?;
            std::fs::rename(&new, &path)
        };
        if let Err(failed) = write() {
            eprintln!("varved: {}: {failed}", path.display());
        }
    }

    fn redirected(&self, id: &str, target: Lsn) -> Lsn {
        let text = std::fs::read_to_string(self.redirection(id)).unwrap_or_default();
        let words: Vec<&str> = text.split_whitespace().collect();
        match words.as_slice() {
            [from, to, "end"] if from.parse() == Ok(target.0) => to.parse().map_or(target, Lsn),
            _ => target,
        }
    }

    fn forget_redirected(&self, id: &str) {
        let _ = std::fs::remove_file(self.redirection(id));
    }
}
