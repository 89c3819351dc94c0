//! The space that all histories together take, and what goes where that is more than it may be: of whichever history has the oldest instants, these.
//!
//! Only the store's own files count: whatever else fills the disk never costs history.

use crate::describe::clock;
use crate::retention::per_day;
use crate::service::Service;
use nix::sys::statvfs::statvfs;
use std::sync::atomic::Ordering::Relaxed;
use varve_control::{SpaceInfo, space_bytes};
use varve_format::WallTime;
use varve_store::{Nanoseconds, StoreError};

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
            stuck: self.space_is_stuck.load(Relaxed),
            ..SpaceInfo::default()
        };
        let now = WallTime(self.clock_ns());
        for id in self.open_ids() {
            self.if_open(&id, |store| {
                space.stored_bytes += store.stored_bytes();
                space.unsettled_bytes += store.unsettled_bytes();
                space.bytes_per_day += per_day(store, now);
            });
        }
        space
    }

    /// Lets the oldest instants go if there is too much; says so, in words. `ready`: histories of which nothing waits to be pruned.
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
        let ids = self.open_ids();
        let next = |id: &String| {
            // What is not known is not decided about.
            let thinning = self.if_open(id, |store| match store.waits_for_key() {
                true => None,
                false => store.next_to_thin(leave, now),
            });
            Some((thinning.flatten()?, id.clone()))
        };
        let all_ready = ids.iter().all(|id| ready(id));
        let first = ids.iter().filter(|id| ready(id)).filter_map(next);
        let Some((thinning, id)) = first.min_by_key(|(thinning, _)| thinning.oldest) else {
            self.space_is_stuck.store(all_ready, Relaxed);
            return Ok(None);
        };
        self.space_is_stuck.store(false, Relaxed);
        let thinned = self.if_open(&id, |store| store.thin(&thinning));
        let thinned = thinned.unwrap_or(Ok(false));
        let name = self.name_of(&id);
        match thinned {
            Err(error) => Err((id, error)),
            Ok(false) => Ok(None),
            Ok(true) => Ok(Some(format!(
                "{name}: histories take {} MiB, {} MiB are theirs (space = \"{policy}\"): the oldest instants go, {name} begins at {} now",
                space.stored_bytes >> 20,
                space.limit_bytes >> 20,
                clock(thinning.begins.0)
            ))),
        }
    }
}
