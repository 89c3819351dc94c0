//! The store: images out of maps and out of settled segments equal what was recorded, and whatever happens to a file is noticed, located and bounded.

#![allow(
    clippy::unwrap_used,
    reason = "in tests a surprise should end the test"
)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use varve_format::{
    EpochId, FRAME_ENTRY_BYTES, Lsn, RecordKind, SettledHeader, WallTime, crc32c, frame_crc,
};
use varve_store::{Compression, Image, RangeKind, VolumeStore, volume_directory};
use varve_tests::retained::{keep, length, policy, sweep};
use varve_tests::sample::{Sample, VOLUME, files, flip, read, scrub};

const VOLUME_BYTES: u64 = 4 << 20;
const SEGMENT_BYTES: u64 = 96 << 10;
const ALL: [Compression; 3] = [Compression::None, Compression::Lz4, Compression::Zstd(3)];

/// Compares images at instants of all kinds with what was recorded.
fn compare(sample: &mut Sample, instants: u64) {
    let end = sample.store.timeline().end();
    let boundaries: Vec<Lsn> = sample.store.segments().map(|s| s.lsn_end).collect();
    for round in 0..instants {
        let lsn = match round % 3 {
            0 => Lsn(3 + sample.random() % (end.0 - 2)),
            1 => boundaries[sample.random() as usize % boundaries.len()],
            _ => Lsn(end.0 - sample.random() % 200),
        };
        assert!(read(&sample.store, lsn) == sample.image(lsn), "LSN {lsn}");
    }
}

#[test]
fn images_out_of_maps_equal_what_was_recorded() {
    let directory = tempfile::tempdir().unwrap();
    let mut sample = Sample::new(directory.path(), VOLUME_BYTES, SEGMENT_BYTES, true);
    for round in 0..4 {
        sample.mixed(1500);
        compare(&mut sample, 6); // Some maps are there, some are not.
        let made = sample.map_all();
        assert!(made > 0, "round {round} made no map");
    }
    compare(&mut sample, 30);
    let segments = sample.store.segments().count() as u64;
    assert!(
        segments > 100,
        "{segments} segments: no map of a high level"
    );
    let end = sample.store.timeline().end();
    let layers = Image::open(&sample.store, end).unwrap().layer_count() as u64;
    // Seven maps of each of the levels 1 to 3, and what is replayed.
    assert!(
        layers <= 7 * 3 + 1,
        "{layers} layers for {segments} segments"
    );
    let levels: Vec<PathBuf> = files(directory.path(), "maps");
    assert!(
        levels
            .iter()
            .any(|path| path.to_string_lossy().contains("/02-"))
    );
    // The same after opening anew, and without any map.
    let Sample { store, .. } = sample;
    let wanted = read(&store, end);
    drop(store);
    let store = VolumeStore::open(directory.path(), VOLUME).unwrap();
    assert!(store.next_map().is_none() && read(&store, end) == wanted);
    drop(store);
    levels
        .iter()
        .for_each(|path| std::fs::remove_file(path).unwrap());
    let store = VolumeStore::open(directory.path(), VOLUME).unwrap();
    assert!(read(&store, end) == wanted && store.next_map().is_some());
}

#[test]
fn an_image_says_what_is_data_zero_and_undefined() {
    let directory = tempfile::tempdir().unwrap();
    let mut sample = Sample::new(directory.path(), VOLUME_BYTES, SEGMENT_BYTES, true);
    sample.write(8192, vec![7; 4096]);
    sample.zero(RecordKind::Zero, 10240, 4096);
    sample.zero(RecordKind::Discard, 20480, 512);
    let end = sample.seal();
    let image = Image::open(&sample.store, end).unwrap();
    let kinds: Vec<(u64, u64, RangeKind)> = image
        .ranges(4096, 20480)
        .unwrap()
        .into_iter()
        .map(|range| (range.offset, range.length, range.kind))
        .collect();
    let wanted = [
        (4096, 4096, RangeKind::Zero),
        (8192, 2048, RangeKind::Data),
        (10240, 4096, RangeKind::Zero),
        (14336, 6144, RangeKind::Zero),
        (20480, 512, RangeKind::Undefined),
        (20992, 3584, RangeKind::Zero),
    ];
    assert_eq!(kinds, wanted);
}

