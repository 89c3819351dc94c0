//! A volume in doubt is compared with its history, so that only what differs is copied into the log again.

use crate::compare::{open_origin, restore_error};
use crate::service::{Service, error, store_error};
use varve_control::{ControlError, FilterOp, FilterReply, VolumeInfo};
use varve_restore::equal_blocks;
use varve_store::Image;

/// Ends a comparison.
const ALL: u64 = u64::MAX;

impl Service {
    /// Compares, and tells the data path block by block; gives the bytes that are equal, or nothing if it was not wanted any more. Whatever goes wrong ends the comparison; everything that is left is copied then.
    pub(crate) fn verify(&self, volume: &VolumeInfo) -> Result<Option<u64>, ControlError> {
        let number = volume.verify_wanted;
        let mut filter = self.filter()?;
        let mut tell = |below: u64, equal: Vec<(u64, u64)>| {
            let op = FilterOp::Verified {
                name: volume.name.clone(),
                number,
                below,
                equal,
            };
            match filter.call(&op)? {
                FilterReply::Wanted { wanted } => Ok(wanted),
                _ => Err(error("C005-answer", "blkfilter gave an unexpected answer")),
            }
        };
        if !tell(0, Vec::new())? {
            return Ok(None);
        }
        let outcome = self.compare_blocks(volume, &mut tell);
        let ended = tell(ALL, Vec::new());
        outcome.and_then(|bytes| ended.map(|_| Some(bytes)))
    }

    fn compare_blocks(
        &self,
        volume: &VolumeInfo,
        tell: &mut dyn FnMut(u64, Vec<(u64, u64)>) -> Result<bool, ControlError>,
    ) -> Result<u64, ControlError> {
        self.refresh(&volume.name)?;
        let image = self.with_store(&volume.id, |store| {
            // What is equal to an image that lacks a segment is another block once that can be read: everything is copied.
            if store.is_partly_unknown() {
                return Err(error(
                    "S026-unknown",
                    "a part of the history cannot be read now: nothing is taken for equal, everything is copied",
                ));
            }
            Image::open(store, store.timeline().end()).map_err(|e| store_error(&e))
        })?;
        let origin = open_origin(&volume.device)?;
        // What is read may lie in the disk's cache only, put there by whoever wrote without Varve: it must not be lost once it counts as known.
        origin.sync_all()?;
        let mut bytes = 0;
        equal_blocks(&image, &origin, volume.bytes, |below, equal| {
            bytes += equal.iter().map(|range| range.1).sum::<u64>();
            tell(below, equal).map_err(|e| e.to_string())
        })
        .map_err(|e| restore_error(&e))?;
        Ok(bytes)
    }
}
