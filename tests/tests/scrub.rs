//! Scrubbing: whatever happens to a file is found, located and bounded; and what is read is the disk.

#![allow(
    clippy::unwrap_used,
    reason = "in tests a surprise should end the test"
)]

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use varve_format::{FRAME_ENTRY_BYTES, SegmentSequence, SettledHeader};
use varve_store::{Compression, Image, Scrubbed, VolumeStore};
use varve_tests::guest::large;
use varve_tests::sample::{
    Sample, VOLUME, files, flip, frames_of, read, scrub, scrub_stored, with_checksums,
};

/// Every byte of the structures of a segment, its run and a map: one bit of each is flipped (with the large numbers all eight), and a scrub says so. Data is untouched, so everything
/// can still be read, or is named as lost.
#[test]
fn every_flipped_byte_of_a_file_is_found_by_a_scrub() {
    for settled in [false, true] {
        let directory = tempfile::tempdir().unwrap();
        let sample = Sample::of_size(directory.path(), settled, 80);
        let end = sample.store.timeline().end();
        let wanted = sample.image(end);
        let store = sample.store;
        let job = store.scrub();
        for kind in ["segments", "runs", "maps"] {
            let victim = &files(directory.path(), kind)[0];
            let before = std::fs::read(victim).unwrap();
            let length = before.len() as u64;
            let tables = match settled && kind == "segments" {
                true => {
                    let header = SettledHeader::parse(&before[..4096], length).unwrap();
                    header.tables_at.get()..length - 4096
                }
                false => 0..0,
            };
            for byte in 0..length {
                // All of the places where structures are, a part of the long rest. What follows them need not begin at a block: tables, the footer.
                let from_end = length - byte;
                let has_structure = byte < 256
                    || byte % 4096 < 128
                    || (4096 - 160..=4096).contains(&from_end)
                    || tables.contains(&byte) && byte % 5 == 0;
                if !has_structure && byte % 509 != 0 {
                    continue;
                }
                // All bits with the large numbers.
                let bits = if large() {
                    0..8
                } else {
                    byte % 8..byte % 8 + 1
                };
                for bit in bits.map(|bit| byte * 8 + bit) {
                    flip(victim, bit);
                    let found = job.run(SegmentSequence(0), |_, _| {
                        std::ops::ControlFlow::Continue(())
                    });
                    assert!(
                        !found.damage.is_empty(),
                        "{kind} (settled: {settled}): bit {bit} of {length} bytes was not found"
                    );
                    // Not flipped back: a scrub mends what it can.
                    std::fs::write(victim, &before).unwrap();
                }
            }
        }
        assert!(scrub(&store).damage.is_empty(), "all bits are back");
        assert!(read(&store, end) == wanted);
    }
}

/// Random flips anywhere: found, and the blocks that are named are the only ones that cannot be read.
#[test]
fn damage_is_located_and_the_rest_stays_readable() {
    for settled in [false, true] {
        let directory = tempfile::tempdir().unwrap();
        let mut sample = Sample::small(directory.path(), settled);
        let end = sample.store.timeline().end();
        let segments = files(directory.path(), "segments");
        let mut lost_something = 0;
        for round in 0..250 {
            let victim = &segments[sample.random() as usize % segments.len()];
            let bits = std::fs::metadata(victim).unwrap().len() * 8;
            let bit = sample.random() % bits;
            flip(victim, bit);
            let found = scrub(&sample.store);
            assert!(
                !found.damage.is_empty(),
                "round {round}: bit {bit} not found"
            );
            let lost: Vec<(u64, u64)> =
                found.damage.iter().flat_map(|d| d.blocks.clone()).collect();
            let first = found.damage.iter().filter_map(|d| d.from).min();
            lost_something += u32::from(!lost.is_empty());
            // At its end, and at an instant at which the damage begins, if there is one.
            for lsn in [Some(end), first.map(|(lsn, _)| lsn)].into_iter().flatten() {
                let image = Image::open(&sample.store, lsn).unwrap();
                let wanted = sample.image(lsn);
                for sector in 0..image.bytes() / 512 {
                    let (offset, mut bytes) = (sector * 512, [0u8; 512]);
                    let named = lost
                        .iter()
                        .any(|(o, l)| offset < o + l && *o < offset + 512);
                    match image.read(offset, &mut bytes) {
                        Ok(()) => assert!(
                            bytes == wanted[offset as usize..offset as usize + 512],
                            "round {round}: wrong bytes were given out"
                        ),
                        Err(error) => assert!(named, "round {round}: not named: {error}"),
                    }
                }
            }
            if let (Some(first), Some(damage)) = (first, found.damage.first())
                && !damage.blocks.is_empty()
            {
                assert_eq!(first.0, damage.from.unwrap().0);
                let image = Image::open(&sample.store, first.0).unwrap();
                let fails = |(offset, length): &(u64, u64)| {
                    image.read(*offset, &mut vec![0; *length as usize]).is_err()
                };
                let lacks = damage.blocks.iter().any(fails);
                assert!(lacks, "round {round}: all of {damage:?} can be read");
                if let Some((until, _)) = damage.until {
                    let image = Image::open(&sample.store, until).unwrap();
                    for (offset, length) in &damage.blocks {
                        let mut bytes = vec![0; *length as usize];
                        image.read(*offset, &mut bytes).unwrap();
                    }
                }
            }
            flip(victim, bit);
        }
        assert!(
            lost_something > 30,
            "{lost_something}: the flips hit nothing"
        );
    }
}

