//! Random flips in every form that a segment has at rest: each is detected, and located: what is named are exactly the records that the flipped bit belongs
//! to, from when they were written until all of them had been written anew; everything else reads as it was.

#![allow(
    clippy::unwrap_used,
    reason = "in tests a surprise should end the test"
)]

use std::collections::BTreeSet;
use std::os::unix::fs::FileExt;
use varve_format::{
    BLOCK_IS_GONE, FRAME_BLOCKS, Lsn, RecordKind, RunEntry, SettledHeader, parse_settled_tables,
};
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

/// The records that a byte of a segment's file belongs to, by the format alone; none: that is not told here.
fn touched(file: &[u8], at: u64, entries: &[RunEntry]) -> Option<Vec<RunEntry>> {
    let writes = entries
        .iter()
        .filter(|entry| entry.kind == RecordKind::Write as u8);
    let footer_at = (file.len() - BLOCK) as u64;
    if !SettledHeader::is_settled(&file[..BLOCK]) {
        let holds = |entry: &&RunEntry| {
            let payload = entry.payload.get();
            at >= footer_at || (payload..payload + entry.length.get()).contains(&at)
        };
        return Some(writes.filter(holds).copied().collect());
    }
    let header = SettledHeader::parse(&file[..BLOCK], file.len() as u64).unwrap();
    if header.is_pruned() {
        return None;
    }
    let tables = &file[header.tables_at.get() as usize..footer_at as usize];
    let (frames, blocks) = parse_settled_tables(&header, tables).unwrap();
    let frame = frames.iter().position(|frame| {
        (frame.offset.get()..frame.offset.get() + u64::from(frame.length.get())).contains(&at)
    });
    // Header, tables and footer are needed for all of it.
    let Some(frame) = frame else {
        return Some(writes.copied().collect());
    };
    let lies_in = |block: u64| {
        let number = blocks[block as usize].get();
        number < BLOCK_IS_GONE && u64::from(number) / u64::from(FRAME_BLOCKS) == frame as u64
    };
    let holds = |entry: &&RunEntry| {
        let (start, end) = (
            entry.payload.get(),
            entry.payload.get() + entry.length.get(),
        );
        (start / BLOCK as u64..end.div_ceil(BLOCK as u64)).any(lies_in)
    };
    Some(writes.filter(holds).copied().collect())
}

/// Ranges of the volume that records wrote, merged; and the first instant behind them at which all of that had been written anew, sector by sector.
fn lost_by(lost: &[RunEntry], all: &[RunEntry]) -> (Vec<(u64, u64)>, Option<Lsn>) {
    let sectors = |entry: &RunEntry| {
        let end = entry.offset.get() + entry.length.get();
        (entry.offset.get() / 512)..end.div_ceil(512)
    };
    let mut named: Vec<(u64, u64)> = Vec::new();
    for sector in lost.iter().flat_map(sectors).collect::<BTreeSet<u64>>() {
        match named.last_mut() {
            Some((offset, length)) if *offset + *length == sector * 512 => *length += 512,
            _ => named.push((sector * 512, 512)),
        }
    }
    let Some(last) = lost.iter().map(RunEntry::lsn).max() else {
        return (named, None);
    };
    let mut lacks = BTreeSet::new();
    for entry in all.iter().filter(|entry| entry.changes_image()) {
        for sector in sectors(entry) {
            lacks.remove(&sector);
        }
        if lost.iter().any(|lost| lost.lsn == entry.lsn) {
            lacks.extend(sectors(entry));
        }
        if entry.lsn() >= last && lacks.is_empty() {
            return (named, Some(entry.lsn().plus(1)));
        }
    }
    (named, None)
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
    let entries: Vec<Vec<RunEntry>> = sample
        .store
        .segments()
        .map(|s| s.entries().unwrap())
        .collect();
    let all = entries.concat();
    let contents: Vec<Vec<u8>> = segments
        .iter()
        .map(|path| std::fs::read(path).unwrap())
        .collect();
    let mut located = 0;
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
        let index = index.unwrap();
        let file = &opened[index].0;
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        let bit = 1 << (sample.random() % 8);
        file.write_all_at(&[byte[0] ^ bit], at).unwrap();
        let what = format!("round {round}: {} at byte {at}", segments[index].display());
        let found = scrub(&sample.store).damage;
        assert!(!found.is_empty(), "{what}: not detected");
        let quickly = scrub_stored(&sample.store).damage;
        assert!(quickly == found, "{what}: without unpacking: {quickly:?}");
        if let Some(lost) = touched(&contents[index], at, &entries[index]) {
            let (blocks, until) = lost_by(&lost, &all);
            assert_eq!(found.len(), 1, "{what}: {found:?}");
            assert_eq!(found[0].blocks, blocks, "{what}: of {lost:?}");
            let from = lost
                .first()
                .map(|entry| (entry.lsn().plus(1), entry.time()));
            assert_eq!(found[0].from, from, "{what}");
            assert_eq!(
                found[0].until.map(|(lsn, _)| lsn),
                until,
                "{what}: of {lost:?}"
            );
            located += u32::from(until.is_some());
        }
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
    let is_pruned = sample
        .store
        .segments()
        .any(|segment| segment.pruned_for != 0);
    assert!(
        is_pruned || located > count / 20,
        "{located}: nothing was ever whole again"
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
