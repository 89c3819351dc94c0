//! A store whose files are cut, flipped, swapped or too new: each is noticed and named, what is good stays readable, nothing wrong is ever given out.

#![allow(
    clippy::unwrap_used,
    reason = "in tests a surprise should end the test"
)]

use blkfilter::{AckPolicy, Law};
use std::path::{Path, PathBuf};
use varve_format::{Lsn, SEGMENT_FOOTER_BYTES, SegmentFooter, SegmentSequence, VolumeId};
use varve_log::{Disk, ReadAt};
use varve_store::{Image, VolumeStore, ingest};
use varve_tests::guest::large;
use varve_tests::simulated::{Script, Simulated, VOLUME_BYTES};

const SEGMENT_BYTES: u64 = 320 * 1024;
const SEGMENT_COUNT: u64 = 24;

fn volume() -> VolumeId {
    VolumeId([9; 16])
}

/// A history of several segments, in a store of its own; and what the image at its end must be.
struct Sample {
    directory: tempfile::TempDir,
    image: Vec<u8>,
    last: Lsn,
}

fn sample(seed: u64) -> Sample {
    let script = Script {
        seed,
        requests: 300,
        log_faults: false,
        ack: AckPolicy::Async,
        copies: false,
    };
    let mut sim = Simulated::<Law>::new(script);
    assert!(sim.start() && sim.run(script));
    let history = sim.history();
    let directory = tempfile::tempdir().unwrap();
    let mut store = VolumeStore::open(directory.path(), volume()).unwrap();
    let machine = sim.machine.borrow();
    let mut log: &[u8] = machine.content(Disk::Log);
    let done = ingest(
        &mut store,
        &mut log as &mut dyn ReadAt,
        SEGMENT_BYTES,
        SEGMENT_COUNT,
        SegmentSequence(sim.status().log.sequence.0),
    )
    .unwrap();
    assert!(done.problems.is_empty(), "{:?}", done.problems);
    let last = store.timeline().last().unwrap();
    let image = history.image(last, VOLUME_BYTES);
    assert!(store.segments().count() >= 4, "too few segments");
    let sample = Sample {
        directory,
        image,
        last,
    };
    drop(store);
    assert_eq!(sample.read().unwrap(), sample.image);
    sample
}

impl Sample {
    fn open(&self) -> VolumeStore {
        VolumeStore::open(self.directory.path(), volume()).unwrap()
    }

    fn files(&self, kind: &str) -> Vec<PathBuf> {
        let folder = self
            .directory
            .path()
            .join("volumes")
            .join(volume().to_string())
            .join(kind);
        let mut files: Vec<PathBuf> = std::fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .collect();
        files.sort();
        files
    }

    /// The image at the end, if the store says that it resolves.
    fn read(&self) -> Result<Vec<u8>, String> {
        let store = self.open();
        if let Some(damage) = store.scrub().structure().first() {
            return Err(damage.what.clone());
        }
        store
            .timeline()
            .check(self.last)
            .map_err(|nearest| format!("does not resolve: {nearest:?}"))?;
        let image = Image::open(&store, self.last).map_err(|e| e.to_string())?;
        let mut bytes = vec![0; VOLUME_BYTES];
        image.read(0, &mut bytes).map_err(|e| e.to_string())?;
        Ok(bytes)
    }

    /// Never something else than what was: an error, or the right bytes.
    fn is_never_wrong(&self, what: &str) -> bool {
        match self.read() {
            Ok(bytes) => {
                assert!(bytes == self.image, "{what}: wrong bytes were given out");
                false
            }
            Err(_) => true,
        }
    }
}

fn with_change(path: &Path, change: impl FnOnce(&mut Vec<u8>), test: impl FnOnce()) {
    let before = std::fs::read(path).unwrap();
    let mut bytes = before.clone();
    change(&mut bytes);
    std::fs::write(path, bytes).unwrap();
    test();
    std::fs::write(path, before).unwrap();
}

/// Which bits of a byte are flipped: all of them with the large numbers, one by default.
fn bits_of(byte: usize) -> std::ops::Range<usize> {
    match large() {
        true => 0..8,
        false => byte % 8..byte % 8 + 1,
    }
}

#[test]
fn every_flipped_bit_of_a_footer_is_noticed_and_the_rest_stays() {
    let sample = sample(31);
    let files = sample.files("segments");
    let victim = files.last().unwrap();
    let name = victim.file_name().unwrap().to_string_lossy().into_owned();
    let length = std::fs::metadata(victim).unwrap().len() as usize;
    let bytes = length - SEGMENT_FOOTER_BYTES..length;
    for (byte, bit) in bytes.flat_map(|byte| bits_of(byte).map(move |bit| (byte, bit))) {
        with_change(
            victim,
            |bytes| bytes[byte] ^= 1 << bit,
            || {
                let store = sample.open();
                let damage = store.scrub().structure();
                assert_eq!(damage.len(), 1, "byte {byte}: {damage:?}");
                assert!(damage[0].what.contains(&name), "byte {byte}: {damage:?}");
                // Its run says what it held: history goes on, and exactly that cannot be read.
                assert!(store.timeline().check(sample.last).is_ok());
                let (from, _) = damage[0].from.unwrap();
                let image = Image::open(&store, from).unwrap();
                let fails = |(offset, length): &(u64, u64)| {
                    image.read(*offset, &mut vec![0; *length as usize]).is_err()
                };
                assert!(damage[0].blocks.iter().any(fails), "byte {byte}");
            },
        );
    }
}