#[test]
fn a_lost_segment_is_located_by_its_run_and_history_goes_on() {
    let directory = tempfile::tempdir().unwrap();
    let sample = Sample::small(directory.path(), false);
    let end = sample.store.timeline().end();
    let wanted = sample.image(end);
    drop(sample);
    let victim = &files(directory.path(), "segments")[4];
    std::fs::remove_file(victim).unwrap();
    let store = VolumeStore::open(directory.path(), VOLUME).unwrap();
    assert_eq!(store.damaged().len(), 1, "{:?}", store.damaged());
    assert!(
        store.timeline().check(end).is_ok(),
        "what is behind it is whole"
    );
    let lost: Vec<(u64, u64)> = scrub(&store).damage[0].blocks.clone();
    assert!(!lost.is_empty());
    let image = Image::open(&store, end).unwrap();
    let mut failed = 0;
    for sector in 0..image.bytes() / 512 {
        let (offset, mut bytes) = (sector * 512, [0u8; 512]);
        match image.read(offset, &mut bytes) {
            Ok(()) => assert!(bytes == wanted[offset as usize..offset as usize + 512]),
            Err(_) => {
                failed += 1;
                assert!(
                    lost.iter()
                        .any(|(o, l)| offset < o + l && *o < offset + 512)
                );
            }
        }
    }
    assert!(
        failed > 0,
        "nothing of it was needed: the test says nothing"
    );
    assert!(!store.scrub().structure().is_empty());
}

/// With its run gone, too, nobody knows what a segment held: no instant behind it resolves, and that is said, whatever is read.
#[test]
fn a_segment_that_is_lost_with_its_run_is_a_hole_that_every_reading_tells() {
    for settled in [false, true] {
        let directory = tempfile::tempdir().unwrap();
        let sample = Sample::small(directory.path(), settled);
        let bytes = Image::open(&sample.store, sample.store.timeline().end())
            .unwrap()
            .bytes();
        drop(sample);
        // The first of all: what was before it nobody else tells of.
        for kind in ["segments", "runs"] {
            std::fs::remove_file(&files(directory.path(), kind)[0]).unwrap();
        }
        let store = VolumeStore::open(directory.path(), VOLUME).unwrap();
        let all = |_, _: &Scrubbed| std::ops::ControlFlow::Continue(());
        let first = SegmentSequence(0);
        for damage in [
            store.scrub().run(first, all).damage,
            store.scrub().stored().run(first, all).damage,
            store.scrub().structure(),
        ] {
            let hole = damage.iter().find(|found| found.what.contains("hole"));
            let hole = hole.unwrap_or_else(|| panic!("{settled}: {damage:?}"));
            assert_eq!((&hole.blocks[..], hole.until), (&[(0, bytes)][..], None));
        }
        let directory = tempfile::tempdir().unwrap();
        let sample = Sample::small(directory.path(), settled);
        let end = sample.store.timeline().end();
        let bytes = Image::open(&sample.store, end).unwrap().bytes();
        drop(sample);
        for kind in ["segments", "runs"] {
            std::fs::remove_file(&files(directory.path(), kind)[4]).unwrap();
        }
        let store = VolumeStore::open(directory.path(), VOLUME).unwrap();
        let mut segments = store.segments();
        let (before, behind) = (segments.nth(3).unwrap(), segments.next().unwrap());
        assert_eq!(before.sequence.0 + 2, behind.sequence.0);
        assert!(store.timeline().check(end).is_err());
        let all = |_, _: &Scrubbed| std::ops::ControlFlow::Continue(());
        let first = SegmentSequence(0);
        for (how, damage) in [
            ("everything", store.scrub().run(first, all).damage),
            (
                "gone on with",
                store.scrub().run(behind.sequence, all).damage,
            ),
            ("stored", store.scrub().stored().run(first, all).damage),
            (
                "for indexes",
                store.scrub().for_indexes().run(first, all).damage,
            ),
            ("structure", store.scrub().structure()),
        ] {
            let hole = damage.iter().find(|found| found.what.contains("hole"));
            let hole = hole.unwrap_or_else(|| panic!("{how} ({settled}): {damage:?}"));
            assert_eq!(
                hole.from,
                Some((before.lsn_end.plus(1), before.time_end)),
                "{how}"
            );
            assert_eq!(
                (&hole.blocks[..], hole.until),
                (&[(0, bytes)][..], None),
                "{how}"
            );
        }
    }
}

