//! The small files of a store, and what cannot be read of it now: nothing is struck, pruned or given up by what is not known, and what has spoilt is mended.

#![allow(
    clippy::unwrap_used,
    reason = "in tests a surprise should end the test"
)]

use std::path::{Path, PathBuf};
use varve_format::{KeptEntry, Lsn, WallTime};
use varve_store::{Compression, Secret, StoreError, StoreKeys, VolumeStore, volume_directory};
use varve_tests::retained::{check, end_time, keep, length, policy, sweep};
use varve_tests::sample::{Sample, VOLUME, files, newer, read, scrub};

const VOLUME_BYTES: u64 = 4 << 20;
const SEGMENT_BYTES: u64 = 96 << 10;
type Lose<'a> = &'a dyn Fn(&Path, &[u8]);
const LISTS: [&str; 2] = ["kept", "kept-copy"];

/// A history that was pruned, with a pin.
fn pruned(root: &Path) -> Sample {
    let mut sample = Sample::new(root, VOLUME_BYTES, SEGMENT_BYTES, true);
    sample.mixed(1500);
    let span = length(&sample.store);
    assert!(keep(&mut sample.store, &policy(span, 20, &[(20, 100)])));
    assert!(sweep(&mut sample.store) > 0);
    sample
}

fn again(sample: &mut Sample, root: &Path) {
    let elsewhere = tempfile::tempdir().unwrap();
    sample.store = VolumeStore::open(elsewhere.path(), VOLUME).unwrap();
    sample.store = VolumeStore::open(root, VOLUME).unwrap();
}

fn stored(root: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let all = ["segments", "runs"]
        .iter()
        .flat_map(|kind| files(root, kind));
    all.map(|path| (path.clone(), std::fs::read(path).unwrap()))
        .collect()
}

/// Lost, damaged, not to be read, or written by a newer version: the instants that they name stay until somebody decides.
#[test]
fn lists_that_cannot_be_read_prune_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path();
    let mut sample = pruned(root);
    let folder = volume_directory(root, VOLUME);
    let kept = sample.store.kept().clone();
    let end = sample.store.timeline().end();
    let lists = LISTS.map(|name| std::fs::read(folder.join(name)).unwrap());
    let ways: [(&str, Lose<'_>); 4] = [
        ("removed", &|path, _| std::fs::remove_file(path).unwrap()),
        ("damaged", &|path, bytes| {
            std::fs::write(path, &bytes[..bytes.len() / 2]).unwrap()
        }),
        ("not to be read", &|path, _| {
            std::fs::remove_file(path).unwrap();
            std::fs::create_dir(path).unwrap();
        }),
        ("newer", &|path, bytes| {
            std::fs::write(path, newer(bytes)).unwrap()
        }),
    ];
    for (how, lose) in ways {
        for (name, bytes) in LISTS.iter().zip(&lists) {
            lose(&folder.join(name), bytes);
        }
        let before = stored(root);
        again(&mut sample, root);
        let told = sample.store.damaged().join("\n");
        assert!(told.contains("--give-up-kept"), "{how}: {told}");
        assert!(sample.store.sweep(Compression::Lz4).is_none(), "{how}");
        let lost = |outcome: Result<bool, StoreError>| {
            assert!(
                matches!(outcome, Err(StoreError::KeptLost(_))),
                "{how}: {outcome:?}"
            );
        };
        let span = length(&sample.store);
        let policy = policy(span, 10, &[(5, 100)]);
        let plan = sample
            .store
            .plan(&policy, end_time(&sample.store))
            .run()
            .unwrap()
            .unwrap();
        lost(sample.store.keep(&plan));
        if let Some(thinning) = sample.store.next_to_thin(0, end_time(&sample.store)) {
            lost(sample.store.thin(&thinning));
        }
        lost(sample.store.pin(end).map(|()| true));
        assert_eq!(scrub(&sample.store).damage.len(), 1, "{how}");
        assert!(stored(root) == before, "{how}");
        for (name, bytes) in LISTS.iter().zip(&lists) {
            let path = folder.join(name);
            if path.is_dir() {
                std::fs::remove_dir(&path).unwrap();
            }
            std::fs::write(path, bytes).unwrap();
        }
        // They are put back: everything is as it was.
        again(&mut sample, root);
        assert!(sample.store.kept() == &kept, "{how}");
        assert_eq!(sample.store.damaged(), [""; 0], "{how}");
        check(&mut sample, 20);
    }
    // Nobody has them any more: they are given up by whoever says so.
    LISTS
        .iter()
        .for_each(|name| std::fs::remove_file(folder.join(name)).unwrap());
    again(&mut sample, root);
    assert!(sample.store.give_up_kept().unwrap());
    assert!(!sample.store.give_up_kept().unwrap());
    assert_eq!(sample.store.damaged(), [""; 0]);
    sample.store.pin(end).unwrap();
    assert!(sweep(&mut sample.store) > 0);
    again(&mut sample, root);
    assert_eq!(sample.store.damaged(), [""; 0]);
    assert!(read(&sample.store, end) == sample.image(end));
}

