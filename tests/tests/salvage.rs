//! Salvage: what can be read of a store is a store again, also if it was pruned meanwhile; what cannot be is named, and nothing else is lost.

#![allow(
    clippy::unwrap_used,
    reason = "in tests a surprise should end the test"
)]

use varve_format::Lsn;
use varve_store::{Compression, Image, StoreError, VolumeStore, salvage};
use varve_tests::sample::{Sample, VOLUME, files, prune_to, read, scrub};

const VOLUME_BYTES: u64 = 2 << 20;
const SEGMENT_BYTES: u64 = 96 << 10;

fn history(root: &std::path::Path) -> Sample {
    let mut sample = Sample::new(root, VOLUME_BYTES, SEGMENT_BYTES, true);
    sample.mixed(800);
    sample.settle_all(Compression::Lz4);
    sample
}

#[test]
fn a_salvaged_store_is_the_store() {
    let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mut sample = history(from.path());
    let end = sample.store.timeline().end();
    sample.store.pin(Lsn(end.0 / 3)).unwrap();
    let to = to.path().join("new");
    let (mut last, mut total) = (0, 0);
    let done = salvage(from.path(), &to, |done, all| {
        assert!(done >= last && done <= all);
        (last, total) = (done, all);
        true
    })
    .unwrap();
    assert!(done.unreadable.is_empty() && done.bytes == total && last == total);
    let store = VolumeStore::open(&to, VOLUME).unwrap();
    assert!(scrub(&store).damage.is_empty());
    for lsn in [Lsn(end.0 / 3), Lsn(end.0 / 2), end] {
        assert!(read(&store, lsn) == sample.image(lsn), "{lsn}");
    }
    assert!(store.kept() == sample.store.kept());
    drop(store);
    let again = salvage(from.path(), &to, |_, _| true);
    assert!(matches!(again, Err(StoreError::NotEmpty(_))));
}

/// A failing disk is not read again for what it has given already.
#[test]
fn one_that_was_broken_off_goes_on() {
    let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mut sample = history(from.path());
    let end = sample.store.timeline().end();
    sample.store.pin(Lsn(end.0 / 3)).unwrap();
    let mut before = 0;
    let broken_off = salvage(from.path(), to.path(), |_, _| {
        before += 1;
        before < 30
    });
    assert!(matches!(broken_off, Err(StoreError::Interrupted)));
    // One of them has changed since: it is what it is now, not what it was.
    let changed = &files(from.path(), "runs")[3];
    let bytes = std::fs::read(changed).unwrap();
    let copy = to.path().join(changed.strip_prefix(from.path()).unwrap());
    assert!(std::fs::read(&copy).unwrap() == bytes, "it was not copied");
    std::fs::write(&copy, &bytes[1..]).unwrap();
    let (mut files, mut total) = (0, 0);
    let done = salvage(from.path(), to.path(), |_, all| {
        (files, total) = (files + 1, all);
        true
    })
    .unwrap();
    assert!(done.unreadable.is_empty() && done.bytes == total);
    assert_eq!(
        done.files - files,
        before - 2,
        "{files} of {} were copied again",
        done.files
    );
    assert!(std::fs::read(&copy).unwrap() == bytes);
    let store = VolumeStore::open(to.path(), VOLUME).unwrap();
    assert!(scrub(&store).damage.is_empty());
    for lsn in [Lsn(end.0 / 3), Lsn(end.0 / 2), end] {
        assert!(read(&store, lsn) == sample.image(lsn), "{lsn}");
    }
    assert!(store.kept() == sample.store.kept());
}

#[test]
fn what_was_pruned_meanwhile_is_what_a_crash_would_have_left() {
    // Pruned before the first file, and after each of the first thirty.
    for turn in (0..30).step_by(3) {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let mut sample = history(from.path());
        let end = sample.store.timeline().end();
        assert!(prune_to(&mut sample.store, 40, Compression::Lz4).unwrap() > 0);
        let pin = Lsn(sample.store.kept().below.0 + 20);
        sample.store.pin(pin).unwrap();
        let mut calls = 0;
        let store = &mut sample.store;
        let done = salvage(from.path(), to.path(), |_, _| {
            if calls == turn {
                assert!(prune_to(store, 5, Compression::Lz4).unwrap() > 0);
            }
            calls += 1;
            true
        })
        .unwrap();
        assert!(calls > 30, "{calls} files only");
        assert!(done.unreadable.is_empty(), "{:?}", done.unreadable);
        let copy = VolumeStore::open(to.path(), VOLUME).unwrap();
        assert!(
            scrub(&copy).damage.is_empty(),
            "turn {turn}: {:?}",
            scrub(&copy).damage
        );
        assert!(copy.kept() == sample.store.kept(), "turn {turn}");
        for lsn in [pin, copy.kept().below, end] {
            assert_eq!(copy.timeline().check(lsn), Ok(lsn), "turn {turn}");
            assert!(read(&copy, lsn) == sample.image(lsn), "turn {turn}: {lsn}");
        }
    }
}

/// Where a segment and its run are damaged, a map is the last to know what they held: without it every instant behind them would be lost.
#[test]
fn maps_that_are_the_last_to_know_are_salvaged() {
    let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mut sample = history(from.path());
    sample.map_all();
    let end = sample.store.timeline().end();
    let wanted = sample.image(end);
    let bad = |path: &std::path::Path, at: usize| {
        let mut bytes = std::fs::read(path).unwrap();
        let at = at.min(bytes.len() - 1);
        bytes[at] ^= 1;
        std::fs::write(path, bytes).unwrap();
    };
    // A byte of the run's records, and one of what the segment holds.
    bad(&files(from.path(), "runs")[1], 4096 + 20);
    bad(&files(from.path(), "segments")[1], 4096 + 300);
    salvage(from.path(), to.path(), |_, _| true).unwrap();
    let store = VolumeStore::open(to.path(), VOLUME).unwrap();
    let image = Image::open(&store, end).unwrap();
    let mut bytes = [0; 4096];
    let whole = wanted.chunks(4096).enumerate().filter(|(block, wanted)| {
        image
            .read(*block as u64 * 4096, &mut bytes)
            .is_ok_and(|()| bytes == *wanted)
    });
    assert!(whole.count() as u64 > VOLUME_BYTES / 4096 / 2);
}

#[test]
fn what_is_lost_is_named_and_the_rest_is_there() {
    let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let sample = history(from.path());
    let end = sample.store.timeline().end();
    // In place of a segment there is something that is no file, as after a bad repair.
    let victim = files(from.path(), "segments").swap_remove(2);
    std::fs::remove_file(&victim).unwrap();
    std::os::unix::net::UnixListener::bind(&victim).unwrap();
    let done = salvage(from.path(), to.path(), |_, _| true).unwrap();
    assert_eq!(done.unreadable, [(victim, 0, 0)]);
    let store = VolumeStore::open(to.path(), VOLUME).unwrap();
    let damage = scrub(&store).damage;
    assert!(!damage.is_empty());
    // Its run tells what it held: everything else reads as it was.
    let wanted = sample.image(end);
    let image = Image::open(&store, end).unwrap();
    let mut bytes = [0; 4096];
    let mut lost = 0;
    for (block, wanted) in (0..).zip(wanted.chunks(4096)) {
        match image.read(block * 4096, &mut bytes) {
            Ok(()) => assert!(bytes == wanted),
            Err(_) => lost += 1,
        }
    }
    assert!(
        lost > 0 && lost < VOLUME_BYTES / 4096 / 2,
        "{lost} blocks are lost"
    );
}