#[test]
fn times_resolve_to_the_record_that_was_the_last() {
    let directory = tempfile::tempdir().unwrap();
    let mut sample = Sample::new(directory.path(), VOLUME_BYTES, SEGMENT_BYTES, true);
    sample.point("before");
    let end = sample.mixed(2000);
    let store = &sample.store;
    let mut times: BTreeMap<WallTime, Lsn> = BTreeMap::new();
    let mut previous = None;
    for entry in store.segments().flat_map(|s| s.entries().unwrap()) {
        times.insert(entry.time(), entry.lsn().plus(1));
        if let Some(before) = previous {
            assert_eq!(store.time_of(entry.lsn()).unwrap(), before);
        }
        previous = Some(entry.time());
    }
    assert_eq!(store.time_of(end).unwrap(), previous.unwrap());
    for (time, lsn) in &times {
        assert_eq!(store.at_time(*time).unwrap(), *lsn);
        let between = times.range(..WallTime(time.0 - 1)).next_back();
        let before = store.at_time(WallTime(time.0 - 1)).unwrap();
        assert_eq!(before, between.map_or(Lsn(0), |(_, lsn)| *lsn));
    }
    let point = store.timeline().points.first().unwrap();
    assert_eq!(store.point_names().of(point).unwrap(), "before");
}

#[test]
fn changed_ranges_are_those_of_the_records_between() {
    let directory = tempfile::tempdir().unwrap();
    let mut sample = Sample::new(directory.path(), VOLUME_BYTES, SEGMENT_BYTES, true);
    let end = sample.mixed(5000);
    sample.map_all();
    for _ in 0..40 {
        let (a, b) = (sample.random() % end.0, sample.random() % (end.0 + 1));
        let (from, to) = (Lsn(a.min(b)), Lsn(a.max(b)));
        let mut sectors = vec![false; (VOLUME_BYTES / 512) as usize];
        for segment in sample.store.segments() {
            for entry in segment.entries().unwrap() {
                if (from..to).contains(&entry.lsn()) && entry.changes_image() {
                    let first = entry.offset.get() / 512;
                    let last = first + entry.length.get() / 512;
                    sectors[first as usize..last as usize].fill(true);
                }
            }
        }
        let mut found = vec![false; sectors.len()];
        let mut behind = 0;
        for (offset, length) in sample.store.changes(from, to).unwrap().ranges().unwrap() {
            assert!(offset > behind || offset == 0, "neighbours are joined");
            behind = offset + length;
            found[(offset / 512) as usize..(behind / 512) as usize].fill(true);
        }
        assert!(found == sectors, "from {from} to {to}");
    }
}

#[test]
fn settled_segments_give_the_same_images_in_less_space() {
    for compression in ALL {
        let directory = tempfile::tempdir().unwrap();
        let mut sample = Sample::new(directory.path(), VOLUME_BYTES, SEGMENT_BYTES, true);
        let end = sample.mixed(2500);
        sample.map_all();
        let before = sample.store.stored_bytes();
        // Open before, read after: what it has open stays, what it opens later is settled.
        let image = Image::open(&sample.store, end).unwrap();
        let mut half = vec![0; VOLUME_BYTES as usize / 2];
        image.read(0, &mut half).unwrap();
        let settled = sample.settle_all(compression);
        assert_eq!(settled, sample.store.segments().count() as u64);
        assert_eq!(sample.store.unsettled_bytes(), 0);
        let mut whole = vec![0; VOLUME_BYTES as usize];
        image.read(0, &mut whole).unwrap();
        assert!(
            whole == sample.image(end),
            "{compression}: an image that was open"
        );
        compare(&mut sample, 12);
        let after = sample.store.stored_bytes();
        println!("{compression}: {before} bytes, settled {after}");
        let limit = if compression == Compression::None {
            90
        } else {
            70
        };
        assert!(
            after * 100 < before * limit,
            "{compression}: {after} of {before}"
        );
        let found = scrub(&sample.store);
        assert!(found.damage.is_empty(), "{compression}: {:?}", found.damage);
        // And after opening anew; a lost run is made again from the settled segment.
        let runs = files(directory.path(), "runs");
        let wanted = sample.image(end);
        drop(image);
        drop(sample);
        std::fs::remove_file(&runs[3]).unwrap();
        let store = VolumeStore::open(directory.path(), VOLUME).unwrap();
        assert!(store.damaged().is_empty(), "{:?}", store.damaged());
        assert!(read(&store, end) == wanted);
        assert!(store.segments().all(|segment| segment.settled));
        assert!(scrub(&store).damage.is_empty());
    }
}

