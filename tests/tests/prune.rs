//! Retention: what is kept reads as it was recorded, what is not is refused by name, and no step of pruning loses anything else.

#![allow(
    clippy::unwrap_used,
    reason = "in tests a surprise should end the test"
)]

use std::path::{Path, PathBuf};
use varve_format::{KeptEntry, Lsn, PointDetail, RunEntry, RunHeader, WallTime};
use varve_store::{Compression, Event, Image, Swept, VolumeStore, volume_directory};
use varve_tests::retained::{check, end_time, keep, length, policy, sweep};
use varve_tests::sample::{Sample, VOLUME, files, read, scrub};

const VOLUME_BYTES: u64 = 4 << 20;
const SEGMENT_BYTES: u64 = 96 << 10;

#[test]
fn what_a_policy_keeps_reads_as_it_was_recorded() {
    for (round, settle) in [(0, false), (1, true)] {
        let directory = tempfile::tempdir().unwrap();
        let mut sample = Sample::new(directory.path(), VOLUME_BYTES, SEGMENT_BYTES, true);
        for _ in 0..round * 7 {
            sample.random();
        }
        let mut last = u64::MAX;
        for turn in 0..3u64 {
            sample.mixed(1200);
            if settle {
                sample.settle_all(Compression::Lz4);
            }
            if round != 1 {
                sample.map_all();
            }
            let before = sample.store.stored_bytes();
            let span = length(&sample.store);
            let policy = policy(span, 30, &[(40, 60), (10, 90)]);
            assert!(keep(&mut sample.store, &policy), "turn {turn}");
            assert!(sweep(&mut sample.store) > 3);
            assert_eq!(sweep(&mut sample.store), 0, "nothing is left to do");
            assert!(sample.store.stored_bytes() < before);
            check(&mut sample, 40);
            last = sample.store.stored_bytes();
        }
        assert_eq!(scrub(&sample.store).damage, [], "round {round}");
        assert_eq!(sample.store.scrub().structure(), []);
        // What came of it says the same after opening anew, and with maps made of what is left.
        let kept = sample.store.kept().entries.clone();
        assert!(kept.len() > 5, "{} instants are kept", kept.len());
        for path in files(directory.path(), "maps") {
            std::fs::remove_file(path).unwrap();
        }
        let elsewhere = tempfile::tempdir().unwrap();
        sample.store = VolumeStore::open(elsewhere.path(), VOLUME).unwrap();
        sample.store = VolumeStore::open(directory.path(), VOLUME).unwrap();
        assert_eq!(sample.store.kept().entries, kept);
        check(&mut sample, 20);
        sample.map_all();
        check(&mut sample, 20);
        // Without the limit of what is younger nearly everything goes but one image.
        let span = length(&sample.store);
        let nothing = policy(span, 1, &[]);
        assert!(keep(&mut sample.store, &nothing));
        assert!(sweep(&mut sample.store) > 0);
        assert!(sample.store.kept().entries.is_empty());
        // Of each block there is one version, besides what shares a record with it, and what is not worth writing anew.
        let below = sample.store.kept().below;
        let pruned = sample.store.segments().filter(|s| s.lsn_end <= below);
        let payload: u64 = pruned.map(|segment| segment.payload_bytes).sum();
        assert!(
            payload < 2 * VOLUME_BYTES,
            "{payload} bytes are left of one image"
        );
        assert!(sample.store.stored_bytes() < last);
        let end = sample.store.timeline().end();
        assert!(read(&sample.store, end) == sample.image(end));
        assert_eq!(scrub(&sample.store).damage, []);
    }
}

#[test]
fn a_finer_policy_brings_nothing_back_and_a_window_is_never_pruned() {
    let directory = tempfile::tempdir().unwrap();
    let mut sample = Sample::new(directory.path(), VOLUME_BYTES, SEGMENT_BYTES, true);
    sample.mixed(3000);
    let span = length(&sample.store);
    let mut coarse = policy(span, 10, &[(10, 100)]);
    coarse.immutable = span / 2;
    assert!(keep(&mut sample.store, &coarse));
    assert!(sweep(&mut sample.store) > 0);
    let window = WallTime(end_time(&sample.store).0 - span / 2);
    assert!(sample.store.kept().below_time <= window);
    let before = sample.store.kept().entries.clone();
    assert!(before.len() > 3, "{before:?}");
    // More is kept from now on: what is left of that age stays, and nothing comes back.
    let mut more = policy(span, 90, &[(10, 100)]);
    keep(&mut sample.store, &more);
    assert_eq!(sample.store.kept().entries, before);
    more.ladder.rungs.clear();
    more.ladder.all = Some(span * 2);
    keep(&mut sample.store, &more);
    assert_eq!(sample.store.kept().entries, before);
    let mut window = policy(span, 10, &[]);
    window.immutable = span * 2;
    keep(&mut sample.store, &window);
    assert_eq!(sample.store.kept().entries, before);
    check(&mut sample, 30);
}

