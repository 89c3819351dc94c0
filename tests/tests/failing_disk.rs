//! System calls fail, one after the other: the disk is full (ENOSPC) or broken (EIO) at each step of settling, merging maps, pruning, pinning, salvaging
//! and copying out. Each step is a process of its own under strace, which lets exactly one call fail.
//!
//! Whatever fails: an error with a code, or the step did without the call; no panic; every instant that is kept reads as it was recorded; and the same
//! step, once more, succeeds and leaves nothing unfinished.

#![allow(
    clippy::unwrap_used,
    reason = "in a test a surprise should end the test"
)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use varve_format::Lsn;
use varve_store::{Compression, StoreError, StoreKeys, Swept, VolumeStore, Written};
use varve_tests::guest::large;
use varve_tests::retained::{check, keep, length, policy};
use varve_tests::sample::{Sample, VOLUME, flip, open_keyed, prune_to, read, sample_secret, scrub};

/// Calls that only read fail with EIO.
const READING: [&str; 5] = ["read", "pread64", "statx", "getdents64", "lseek"];
/// The others with ENOSPC, too.
const CHANGING: [&str; 11] = [
    "openat",
    "write",
    "pwrite64",
    "fsync",
    "fdatasync",
    "rename",
    "unlink",
    "mkdir",
    "ftruncate",
    "fchmod",
    "copy_file_range",
];

/// Who goes on without these has lost what was to be written, or its order.
const WRITING: [&str; 6] = [
    "write",
    "pwrite64",
    "fsync",
    "fdatasync",
    "rename",
    "ftruncate",
];

fn copy_tree(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        match entry.file_type().unwrap().is_dir() {
            true => copy_tree(&entry.path(), &target),
            false => drop(std::fs::copy(entry.path(), target).unwrap()),
        }
    }
}

fn unfinished(root: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(root).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => unfinished(&path, found),
            false if path.extension().is_some_and(|end| end == "new") => found.push(path),
            false => {}
        }
    }
}

/// Runs a step on a store under strace; gives its exit code and what it said.
fn run(step: &str, root: &Path, strace: &[&str]) -> (Option<i32>, String) {
    let trace = root.with_extension("trace");
    let output = Command::new("strace")
        .args(["-qq", "-f", "-o"])
        .arg(&trace)
        .args(strace)
        .arg(env!("CARGO_BIN_EXE_store-step"))
        .args([step.as_ref(), root.as_os_str()])
        // One thread packs and writes: calls are counted by thread, and come in the same order each time.
        .env("RAYON_NUM_THREADS", "1")
        .output()
        .expect("strace is there: tools/setup installs it");
    let said = [output.stdout, output.stderr].concat();
    (
        output.status.code(),
        String::from_utf8_lossy(&said).into_owned(),
    )
}

/// Every call of a step between its marks: (call, number from the process's start).
fn calls(step: &str, root: &Path) -> Vec<(String, usize)> {
    let all = [&READING[..], &CHANGING[..], &["sched_yield"]].concat();
    let (code, said) = run(step, root, &["-e", &format!("trace={}", all.join(","))]);
    assert_eq!(code, Some(0), "{step} works under strace: {said}");
    let trace = std::fs::read_to_string(root.with_extension("trace")).unwrap();
    let (mut outside, mut main) = (Vec::new(), None);
    let (mut counts, mut found, mut marks) = (BTreeMap::new(), Vec::new(), 0);
    for line in trace.lines() {
        // `PID call(…`
        let Some((call, _)) = line.split_once('(') else {
            continue;
        };
        let (pid, call) = call.trim_end().rsplit_once(' ').unwrap_or(("", call));
        // Threads that wait for work yield, too: the marks are the first thread's.
        let first = main.get_or_insert_with(|| pid.to_owned());
        marks += usize::from(call == "sched_yield" && *first == pid);
        if !all.contains(&call) || call == "sched_yield" {
            continue;
        }
        // strace counts for each thread by itself.
        let count = counts.entry((pid.to_owned(), call.to_owned())).or_insert(0);
        *count += 1;
        let one = (call.to_owned(), *count);
        if marks == 1 && !found.contains(&one) {
            found.push(one);
        } else if marks != 1 {
            outside.push(one);
        }
    }
    // What also hits a thread's start would say nothing of the step.
    found.retain(|one| !outside.contains(one));
    found
}