/// A pin that was made before anything was pruned does not go with lists that cannot be read either.
#[test]
fn a_pin_is_not_forgotten_with_its_lists() {
    let directory = tempfile::tempdir().unwrap();
    let mut sample = Sample::new(directory.path(), VOLUME_BYTES, SEGMENT_BYTES, true);
    sample.mixed(900);
    let pin = Lsn(sample.store.timeline().end().0 / 3);
    sample.store.pin(pin).unwrap();
    let folder = volume_directory(directory.path(), VOLUME);
    let bytes = std::fs::read(folder.join("kept")).unwrap();
    LISTS
        .iter()
        .for_each(|name| std::fs::write(folder.join(name), b"no list").unwrap());
    again(&mut sample, directory.path());
    let span = length(&sample.store);
    let plan = sample
        .store
        .plan(&policy(span, 20, &[]), end_time(&sample.store))
        .run()
        .unwrap();
    assert!(matches!(
        sample.store.keep(&plan.unwrap()),
        Err(StoreError::KeptLost(_))
    ));
    std::fs::write(folder.join("kept"), bytes).unwrap();
    again(&mut sample, directory.path());
    assert!(
        sample
            .store
            .kept()
            .get(pin)
            .is_some_and(KeptEntry::is_pinned)
    );
}

/// Rotten while the history is open: a scrub or a check writes them anew from what is in use.
#[test]
fn lists_that_spoil_while_they_are_in_use_are_written_anew() {
    let directory = tempfile::tempdir().unwrap();
    let sample = pruned(directory.path());
    let folder = volume_directory(directory.path(), VOLUME);
    assert_eq!(sample.store.mend_lists(), []);
    let whole = std::fs::read(folder.join("kept")).unwrap();
    for bit in [3, 500, whole.len() * 8 - 1] {
        for name in LISTS {
            let mut bytes = whole.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            std::fs::write(folder.join(name), bytes).unwrap();
        }
        let mended = sample.store.mend_lists();
        assert_eq!(mended.len(), 2, "{mended:?}");
        for name in LISTS {
            assert!(std::fs::read(folder.join(name)).unwrap() == whole);
        }
        assert_eq!(sample.store.mend_lists(), []);
    }
    std::fs::remove_file(folder.join("kept-copy")).unwrap();
    assert_eq!(sample.store.mend_lists().len(), 1);
    assert_eq!(sample.store.mend_lists(), []);
}

#[test]
fn keys_that_spoil_while_they_are_in_use_are_written_anew() {
    let (directory, copy) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let root = directory.path();
    let secret = Secret::KeyFile(vec![7; 64].into());
    let mut keys = StoreKeys::load(root);
    keys.create(&secret).unwrap();
    keys.of_volume(VOLUME).1.unwrap();
    assert_eq!(keys.mend(), [""; 0]);
    let whole = std::fs::read(root.join("keys")).unwrap();
    for name in ["keys", "keys-copy"] {
        let mut bytes = whole.clone();
        bytes[70] ^= 1;
        std::fs::write(root.join(name), bytes).unwrap();
    }
    assert_eq!(keys.mend().len(), 2);
    assert_eq!(keys.mend(), [""; 0]);
    for name in ["keys", "keys-copy"] {
        assert!(std::fs::read(root.join(name)).unwrap() == whole);
    }
    // A copy whose disk gave neither gets both.
    assert_eq!(keys.mend_in(copy.path()).len(), 2);
    StoreKeys::load(copy.path()).unlock(&secret).unwrap();
    // What another process has written is not written over.
    let mut other = StoreKeys::load(root);
    other.unlock(&secret).unwrap();
    other.rotate(&Secret::KeyFile(vec![8; 64].into())).unwrap();
    let newer = std::fs::read(root.join("keys")).unwrap();
    assert_eq!(keys.mend().len(), 2);
    assert!(std::fs::read(root.join("keys")).unwrap() == newer);
}

/// Two processes that share a store: neither writes over a key that the other has made.
#[test]
fn keys_that_another_process_has_made_are_not_written_over() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path();
    let secret = Secret::KeyFile(vec![7; 64].into());
    let mut first = StoreKeys::load(root);
    first.create(&secret).unwrap();
    let mut second = StoreKeys::load(root);
    second.unlock(&secret).unwrap();
    first.of_volume(VOLUME).1.unwrap();
    let other = varve_format::VolumeId([6; 16]);
    assert!(matches!(
        second.of_volume(other).1,
        Err(StoreError::Unread(_))
    ));
    // It reads them again, and goes on.
    second.refresh().unwrap();
    second.unlock(&secret).unwrap();
    second.of_volume(other).1.unwrap();
    let mut all = StoreKeys::load(root);
    all.unlock(&secret).unwrap();
    assert_eq!(all.info().unwrap().keys, 2);
}