/// Opened with whatever is wrong with its files, a history never gives out wrong bytes, at its end or before.
fn is_never_wrong(root: &Path, instants: &[(varve_format::Lsn, Vec<u8>)], what: &str) {
    let store = VolumeStore::open(root, VOLUME).unwrap();
    for (lsn, wanted) in instants {
        let Ok(image) = Image::open(&store, *lsn) else {
            continue;
        };
        let mut bytes = [0u8; 4096];
        for (block, wanted) in (0..).zip(wanted.chunks(4096)) {
            if image.read(block * 4096, &mut bytes).is_ok() {
                assert!(
                    bytes == wanted,
                    "{what}: wrong bytes at {lsn}, block {block}"
                );
            }
        }
    }
}

/// Cut at the border of any frame, of tables, or of a block; settled or pruned; runs and maps, too.
#[test]
fn files_that_are_cut_are_noticed() {
    for pruned in [false, true] {
        let directory = tempfile::tempdir().unwrap();
        let mut sample = Sample::of_size(directory.path(), true, 250);
        if pruned {
            assert!(
                varve_tests::sample::prune_to(&mut sample.store, 30, Compression::Lz4).unwrap() > 0
            );
        }
        let end = sample.store.timeline().end();
        let middle = varve_format::Lsn(end.0 * 3 / 4);
        let known = [middle, end]
            .into_iter()
            .filter(|lsn| sample.store.timeline().check(*lsn).is_ok());
        let instants: Vec<_> = known.map(|lsn| (lsn, sample.image(lsn))).collect();
        let elsewhere = tempfile::tempdir().unwrap();
        sample.store = VolumeStore::open(elsewhere.path(), VOLUME).unwrap();
        let mut noticed = 0;
        for kind in ["segments", "runs", "maps"] {
            for victim in files(directory.path(), kind).into_iter().take(2) {
                let whole = std::fs::read(&victim).unwrap();
                let length = whole.len() as u64;
                let mut cuts: Vec<u64> = (0..length).step_by(4096).collect();
                if kind == "segments" {
                    let header = SettledHeader::parse(&whole[..4096], length).unwrap();
                    cuts.push(header.tables_at.get());
                    if !pruned {
                        let tables = &whole[header.tables_at.get() as usize..whole.len() - 4096];
                        let (frames, _) =
                            varve_format::parse_settled_tables(&header, tables).unwrap();
                        cuts.extend(frames.iter().map(|frame| frame.offset.get()));
                    }
                }
                for cut in cuts {
                    std::fs::write(&victim, &whole[..cut as usize]).unwrap();
                    let what = format!("{} cut to {cut} of {length}", victim.display());
                    is_never_wrong(directory.path(), &instants, &what);
                    let store = VolumeStore::open(directory.path(), VOLUME).unwrap();
                    // A run was made again by now, a map was given up, which was said.
                    let told = !store.healed().is_empty() || !scrub(&store).damage.is_empty();
                    let now = std::fs::metadata(&victim).map(|now| now.len());
                    let is_mended = kind != "segments" && now.map_or(true, |now| now == length);
                    assert!(told || is_mended, "{what}: not noticed");
                    noticed += 1;
                    drop(store);
                    std::fs::write(&victim, &whole).unwrap();
                }
            }
        }
        assert!(noticed > 20, "{noticed}");
        let store = VolumeStore::open(directory.path(), VOLUME).unwrap();
        assert_eq!(scrub(&store).damage, []);
    }
}

