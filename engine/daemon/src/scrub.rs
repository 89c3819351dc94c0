//! Proof on demand: `varve scrub` reads everything again, `varve check` looks at the structure. Damage is told with instants and blocks.

use crate::service::{Service, error, store_error};
use std::ops::ControlFlow;
use std::path::Path;
use std::time::{Duration, Instant};
use varve_control::{ControlError, DamageInfo, Reporter, Scrubbing, StoreReply};
use varve_format::{Lsn, SegmentSequence, VolumeId};
use varve_store::{Damage, Scrubbed, VolumeStore, salvage, volume_directory};

impl Service {
    /// Reads a volume's whole history, or compares what is stored with its checksums, or makes its indexes anew. The first, if it was broken off without
    /// having found anything, goes on where it was.
    pub(crate) fn scrub(
        &self,
        volume: &str,
        bytes_per_second: Option<u64>,
        how: Scrubbing,
        reporter: &mut Reporter<'_>,
    ) -> Result<StoreReply, ControlError> {
        let id = self.id_of(volume)?;
        let (job, from) = self.with_store(&id, |store| {
            let job = store.scrub();
            if how == Scrubbing::Stored {
                return Ok((job.stored(), None));
            }
            store
                .refuse_without_key(Lsn(u64::MAX))
                .map_err(|e| store_error(&e))?;
            Ok(match how {
                Scrubbing::ForIndexes => (job.for_indexes(), None),
                _ => (job, store.scrub_position()),
            })
        })?;
        let resumes = how == Scrubbing::Everything;
        let from = from.unwrap_or(SegmentSequence(0));
        let (began, total) = (Instant::now(), job.bytes());
        let skipped = job.bytes_below(from);
        let mut gone = false;
        let found = job.run(from, |next, found| {
            if let Some(rate) = bytes_per_second.filter(|rate| *rate > 0) {
                let due = Duration::from_secs_f64(found.bytes as f64 / rate as f64);
                std::thread::sleep(due.saturating_sub(began.elapsed()));
            }
            if resumes && found.damage.is_empty() && next.0 != u64::MAX {
                let _ = self.if_open(&id, |store| store.note_scrub(Some(next)));
            }
            gone = !reporter.report((skipped + found.bytes).min(total), total);
            match gone {
                true => ControlFlow::Break(()),
                false => ControlFlow::Continue(()),
            }
        });
        if gone {
            return Err(error("S012-interrupted", "the scrub was interrupted"));
        }
        let mut found = found;
        found.damage.extend(self.mend_lists(&id));
        self.if_open(&id, |store| {
            store.discard_maps(&found);
            // What was found counts more than that it is noted.
            if resumes && let Err(error) = store.note_scrub(None) {
                eprintln!("varved: {volume}: {error}");
            }
        });
        Ok(reply(&found, from))
    }

    /// Copies all that can be read of the store into a new one, and reads that again.
    pub(crate) fn salvage(
        &self,
        to: &str,
        reporter: &mut Reporter<'_>,
    ) -> Result<StoreReply, ControlError> {
        let (from, to) = (self.paths().store(), Path::new(to));
        if to.starts_with(&from) {
            return Err(error(
                "S020-not-empty",
                "the new store must lie outside the old one",
            ));
        }
        let salvaged = salvage(&from, to, |done, total| reporter.report(done, total));
        let salvaged = salvaged.map_err(|e| store_error(&e))?;
        // What is in use is known, whatever the disk gives.
        let keys = self.keys.mend(Some(to));
        let mut damage: Vec<DamageInfo> = keys
            .iter()
            .map(|what| told(&Damage::without_place(what)))
            .collect();
        for id in volumes_in(to) {
            let directory = volume_directory(to, id);
            let lists = self.if_open(&id.to_string(), |store| store.mend_lists_in(&directory));
            damage.extend(lists.unwrap_or_default().iter().map(told));
        }
        for id in volumes_in(to) {
            let keys = self.keys.of_volume(&from, &self.paths().store_policy(), id);
            let copy = VolumeStore::open_with(to, id, keys).map_err(|e| store_error(&e))?;
            let job = copy.scrub();
            let job = match copy.encrypts() {
                Err(_) => job.stored(), // Without its key it is not unpacked.
                Ok(_) => job,
            };
            let on = |_, found: &Scrubbed| match reporter
                .report(found.bytes.min(salvaged.bytes), salvaged.bytes)
            {
                true => ControlFlow::Continue(()),
                false => ControlFlow::Break(()),
            };
            let found = job.run(SegmentSequence(0), on).damage;
            damage.extend(found.iter().map(told));
        }
        let name = |path: &Path| path.display().to_string();
        Ok(StoreReply::Salvaged {
            files: salvaged.files,
            bytes: salvaged.bytes,
            unreadable: salvaged
                .unreadable
                .iter()
                .map(|(path, offset, length)| (name(path), *offset, *length))
                .collect(),
            damage,
        })
    }

    /// The small files beside a history, and the keys of the store: what of them is not what is in use is written anew.
    fn mend_lists(&self, id: &str) -> Vec<Damage> {
        let mut found: Vec<Damage> = self
            .if_open(id, |store| store.mend_lists())
            .unwrap_or_default();
        let keys = self.keys.mend(None);
        found.extend(keys.iter().map(|what| Damage::without_place(what)));
        found
    }

    /// Looks at the structure of a volume's history.
    pub(crate) fn check(&self, volume: &str) -> Result<StoreReply, ControlError> {
        let id = self.id_of(volume)?;
        let job = self.with_store(&id, |store| Ok(store.scrub()))?;
        let mut damage = job.structure();
        damage.extend(self.mend_lists(&id));
        let found = Scrubbed {
            segments: job.segment_count(),
            damage,
            ..Scrubbed::default()
        };
        Ok(reply(&found, SegmentSequence(0)))
    }
}

/// The volumes of a store, by its directories.
fn volumes_in(root: &Path) -> Vec<VolumeId> {
    let entries = std::fs::read_dir(root.join("volumes"))
        .into_iter()
        .flatten();
    entries
        .flatten()
        .filter_map(|entry| VolumeId::parse(entry.file_name().to_str()?))
        .collect()
}

fn reply(found: &Scrubbed, from: SegmentSequence) -> StoreReply {
    StoreReply::Scrubbed {
        segments: found.segments,
        bytes: found.bytes,
        history_bytes: found.history_bytes,
        from_segment: from.0,
        damage: found.damage.iter().map(told).collect(),
    }
}

fn told(damage: &Damage) -> DamageInfo {
    let instant = |at: Option<(Lsn, varve_format::WallTime)>| at.map(|(lsn, time)| (lsn.0, time.0));
    DamageInfo {
        what: damage.what.clone(),
        segment: damage.segment.map(|segment| segment.0),
        blocks: damage.blocks.clone(),
        from: instant(damage.from),
        until: instant(damage.until),
        unplaced: damage.unplaced,
    }
}