/// Records carry the machine's time, which may be wrong. History ages from when the store took it.
#[test]
fn what_the_store_took_lately_is_young_whatever_its_records_say() {
    let directory = tempfile::tempdir().unwrap();
    let mut sample = Sample::new(directory.path(), VOLUME_BYTES, SEGMENT_BYTES, true);
    const HOUR: i64 = 3_600_000_000_000;
    let mut noon = WallTime(500_000 * HOUR);
    sample.store.set_now(noon);
    sample.mixed(1000);
    let mut policy = policy(HOUR, 100, &[]);
    let plan = sample
        .store
        .plan(&policy, WallTime(noon.0 + HOUR / 2))
        .run()
        .unwrap();
    assert!(plan.is_none(), "what is half an hour old is to be pruned");
    let first = sample.store.timeline().end();
    noon.0 += 2 * HOUR;
    sample.store.set_now(noon);
    sample.mixed(1000);
    policy.immutable = HOUR;
    policy.ladder.all = Some(HOUR / 10);
    let plan = sample
        .store
        .plan(&policy, WallTime(noon.0 + HOUR / 2))
        .run()
        .unwrap();
    assert!(sample.store.keep(&plan.unwrap()).unwrap());
    assert!(sweep(&mut sample.store) > 3);
    let below = sample.store.kept().below;
    assert!(below <= first && below.0 > first.0 / 2, "{below}, {first}");
    check(&mut sample, 40);
}

/// The store's clock may be ahead (the machine's was, once, when it started): instants are no older for that, and rungs keep what they say.
#[test]
fn a_store_clock_that_is_ahead_takes_nothing_from_the_rungs() {
    let directory = tempfile::tempdir().unwrap();
    let mut sample = Sample::new(directory.path(), VOLUME_BYTES, SEGMENT_BYTES, true);
    sample.mixed(2000);
    let (span, machine) = (length(&sample.store), end_time(&sample.store));
    let policy = policy(span, 10, &[(40, 200)]);
    let ahead = WallTime(machine.0 + 10 * span);
    let plan = |machine| {
        let plan = sample.store.plan_by(&policy, ahead, machine).run();
        plan.unwrap().unwrap().kept.entries.len()
    };
    assert_eq!(plan(ahead), 0, "all of it would be too old");
    assert!(plan(machine) > 30, "{} instants", plan(machine));
}

/// Nor does what is old become young by it: both clocks are told apart.
#[test]
fn a_store_clock_that_is_far_ahead_keeps_no_more_than_it_should() {
    const MONTH: i64 = 30 * 86_400_000_000_000;
    let kept = |ahead: i64| {
        let directory = tempfile::tempdir().unwrap();
        let mut sample = Sample::new(directory.path(), VOLUME_BYTES, SEGMENT_BYTES, true);
        sample.store.set_now(WallTime(1 + ahead));
        sample.mixed(2000);
        let (span, machine) = (length(&sample.store), end_time(&sample.store));
        let policy = policy(span, 0, &[(40, 30)]);
        let now = WallTime(machine.0 + ahead);
        let plan = sample.store.plan_by(&policy, now, machine).run();
        plan.unwrap().unwrap().kept.entries.len()
    };
    let (near, far) = (kept(0), kept(12 * MONTH));
    assert!(near > 5 && near < 20, "{near}");
    assert_eq!(near, far);
}

