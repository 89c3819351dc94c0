//! Proof on demand: `varve scrub` reads everything again, `varve check` looks at the structure. Damage is told with instants and blocks.

use crate::service::{Service, error, store_error};
use std::ops::ControlFlow;
use std::time::{Duration, Instant};
use varve_control::{ControlError, DamageInfo, Reporter, StoreReply};
use varve_format::{Lsn, SegmentSequence};
use varve_store::{Damage, Scrubbed};

impl Service {
    /// Reads a volume's whole history. A scrub that was broken off without having found anything goes on where it was.
    pub(crate) fn scrub(
        &self,
        volume: &str,
        bytes_per_second: Option<u64>,
        reporter: &mut Reporter<'_>,
    ) -> Result<StoreReply, ControlError> {
        let id = self.id_of(volume)?;
        let (job, from) = self.with_store(&id, |store| {
            store
                .refuse_without_key(Lsn(u64::MAX))
                .map_err(|e| store_error(&e))?;
            Ok((store.scrub(), store.scrub_position()))
        })?;
        let from = from.unwrap_or(SegmentSequence(0));
        let (began, total) = (Instant::now(), job.bytes());
        let skipped = job.bytes_below(from);
        let mut gone = false;
        let found = job.run(from, |next, found| {
            if let Some(rate) = bytes_per_second.filter(|rate| *rate > 0) {
                let due = Duration::from_secs_f64(found.bytes as f64 / rate as f64);
                std::thread::sleep(due.saturating_sub(began.elapsed()));
            }
            if found.damage.is_empty() && next.0 != u64::MAX {
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
        self.if_open(&id, |store| {
            store.discard_maps(&found);
            // What was found counts more than that it is noted.
            if let Err(error) = store.note_scrub(None) {
                eprintln!("varved: {volume}: {error}");
            }
        });
        Ok(reply(&found, from))
    }

    /// Looks at the structure of a volume's history.
    pub(crate) fn check(&self, volume: &str) -> Result<StoreReply, ControlError> {
        let id = self.id_of(volume)?;
        let job = self.with_store(&id, |store| Ok(store.scrub()))?;
        let found = Scrubbed {
            segments: job.segment_count(),
            damage: job.structure(),
            ..Scrubbed::default()
        };
        Ok(reply(&found, SegmentSequence(0)))
    }
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
    }
}
