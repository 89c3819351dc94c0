//! The log and the state file are put back to an older state, or lost together, and the store is not: nothing that is written then seems to be in the history
//! already, and the history goes on.

#![allow(
    clippy::unwrap_used,
    reason = "in tests a surprise should end the test"
)]

use blkfilter::{AckPolicy, Law};
use varve_format::{Lsn, SegmentSequence, VolumeId, WallTime};
use varve_log::{CrashPlan, Disk, ReadAt};
use varve_store::{Image, Ingested, StoreError, VolumeStore, ingest};
use varve_tests::simulated::{Cut, Script, Simulated, VOLUME_BYTES};

const SEGMENT_BYTES: u64 = 320 * 1024;
const SEGMENT_COUNT: u64 = 24;

fn script(seed: u64) -> Script {
    Script {
        seed,
        requests: 60,
        log_faults: false,
        ack: AckPolicy::Async,
        copies: false,
    }
}

fn take(store: &mut VolumeStore, sim: &Simulated) -> Result<Ingested, StoreError> {
    let machine = sim.machine.borrow();
    let mut log: &[u8] = machine.content(Disk::Log);
    let below = SegmentSequence(sim.status().log.sequence.0);
    ingest(
        store,
        &mut log as &mut dyn ReadAt,
        SEGMENT_BYTES,
        SEGMENT_COUNT,
        below,
    )
}

/// Takes everything up to this moment; gives the last instant.
fn take_all(store: &mut VolumeStore, sim: &mut Simulated) -> Lsn {
    sim.seal();
    assert!(take(store, sim).unwrap().problems.is_empty());
    let end = store.timeline().end();
    assert_eq!(store.timeline().last(), Some(end));
    end
}

fn image(store: &VolumeStore, lsn: Lsn) -> Vec<u8> {
    assert_eq!(store.timeline().check(lsn), Ok(lsn));
    let mut bytes = vec![0; VOLUME_BYTES];
    Image::open(store, lsn)
        .unwrap()
        .read(0, &mut bytes)
        .unwrap();
    bytes
}

/// `restored`: what the two hold once the machine is there again; by the log and the state file as they were early in its life.
fn put_back(seed: u64, restored: &dyn Fn([Vec<u8>; 2]) -> [Vec<u8>; 2]) {
    let disks = [Disk::Log, Disk::State];
    let directory = tempfile::tempdir().unwrap();
    let mut store = VolumeStore::open(directory.path(), VolumeId([9; 16])).unwrap();
    let mut sim = Simulated::<Law>::new(script(seed));
    sim.compares = false;
    assert!(sim.start());
    for _ in 0..3 {
        assert!(sim.run(script(seed)));
    }
    let early = disks.map(|disk| sim.machine.borrow().content(disk).to_vec());
    take(&mut store, &sim).unwrap();
    let (first, first_image) = {
        let end = store.timeline().last().unwrap();
        (end, image(&store, end))
    };
    for _ in 0..2 {
        assert!(sim.run(script(seed)));
    }
    assert!(take(&mut store, &sim).unwrap().problems.is_empty());
    let end = store.timeline().end();
    let end_image = image(&store, end);
    assert!(end > first);
    // The machine comes back with an older system disk; the store and the device lie on others.
    sim.cut(Cut::Power(CrashPlan::KeepAll));
    for (disk, content) in disks.into_iter().zip(restored(early)) {
        sim.machine.borrow_mut().disk(disk).tamper(0, &content);
    }
    sim.forget_flushed();
    assert!(sim.start() && sim.run(script(seed)));
    let refused = take(&mut store, &sim);
    assert!(
        matches!(refused, Err(StoreError::OtherLog(_))),
        "seed {seed}: {refused:?}"
    );
    assert_eq!(store.timeline().end(), end);
    let since = store.time_of(end).unwrap();
    let newest = store.newest().unwrap();
    assert!(sim.go_on_above((newest, end), since));
    // Once more meanwhile does nothing.
    assert!(!sim.go_on_above((newest, end), since));
    assert!(sim.run(script(seed)));
    let taken = take(&mut store, &sim).unwrap();
    assert!(taken.problems.is_empty(), "{:?}", taken.problems);
    assert!(taken.segments > 0 && taken.below > newest);
    let last = take_all(&mut store, &mut sim);
    assert!(last > end && !store.timeline().is_incomplete());
    assert!(
        image(&store, last) == sim.machine.borrow().content(Disk::Origin),
        "seed {seed}: the image at the end is not the device"
    );
    assert!(image(&store, first) == first_image && image(&store, end) == end_image);
    let gaps = &store.timeline().gaps;
    assert!(
        gaps.iter()
            .any(|gap| WallTime(gap.entry.offset.get() as i64) == since),
        "no gap begins where the history ended"
    );
    // It is its own log from now on, also after a restart of either.
    sim.cut(Cut::Power(CrashPlan::DropAll));
    assert!(sim.start() && sim.run(script(seed)));
    drop(store);
    let mut store = VolumeStore::open(directory.path(), VolumeId([9; 16])).unwrap();
    let last = take_all(&mut store, &mut sim);
    assert!(image(&store, last) == sim.machine.borrow().content(Disk::Origin));
}

#[test]
fn a_log_that_was_put_back_is_not_taken_for_what_the_history_has() {
    for seed in 0..8 {
        put_back(seed, &|early| early);
    }
}

#[test]
fn a_log_that_was_made_anew_is_not_taken_for_what_the_history_has() {
    for seed in 10..18 {
        put_back(seed, &|early| early.map(|disk| vec![0; disk.len()]));
    }
}

/// The log tells of a comparison with a history that is lost since: what was equal to that is not in the log. Nothing resolves by it.
#[test]
fn a_comparison_with_a_history_that_is_lost_makes_up_for_nothing() {
    for seed in 20..26 {
        let mut sim = Simulated::<Law>::new(script(seed));
        assert!(sim.start() && sim.run(script(seed)));
        let lost = sim.status().log.sequence;
        sim.close();
        sim.tamper(4096, &[0xee; 512]);
        sim.forget_flushed();
        assert!(sim.start() && sim.run(script(seed)));
        assert!(sim.found_equal > 0, "nothing was compared");
        sim.seal();
        // All that was sealed before the comparison is gone from the log, and so is the store.
        let geometry = SEGMENT_BYTES as usize;
        for sequence in 0..=lost.0 {
            let place = (sequence % SEGMENT_COUNT) as usize * geometry;
            sim.machine
                .borrow_mut()
                .disk(Disk::Log)
                .tamper(place, &[0; 4096]);
        }
        let directory = tempfile::tempdir().unwrap();
        let mut store = VolumeStore::open(directory.path(), VolumeId([9; 16])).unwrap();
        let taken = take(&mut store, &sim).unwrap();
        assert!(!taken.problems.is_empty());
        if let Some(last) = store.timeline().last() {
            let found = image(&store, last);
            let device = sim.machine.borrow().content(Disk::Origin).to_vec();
            assert!(found == device, "seed {seed}: {last} is another image");
            panic!("seed {seed}: {last} resolves");
        }
    }
}
