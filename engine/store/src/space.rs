//! What goes where history takes more space than it may: the oldest instants of the list, and when none of them is left that may go, the limit below
//! which there is a list moves on. A part at a time: what a step freed is seen before the next one.
//!
//!   kept │ kept │ kept │ …  below ── every instant ── end
//!   ^^^^ first               ^^^^ then
//!
//! Pins, instants at which images are open, the target of a rewind and what is younger than it is told never go; like every striking (see `kept`) this
//! is durable before anything is deleted.

use crate::kept::KeptInstants;
use crate::retention::limit_behind;
use crate::{Nanoseconds, StoreError, StoredSegment, VolumeStore};
use varve_format::{KeptEntry, Lsn, WallTime};

/// One in so many of what may go goes at a time.
const SHARE: usize = 16;

/// What goes next.
#[derive(Clone, Debug)]
pub struct Thinning {
    kept: KeptInstants,
    /// The time of the oldest instant that goes.
    pub oldest: WallTime,
    /// The first instant that there is afterwards.
    pub begins: WallTime,
}

impl VolumeStore {
    /// What goes next; None: nothing that is older than `leave` may, at `now` by the store's clock. Nothing is read for it.
    #[must_use]
    pub fn next_to_thin(&self, leave: Nanoseconds, now: WallTime) -> Option<Thinning> {
        let young = WallTime(now.0.saturating_sub(leave));
        let kept = self.kept();
        let needed = self.needed_instants();
        let may_go = |entry: &&KeptEntry| {
            entry.lsn() < kept.below
                && entry.time() <= young
                && !entry.is_pinned()
                && !needed.contains(&entry.lsn())
        };
        let Some(first) = kept.entries.iter().find(may_go) else {
            return self.move_limit(young, &needed);
        };
        let mut going = kept.entries.iter().filter(may_go).count().div_ceil(SHARE);
        let mut left = (**kept).clone();
        left.entries.retain(|entry| {
            let goes = going > 0 && may_go(&entry);
            going -= usize::from(goes);
            !goes
        });
        Some(Thinning {
            oldest: first.time(),
            begins: begins(&left),
            kept: left,
        })
    }

    /// The limit moves over one in so many of the bytes behind it.
    fn move_limit(&self, young: WallTime, needed: &[Lsn]) -> Option<Thinning> {
        let kept = self.kept();
        let behind = |segment: &&StoredSegment| segment.lsn_end > kept.below;
        let every: u64 = self.segments().filter(behind).map(|s| s.stored_bytes).sum();
        let mut passed = 0;
        for segment in self.segments().filter(behind) {
            if segment.stored_at > young {
                break;
            }
            passed += segment.stored_bytes;
            let resolves = self.timeline().check(segment.lsn_end).is_ok();
            if passed < every / SHARE as u64 || !resolves {
                continue;
            }
            // By the segment, not by when it was taken: after a while without the daemon many were taken at once.
            let moved = limit_behind(&self.shared_segments(), self.timeline(), |passed| {
                passed.sequence <= segment.sequence
            });
            let Some((below, time)) = moved.filter(|(lsn, _)| *lsn > kept.below) else {
                continue;
            };
            // Whatever a record says: times are compared with it.
            let (oldest, most) = (kept.below_time.0, young.0.max(kept.below_time.0));
            let mut left = KeptInstants {
                below,
                below_time: WallTime(time.0.clamp(oldest, most)),
                entries: kept.entries.clone(),
            };
            let stays = |entry: &KeptEntry| {
                entry.lsn() < kept.below || entry.is_pinned() || needed.contains(&entry.lsn())
            };
            left.entries.retain(stays);
            let first = self.segments().next()?.time_start;
            return Some(Thinning {
                oldest: if kept.below == Lsn(0) {
                    first
                } else {
                    kept.below_time
                },
                begins: begins(&left),
                kept: left,
            });
        }
        None
    }

    /// Lets it go, durably. Says whether anything changed.
    pub fn thin(&mut self, thinning: &Thinning) -> Result<bool, StoreError> {
        self.take_list(thinning.kept.clone())
    }
}

fn begins(kept: &KeptInstants) -> WallTime {
    let first = kept.entries.first();
    first.map_or(kept.below_time, |entry| entry.time())
}