/// Moves the times of a segment's records, as a machine's clock does that is wrong; not when the store took it.
fn skew(run: &Path, by: i64) {
    let mut bytes = std::fs::read(run).unwrap();
    let (head, rest) = bytes.split_at_mut(4096);
    for entry in rest.chunks_exact_mut(size_of::<RunEntry>()) {
        let time = &mut entry[std::mem::offset_of!(RunEntry, wall_time)..][..8];
        let moved = i64::from_le_bytes(time.try_into().unwrap()) + by;
        time.copy_from_slice(&moved.to_le_bytes());
    }
    let mut header = RunHeader::parse(head, 4096 + rest.len() as u64).unwrap();
    let entries = header.entry_count.get() as usize * size_of::<RunEntry>();
    header.entries_crc = varve_format::crc32c(&rest[..entries]).into();
    header.events_crc = varve_format::crc32c(&rest[entries..]).into();
    header.time_start = (header.time_start.get() + by).into();
    header.time_end = (header.time_end.get() + by).into();
    head.copy_from_slice(&header.to_block());
    std::fs::write(run, bytes).unwrap();
}

fn kept_while_behind(store: &VolumeStore, before: i64) -> usize {
    let kept = store.kept().entries.iter();
    kept.filter(|entry| entry.time().0 < before).count()
}

/// The store's clock may lag far behind the machine's, whose time records carry: a time that was pruned is refused all the same.
#[test]
fn a_pruned_time_is_refused_when_the_clock_of_the_store_lags() {
    let directory = tempfile::tempdir().unwrap();
    let mut sample = Sample::new(directory.path(), VOLUME_BYTES, SEGMENT_BYTES, true);
    sample.store.set_now(WallTime(1));
    // Few blocks, written again and again: between two kept instants nothing is left.
    for round in 0..3000u64 {
        sample.write(round % 16 * 4096, vec![round as u8; 4096]);
    }
    sample.seal();
    let span = length(&sample.store);
    let policy = policy(span, 20, &[(20, 100)]);
    let now = WallTime(1 + span / 5 + 2 * (span / 20));
    let plan = sample.store.plan(&policy, now).run().unwrap().unwrap();
    assert!(sample.store.keep(&plan).unwrap());
    assert!(sweep(&mut sample.store) > 3);
    let kept = sample.store.kept().clone();
    let mut refused = 0;
    for pair in kept.entries.windows(2) {
        let between = WallTime(i64::midpoint(pair[0].time().0, pair[1].time().0));
        assert!(between > kept.below_time, "the clock does not lag");
        let nearest = sample.store.pruned_at(between).unwrap();
        let nearest = nearest.unwrap_or_else(|| panic!("{between:?} is answered"));
        assert_eq!(nearest.before.unwrap().0, pair[0].lsn());
        assert_eq!(nearest.after.unwrap().0, pair[1].lsn());
        assert!(sample.store.pruned_at(pair[0].time()).unwrap().is_none());
        refused += 1;
    }
    assert!(refused > 5, "{refused}");
}

