//! The space that all histories together take, and what goes where that is more than it may be: of whichever history has the oldest instants, these.
//!
//! Only the store's own files count: whatever else fills the disk never costs history.

use crate::describe::clock;
use crate::retention::per_day;
use crate::service::Service;
use nix::sys::statvfs::statvfs;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{MutexGuard, PoisonError};
use varve_control::{SpaceInfo, space_bytes};
use varve_format::WallTime;
use varve_store::{Nanoseconds, StoreError, Thinning, VolumeStore};

/// What is younger than this does not go for space, unless the policy has an immutable window of its own.
const LEAVE_NS: Nanoseconds = 3_600_000_000_000;

impl Service {
    /// What histories that are open take; `policy`: what they may.
    pub(crate) fn space(&self, policy: &str) -> SpaceInfo {
        let disk = statvfs(&self.paths().store());
        let bytes = |blocks: fn(&nix::sys::statvfs::Statvfs) -> u64| {
            disk.as_ref()
                .map_or(0, |disk| blocks(disk) * disk.fragment_size())
        };
        let limit = space_bytes(policy, bytes(|disk| disk.blocks()));
        let mut space = SpaceInfo {
            policy: policy.to_owned(),
            limit_bytes: limit.ok().flatten().unwrap_or(0),
            free_bytes: bytes(|disk| disk.blocks_available()),
            ..SpaceInfo::default()
        };
        let now = WallTime(self.clock_ns());
        for id in self.open_ids() {
            self.if_open(&id, |store| {
                space.stored_bytes += store.stored_bytes();
                space.unsettled_bytes += store.unsettled_bytes();
                space.bytes_per_day += per_day(store, now);
                let first = store.segments().next().map(|first| first.stored_at.0);
                let since = first.map_or(0, |first| now.0.saturating_sub(first));
                space.history_ns = space.history_ns.max(since);
            });
        }
        space.stuck = self.space_is_stuck.load(Relaxed) && space.excess_bytes() > 0;
        if space.stuck {
            space.held_up_by.clone_from(&self.held_up_by());
        }
        space
    }

    /// Lets the oldest instants go if there is too much; says so, in words. `ready`: whether anything may go of a history now. If not, and it has the oldest
    /// instants, it is waited for: the others do not pay for it.
    pub(crate) fn make_room(
        &self,
        policy: &str,
        immutable: Nanoseconds,
        ready: impl Fn(&str) -> bool,
    ) -> Result<Option<String>, (String, StoreError)> {
        let space = self.space(policy);
        if space.excess_bytes() == 0 {
            self.space_is_stuck.store(false, Relaxed);
            return Ok(None);
        }
        let leave = if immutable > 0 { immutable } else { LEAVE_NS };
        let now = WallTime(self.clock_ns());
        // What is not known is not decided about, nor do others pay for it: which histories hold up what is no older than they are.
        let undecided = |store: &mut VolumeStore| {
            let is_undecided = store.is_partly_unknown() || store.kept_is_lost();
            is_undecided.then(|| store.oldest_time())
        };
        let undecided: Vec<(WallTime, String)> = self
            .open_ids()
            .into_iter()
            .filter_map(|id| Some((self.if_open(&id, undecided)??, id)))
            .collect();
        let next = |id: String| {
            let thinning = self.if_open(&id, |store| store.next_to_thin(leave, now));
            Some((thinning.flatten()?, id))
        };
        let mut nexts: Vec<(Thinning, String)> =
            self.open_ids().into_iter().filter_map(next).collect();
        nexts.sort_by_key(|(thinning, _)| thinning.oldest);
        let (mut held_up, mut waits) = (None, false);
        let have_next: Vec<String> = nexts.iter().map(|(_, id)| id.clone()).collect();
        for (thinning, id) in nexts {
            let older = undecided
                .iter()
                .find(|(first, other)| *other == id || *first <= thinning.oldest);
            held_up = older.map(|(_, id)| self.name_of(id));
            waits = !ready(&id);
            if held_up.is_some() || waits {
                break;
            }
            let thinned = self.if_open(&id, |store| store.thin(&thinning));
            let name = self.name_of(&id);
            match thinned.unwrap_or(Ok(false)) {
                Err(error) => return Err((id, error)),
                Ok(false) => {} // Its limit does not resolve any more.
                Ok(true) => {
                    self.space_is_stuck.store(false, Relaxed);
                    return Ok(Some(format!(
                        "{name}: histories take {} MiB, {} MiB are theirs (space = \"{policy}\"): the oldest instants go, {name} begins at {} now",
                        space.stored_bytes >> 20,
                        space.limit_bytes >> 20,
                        clock(thinning.begins.0)
                    )));
                }
            }
        }
        self.space_is_stuck.store(true, Relaxed);
        // Behind a hole nothing may go for now: there is nothing that is next.
        let behind_a_hole = |(_, id): &&(WallTime, String)| !waits && !have_next.contains(id);
        let unknown = undecided.iter().find(behind_a_hole);
        let unknown = unknown.map(|(_, id)| self.name_of(id));
        *self.held_up_by() = held_up.or(unknown).unwrap_or_default();
        Ok(None)
    }

    fn held_up_by(&self) -> MutexGuard<'_, String> {
        self.space_held_up_by
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}