#[test]
fn repetitions_and_zeroes_are_stored_once() {
    let directory = tempfile::tempdir().unwrap();
    let mut sample = Sample::new(directory.path(), VOLUME_BYTES, 2 << 20, true);
    let mut noise = vec![0u8; 4096];
    for byte in &mut noise {
        *byte = sample.random() as u8;
    }
    for block in 0..200 {
        sample.write(block * 8192, noise.clone());
        sample.write(block * 8192 + 4096, vec![0; 4096]);
    }
    let end = sample.seal();
    sample.settle_all(Compression::None);
    let segment = sample.store.segments().next().unwrap();
    // 200 blocks of noise became one; headers of batches are what is left.
    assert!(segment.stored_bytes < 100_000, "{}", segment.stored_bytes);
    assert!(segment.data_bytes > 1_600_000, "{}", segment.data_bytes);
    assert!(read(&sample.store, end) == sample.image(end));
}

/// A segment that is not there when maps are made, and is there again later (its disk was away), is in every image: no map that lacks it is asked.
#[test]
fn a_segment_that_comes_back_is_not_hidden_by_a_map() {
    let directory = tempfile::tempdir().unwrap();
    let mut sample = Sample::small(directory.path(), false);
    let end = sample.store.timeline().end();
    let wanted = sample.image(end);
    // In the newest group that has a map: what it wrote is still there. Numbers begin with 1.
    let newest = sample.store.newest().unwrap().0;
    let victim = (newest / 8 * 8 - 2) as usize;
    let files = [
        files(directory.path(), "segments")[victim].clone(),
        files(directory.path(), "runs")[victim].clone(),
    ];
    let kept = files.clone().map(|path| std::fs::read(path).unwrap());
    // An empty store in its place lets the lock go.
    let elsewhere = tempfile::tempdir().unwrap();
    sample.store = VolumeStore::open(elsewhere.path(), VOLUME).unwrap();
    for path in &files {
        std::fs::remove_file(path).unwrap();
    }
    let mut store = VolumeStore::open(directory.path(), VOLUME).unwrap();
    assert!(
        !store.healed().is_empty(),
        "the maps with that segment stay"
    );
    while let Some(job) = store.next_map() {
        job.run().unwrap();
        store.add_map(&job).unwrap();
    }
    assert!(
        store.timeline().check(end).is_err(),
        "a hole closes what is behind it"
    );
    assert!(
        read(&store, end) != wanted,
        "nothing of it was needed: the test says nothing"
    );
    drop(store);
    for (path, bytes) in files.iter().zip(&kept) {
        std::fs::write(path, bytes).unwrap();
    }
    let store = VolumeStore::open(directory.path(), VOLUME).unwrap();
    assert!(store.timeline().check(end).is_ok());
    assert!(read(&store, end) == wanted, "a map hides the segment");
}