/// The clock was behind for a while, and ahead for a while. No instant is lost but those that a right clock would lose, and time goes on.
#[test]
fn clocks_that_were_wrong_lose_nothing_else() {
    const YEARS: i64 = 1_000_000_000_000_000_000;
    let directory = tempfile::tempdir().unwrap();
    let mut sample = Sample::new(directory.path(), VOLUME_BYTES, SEGMENT_BYTES, true);
    sample.mixed(3000);
    let (first, span) = (
        sample.store.segments().next().unwrap().time_start.0,
        length(&sample.store),
    );
    let runs = files(directory.path(), "runs");
    let count = runs.len();
    let (behind, ahead) = (count / 5..count / 4, count / 2..count / 2 + count / 10);
    let step = span / 40;
    let mut right = std::collections::BTreeSet::new();
    for (index, segment) in sample.store.segments().enumerate() {
        if !behind.contains(&index) && !ahead.contains(&index) {
            let entries = segment.entries().unwrap();
            let number = |entry: &RunEntry| (entry.time().0 + step - 1).div_euclid(step);
            right.extend(entries.iter().filter(|e| e.changes_image()).map(number));
        }
    }
    let elsewhere = tempfile::tempdir().unwrap();
    sample.store = VolumeStore::open(elsewhere.path(), VOLUME).unwrap();
    behind.clone().for_each(|index| skew(&runs[index], -YEARS));
    ahead.clone().for_each(|index| skew(&runs[index], YEARS));
    sample.store = VolumeStore::open(directory.path(), VOLUME).unwrap();
    assert!(sample.store.damaged().is_empty() && sample.store.healed().is_empty());
    let policy = policy(span, 20, &[(40, 200)]);
    for part in 4..=10 {
        let now = WallTime(first + span * part / 10);
        if let Some(plan) = sample.store.plan(&policy, now).run().unwrap() {
            sample.store.keep(&plan).unwrap();
        }
        sweep(&mut sample.store);
        let below = sample.store.kept().below_time;
        assert!(below.0 <= now.0 - span / 5, "{below:?} is young at {now:?}");
        let lately = WallTime(now.0 - span / 10);
        assert!(sample.store.pruned_at(lately).unwrap().is_none());
    }
    let below = sample.store.kept().below;
    assert!(
        below.0 > sample.store.timeline().end().0 / 2,
        "the limit stands still at {below}"
    );
    for entry in sample.store.kept().entries.clone() {
        assert!(read(&sample.store, entry.lsn()) == sample.image(entry.lsn()));
    }
    // What was recorded while the clock was behind is no older for that.
    let behind = kept_while_behind(&sample.store, first - YEARS / 2);
    assert!(behind > 0, "nothing of that time is kept");
    // Each step in which the clock was right has its instant.
    let kept = sample.store.kept().entries.clone();
    let mut steps = 0;
    for number in right {
        let end = number * step;
        if end < sample.store.kept().below_time.0 {
            steps += 1;
            let within = |at: i64| end - step < at && at <= end;
            assert!(
                kept.iter().any(|entry| within(entry.time().0)),
                "nothing is kept at {end}"
            );
        }
    }
    assert!(steps > 8, "{steps} steps");
}

/// A segment that cannot be read stays as it is, and holds up no other.
#[test]
fn a_damaged_segment_holds_up_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let mut sample = Sample::new(directory.path(), VOLUME_BYTES, SEGMENT_BYTES, true);
    sample.mixed(2000);
    sample.settle_all(Compression::Lz4);
    let span = length(&sample.store);
    assert!(keep(&mut sample.store, &policy(span, 10, &[(10, 100)])));
    let count = sample.store.segments().count();
    let victims: Vec<PathBuf> =
        files(directory.path(), "segments")[count / 2..count / 2 + 3].to_vec();
    let runs = files(directory.path(), "runs");
    for path in &victims {
        let mut bytes = std::fs::read(path).unwrap();
        for at in (4096..bytes.len() - 4096).step_by(64) {
            bytes[at] ^= 1;
        }
        std::fs::write(path, bytes).unwrap();
    }
    std::fs::remove_file(&victims[0]).unwrap();
    std::fs::remove_file(&runs[count / 2 + 1]).unwrap();
    let pruned = sweep(&mut sample.store);
    assert!(pruned > count as u64 / 3, "{pruned} of {count}");
    let oldest: Vec<_> = sample.store.segments().take(count / 2).collect();
    let older = oldest.iter().filter(|s| s.pruned_for != 0).count();
    assert!(older > count / 8, "{older} of {count}");
    // What can still be read is what was recorded.
    for entry in sample.store.kept().entries.clone() {
        let wanted = sample.image(entry.lsn());
        let Ok(image) = Image::open(&sample.store, entry.lsn()) else {
            continue;
        };
        for offset in (0..image.bytes()).step_by(4096) {
            let mut bytes = [0; 4096];
            if image.read(offset, &mut bytes).is_ok() {
                assert!(bytes == wanted[offset as usize..offset as usize + 4096]);
            }
        }
    }
}

/// What was never compressed has no checksum but its records': damage to it is not written into a file that looks whole.
#[test]
fn damage_to_a_sealed_segment_is_not_pruned_into_a_file_that_looks_whole() {
    let directory = tempfile::tempdir().unwrap();
    let mut sample = Sample::new(directory.path(), VOLUME_BYTES, SEGMENT_BYTES, true);
    sample.mixed(2000);
    let span = length(&sample.store);
    assert!(keep(&mut sample.store, &policy(span, 10, &[(10, 100)])));
    let segments = files(directory.path(), "segments");
    let victim = &segments[segments.len() / 3];
    let mut bytes = std::fs::read(victim).unwrap();
    // In payloads, one bit of each block: what is kept of it is hit, too.
    for at in (4096 + 2048..bytes.len() - 4096).step_by(4096) {
        bytes[at] ^= 1;
    }
    std::fs::write(victim, &bytes).unwrap();
    let pruned = sweep(&mut sample.store);
    assert!(
        pruned > segments.len() as u64 / 3,
        "{pruned} of {}",
        segments.len()
    );
    assert!(
        std::fs::read(victim).unwrap() == bytes,
        "the damaged segment was pruned"
    );
}

