//! A store that a newer version has written, wholly or in part: nothing of it is believed, written over or given up, and it says what it is.

#![allow(
    clippy::unwrap_used,
    reason = "in tests a surprise should end the test"
)]

use std::path::{Path, PathBuf};
use varve_format::Lsn;
use varve_store::{Compression, Image, StoreKeys, VolumeStore};
use varve_tests::sample::{
    Sample, VOLUME, files, newer, open_keyed, read, sample_secret, scrub, scrub_stored,
};

/// A settled history with maps, closed; its end, and its image there.
fn history(root: &Path) -> (Lsn, Vec<u8>) {
    let sample = Sample::small(root, true);
    let end = sample.store.timeline().end();
    let image = sample.image(end);
    assert!(read(&sample.store, end) == image);
    (end, image)
}

fn open(root: &Path) -> VolumeStore {
    VolumeStore::open(root, VOLUME).unwrap()
}

/// Makes files newer; gives what they are now.
fn make_newer(paths: &[PathBuf]) -> Vec<(PathBuf, Vec<u8>)> {
    let each = paths.iter().map(|path| {
        let bytes = newer(&std::fs::read(path).unwrap());
        std::fs::write(path, &bytes).unwrap();
        (path.clone(), bytes)
    });
    each.collect()
}

fn are_untouched(written: &[(PathBuf, Vec<u8>)]) {
    for (path, bytes) in written {
        assert!(std::fs::read(path).unwrap() == *bytes, "{}", path.display());
    }
}

#[test]
fn indexes_of_a_newer_version_are_done_without() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path();
    let (end, image) = history(root);
    let runs = make_newer(&files(root, "runs"));
    let maps = make_newer(&files(root, "maps"));
    let store = open(root);
    assert!(read(&store, end) == image);
    let told = store.healed().join("\n");
    assert_eq!(
        told.matches("newer").count(),
        runs.len() + maps.len(),
        "{told}"
    );
    assert_eq!(store.damaged(), [""; 0]);
    are_untouched(&runs);
}

#[test]
fn a_segment_of_a_newer_version_is_named_and_the_rest_is_read() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path();
    let (end, image) = history(root);
    let victim = files(root, "segments").pop().unwrap();
    let written = make_newer(std::slice::from_ref(&victim));
    let store = open(root);
    let past = Image::open(&store, end).unwrap();
    let (mut good, mut bad) = (0, 0);
    for (at, right) in (0..).step_by(512).zip(image.chunks(512)) {
        let mut block = vec![0; 512];
        match past.read(at, &mut block) {
            Ok(()) if block == right => good += 1,
            Ok(()) => panic!("wrong bytes at {at}"),
            Err(error) => {
                assert!(error.to_string().contains("newer"), "{error}");
                bad += 1;
            }
        }
    }
    assert!(
        bad > 0 && good > bad,
        "{good} blocks are read, {bad} are not"
    );
    for scrubbed in [scrub(&store), scrub_stored(&store)] {
        let told = format!("{:?}", scrubbed.damage);
        assert!(told.contains("newer"), "{told}");
    }
    are_untouched(&written);
}

/// Neither the segment nor its run can be read: what they hold is not known, so nothing is concluded from it.
#[test]
fn nothing_is_pruned_beside_what_a_newer_version_wrote() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path();
    let (end, image) = history(root);
    let victims = [
        files(root, "segments")[7].clone(),
        files(root, "runs")[7].clone(),
    ];
    let before = victims.clone().map(|path| std::fs::read(path).unwrap());
    let written = make_newer(&victims);
    let store = open(root);
    assert!(store.is_partly_unknown());
    let told = store.damaged().join("\n");
    assert!(told.contains("newer"), "{told}");
    assert!(store.sweep(Compression::Lz4).is_none());
    are_untouched(&written);
    drop(store);
    for (path, bytes) in victims.iter().zip(before) {
        std::fs::write(path, bytes).unwrap();
    }
    let store = open(root);
    assert!(!store.is_partly_unknown());
    assert_eq!(store.damaged(), [""; 0]);
    assert!(read(&store, end) == image);
}

#[test]
fn keys_of_a_newer_version_lock_the_store_and_stay() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path();
    StoreKeys::load(root).create(&sample_secret()).unwrap();
    let mut sample = Sample::with(open_keyed(root).unwrap(), 1 << 20, 32 << 10, true);
    sample.mixed(120);
    sample.settle_all(Compression::Lz4);
    let (end, image) = (
        sample.store.timeline().end(),
        sample.image(sample.store.timeline().end()),
    );
    drop(sample);
    let keys: Vec<PathBuf> = std::fs::read_dir(root)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| {
            path.file_name()
                .unwrap()
                .to_string_lossy()
                .starts_with("keys")
        })
        .collect();
    assert_eq!(keys.len(), 2, "{keys:?}");
    let before: Vec<Vec<u8>> = keys
        .iter()
        .map(|path| std::fs::read(path).unwrap())
        .collect();
    let written = make_newer(&keys);
    let refused = open_keyed(root)
        .err()
        .map(|error| error.to_string())
        .unwrap_or_default();
    assert!(refused.contains("newer"), "{refused}");
    are_untouched(&written);
    for (path, bytes) in keys.iter().zip(before) {
        std::fs::write(path, bytes).unwrap();
    }
    assert!(read(&open_keyed(root).unwrap(), end) == image);
}