#[test]
fn a_damaged_or_lost_run_is_made_again_from_its_segment() {
    let sample = sample(32);
    let run = &sample.files("runs")[1];
    let length = std::fs::metadata(run).unwrap().len() as usize;
    for byte in (0..length).step_by(61) {
        with_change(
            run,
            |bytes| bytes[byte] ^= 0x10,
            || {
                let store = sample.open();
                let image = Image::open(&store, sample.last).unwrap();
                let mut bytes = vec![0; VOLUME_BYTES];
                image.read(0, &mut bytes).unwrap();
                assert!(bytes == sample.image, "byte {byte}: wrong bytes");
                // The head was made again when the store was opened; single records are, by a scrub.
                let go_on = |_, _: &_| std::ops::ControlFlow::Continue(());
                let found = store.scrub().run(SegmentSequence(0), go_on);
                assert!(found.damage.iter().all(|damage| damage.blocks.is_empty()));
                let found = store.scrub().run(SegmentSequence(0), go_on);
                assert!(found.damage.is_empty(), "byte {byte}: {:?}", found.damage);
            },
        );
    }
    std::fs::remove_file(run).unwrap();
    assert_eq!(sample.read().unwrap(), sample.image);
}

#[test]
fn flipped_data_is_an_error_where_it_is_needed_and_never_wrong_bytes() {
    let sample = sample(33);
    let mut seed = 0x9e37_79b9_7f4a_7c15u64;
    let mut noticed = 0;
    for round in 0..400 {
        let files = sample.files("segments");
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        let victim = &files[seed as usize % files.len()];
        let length = std::fs::metadata(victim).unwrap().len();
        let byte = (seed >> 8) % length;
        with_change(
            victim,
            |bytes| bytes[byte as usize] ^= 1 << (seed % 8),
            || noticed += u32::from(sample.is_never_wrong(&format!("round {round}"))),
        );
    }
    println!("{noticed} of 400 flips met something that is read");
    assert!(noticed > 20, "{noticed}: the flips hit nothing");
}

#[test]
fn a_truncated_segment_is_noticed_at_every_block() {
    let sample = sample(34);
    let victim = &sample.files("segments")[1];
    let length = std::fs::metadata(victim).unwrap().len();
    for cut in (0..length).step_by(4096) {
        with_change(
            victim,
            |bytes| bytes.truncate(cut as usize),
            || {
                assert!(
                    sample.is_never_wrong("truncated"),
                    "cut to {cut}: not noticed"
                )
            },
        );
    }
}

#[test]
fn a_segment_of_another_volume_a_newer_version_or_a_fork_is_refused_by_name() {
    let sample = sample(35);
    let victim = &sample.files("segments")[2];
    let with_footer = |change: fn(&mut SegmentFooter)| {
        move |bytes: &mut Vec<u8>| {
            let at = bytes.len() - SEGMENT_FOOTER_BYTES;
            let mut footer = SegmentFooter::parse(&bytes[at..]).unwrap();
            change(&mut footer);
            bytes.truncate(at);
            bytes.extend_from_slice(&footer.to_block());
        }
    };
    with_change(
        victim,
        with_footer(|footer| footer.volume = [7; 16]),
        || {
            assert!(
                sample.read().unwrap_err().contains("another"),
                "{:?}",
                sample.read()
            )
        },
    );
    with_change(
        victim,
        with_footer(|footer| footer.version = 999.into()),
        || {
            assert!(
                sample.read().unwrap_err().contains("newer"),
                "{:?}",
                sample.read()
            )
        },
    );
    // A fork: the same place in the same volume, by another machine that was restored from the same disk.
    let other = self::sample(36);
    let foreign = std::fs::read(&other.files("segments")[2]).unwrap();
    let run = &sample.files("runs")[2];
    with_change(
        victim,
        |bytes| *bytes = foreign,
        || {
            let index = std::fs::read(run).unwrap();
            std::fs::remove_file(run).unwrap();
            assert!(
                sample.is_never_wrong("a fork"),
                "a fork was taken for our own"
            );
            std::fs::write(run, index).unwrap();
        },
    );
    assert_eq!(sample.read().unwrap(), sample.image);
}

#[test]
fn a_second_process_is_refused() {
    let sample = sample(37);
    let _first = sample.open();
    let second = VolumeStore::open(sample.directory.path(), volume());
    assert_eq!(second.err().map(|error| error.code()), Some("S003-locked"));
}