/// Sectors that are written one by one are pruned like blocks.
#[test]
fn what_is_written_in_parts_of_blocks_is_pruned_too() {
    let directory = tempfile::tempdir().unwrap();
    let mut sample = Sample::new(directory.path(), VOLUME_BYTES, SEGMENT_BYTES, true);
    for number in 0..4000u64 {
        let (sector, value) = (sample.random() % 101, number as u8);
        sample.write(sector * 512, vec![value; 512 * (1 + number as usize % 3)]);
    }
    sample.seal();
    let span = length(&sample.store);
    assert!(keep(&mut sample.store, &policy(span, 5, &[(4, 100)])));
    assert!(sweep(&mut sample.store) > 0);
    check(&mut sample, 40);
    let left: u64 = sample
        .store
        .segments()
        .map(|segment| segment.payload_bytes)
        .sum();
    assert!(left < 4000 * 1024 / 4, "{left} bytes are left");
}

#[test]
fn pins_points_and_open_images_stay() {
    let directory = tempfile::tempdir().unwrap();
    let mut sample = Sample::new(directory.path(), VOLUME_BYTES, SEGMENT_BYTES, true);
    sample.mixed(700);
    let point = sample.point("before the upgrade");
    let pinned = sample.mixed(300);
    let open = Lsn(pinned.0 - 100);
    sample.store.pin(pinned).unwrap();
    sample.settle_all(Compression::Lz4);
    let image = Image::open(&sample.store, open).unwrap();
    let mut bytes = vec![0; image.bytes() as usize];
    image.read(0, &mut bytes).unwrap();
    sample.mixed(2000);
    let span = length(&sample.store);
    let short = policy(span, 10, &[]);
    let long = policy(span, 10, &[(3, 100)]);
    assert!(keep(&mut sample.store, &long));
    assert!(sweep(&mut sample.store) > 0);
    for lsn in [point, pinned, open] {
        assert!(sample.store.timeline().check(lsn).is_ok(), "{lsn}");
    }
    check(&mut sample, 20);
    // Its files were replaced under it, and are opened anew.
    bytes.fill(1);
    image.read(0, &mut bytes).unwrap();
    assert!(bytes == sample.image(open));
    drop(image);
    // A point goes with the last rung, an image's instant with the image; a pin goes when it is taken out.
    assert!(keep(&mut sample.store, &short));
    sweep(&mut sample.store);
    for lsn in [point, open] {
        assert!(sample.store.timeline().check(lsn).is_err(), "{lsn}");
    }
    assert!(read(&sample.store, pinned) == sample.image(pinned));
    assert!(sample.store.unpin(pinned).unwrap() && !sample.store.unpin(pinned).unwrap());
    assert!(keep(&mut sample.store, &short));
    assert!(sweep(&mut sample.store) > 0);
    assert!(sample.store.timeline().check(pinned).is_err());
    check(&mut sample, 20);
}