/// The newest segment is lost, and its run is not: what is still in the log is taken again, and the run does not stand for it meanwhile.
#[test]
fn a_run_does_not_stand_for_a_segment_that_is_still_to_be_taken() {
    let directory = tempfile::tempdir().unwrap();
    let mut sample = Sample::small(directory.path(), false);
    let end = sample.store.timeline().end();
    let wanted = sample.image(end);
    let newest = sample.store.newest().unwrap();
    let victim = files(directory.path(), "segments").pop().unwrap();
    let segment = std::fs::read(&victim).unwrap();
    let elsewhere = tempfile::tempdir().unwrap();
    sample.store = VolumeStore::open(elsewhere.path(), VOLUME).unwrap();
    std::fs::remove_file(&victim).unwrap();
    let mut store = VolumeStore::open(directory.path(), VOLUME).unwrap();
    assert!(store.newest() < Some(newest), "it is asked of the log");
    assert!(store.timeline().check(end).is_err());
    varve_tests::sample::map_all(&mut store).unwrap();
    drop(store);
    std::fs::write(&victim, segment).unwrap();
    let store = VolumeStore::open(directory.path(), VOLUME).unwrap();
    assert_eq!(store.newest(), Some(newest));
    assert!(read(&store, end) == wanted);
}

/// A page that rots while the store is open: the image that meets it says so, the next one does without the map, and the map is made again.
#[test]
fn a_map_that_rots_is_asked_once() {
    let directory = tempfile::tempdir().unwrap();
    let sample = Sample::small(directory.path(), false);
    let end = sample.store.timeline().end();
    let wanted = sample.image(end);
    let mut store = sample.store;
    for victim in files(directory.path(), "maps") {
        flip(&victim, 8 * 5000);
    }
    let image = Image::open(&store, end).unwrap();
    let mut bytes = vec![0; image.bytes() as usize];
    assert_eq!(
        image.read(0, &mut bytes).unwrap_err().code(),
        "S002-damaged"
    );
    for _ in 0..10 {
        let image = Image::open(&store, end).unwrap();
        if image.read(0, &mut bytes).is_ok() {
            break;
        }
    }
    assert!(read(&store, end) == wanted);
    for _ in 0..20 {
        if let Some(job) = store.next_map()
            && job.run().is_ok()
        {
            store.add_map(&job).unwrap();
        }
    }
    assert!(store.next_map().is_none() && read(&store, end) == wanted);
}

#[test]
fn a_damaged_map_is_made_again() {
    let directory = tempfile::tempdir().unwrap();
    let sample = Sample::small(directory.path(), false);
    let end = sample.store.timeline().end();
    let wanted = sample.image(end);
    let mut store = sample.store;
    // In a page: noticed when it is read, or by a scrub, which gives the map up.
    let victim = files(directory.path(), "maps")[1].clone();
    flip(&victim, 8 * 5000);
    let found = scrub(&store);
    assert_eq!(found.maps, std::slice::from_ref(&victim));
    store.discard_maps(&found);
    assert!(!victim.exists());
    assert!(read(&store, end) == wanted, "replayed instead");
    let job = store.next_map().unwrap();
    job.run().unwrap();
    store.add_map(&job).unwrap();
    assert!(victim.exists() && scrub(&store).damage.is_empty());
    // In the header: noticed when the store opens.
    drop(store);
    flip(&victim, 8 * 100);
    let store = VolumeStore::open(directory.path(), VOLUME).unwrap();
    assert_eq!(store.healed().len(), 1);
    assert!(!victim.exists() && read(&store, end) == wanted);
}