/// One segment in two places is one segment.
#[test]
fn files_that_are_there_twice_are_noticed() {
    for settled in [false, true] {
        let directory = tempfile::tempdir().unwrap();
        let sample = Sample::small(directory.path(), settled);
        let end = sample.store.timeline().end();
        let instants = [(end, sample.image(end))];
        drop(sample);
        let (segments, runs) = (
            files(directory.path(), "segments"),
            files(directory.path(), "runs"),
        );
        let behind = |files: &[std::path::PathBuf]| {
            let last = files.last().unwrap();
            let number: u64 = last.file_stem().unwrap().to_str().unwrap().parse().unwrap();
            let ending = last.extension().unwrap().to_str().unwrap();
            last.with_file_name(format!("{:020}.{ending}", number + 1))
        };
        let places = [
            (behind(&segments), behind(&runs)),
            (
                segments[0].with_file_name("copy of it.seg"),
                runs[0].with_file_name("copy.run"),
            ),
        ];
        for (segment, run) in places {
            std::fs::copy(&segments[1], &segment).unwrap();
            std::fs::copy(&runs[1], &run).unwrap();
            let store = VolumeStore::open(directory.path(), VOLUME).unwrap();
            assert_eq!(store.timeline().end(), end, "{}", segment.display());
            assert!(!store.damaged().is_empty(), "{}", segment.display());
            drop(store);
            is_never_wrong(directory.path(), &instants, "twice");
            let store = VolumeStore::open(directory.path(), VOLUME).unwrap();
            assert!(read(&store, end) == instants[0].1);
            let _ = (std::fs::remove_file(segment), std::fs::remove_file(run));
        }
    }
}

/// Where a segment and its run are damaged, a map is the last to know what was in them: indexes made anew do without making that one.
#[test]
fn maps_outlive_what_they_could_not_be_made_of_again() {
    let directory = tempfile::tempdir().unwrap();
    let sample = Sample::small(directory.path(), false);
    let all = |_, _: &Scrubbed| std::ops::ControlFlow::Continue(());
    let maps = files(directory.path(), "maps");
    let made = |sample: &Sample| {
        sample
            .store
            .scrub()
            .for_indexes()
            .run(SegmentSequence(0), all)
            .maps
    };
    assert_eq!(made(&sample), maps);
    let victim = &files(directory.path(), "segments")[1];
    let length = std::fs::metadata(victim).unwrap().len();
    std::fs::write(victim, vec![0; length as usize]).unwrap();
    assert!(made(&sample).is_empty() && !maps.is_empty());
}

/// The newest segment is lost: history ends before it, and what it held is said until the log gives it again.
#[test]
fn the_newest_segment_does_not_go_in_silence() {
    let directory = tempfile::tempdir().unwrap();
    let sample = Sample::small(directory.path(), false);
    let newest = sample.store.segments().next_back().unwrap().clone();
    drop(sample);
    let victim = files(directory.path(), "segments").pop().unwrap();
    let bytes = std::fs::read(&victim).unwrap();
    std::fs::remove_file(&victim).unwrap();
    for _ in 0..2 {
        let store = VolumeStore::open(directory.path(), VOLUME).unwrap();
        assert_eq!(store.timeline().end(), newest.previous_lsn_end);
        let told = format!("from LSN {} to {}", newest.lsn_start, newest.lsn_end);
        for damage in [scrub(&store).damage, store.scrub().structure()] {
            assert!(
                damage.len() == 1 && damage[0].what.contains(&told),
                "{damage:?}"
            );
            assert!(damage[0].unplaced);
        }
    }
    std::fs::write(&victim, bytes).unwrap();
    let store = VolumeStore::open(directory.path(), VOLUME).unwrap();
    assert_eq!(store.timeline().end(), newest.lsn_end);
    assert_eq!(scrub(&store).damage, []);
    assert_eq!(store.scrub().structure(), []);
}