/// Points that were made by themselves thin out as instants do; those that somebody made stay.
#[test]
fn automatic_points_thin_out_by_the_ladder() {
    let directory = tempfile::tempdir().unwrap();
    let mut sample = Sample::new(directory.path(), VOLUME_BYTES, SEGMENT_BYTES, true);
    let (mut automatic, mut by_hand, mut best) = (Vec::new(), Vec::new(), Vec::new());
    for number in 0..60 {
        sample.mixed(40);
        let better = if number % 10 == 3 {
            PointDetail::APPLICATION
        } else {
            0
        };
        let detail = PointDetail::AUTOMATIC | better;
        automatic.push(sample.point_with(&format!("auto-{number}"), detail));
        best.extend(automatic.last().filter(|_| better != 0).copied());
        sample.mixed(3);
        if number % 20 == 5 {
            by_hand.push(sample.point(&format!("mine-{number}")));
        }
    }
    sample.settle_all(Compression::Lz4);
    let span = length(&sample.store);
    let coarse = policy(span, 10, &[(30, 40), (6, 100)]);
    assert!(keep(&mut sample.store, &coarse));
    assert!(sweep(&mut sample.store) > 0);
    let below = sample.store.kept().below;
    let timeline = sample.store.timeline();
    let is_left = |lsn: &Lsn| timeline.check(*lsn).is_ok();
    for lsn in &by_hand {
        assert!(is_left(lsn), "{lsn}");
    }
    let old: Vec<Lsn> = automatic
        .iter()
        .copied()
        .filter(|lsn| *lsn < below)
        .collect();
    let left: Vec<Lsn> = old.iter().copied().filter(is_left).collect();
    // Of sixty in time, one for each step of each rung.
    assert!(
        old.len() > 40 && (8..=22).contains(&left.len()),
        "{left:?} of {old:?}"
    );
    // Those that went are remembered nowhere.
    let is_old = |point: &&Event| point.lsn < below && automatic.contains(&point.lsn);
    assert_eq!(timeline.points.iter().filter(is_old).count(), left.len());
    for lsn in &left {
        let point = timeline
            .points
            .iter()
            .find(|point| point.lsn == *lsn)
            .unwrap();
        let name = sample.store.point_names().of(point).unwrap();
        assert!(name.starts_with("auto-"), "{name}");
    }
    // A better one is not given up for one that merely came later.
    let better = |lsn: &&Lsn| best.contains(lsn);
    let (were, are) = (
        old.iter().filter(better).count(),
        left.iter().filter(better).count(),
    );
    assert!(were >= 4 && are >= 3, "{are} of {were}");
    // The same policy, later: no more than the ladder says, and each that is left then was left before.
    sample.mixed(600);
    keep(&mut sample.store, &coarse);
    sweep(&mut sample.store);
    let timeline = sample.store.timeline();
    let later: Vec<Lsn> = old
        .iter()
        .copied()
        .filter(|lsn| timeline.check(*lsn).is_ok())
        .collect();
    assert!(
        !later.is_empty() && later.len() < left.len() && later.iter().all(|lsn| left.contains(lsn)),
        "{later:?} of {left:?}"
    );
    check(&mut sample, 40);
}

/// The process dies between any two steps: what it leaves reads as it should, and pruning goes on.
#[test]
fn a_crash_between_any_two_steps_loses_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let mut sample = Sample::new(directory.path(), VOLUME_BYTES, SEGMENT_BYTES, true);
    sample.mixed(2500);
    sample.settle_all(Compression::Zstd(1));
    sample.map_all();
    let span = length(&sample.store);
    assert!(keep(&mut sample.store, &policy(span, 20, &[(20, 100)])));
    check(&mut sample, 20); // The list is there, nothing is pruned.
    let elsewhere = tempfile::tempdir().unwrap();
    let mut crashes = 0;
    loop {
        sample.store = VolumeStore::open(elsewhere.path(), VOLUME).unwrap();
        sample.store = VolumeStore::open(directory.path(), VOLUME).unwrap();
        assert!(sample.store.damaged().is_empty());
        let Some(mut sweep) = sample.store.sweep(Compression::Lz4) else {
            break;
        };
        let done = loop {
            match sweep.step().unwrap() {
                Swept::Done => break None,
                Swept::Read => {}
                Swept::Stays(sequence, hash) => sample.store.stays(sequence, hash),
                Swept::Pruned(done) => break Some(done),
            }
        };
        let Some(done) = done else {
            break;
        };
        crashes += 1;
        match crashes % 3 {
            // The new file is there, without its name.
            1 if crashes < 40 => assert!(
                files(directory.path(), "segments")
                    .iter()
                    .any(|path| path.extension().unwrap() == "new")
            ),
            // The segment has its name, the run is the old one.
            2 => {
                let runs = files(directory.path(), "runs");
                let old: Vec<Vec<u8>> = runs.iter().map(|p| std::fs::read(p).unwrap()).collect();
                sample.store.replace_pruned(&done).unwrap();
                for (path, bytes) in runs.iter().zip(&old) {
                    std::fs::write(path, bytes).unwrap();
                }
                assert_eq!(scrub(&sample.store).damage, []);
            }
            _ => sample.store.replace_pruned(&done).unwrap(),
        }
        if crashes % 10 == 0 {
            check(&mut sample, 10);
        }
    }
    assert!(crashes > 20, "{crashes}");
    check(&mut sample, 20);
    assert_eq!(scrub(&sample.store).damage, []);
}

