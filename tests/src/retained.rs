//! Policies for sample histories, and what must be true of what they leave.

use crate::sample::{self, Sample, read};
use varve_format::{KeptEntry, Lsn, WallTime};
use varve_store::{Compression, Ladder, Policy, Rung, VolumeStore};

/// A policy by fractions of a history's length in time.
#[must_use]
pub fn policy(length: i64, all: i64, rungs: &[(i64, i64)]) -> Policy {
    let rung = |(step, age): &(i64, i64)| Rung {
        step: length / step,
        age: length * age / 100,
    };
    Policy {
        ladder: Ladder {
            all: Some(length * all / 100),
            rungs: rungs.iter().map(rung).collect(),
        },
        immutable: 0,
    }
}

/// When the history ends.
///
/// # Panics
/// If that cannot be told.
#[must_use]
pub fn end_time(store: &VolumeStore) -> WallTime {
    store.time_of(store.timeline().end()).unwrap()
}

/// How long it is, in nanoseconds.
///
/// # Panics
/// If there is none.
#[must_use]
pub fn length(store: &VolumeStore) -> i64 {
    end_time(store).0 - store.segments().next().unwrap().time_start.0
}

/// Takes what a policy says now into use; gives whether anything changed.
///
/// # Panics
/// If it is otherwise.
pub fn keep(store: &mut VolumeStore, policy: &Policy) -> bool {
    let plan = store.plan(policy, end_time(store)).run().unwrap();
    plan.is_some_and(|plan| store.keep(&plan).unwrap())
}

/// Prunes all that is to be pruned; gives how many segments were written anew.
///
/// # Panics
/// If it is otherwise.
pub fn sweep(store: &mut VolumeStore) -> u64 {
    sample::sweep(store, Compression::Zstd(1)).unwrap()
}

/// Everything that resolves reads as it was recorded; everything else is refused, with neighbours that resolve.
///
/// # Panics
/// If it is otherwise.
pub fn check(sample: &mut Sample, others: u64) {
    let kept: Vec<KeptEntry> = sample.store.kept().entries.clone();
    let below = sample.store.kept().below;
    let end = sample.store.timeline().end();
    for lsn in kept.iter().map(KeptEntry::lsn).chain([below, end]) {
        assert_eq!(sample.store.timeline().check(lsn), Ok(lsn));
        assert!(read(&sample.store, lsn) == sample.image(lsn), "kept {lsn}");
    }
    let (mut above, mut refused) = (0, 0);
    for _ in 0..others {
        let lsn = Lsn(3 + sample.random() % (end.0 - 2));
        match sample.store.timeline().check(lsn) {
            Ok(lsn) => {
                assert!(read(&sample.store, lsn) == sample.image(lsn), "LSN {lsn}");
                above += 1;
            }
            Err(outside) => {
                assert!(outside.pruned && lsn < below, "{lsn}: {outside:?}");
                for near in outside.before.into_iter().chain(outside.after) {
                    assert!(sample.store.timeline().check(near).is_ok(), "{near}");
                }
                assert!(outside.before.is_none_or(|before| before < lsn));
                assert!(outside.after.is_some_and(|after| after > lsn));
                refused += 1;
            }
        }
    }
    assert!(
        refused > 0 && (above > 0 || others < 20),
        "{above} {refused}"
    );
}