/// Lets each call of `step` fail in turn, on a copy of `pristine`; `good` looks at what is left, and hears whether the step said that it is
/// done: perhaps now, certainly once more.
fn each_failing(step: &str, pristine: &Path, least: usize, good: impl Fn(&Path, &str, bool)) {
    let root = pristine.with_extension("work");
    let fresh = || {
        let _ = std::fs::remove_dir_all(&root);
        let _ = std::fs::remove_dir_all(root.with_extension("salvaged"));
        copy_tree(pristine, &root);
    };
    fresh();
    let all = calls(step, &root);
    assert!(
        all.len() >= least,
        "{step}: only {} calls: {all:?}",
        all.len()
    );
    let faults: Vec<(&String, usize, &str)> = all
        .iter()
        .flat_map(|(call, number)| {
            let errors: &[&str] = match READING.contains(&call.as_str()) {
                true => &["EIO"],
                false => &["EIO", "ENOSPC"],
            };
            errors.iter().map(move |error| (call, *number, *error))
        })
        .collect();
    // One of so many, but each kind of call.
    let stride = if large() { 1 } else { faults.len() / 30 + 1 };
    let (mut refused, mut done_without, mut missed, mut seen) = (0, 0, 0, BTreeMap::new());
    for (index, (call, number, error)) in faults.iter().enumerate() {
        let met = seen.entry((*call, *error)).or_insert(0);
        *met += 1;
        if index % stride != 0 && *met > 2 {
            continue;
        }
        let what = format!("{step}, {call} number {number} fails with {error}");
        fresh();
        let inject = format!("inject={call}:error={error}:when={number}");
        let (code, said) = run(step, &root, &["-e", &inject]);
        let trace = std::fs::read_to_string(root.with_extension("trace")).unwrap();
        if !trace.contains("(INJECTED)") {
            // Threads made other calls this time than the last: nothing failed.
            missed += 1;
            continue;
        }
        match code {
            Some(0) => {
                done_without += 1;
                // Pruning leaves such a segment as it is. Nothing else may go on as if it had been written.
                let wrote = WRITING.contains(&call.as_str()) && step != "prune";
                // A disk that failed once is no good one, even if the next reading succeeds.
                let read = step == "scrub-stored" && call.as_str() == "pread64";
                assert!(!wrote && !read, "{what}, and nobody noticed");
            }
            Some(1) => {
                refused += 1;
                let named = said.lines().any(|line| {
                    let code = line
                        .strip_prefix("error ")
                        .and_then(|rest| rest.split_once(": "));
                    code.is_some_and(|(code, words)| code.contains('-') && words.len() > 10)
                });
                assert!(named, "{what}: no error with a name: {said}");
            }
            other => panic!("{what}: ended with {other:?}: {said}"),
        }
        good(&root, &what, code == Some(0));
        let salvaged = root.with_extension("salvaged");
        if !salvaged.join("salvage-unfinished").exists() {
            // One that is whole would be refused once more; one that was broken off goes on.
            let _ = std::fs::remove_dir_all(salvaged);
        }
        let (code, said) = run(step, &root, &["-e", "trace=sched_yield"]);
        assert_eq!(code, Some(0), "{what}; once more: {said}");
        good(&root, &what, true);
        let mut left = Vec::new();
        unfinished(&root, &mut left);
        assert!(left.is_empty(), "{what}: {left:?} are left");
    }
    println!(
        "{step}: {refused} failed with an error, {done_without} did without the call, {missed} were not made"
    );
    assert!(
        missed * 4 < refused + done_without,
        "{step}: {missed} faults met nothing"
    );
    assert!(
        refused > 10 || step == "pin" && refused > 3,
        "{step}: only {refused} calls mattered"
    );
}

/// A history, and its images at some instants.
struct Known {
    images: Vec<(Lsn, Vec<u8>)>,
    end: Lsn,
}

impl Known {
    fn of(sample: &Sample, end: Lsn) -> Known {
        let step = (end.0 / 12).max(1) as usize;
        let lsns = (3..=end.0).rev().step_by(step).map(Lsn);
        Known {
            images: lsns.map(|lsn| (lsn, sample.image(lsn))).collect(),
            end,
        }
    }