/// A table whose frames lie over each other would have its reader read the same bytes again and again.
#[test]
fn frames_that_do_not_lie_one_behind_the_other_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let mut sample = Sample::new(directory.path(), 4 << 20, 256 << 10, true);
    sample.mixed(400);
    sample.settle_all(Compression::None);
    let victim = files(directory.path(), "segments").into_iter();
    let victim = victim
        .max_by_key(|path| std::fs::metadata(path).unwrap().len())
        .unwrap();
    let mut file = std::fs::read(&victim).unwrap();
    assert!(with_checksums(file.clone()) == file);
    let (first, second) = frames_of(&file, 0, 1);
    let header = SettledHeader::parse(&file[..4096], file.len() as u64).unwrap();
    let entry = header.tables_at.get() as usize + FRAME_ENTRY_BYTES;
    assert_eq!(file[entry..entry + 8], (second.start as u64).to_le_bytes());
    file[entry..entry + 8].copy_from_slice(&(first.start as u64).to_le_bytes());
    std::fs::write(&victim, with_checksums(file)).unwrap();
    let damage = scrub_stored(&sample.store).damage;
    assert!(damage[0].what.contains("settled.frame"), "{damage:?}");
}

/// A file system of its own, in a file.
struct Disk<'a> {
    image: &'a Path,
    mounted: &'a Path,
}

impl Disk<'_> {
    fn mount<'a>(image: &'a Path, on: &'a Path) -> Disk<'a> {
        std::fs::File::create(image)
            .and_then(|file| file.set_len(64 << 20))
            .unwrap();
        std::fs::create_dir(on).unwrap();
        let done = |command: &mut Command| assert!(command.status().unwrap().success());
        done(
            Command::new("mkfs.ext4")
                .args(["-q", "-F", "-b", "4096"])
                .arg(image),
        );
        done(
            Command::new("mount")
                .args(["-o", "loop"])
                .arg(image)
                .arg(on),
        );
        Disk { image, mounted: on }
    }

    /// Flips a bit of the disk, under the file system, where it holds this block; gives how often it does.
    fn spoil(&self, block: &[u8]) -> usize {
        let content = std::fs::read(self.image).unwrap();
        let blocks = content.chunks(block.len()).enumerate();
        let places: Vec<usize> = blocks
            .filter_map(|(number, bytes)| (bytes == block).then_some(number * block.len()))
            .collect();
        let file = std::fs::File::options().write(true).open(self.image);
        for at in &places {
            let spoilt = [content[at + 40] ^ 1];
            file.as_ref()
                .unwrap()
                .write_all_at(&spoilt, *at as u64 + 40)
                .unwrap();
        }
        places.len()
    }
}

impl Drop for Disk<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.mounted).status();
    }
}

/// What the disk has spoilt is found although all of it is still whole in memory.
#[test]
fn a_scrub_reads_the_disk_and_not_memory() {
    for settled in [false, true] {
        let directory = tempfile::tempdir().unwrap();
        let (image, on) = (directory.path().join("disk"), directory.path().join("on"));
        let disk = Disk::mount(&image, &on);
        let sample = Sample::small(&on, settled);
        let victim = files(&on, "segments").swap_remove(2);
        // All of it is on the disk, and in memory.
        nix::unistd::syncfs(std::fs::File::open(&on).unwrap()).unwrap();
        let content = std::fs::read(&victim).unwrap();
        assert_eq!(scrub(&sample.store).damage, []);
        assert_eq!(std::fs::read(&victim).unwrap(), content);
        let is_data = |block: &&[u8]| {
            let bytes: std::collections::BTreeSet<&u8> = block.iter().collect();
            bytes.len() > 200
        };
        let block = content.chunks_exact(4096).find(is_data).unwrap();
        assert!(disk.spoil(block) > 0);
        assert_eq!(std::fs::read(&victim).unwrap(), content, "still in memory");
        let named = victim.display().to_string();
        for found in [scrub_stored(&sample.store), scrub(&sample.store)] {
            let mut said = found.damage.iter().map(|damage| &damage.what);
            assert!(
                said.any(|what| what.contains(&named)),
                "{settled}: {:?}",
                found.damage
            );
        }
        drop(sample);
    }
}
