//! A log that is not the one that the history was taken from: log and state file were restored from an older copy, with the disk that they lie on or with the
//! whole machine, or made anew, and the store was not. The data path is told where the history ends, and goes on behind that; what lies between is a gap, and
//! the device is compared with the history. Instants before the gap stay what they are.

use crate::service::{Service, store_error};
use varve_control::{ControlError, FilterOp, FilterReply, VolumeInfo};

/// Code of the error that says so.
pub(crate) const OTHER_LOG: &str = "S025-other-log";

impl Service {
    /// Lets a volume go on behind its history. While it cannot (it is in bypass), that is tried again with the next look at its log.
    pub(crate) fn go_on_behind(&self, volume: &VolumeInfo) -> Result<(), ControlError> {
        let end = self.with_store(&volume.id, |store| {
            // Where the history ends is not known then: what cannot be read now would be written over.
            if store.is_partly_unknown() {
                return Ok(None);
            }
            let sequence = store.newest().unwrap_or_default();
            let lsn = store.timeline().end();
            let time = store.time_of(lsn).map_err(|e| store_error(&e))?;
            Ok(Some((sequence, lsn, time)))
        })?;
        let Some(end) = end else {
            return Ok(());
        };
        let op = FilterOp::GoOnAbove {
            name: volume.name.clone(),
            sequence: end.0.0,
            lsn: end.1.0,
            since_ns: end.2.0,
        };
        if let FilterReply::Wanted { wanted: true } = self.filter()?.call(&op)? {
            eprintln!(
                "varved: {}: the log is another one than the history was taken from: it was restored from an older copy, or made anew. What it holds is given up; the history \
                 goes on behind its end, and the device is compared with it",
                volume.name
            );
        }
        Ok(())
    }
}
