//! The device against its history, and one instant against another.

use crate::resolve::{ENDED, resolve};
use crate::service::{Service, UNPROTECTED, error, now_ns, store_error};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;
use varve_control::{ControlError, Instant, Reporter, StoreReply};
use varve_log::open_for_reading;
use varve_restore::{RestoreError, differences, differing};
use varve_store::Check;

impl Service {
    /// Ranges that were written between two instants (by records: a rewrite of the same bytes counts).
    pub(crate) fn diff(
        &self,
        volume: &str,
        from: &Instant,
        to: &Instant,
    ) -> Result<StoreReply, ControlError> {
        let (info, behind) = self.refresh_if_possible(volume)?;
        let changes = self.with_store(&info.id, |store| {
            let resolve = |instant| resolve(store, instant, behind.as_ref());
            let (from, to) = (resolve(from)?, resolve(to)?);
            let (from, to) = (from.min(to), from.max(to));
            store.changes(from, to).map_err(|e| store_error(&e))
        })?;
        // Without the lock: the logs of all volumes must go on being drained.
        let ranges = changes.ranges().map_err(|e| store_error(&e))?;
        let bytes = ranges.iter().map(|range| range.1).sum();
        Ok(StoreReply::Ranges { ranges, bytes })
    }

    /// Origin against image. Blocks that are written meanwhile differ for a moment, so whatever differs is looked at again, with a newer image.
    pub(crate) fn compare(
        &self,
        volume: &str,
        reporter: &mut Reporter<'_>,
    ) -> Result<StoreReply, ControlError> {
        let info = self.info(volume)?;
        if info.state == UNPROTECTED {
            return Err(error(
                ENDED,
                format!(
                    "{volume} is protected no more: what was written to its device since is in no history"
                ),
            ));
        }
        let (image, _) = self.image(volume, &Instant::Now)?;
        let origin = open_origin(&info.device)?;
        let mut suspects: Vec<(u64, u64)> = Vec::new();
        let note = |offset: u64, bytes: &[u8], list: &mut Vec<(u64, u64)>| {
            list.push((offset, bytes.len() as u64))
        };
        differences(
            &image,
            &origin,
            |offset, bytes| {
                note(offset, bytes, &mut suspects);
                Ok(())
            },
            |done, total| reporter.report(done, total),
        )
        .map_err(|e| restore_error(&e))?;
        let mut looked_at = image.lsn();
        for _ in 0..20 {
            if suspects.is_empty() {
                break;
            }
            std::thread::sleep(Duration::from_millis(100));
            let (image, _) = self.image(volume, &Instant::Now)?;
            let mut still = Vec::new();
            for (offset, length) in suspects {
                let theirs = read_aligned(&origin, offset, length)?;
                let differing = differing(&image, offset, &theirs);
                still.extend(differing.map_err(|e| store_error(&e))?);
            }
            suspects = still;
            looked_at = image.lsn();
        }
        if !suspects.is_empty() {
            // What is being written all the time never stands still for a look: it is not said to differ.
            let (newer, _) = self.image(volume, &Instant::Now)?;
            let changes = self.with_store(&info.id, |store| {
                let changes = store.changes(looked_at, newer.lsn());
                changes.map_err(|e| store_error(&e))
            })?;
            let written = changes.ranges().map_err(|e| store_error(&e))?;
            suspects.retain(|(offset, length)| {
                let overlaps = |(start, bytes): &(u64, u64)| {
                    *start < offset + length && *offset < start + bytes
                };
                !written.iter().any(overlaps)
            });
        }
        let bytes = suspects.iter().map(|range| range.1).sum();
        let check = Check {
            time_ns: now_ns(),
            lsn: image.lsn().0,
            differing_bytes: bytes,
        };
        self.with_store(&info.id, |store| {
            store.note_check(&check).map_err(|e| store_error(&e))
        })?;
        Ok(StoreReply::Ranges {
            ranges: suspects,
            bytes,
        })
    }
}

pub(crate) fn open_origin(path: &str) -> Result<File, ControlError> {
    open_for_reading(Path::new(path)).map_err(|e| error("V013-device", format!("{path}: {e}")))
}

pub(crate) fn read_aligned(file: &File, offset: u64, length: u64) -> Result<Vec<u8>, ControlError> {
    let mut space = vec![0u8; length as usize + 4096];
    let skip = space.as_ptr().align_offset(4096);
    file.read_exact_at(&mut space[skip..skip + length as usize], offset)?;
    Ok(space[skip..skip + length as usize].to_vec())
}

pub(crate) fn restore_error(failed: &RestoreError) -> ControlError {
    match failed {
        RestoreError::Store(inner) => store_error(inner),
        other => error("R001-restore", other),
    }
}
