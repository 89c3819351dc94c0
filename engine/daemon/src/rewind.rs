//! Rewinds: the device becomes what it was; only blocks that differ are written, through the data path, which records them.
//!
//! A crash leaves the span open: the data path does not offer the device, and whoever follows the logs finishes the rewind.

use crate::compare::{open_origin, restore_error};
use crate::service::{Service, error, store_error};
use std::sync::Arc;
use varve_control::{
    ControlError, FilterOp, FilterReply, Instant, Reporter, StoreReply, VolumeInfo,
};
use varve_format::Lsn;
use varve_restore::differences;
use varve_store::Image;

impl Service {
    pub(crate) fn rewind(
        self: &Arc<Self>,
        volume: &str,
        instant: &Instant,
        dry_run: bool,
        reporter: &mut Reporter<'_>,
    ) -> Result<StoreReply, ControlError> {
        let info = self.info(volume)?;
        if let (Some(target), "rewinding") = (info.rewind_target, info.state.as_str()) {
            let message = format!(
                "a rewind to LSN {target} is being written, or was interrupted and is being finished; wait for it (`varve status`)"
            );
            return Err(error("V023-rewinding", message));
        }
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
        if dry_run {
            let origin = open_origin(&info.device)?;
            let bytes = differences(
                &image,
                &origin,
                |_, _| Ok(()),
                |done, total| reporter.report(done, total),
            )
            .map_err(|e| restore_error(&e))?;
            return Ok(StoreReply::Rewound {
                lsn: target.0,
                time_ns,
                written_bytes: bytes,
                undo_lsn: 0,
            });
        }
        if info.state != "protected" {
            return Err(error(
                "V030-state",
                format!(
                    "{volume} is {}: a rewind could not be undone from here. Wait until `varve status` says protected",
                    info.state
                ),
            ));
        }
        // A store that takes nothing more could not take what undoes it either, nor end it.
        self.refresh(volume)?;
        // While it is open its instant is kept: until the span is in the history, and says where it goes.
        let held = image;
        let _claim = self.claim(volume).ok_or_else(|| {
            error(
                "V023-rewinding",
                format!("{volume} is being rewound already; wait for it (`varve status`)"),
            )
        })?;
        // Nothing is pruned until it has ended: the store may not yet know where it goes.
        self.note_taken(&info.id, false);
        self.filter()?
            .call::<_, FilterReply>(&FilterOp::RewindBegin {
                name: volume.to_owned(),
                target: target.0,
            })?;
        // The span has begun: what is below it is the present before the rewind.
        let begun = self.refresh(volume)?;
        let undo_lsn = self.with_store(&begun.id, |store| {
            Ok(store.timeline().last().map_or(0, |lsn| lsn.0))
        })?;
        let written_bytes = self.write_back(&begun, target, reporter)?;
        drop(held);
        Ok(StoreReply::Rewound {
            lsn: target.0,
            time_ns,
            written_bytes,
            undo_lsn,
        })
    }

    /// The span is open: writes what differs and ends it.
    pub(crate) fn write_back(
        &self,
        info: &VolumeInfo,
        target: Lsn,
        reporter: &mut Reporter<'_>,
    ) -> Result<u64, ControlError> {
        let mut report = |done, total| {
            let _ = reporter.report(done, total);
        };
        self.write_back_with(info, target, &mut report)
    }

    pub(crate) fn write_back_with(
        &self,
        info: &VolumeInfo,
        target: Lsn,
        report: &mut dyn FnMut(u64, u64),
    ) -> Result<u64, ControlError> {
        let image = self.with_store(&info.id, |store| {
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

    /// A daemon died in a rewind: it is finished before the device is offered again.
    pub(crate) fn finish_rewind(&self, info: &VolumeInfo, target: Lsn) -> Result<(), ControlError> {
        self.refresh(&info.name)?;
        let written = self.write_back_with(info, target, &mut |_, _| {})?;
        eprintln!(
            "varved: {}: the interrupted rewind to LSN {target} is finished ({written} bytes were still to be written)",
            info.name
        );
        Ok(())
    }
}
