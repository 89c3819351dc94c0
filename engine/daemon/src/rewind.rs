//! Rewinds: the device becomes what it was; only blocks that differ are written, through the data path, which records them.
//!
//! A crash leaves the span open: the data path does not offer the device, and whoever follows the logs finishes the rewind.

use crate::compare::{open_origin, restore_error};
use crate::service::{Service, error, store_error};
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
        let is_open = info.state == "rewinding";
        if !dry_run && !is_open && info.state != "protected" {
            return Err(error(
                "V030-state",
                format!(
                    "{volume} is {}: a rewind could not be undone from here. Wait until `varve status` says protected",
                    info.state
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
            // A store that takes nothing more could not take what undoes it either, nor end it.
            self.refresh(volume)?;
        }
        // While it is open its instant is kept: until the span is in the history, and says where it goes.
        let held = image;
        let _claim = self.claim(volume).ok_or_else(|| {
            error(
                "V023-rewinding",
                format!(
                    "{volume} is being rewound already, or an interrupted rewind is being finished; wait for it (`varve status`)"
                ),
            )
        })?;
        let now = self.info(volume)?.state;
        if now != info.state {
            let message = format!(
                "{volume} was {} and is {now} by now; look at `varve status`, and say it again",
                info.state
            );
            return Err(error("V030-state", message));
        }
        // Nothing is pruned until it has ended: the store may not yet know where it goes.
        self.note_taken(&info.id, false);
        if !is_open {
            self.filter()?
                .call::<_, FilterReply>(&FilterOp::RewindBegin {
                    name: volume.to_owned(),
                    target: target.0,
                })?;
        }
        // The span has begun: what is below it is the present before the rewind.
        let (begun, _) = self.refresh_if_possible(volume)?;
        let undo_lsn = self.undo_lsn(&begun.id)?;
        let mut report = |done, total| {
            let _ = reporter.report(total + done, total * 2);
        };
        let written_bytes = self
            .write_back(&begun, target, &mut report)
            .map_err(|why| self.unfinished(&begun, target, &why))?;
        drop(held);
        self.unfinished_rewinds().remove(&begun.id);
        Ok(StoreReply::Rewound {
            lsn: target.0,
            time_ns,
            written_bytes,
            undo_lsn,
        })
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
        error(
            "R003-unfinished",
            format!(
                "{name} could not become what it was at LSN {target}: {} [{}]. It is partly written, and not offered until it is whole: `varve rewind lsn:{undo} --yes` makes it what \
                 it was before, or name another instant",
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
    pub(crate) fn finish_rewind(&self, info: &VolumeInfo, target: Lsn) {
        let rests = |known: &Unfinished| known.until > std::time::Instant::now();
        if self.unfinished_rewinds().get(&info.id).is_some_and(rests) {
            return;
        }
        let began = std::time::Instant::now();
        let written = self
            .refresh_if_possible(&info.name)
            .and_then(|_| self.write_back(info, target, &mut |_, _| {}));
        match written {
            Ok(written) => {
                self.unfinished_rewinds().remove(&info.id);
                eprintln!(
                    "varved: {}: the interrupted rewind to LSN {target} is finished ({written} bytes were still to be written)",
                    info.name
                );
            }
            Err(why) => {
                let why = self.unfinished(info, target, &why);
                eprintln!("varved: {why}");
                let until = std::time::Instant::now() + REST.max(began.elapsed() * 10);
                self.unfinished_rewinds()
                    .insert(info.id.clone(), Unfinished { why, until });
            }
        }
    }

    /// Why a rewind could not be finished that is still open.
    pub(crate) fn why_unfinished(&self, id: &str) -> Option<ControlError> {
        self.unfinished_rewinds()
            .get(id)
            .map(|known| known.why.clone())
    }
}