#[test]
fn lists_and_runs_that_are_lost_are_made_good() {
    let directory = tempfile::tempdir().unwrap();
    let mut sample = Sample::new(directory.path(), VOLUME_BYTES, SEGMENT_BYTES, true);
    sample.mixed(2500);
    let span = length(&sample.store);
    assert!(keep(&mut sample.store, &policy(span, 20, &[(20, 100)])));
    assert!(sweep(&mut sample.store) > 0);
    let elsewhere = tempfile::tempdir().unwrap();
    let again = |sample: &mut Sample| {
        sample.store = VolumeStore::open(elsewhere.path(), VOLUME).unwrap();
        sample.store = VolumeStore::open(directory.path(), VOLUME).unwrap();
    };
    // All runs: those of pruned segments are in the segments.
    for path in files(directory.path(), "runs") {
        std::fs::remove_file(path).unwrap();
    }
    again(&mut sample);
    assert!(sample.store.damaged().is_empty());
    assert_eq!(scrub(&sample.store).damage, []);
    check(&mut sample, 20);
    // One list.
    let folder = volume_directory(directory.path(), VOLUME);
    let kept = sample.store.kept().entries.clone();
    for name in ["kept", "kept-copy"] {
        let path = folder.join(name);
        let whole = std::fs::read(&path).unwrap();
        for at in [5, 40, 5000] {
            let mut bytes = whole.clone();
            let at = at.min(bytes.len() - 1);
            bytes[at] ^= 4;
            std::fs::write(&path, bytes).unwrap();
            again(&mut sample);
            assert_eq!(sample.store.kept().entries, kept, "{name} {at}");
            assert_eq!(sample.store.healed().len(), 1, "{name} {at}");
        }
        std::fs::write(&path, whole).unwrap();
    }
    // While they cannot be made to say the same nothing is pruned: the other would take back what is struck by one.
    let lists = ["kept", "kept-copy"].map(|name| std::fs::read(folder.join(name)).unwrap());
    let span = length(&sample.store);
    assert!(keep(&mut sample.store, &policy(span, 10, &[(10, 100)])));
    std::fs::write(folder.join("kept-copy"), &lists[1]).unwrap();
    std::fs::create_dir(folder.join("kept.new")).unwrap();
    again(&mut sample);
    assert!(sample.store.sweep(Compression::Lz4).is_none());
    std::fs::remove_dir(folder.join("kept.new")).unwrap();
    again(&mut sample);
    assert!(sample.store.sweep(Compression::Lz4).is_some());
    for (name, list) in ["kept", "kept-copy"].iter().zip(&lists) {
        std::fs::write(folder.join(name), list).unwrap();
    }
    again(&mut sample);
    // A crash between the two, then a bad sector: what was struck does not come back.
    let (first, second) = (folder.join("kept"), folder.join("kept-copy"));
    let older = std::fs::read(&second).unwrap();
    let span = length(&sample.store);
    assert!(keep(&mut sample.store, &policy(span, 20, &[(5, 100)])));
    let fewer = sample.store.kept().entries.clone();
    assert!(fewer.len() < kept.len());
    std::fs::write(&second, older).unwrap();
    again(&mut sample);
    assert_eq!(
        sample.store.healed().len(),
        1,
        "{:?}",
        sample.store.healed()
    );
    assert!(std::fs::read(&first).unwrap() == std::fs::read(&second).unwrap());
    assert_eq!(sample.store.kept().entries, fewer);
    sweep(&mut sample.store);
    // Both: what is left resolves, nothing wrong is given out, and it is said.
    let below = sample.store.kept().below;
    for name in ["kept", "kept-copy"] {
        std::fs::remove_file(folder.join(name)).unwrap();
    }
    again(&mut sample);
    assert_eq!(sample.store.damaged().len(), 1);
    assert!(Image::open(&sample.store, fewer[0].lsn()).is_err());
    for entry in kept
        .iter()
        .filter(|entry| entry.lsn() < sample.store.kept().below)
    {
        assert!(sample.store.timeline().check(entry.lsn()).is_err());
    }
    let end = sample.store.timeline().end();
    assert!(sample.store.kept().below <= below && sample.store.kept().below > Lsn(0));
    for lsn in [sample.store.kept().below, end, Lsn(end.0 - 50)] {
        assert!(read(&sample.store, lsn) == sample.image(lsn));
    }
}