/// Another machine went on from the same disk: its segment fits into the place of one of ours, run and all, and is told by its epoch.
#[test]
fn a_segment_of_another_epoch_is_no_part_of_history() {
    for settled in [false, true] {
        let (ours, theirs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let recorded = |root: &Path, epoch: u8| {
            let store = VolumeStore::open(root, VOLUME).unwrap();
            let epoch_id = EpochId([epoch; 16]);
            let mut sample = Sample::of_epoch(epoch_id, store, 1 << 20, 64 << 10, true);
            for number in 0..100u64 {
                sample.write(
                    number * 7 % 256 * 4096,
                    vec![epoch * 31 + number as u8; 4096],
                );
            }
            sample.seal();
            if settled {
                sample.settle_all(Compression::Lz4);
            }
            sample
        };
        let (sample, other) = (recorded(ours.path(), 3), recorded(theirs.path(), 4));
        let ends = |sample: &Sample| -> Vec<Lsn> {
            sample
                .store
                .segments()
                .map(|segment| segment.lsn_end)
                .collect()
        };
        assert_eq!(ends(&sample), ends(&other));
        assert!(ends(&sample).len() > 5);
        let images: Vec<(Lsn, Vec<u8>)> = ends(&sample)
            .into_iter()
            .map(|lsn| (lsn, sample.image(lsn)))
            .collect();
        drop((sample, other));
        for kind in ["segments", "runs"] {
            let (to, from) = (files(ours.path(), kind), files(theirs.path(), kind));
            std::fs::copy(&from[2], &to[2]).unwrap();
        }
        let store = VolumeStore::open(ours.path(), VOLUME).unwrap();
        assert!(
            store.damaged()[0].contains("another epoch"),
            "{:?}",
            store.damaged()
        );
        assert!(!scrub(&store).damage.is_empty() && !store.scrub().structure().is_empty());
        for (index, (lsn, image)) in images.iter().enumerate() {
            if store.timeline().check(*lsn).is_err() {
                assert!(index >= 2, "{lsn} is before it");
                continue;
            }
            assert!(index < 2, "{lsn} needs what is not there");
            assert!(read(&store, *lsn) == *image, "{lsn}");
        }
    }
}

/// Files of the first version, whose frames had 64 KiB without saying so, are read as they were.
#[test]
fn frames_of_a_size_that_is_not_said_are_read() {
    let directory = tempfile::tempdir().unwrap();
    let mut sample = Sample::new(directory.path(), 1 << 20, 128 << 10, true);
    let end = sample.mixed(120);
    sample.settle_all(Compression::None);
    let wanted = sample.image(end);
    drop(sample);
    let mut merged = 0;
    for path in files(directory.path(), "segments") {
        let bytes = std::fs::read(&path).unwrap();
        let mut header = SettledHeader::parse(&bytes, bytes.len() as u64).unwrap();
        let tables_at = header.tables_at.get() as usize;
        let frames_end = tables_at + header.frame_count() as usize * FRAME_ENTRY_BYTES;
        let blocks = &bytes[frames_end..bytes.len() - 4096];
        // Uncompressed frames lie one behind the other: four small ones are a large one.
        header.incompat = 0.into();
        header.frame_blocks = 0.into();
        let (mut tables, mut at) = (Vec::new(), 4096);
        for frame in 0..header.frame_count() {
            let length = header.frame_bytes(frame);
            let crc = frame_crc(&bytes[at..at + length], header.sequence.get(), frame);
            tables.extend((at as u64).to_le_bytes());
            tables.extend((length as u32).to_le_bytes());
            tables.extend(crc.to_le_bytes());
            tables.extend([0; 8]);
            at += length;
            merged += u64::from(length == 64 << 10);
        }
        assert_eq!(at, tables_at);
        tables.extend(blocks);
        header.tables_crc = crc32c(&tables).into();
        let parts = [
            &header.to_block()[..],
            &bytes[4096..at],
            &tables,
            &bytes[bytes.len() - 4096..],
        ];
        std::fs::write(path, parts.concat()).unwrap();
    }
    assert!(merged > 3, "only {merged} whole frames");
    let store = VolumeStore::open(directory.path(), VOLUME).unwrap();
    assert!(read(&store, end) == wanted && scrub(&store).damage.is_empty());
    assert!(read_by_the_other_reader(directory.path(), end) == wanted);
}

/// Writing fails at every step of settling and of making a map: nothing is lost, nothing half done is left, and it goes on when there is room.
#[test]
fn a_failing_disk_loses_nothing_at_any_step() {
    let directory = tempfile::tempdir().unwrap();
    let mut sample = Sample::new(directory.path(), 1 << 20, 64 << 10, true);
    let end = sample.mixed(300);
    let wanted = sample.image(end);
    let mut failures = 0;
    let map_bytes = {
        let job = sample.store.next_map().unwrap();
        job.run().unwrap();
        let made = files(directory.path(), "maps")[0].clone();
        let bytes = std::fs::metadata(&made).unwrap().len();
        std::fs::remove_file(made).unwrap();
        bytes
    };
    for limit in (0..map_bytes).step_by(2048) {
        let job = sample.store.next_map().unwrap();
        assert!(with_file_limit(limit, || job.run()).is_err(), "at {limit}");
        failures += 1;
        assert!(read(&sample.store, end) == wanted);
    }
    for limit in (0..).step_by(1024) {
        let job = sample
            .store
            .next_to_settle(Compression::Lz4, &|_| false)
            .unwrap();
        let path = files(directory.path(), "segments")[0].clone();
        let before = std::fs::read(&path).unwrap();
        match with_file_limit(limit, || job.compress(1)) {
            Ok(settling) => {
                sample.store.replace(&settling.prove().unwrap()).unwrap();
                break;
            }
            Err(_) => {
                failures += 1;
                assert!(std::fs::read(&path).unwrap() == before);
                let left = files(directory.path(), "segments");
                assert!(left.iter().all(|path| path.extension().unwrap() == "seg"));
            }
        }
    }
    assert!(failures > 20, "only {failures} failures");
    sample.map_all();
    sample.settle_all(Compression::Lz4);
    assert!(read(&sample.store, end) == wanted && scrub(&sample.store).damage.is_empty());
}

/// The process dies at any step: what it leaves is one of these, and the next open of the store makes it good.
#[test]
fn what_a_crash_leaves_is_cleared_away() {
    let directory = tempfile::tempdir().unwrap();
    let sample = Sample::small(directory.path(), false);
    let end = sample.store.timeline().end();
    let wanted = sample.image(end);
    // Compressed, perhaps even proved, and not renamed.
    let job = sample
        .store
        .next_to_settle(Compression::Zstd(1), &|_| false)
        .unwrap();
    let _settling = job.compress(1).unwrap();
    // Half a map, half a run.
    let folder = volume_directory(directory.path(), VOLUME);
    std::fs::write(folder.join("maps/01-00000000000000000009.new"), [7; 9000]).unwrap();
    std::fs::write(folder.join("runs/00000000000000000002.new"), [7; 100]).unwrap();
    // A segment has its name, its run does not.
    std::fs::remove_file(&files(directory.path(), "runs")[5]).unwrap();
    drop(sample);
    let store = VolumeStore::open(directory.path(), VOLUME).unwrap();
    assert!(store.damaged().is_empty(), "{:?}", store.damaged());
    for kind in ["segments", "runs", "maps"] {
        let left = files(directory.path(), kind);
        assert!(
            left.iter().all(|path| path.extension().unwrap() != "new"),
            "{left:?}"
        );
    }
    assert!(read(&store, end) == wanted && scrub(&store).damage.is_empty());
}

#[test]
fn what_does_not_come_back_from_the_disk_replaces_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let sample = Sample::small(directory.path(), false);
    let store = sample.store;
    let job = store
        .next_to_settle(Compression::Zstd(1), &|_| false)
        .unwrap();
    let path = files(directory.path(), "segments")[0].clone();
    let sealed = std::fs::read(&path).unwrap();
    let settling = job.compress(1).unwrap();
    flip(&path.with_extension("new"), 8 * 4100);
    let failed = settling.prove().err().unwrap();
    assert_eq!(failed.code(), "S011-proof", "{failed}");
    assert!(std::fs::read(&path).unwrap() == sealed && !path.with_extension("new").exists());
    // A segment that was damaged before is not made to look whole.
    flip(&path, 8 * 9000);
    let job = store
        .next_to_settle(Compression::Zstd(1), &|_| false)
        .unwrap();
    let failed = job.compress(1).unwrap().prove().err().unwrap();
    assert_eq!(failed.code(), "S010-root", "{failed}");
}