    /// What resolves reads as it was recorded; `must` resolve.
    fn check(&self, root: &Path, what: &str, must: &dyn Fn(Lsn) -> bool) {
        let store = open_keyed(root).unwrap();
        for (lsn, image) in &self.images {
            let resolves = store.kept().resolves(*lsn);
            assert!(resolves || !must(*lsn), "{what}: {lsn} does not resolve");
            assert!(
                !resolves || read(&store, *lsn) == *image,
                "{what}: {lsn} is another image"
            );
        }
        assert_eq!(store.timeline().end(), self.end, "{what}");
        let found = scrub(&store);
        assert!(found.damage.is_empty(), "{what}: {:?}", found.damage);
    }
}

fn history(directory: &Path, segment_bytes: u64, records: u64) -> (Sample, Known, PathBuf) {
    let root = directory.join("store");
    let mut sample = Sample::new(&root, 256 << 10, segment_bytes, true);
    let end = sample.mixed(records);
    let known = Known::of(&sample, end);
    (sample, known, root)
}

#[test]
fn of_settling() {
    let directory = tempfile::tempdir().unwrap();
    let (sample, known, root) = history(directory.path(), 64 << 10, 50);
    drop(sample);
    each_failing("settle", &root, 60, |root, what, done| {
        known.check(root, what, &|_| true);
        let store = VolumeStore::open(root, VOLUME).unwrap();
        let settled = store.segments().filter(|segment| segment.settled).count();
        assert!(!done || settled == store.segments().count(), "{what}");
    });
}

#[test]
fn of_settling_with_keys() {
    let directory = tempfile::tempdir().unwrap();
    let (sample, known, root) = history(directory.path(), 64 << 10, 50);
    drop(sample);
    StoreKeys::load(&root).create(&sample_secret()).unwrap();
    // The volume's own key is made when it is first opened.
    drop(open_keyed(&root).unwrap());
    each_failing("settle", &root, 70, |root, what, done| {
        known.check(root, what, &|_| true);
        let store = open_keyed(root).unwrap();
        let (mut settled, mut count) = (0, 0);
        for segment in store.segments() {
            count += 1;
            settled += usize::from(segment.settled);
            assert!(
                !segment.settled || segment.is_encrypted(),
                "{what}: settled in the clear"
            );
        }
        assert!(!done || settled == count, "{what}");
    });
}

#[test]
fn of_comparing_what_is_stored() {
    let directory = tempfile::tempdir().unwrap();
    let (mut sample, known, root) = history(directory.path(), 64 << 10, 50);
    sample.settle_all(Compression::Zstd(1));
    drop(sample);
    each_failing("scrub-stored", &root, 30, |root, what, _| {
        known.check(root, what, &|_| true);
    });
}

#[test]
fn of_merging() {
    let directory = tempfile::tempdir().unwrap();
    let (sample, known, root) = history(directory.path(), 32 << 10, 140);
    drop(sample);
    each_failing("merge", &root, 60, |root, what, done| {
        known.check(root, what, &|_| true);
        let store = VolumeStore::open(root, VOLUME).unwrap();
        assert!(!done || store.next_map().is_none(), "{what}");
    });
}

#[test]
fn of_pruning() {
    let directory = tempfile::tempdir().unwrap();
    let (mut sample, known, root) = history(directory.path(), 64 << 10, 70);
    sample.settle_all(Compression::Lz4);
    drop(sample);
    // What is kept in the end is kept all the while.
    let clean = root.with_extension("clean");
    copy_tree(&root, &clean);
    let mut store = VolumeStore::open(&clean, VOLUME).unwrap();
    assert!(prune_to(&mut store, 30, Compression::Lz4).unwrap() > 0);
    let resolves = |lsn| store.kept().resolves(lsn);
    assert!(known.images.iter().any(|(lsn, _)| resolves(*lsn)));
    assert!(known.images.iter().any(|(lsn, _)| !resolves(*lsn)));
    each_failing("prune", &root, 60, |root, what, done| {
        known.check(root, what, &resolves);
        let pruned = VolumeStore::open(root, VOLUME).unwrap();
        let struck = |known: &Known| {
            known
                .images
                .iter()
                .any(|(lsn, _)| !pruned.kept().resolves(*lsn))
        };
        // A run that could not be read for a moment was made again: its segment seems as young as its file, and is kept.
        let young = what.contains("openat") || what.contains("read") || what.contains("statx");
        assert!(
            !done || young || struck(&known),
            "{what}: nothing was pruned"
        );
    });
}

