//! Random flips in every form that a segment has at rest: each is detected, and located: what is named cannot be read or reads as it was, everything else
//! reads as it was.

#![allow(
    clippy::unwrap_used,
    reason = "in tests a surprise should end the test"
)]

use std::os::unix::fs::FileExt;
use varve_format::Lsn;
use varve_store::{Compression, Image, Secret, StoreKeys, VolumeStore};
use varve_tests::guest::sized;
use varve_tests::sample::{Sample, VOLUME, files, prune_to, scrub, scrub_stored};

const VOLUME_BYTES: u64 = 256 << 10;
const SEGMENT_BYTES: u64 = 64 << 10;
const BLOCK: usize = 4096;

/// A small history; `store` is where it goes.
fn history(store: VolumeStore) -> Sample {
    let mut sample = Sample::with(store, VOLUME_BYTES, SEGMENT_BYTES, true);
    sample.mixed(60);
    sample
}

fn plain(root: &std::path::Path) -> Sample {
    history(VolumeStore::open(root, VOLUME).unwrap())
}

/// Flips bits one after the other; gives how many there were.
fn flip(root: &std::path::Path, sample: &mut Sample, count: u32) {
    let segments = files(root, "segments");
    let opened: Vec<_> = segments
        .iter()
        .map(|path| {
            let file = std::fs::File::options()
                .read(true)
                .write(true)
                .open(path)
                .unwrap();
            let length = file.metadata().unwrap().len();
            (file, length)
        })
        .collect();
    let total: u64 = opened.iter().map(|file| file.1).sum();
    let end = sample.store.timeline().end();
    let instants: Vec<Lsn> = (1..=8)
        .map(|part| Lsn(end.0 * part / 8))
        .filter(|lsn| sample.store.timeline().check(*lsn).is_ok())
        .collect();
    assert!(instants.len() >= 2);
    let wanted: Vec<Vec<u8>> = instants.iter().map(|lsn| sample.image(*lsn)).collect();
    let mut unreadable = 0;
    for round in 0..count {
        let mut at = sample.random() % total;
        let index = opened.iter().position(|file| {
            let here = at < file.1;
            if !here {
                at -= file.1;
            }
            here
        });
        let file = &opened[index.unwrap()].0;
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        let bit = 1 << (sample.random() % 8);
        file.write_all_at(&[byte[0] ^ bit], at).unwrap();
        let what = format!(
            "round {round}: {} at byte {at}",
            segments[index.unwrap()].display()
        );
        let found = scrub(&sample.store).damage;
        assert!(!found.is_empty(), "{what}: not detected");
        let quickly = scrub_stored(&sample.store).damage;
        assert!(quickly == found, "{what}: without unpacking: {quickly:?}");
        for (lsn, wanted) in instants.iter().zip(&wanted) {
            let named = |block: u64| {
                found.iter().any(|damage| {
                    let lacks = damage.from.is_some_and(|(from, _)| *lsn >= from)
                        && damage.until.is_none_or(|(until, _)| *lsn < until);
                    let inside = |(offset, length): &(u64, u64)| {
                        *offset < (block + 1) * BLOCK as u64
                            && offset + length > block * BLOCK as u64
                    };
                    lacks && damage.blocks.iter().any(inside)
                })
            };
            let image = Image::open(&sample.store, *lsn).unwrap();
            let mut bytes = [0; BLOCK];
            for (block, wanted) in (0..).zip(wanted.chunks(BLOCK)) {
                match image.read(block * BLOCK as u64, &mut bytes) {
                    Ok(()) => assert!(
                        bytes == wanted,
                        "{what}: wrong bytes at {lsn}, block {block}"
                    ),
                    Err(error) => {
                        unreadable += 1;
                        assert!(
                            named(block),
                            "{what}: block {block} at {lsn} is not named: {error}; {found:?}"
                        );
                    }
                }
            }
        }
        file.write_all_at(&byte, at).unwrap();
    }
    assert!(
        unreadable > count / 4,
        "{unreadable} blocks could not be read: the flips hit nothing"
    );
    assert!(scrub(&sample.store).damage.is_empty());
    assert!(scrub_stored(&sample.store).damage.is_empty());
}

fn count() -> u32 {
    sized(400, 20_000)
}

#[test]
fn flips_in_sealed_segments() {
    let directory = tempfile::tempdir().unwrap();
    let mut sample = plain(directory.path());
    flip(directory.path(), &mut sample, count());
}

#[test]
fn flips_in_compressed_segments() {
    let directory = tempfile::tempdir().unwrap();
    let mut sample = plain(directory.path());
    sample.settle_all(Compression::Zstd(3));
    flip(directory.path(), &mut sample, count());
}

#[test]
fn flips_in_segments_that_are_as_they_were() {
    let directory = tempfile::tempdir().unwrap();
    let mut sample = plain(directory.path());
    sample.settle_all(Compression::None);
    flip(directory.path(), &mut sample, count());
}

#[test]
fn flips_in_encrypted_segments() {
    let directory = tempfile::tempdir().unwrap();
    let mut keys = StoreKeys::load(directory.path());
    keys.create(&Secret::KeyFile(vec![7; 32].into())).unwrap();
    let handle = keys.of_volume(VOLUME).0;
    let mut sample = history(VolumeStore::open_with(directory.path(), VOLUME, handle).unwrap());
    sample.settle_all(Compression::Lz4);
    flip(directory.path(), &mut sample, count());
}

#[test]
fn flips_in_pruned_segments() {
    let directory = tempfile::tempdir().unwrap();
    let mut sample = plain(directory.path());
    sample.settle_all(Compression::Lz4);
    assert!(prune_to(&mut sample.store, 10, Compression::Zstd(1)).unwrap() > 0);
    flip(directory.path(), &mut sample, count());
}