/// Readers in threads of their own see nothing of what goes on meanwhile: settling, mapping, pruning, scrubbing, new history.
#[test]
fn images_are_read_while_everything_goes_on() {
    let directory = tempfile::tempdir().unwrap();
    let mut sample = Sample::new(directory.path(), 2 << 20, 96 << 10, true);
    sample.mixed(1500);
    let end = sample.store.timeline().end();
    let pinned = Lsn(end.0 / 3);
    sample.store.pin(pinned).unwrap();
    let images = [pinned, end].map(|lsn| {
        let image = Image::open(&sample.store, lsn).unwrap();
        (image, sample.image(lsn))
    });
    let done = std::sync::atomic::AtomicBool::new(false);
    let looped = std::sync::atomic::AtomicU64::new(0);
    let relaxed = std::sync::atomic::Ordering::Relaxed;
    std::thread::scope(|scope| {
        for (seed, (image, wanted)) in [3u64, 5, 7, 11].into_iter().zip(images.iter().cycle()) {
            let (done, looped) = (&done, &looped);
            scope.spawn(move || {
                let mut state = seed;
                let mut whole = vec![0u8; wanted.len()];
                while !done.load(relaxed) {
                    image.read(0, &mut whole).unwrap();
                    assert!(whole == *wanted);
                    for _ in 0..50 {
                        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
                        let sectors = 1 + (state >> 20) as usize % 80;
                        let at = (state >> 33) as usize % (wanted.len() / 512 - sectors) * 512;
                        let part = &mut whole[..sectors * 512];
                        image.read(at as u64, part).unwrap();
                        assert!(part == &wanted[at..at + sectors * 512], "{sectors} at {at}");
                    }
                    looped.fetch_add(1, relaxed);
                }
            });
        }
        let mut beside = 0;
        for compression in [Compression::Lz4, Compression::Zstd(1)] {
            let before = looped.load(relaxed);
            sample.settle_all(compression);
            sample.map_all();
            let span = length(&sample.store);
            keep(&mut sample.store, &policy(span, 30, &[(10, 100)]));
            // One that is opened meanwhile, and read while its segments are rewritten.
            let opened = Image::open(&sample.store, pinned).unwrap();
            sweep(&mut sample.store);
            let mut whole = vec![0u8; images[0].1.len()];
            opened.read(0, &mut whole).unwrap();
            assert!(whole == images[0].1);
            let scrubbed = scrub(&sample.store);
            assert_eq!(scrubbed.damage, []);
            sample.store.discard_maps(&scrubbed);
            beside += looped.load(relaxed) - before;
            sample.mixed(500);
        }
        assert!(beside > 0, "nobody read while all that went on");
        let rounds = looped.load(relaxed);
        while looped.load(relaxed) < rounds + 8 {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        done.store(true, relaxed);
    });
    assert!(sample.store.kept().below > Lsn(0), "nothing was pruned");
}

/// An image as `tests/reader.py` restores it.
fn read_by_the_other_reader(root: &Path, lsn: Lsn) -> Vec<u8> {
    let said = other_reader(root, lsn);
    assert!(said.status.success(), "{said:?}");
    std::fs::read(root.join("image")).unwrap()
}

fn other_reader(root: &Path, lsn: Lsn) -> std::process::Output {
    let output = root.join("image");
    let said = std::process::Command::new("python3")
        .arg(varve_tests::guest::repository().join("tests/reader.py"))
        .arg(volume_directory(root, VOLUME))
        .arg(lsn.0.to_string())
        .arg(&output)
        .output();
    said.unwrap()
}

/// A reader in another language, written from FORMAT.md alone, restores the same images, out of sealed and out of settled segments.
#[test]
fn a_reader_written_from_the_format_alone_restores_any_instant() {
    for settled in [None, Some(Compression::Lz4), Some(Compression::Zstd(3))] {
        let directory = tempfile::tempdir().unwrap();
        let mut sample = Sample::new(directory.path(), 256 << 10, 32 << 10, true);
        let end = sample.mixed(70);
        if let Some(compression) = settled {
            sample.settle_all(compression);
        }
        for lsn in [end, Lsn(3 + sample.random() % (end.0 - 3)), Lsn(end.0 / 2)] {
            let restored = read_by_the_other_reader(directory.path(), lsn);
            assert!(restored == sample.image(lsn), "LSN {lsn}");
        }
        let refuses = |lsn: Lsn| {
            let said = other_reader(directory.path(), lsn);
            let why = String::from_utf8_lossy(&said.stderr).into_owned();
            assert!(
                !said.status.success() && why.contains("does not resolve"),
                "{lsn}: {why}"
            );
        };
        // Within the first copy, and behind the end.
        assert!(sample.store.timeline().check(Lsn(2)).is_err());
        refuses(Lsn(2));
        refuses(end.plus(1));
        // Without the first segment nothing is whole; nor behind another that is missing.
        let segments = files(directory.path(), "segments");
        for victim in [0, 2] {
            let away = directory.path().join("away");
            std::fs::rename(&segments[victim], &away).unwrap();
            refuses(end);
            std::fs::rename(&away, &segments[victim]).unwrap();
        }
    }
}

/// Runs `work` while no file of this process can grow past `bytes`, as on a disk that fails from there on. (Each test is a process of its own.)
fn with_file_limit<T>(bytes: u64, work: impl FnOnce() -> T) -> T {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    use nix::sys::signal::{SigSet, Signal};
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGXFSZ);
    signals.thread_block().unwrap();
    let (_, hard) = getrlimit(Resource::RLIMIT_FSIZE).unwrap();
    setrlimit(Resource::RLIMIT_FSIZE, bytes, hard).unwrap();
    let done = work();
    setrlimit(Resource::RLIMIT_FSIZE, hard, hard).unwrap();
    done
}