/// Each bit of what a pruned segment keeps counts.
#[test]
fn damage_in_a_pruned_segment_is_noticed_and_located() {
    let directory = tempfile::tempdir().unwrap();
    let mut sample = Sample::new(directory.path(), 1 << 20, 64 << 10, true);
    sample.mixed(900);
    let span = length(&sample.store);
    assert!(keep(&mut sample.store, &policy(span, 20, &[(10, 100)])));
    assert!(sweep(&mut sample.store) > 2);
    let pruned: Vec<PathBuf> = sample
        .store
        .segments()
        .filter(|segment| segment.pruned_for != 0)
        .map(varve_store::StoredSegment::path)
        .collect();
    let kept = sample.store.kept().entries.clone();
    let mut lost = 0;
    for round in 0..150 {
        let victim = &pruned[sample.random() as usize % pruned.len()];
        let whole = std::fs::read(victim).unwrap();
        let mut bytes = whole.clone();
        let at = sample.random() as usize % bytes.len();
        bytes[at] ^= 1 << (sample.random() % 8);
        std::fs::write(victim, &bytes).unwrap();
        let found = scrub(&sample.store);
        assert!(
            !found.damage.is_empty(),
            "round {round}: byte {at} of {}",
            victim.display()
        );
        lost += usize::from(!found.damage[0].blocks.is_empty());
        for entry in &kept {
            let wanted = sample.image(entry.lsn());
            let image = Image::open(&sample.store, entry.lsn()).unwrap();
            for offset in (0..image.bytes()).step_by(4096) {
                let mut bytes = [0; 4096];
                if image.read(offset, &mut bytes).is_ok() {
                    let offset = offset as usize;
                    assert!(bytes == wanted[offset..offset + 4096], "round {round}");
                }
            }
        }
        std::fs::write(victim, whole).unwrap();
    }
    assert!(lost > 20, "{lost}: the flips hit nothing");
    assert_eq!(scrub(&sample.store).damage, []);
}

/// A reader in another language, written from FORMAT.md alone, restores kept instants, and refuses others.
#[test]
fn a_reader_written_from_the_format_alone_restores_what_is_kept() {
    let directory = tempfile::tempdir().unwrap();
    let mut sample = Sample::new(directory.path(), 256 << 10, 32 << 10, true);
    sample.mixed(250);
    let span = length(&sample.store);
    assert!(keep(&mut sample.store, &policy(span, 20, &[(8, 100)])));
    assert!(sweep(&mut sample.store) > 0);
    let output = directory.path().join("image");
    let run = |lsn: Lsn| {
        let reader = varve_tests::guest::repository().join("tests/reader.py");
        std::process::Command::new("python3")
            .arg(reader)
            .arg(volume_directory(directory.path(), VOLUME))
            .arg(lsn.0.to_string())
            .arg(&output)
            .output()
            .unwrap()
    };
    let kept = sample.store.kept().entries.clone();
    let last = [sample.store.kept().below, sample.store.timeline().end()];
    for lsn in kept.iter().map(KeptEntry::lsn).chain(last) {
        let said = run(lsn);
        assert!(said.status.success(), "{said:?}");
        assert!(
            std::fs::read(&output).unwrap() == sample.image(lsn),
            "LSN {lsn}"
        );
    }
    let refuses = |lsn: Lsn| {
        let said = run(lsn);
        let why = String::from_utf8_lossy(&said.stderr).into_owned();
        assert!(!said.status.success() && why.contains("kept"), "{why}");
    };
    refuses(Lsn(kept[1].lsn().0 + 1));
    // Where one list is lost the other counts; without both what was kept is not known.
    let folder = volume_directory(directory.path(), VOLUME);
    std::fs::write(folder.join("kept"), b"no list").unwrap();
    assert!(run(kept[0].lsn()).status.success());
    refuses(Lsn(kept[1].lsn().0 + 1));
    std::fs::remove_file(folder.join("kept-copy")).unwrap();
    refuses(kept[0].lsn());
    assert!(run(sample.store.timeline().end()).status.success());
}