#[test]
fn of_pinning() {
    let directory = tempfile::tempdir().unwrap();
    let (sample, known, root) = history(directory.path(), 64 << 10, 20);
    drop(sample);
    each_failing("pin", &root, 10, |root, what, done| {
        known.check(root, what, &|_| true);
        let store = VolumeStore::open(root, VOLUME).unwrap();
        assert!(!done || !store.kept().entries.is_empty(), "{what}");
    });
}

#[test]
fn of_salvaging() {
    let directory = tempfile::tempdir().unwrap();
    let (sample, known, root) = history(directory.path(), 64 << 10, 20);
    drop(sample);
    each_failing("salvage", &root, 30, |root, what, done| {
        known.check(root, what, &|_| true);
        if done {
            known.check(&root.with_extension("salvaged"), what, &|_| true);
        }
    });
}

#[test]
fn of_copying_out() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path().join("store");
    std::fs::create_dir(&root).unwrap();
    let mut content = vec![0u8; 3 << 20];
    for (index, byte) in content[..1 << 20].iter_mut().enumerate() {
        *byte = ((index * 31) >> 3) as u8;
    }
    content[5 << 19..].fill(7);
    std::fs::write(root.join("source"), &content).unwrap();
    each_failing("export", &root, 15, |root, what, done| {
        assert!(
            std::fs::read(root.join("source")).unwrap() == content,
            "{what}"
        );
        if done {
            let target = root.join("target");
            assert!(std::fs::read(&target).unwrap() == content, "{what}");
            std::fs::remove_file(target).unwrap(); // It would be refused once more.
        }
    });
    // Only reading the target again fails: what is there is ours, and the same command begins anew.
    let target = root.join("target");
    let only_target = [
        "-P",
        target.to_str().unwrap(),
        "-e",
        "inject=pread64:error=EIO:when=1",
    ];
    let (code, said) = run("export", &root, &only_target);
    assert!(code == Some(1) && said.contains("H016-read"), "{said}");
    let (code, said) = run("export", &root, &["-e", "trace=sched_yield"]);
    assert!(
        code == Some(0) && std::fs::read(&target).unwrap() == content,
        "{said}"
    );
}

/// The disk takes what pruning writes, and keeps something else: it is read back before the old file goes, so that stays.
#[test]
fn a_pruned_segment_that_the_disk_keeps_otherwise_replaces_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let mut sample = Sample::new(directory.path(), 2 << 20, 96 << 10, true);
    sample.mixed(1200);
    sample.settle_all(Compression::Lz4);
    let span = length(&sample.store);
    assert!(keep(&mut sample.store, &policy(span, 20, &[(20, 100)])));
    let (mut spoiled, mut rounds) = (0, 0);
    while let Some(mut sweep) = sample.store.sweep(Compression::Lz4) {
        let unproved = loop {
            match sweep.write_next().unwrap() {
                Written::Segment(unproved) => break Some(unproved),
                Written::Nothing(Swept::Done) => break None,
                Written::Nothing(Swept::Stays(sequence, hash)) => {
                    sample.store.stays(sequence, hash);
                }
                Written::Nothing(_) => {}
            }
        };
        let Some(unproved) = unproved else {
            break;
        };
        rounds += 1;
        if rounds % 2 == 0 {
            // Each second one is well.
            if let Swept::Pruned(pruned) = sweep.prove(*unproved).unwrap() {
                sample.store.replace_pruned(&pruned).unwrap();
            }
            continue;
        }
        let new = unproved.path().to_path_buf();
        let segment = new.with_extension("seg");
        let before = std::fs::read(&segment).unwrap();
        // In its first frame.
        flip(&new, (4096 + 50) * 8 + 3);
        let proved = sweep.prove(*unproved);
        assert!(matches!(proved, Err(StoreError::Proof(_))));
        assert!(!new.exists() && std::fs::read(&segment).unwrap() == before);
        spoiled += 1;
    }
    assert!(spoiled > 3, "{spoiled} files only");
    check(&mut sample, 40);
    assert_eq!(scrub(&sample.store).damage, []);
}