/// A segment whose disk does not answer when the history is opened is not one that has gone.
#[test]
fn what_cannot_be_read_now_may_be_read_later() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path();
    let mut sample = Sample::new(root, VOLUME_BYTES, SEGMENT_BYTES, true);
    sample.mixed(1500);
    sample.map_all();
    let end = sample.store.timeline().end();
    assert!(!sample.store.is_partly_unknown());
    let (maps, runs, segments) = (
        files(root, "maps"),
        files(root, "runs"),
        files(root, "segments"),
    );
    let away = tempfile::tempdir().unwrap();
    // In the midst, and at the beginning: then nobody knows how far back it goes.
    for index in [2, 0] {
        let files_of_it = [(&runs[index], "run"), (&segments[index], "seg")];
        for (victim, name) in files_of_it {
            std::fs::rename(victim, away.path().join(name)).unwrap();
            // Cannot be opened, as on a disk that gives errors.
            std::os::unix::fs::symlink(victim, victim).unwrap();
        }
        again(&mut sample, root);
        assert!(sample.store.is_partly_unknown());
        assert!(sample.store.timeline().check(end).is_err());
        let is_beginning_known = sample.store.oldest_time() > WallTime(i64::MIN);
        assert_eq!(is_beginning_known, index == 2);
        for (victim, name) in files_of_it {
            std::fs::remove_file(victim).unwrap();
            std::fs::rename(away.path().join(name), victim).unwrap();
        }
        again(&mut sample, root);
        assert!(!sample.store.is_partly_unknown());
        assert_eq!(files(root, "maps"), maps, "they were not made of less");
        assert!(read(&sample.store, end) == sample.image(end));
        assert_eq!(scrub(&sample.store).damage, []);
    }
    // One that is not there is gone.
    std::fs::remove_file(&runs[2]).unwrap();
    std::fs::remove_file(&segments[2]).unwrap();
    again(&mut sample, root);
    assert!(!sample.store.is_partly_unknown());
}

/// A disk that gives other bytes the second time cannot bring them into the history as recorded: what was checked is what is stored.
#[test]
fn what_was_checked_is_what_is_stored() {
    let directory = tempfile::tempdir().unwrap();
    let mut sample = Sample::new(directory.path(), VOLUME_BYTES, SEGMENT_BYTES, true);
    sample.lies_again = true;
    sample.mixed(800);
    sample.settle_all(Compression::Lz4);
    let end = sample.store.timeline().end();
    assert!(read(&sample.store, end) == sample.image(end));
    assert_eq!(scrub(&sample.store).damage, []);
}

/// A disk that does not take what pruning writes: that is said, and nothing more is struck for it.
#[test]
fn pruning_says_what_its_disk_does_not_take() {
    let directory = tempfile::tempdir().unwrap();
    let mut sample = Sample::new(directory.path(), VOLUME_BYTES, SEGMENT_BYTES, true);
    sample.mixed(900);
    let span = length(&sample.store);
    assert!(keep(&mut sample.store, &policy(span, 20, &[(20, 100)])));
    for segment in files(directory.path(), "segments") {
        std::fs::create_dir(segment.with_extension("new")).unwrap();
    }
    let mut pruning = sample.store.sweep(Compression::Lz4).unwrap();
    let failed = (0..1000).find_map(|_| pruning.step().err());
    assert!(matches!(failed, Some(StoreError::Io(..))), "{failed:?}");
}

/// A map that becomes unreadable while it is in use is made again, and the images that are opened then do without it.
#[test]
fn a_map_that_cannot_be_read_any_more_is_made_again() {
    let directory = tempfile::tempdir().unwrap();
    let mut sample = Sample::new(directory.path(), VOLUME_BYTES, SEGMENT_BYTES, true);
    sample.mixed(1500);
    sample.map_all();
    let end = sample.store.timeline().end();
    let wanted = sample.image(end);
    assert!(read(&sample.store, end) == wanted);
    again(&mut sample, directory.path());
    let open = varve_store::Image::open(&sample.store, end).unwrap();
    for map in files(directory.path(), "maps") {
        std::fs::File::options()
            .write(true)
            .open(map)
            .unwrap()
            .set_len(4096 * 2)
            .unwrap();
    }
    let mut bytes = vec![0; VOLUME_BYTES as usize];
    assert!(open.read(0, &mut bytes).is_err());
    drop(open);
    // Each that turns out so is done without from then on.
    let count = files(directory.path(), "maps").len();
    let whole = (0..=count).any(|_| {
        let image = varve_store::Image::open(&sample.store, end).unwrap();
        image.read(0, &mut bytes).is_ok()
    });
    assert!(whole && bytes == wanted);
    assert!(sample.store.next_map().is_some());
    sample.map_all();
    assert!(read(&sample.store, end) == wanted);
}
