//! Where history takes more space than it may.

#![allow(
    clippy::unwrap_used,
    reason = "in tests a surprise should end the test"
)]

use varve_format::{KeptEntry, Lsn, WallTime};
use varve_store::{Image, VolumeStore};
use varve_tests::retained::{check, end_time, keep, length, policy, sweep};
use varve_tests::sample::{Sample, VOLUME, scrub};

const VOLUME_BYTES: u64 = 4 << 20;
const SEGMENT_BYTES: u64 = 96 << 10;

fn instants_of(store: &VolumeStore) -> Vec<Lsn> {
    store.kept().entries.iter().map(KeptEntry::lsn).collect()
}

/// Where there is too little space the oldest instants go, a part at a time, until nothing is left that may.
#[test]
fn the_oldest_go_first_and_what_must_stay_stays() {
    let directory = tempfile::tempdir().unwrap();
    let mut sample = Sample::new(directory.path(), VOLUME_BYTES, SEGMENT_BYTES, true);
    sample.mixed(3000);
    sample.map_all();
    let span = length(&sample.store);
    let now = end_time(&sample.store);
    assert!(keep(&mut sample.store, &policy(span, 40, &[(100, 100)])));
    sweep(&mut sample.store);
    let listed = instants_of(&sample.store);
    assert!(listed.len() > 20, "{} instants", listed.len());
    let (pinned, open) = (listed[3], listed[listed.len() / 2]);
    sample.store.pin(pinned).unwrap();
    let image = Image::open(&sample.store, open).unwrap();
    // The whole history is younger than that.
    assert!(sample.store.next_to_thin(2 * span, now).is_none());
    let leave = span / 10;
    let young = now.0 - leave;
    let (mut steps, mut moved) = (0, 0);
    while let Some(thinning) = sample.store.next_to_thin(leave, now) {
        let before = (**sample.store.kept()).clone();
        let stored = sample.store.stored_bytes();
        let lasting = |entry: &&KeptEntry| entry.lsn() == pinned || entry.lsn() == open;
        let first = before.entries.iter().find(|entry| !lasting(entry));
        assert_eq!(
            thinning.oldest,
            first.map_or(before.below_time, |first| first.time())
        );
        assert!(sample.store.thin(&thinning).unwrap(), "nothing has changed");
        sweep(&mut sample.store);
        let after = (**sample.store.kept()).clone();
        assert!(sample.store.stored_bytes() <= stored);
        assert!([pinned, open].iter().all(|lsn| after.get(*lsn).is_some()));
        assert!(after.get(pinned).unwrap().is_pinned());
        let gone = before
            .entries
            .iter()
            .filter(|entry| after.get(entry.lsn()).is_none());
        let gone: Vec<Lsn> = gone.map(KeptEntry::lsn).collect();
        // Those that went are the first of those that may, and not many; only when none is left the limit moves.
        let may: Vec<Lsn> = before
            .entries
            .iter()
            .filter(|e| !lasting(e))
            .map(KeptEntry::lsn)
            .collect();
        assert_eq!(gone, may[..gone.len()]);
        assert_eq!(gone.len(), may.len().div_ceil(16));
        assert_eq!(after.below > before.below, may.is_empty());
        moved += u64::from(after.below > before.below);
        assert!(after.below_time.0 <= young);
        assert_eq!(
            after.first().map(|lsn| sample.store.time_of(lsn).unwrap()),
            Some(thinning.begins)
        );
        steps += 1;
        if steps % 8 == 0 {
            check(&mut sample, 10);
        }
    }
    assert!(moved > 5 && steps > moved + 10, "{moved} of {steps}");
    let left = instants_of(&sample.store);
    assert_eq!(left, [pinned, open]);
    let mut bytes = vec![0; VOLUME_BYTES as usize];
    image.read(0, &mut bytes).unwrap();
    assert!(
        bytes == sample.image(open),
        "an image that is open has changed"
    );
    // What is young was left alone; the limit stops a segment before it, or where a span begins.
    let below = sample.store.kept().below;
    let younger = sample
        .store
        .segments()
        .filter(|s| s.lsn_start >= below && s.time_end.0 <= young);
    assert!(younger.count() <= 3);
    drop(image);
    let thinning = sample.store.next_to_thin(leave, now).unwrap();
    assert!(sample.store.thin(&thinning).unwrap());
    sweep(&mut sample.store);
    let elsewhere = tempfile::tempdir().unwrap();
    sample.store = VolumeStore::open(elsewhere.path(), VOLUME).unwrap();
    sample.store = VolumeStore::open(directory.path(), VOLUME).unwrap();
    let left = instants_of(&sample.store);
    assert_eq!(left, [pinned]);
    check(&mut sample, 40);
    assert_eq!(scrub(&sample.store).damage, []);
}

/// After a while without the daemon much is taken in one go: it is of one age, and goes bit by bit all the same.
#[test]
fn what_was_taken_at_once_goes_bit_by_bit() {
    const HOUR: i64 = 3_600_000_000_000;
    let directory = tempfile::tempdir().unwrap();
    let mut sample = Sample::new(directory.path(), VOLUME_BYTES, SEGMENT_BYTES, true);
    let taken = WallTime(500_000 * HOUR);
    sample.store.set_now(taken);
    sample.mixed(1500);
    let end = sample.store.timeline().end();
    let at = |hours: i64| WallTime(taken.0 + hours * HOUR);
    assert!(sample.store.next_to_thin(2 * HOUR, at(1)).is_none());
    let (mut steps, mut below) = (0, Lsn(0));
    while let Some(thinning) = sample.store.next_to_thin(2 * HOUR, at(3)) {
        assert!(sample.store.thin(&thinning).unwrap());
        let now = sample.store.kept().below;
        assert!(
            now > below && now.0 - below.0 < end.0 / 4,
            "from {below} to {now} of {end}"
        );
        (steps, below) = (steps + 1, now);
    }
    assert!(
        steps > 8 && below.0 > end.0 / 2,
        "{steps} steps to {below} of {end}"
    );
    sweep(&mut sample.store);
    check(&mut sample, 15);
}