/// However many threads compress a segment, its file is the same, and proves itself.
#[test]
fn several_threads_make_the_same_file() {
    let directory = tempfile::tempdir().unwrap();
    let mut sample = Sample::new(directory.path(), 4 << 20, 4 << 20, true);
    sample.mixed(400);
    let job = || {
        sample
            .store
            .next_to_settle(Compression::Zstd(3), &|_| false)
    };
    let compressed = |threads| {
        let settling = job().unwrap().compress(threads).unwrap();
        let new = files(directory.path(), "segments");
        let new = new
            .iter()
            .find(|path| path.extension().is_some_and(|end| end == "new"));
        (std::fs::read(new.unwrap()).unwrap(), settling)
    };
    let (alone, _) = compressed(1);
    assert!(alone.len() > 1 << 20, "{}: one lane's work", alone.len());
    for threads in [2, 3, 7] {
        let (together, settling) = compressed(threads);
        assert!(together == alone, "{threads} threads make another file");
        settling.prove().unwrap();
    }
}

/// History holds what everybody wrote: it is for its owner's eyes, also where an older version left it open.
#[test]
fn nobody_else_can_read_history() {
    use std::os::unix::fs::PermissionsExt;
    fn closed(path: &Path) -> usize {
        let mode = std::fs::metadata(path).unwrap().permissions().mode();
        assert_eq!(mode & 0o077, 0, "{} is open: {mode:o}", path.display());
        let entries = match path.is_dir() {
            true => std::fs::read_dir(path).unwrap().collect(),
            false => Vec::new(),
        };
        let inside = entries
            .into_iter()
            .map(|entry| closed(&entry.unwrap().path()));
        1 + inside.sum::<usize>()
    }
    let (root, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mut sample = Sample::small(root.path(), true);
    sample.store.pin(sample.store.timeline().end()).unwrap();
    let volumes = root.path().join("volumes");
    assert!(closed(&volumes) > 40);
    varve_store::salvage(root.path(), to.path(), |_, _| true).unwrap();
    closed(to.path().join("volumes").as_path());
    drop(sample);
    std::fs::set_permissions(&volumes, std::fs::Permissions::from_mode(0o755)).unwrap();
    drop(VolumeStore::open(root.path(), VOLUME).unwrap());
    assert_eq!(
        std::fs::metadata(&volumes).unwrap().permissions().mode() & 0o777,
        0o700
    );
}
