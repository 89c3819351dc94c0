//! `store-bench write SEED COUNT TARGET`: pages like a database's at random places of a file or device; COUNT 0: everywhere, in order. Says which places.
//! `store-bench DIR [MILLIONS...]`: figures of the store, each beside what it is measured against, in one run. Part of `make bench`.
//!
//! Histories are made by the real log writer and taken by the real ingest; payloads are zero where only their number counts, and like a database's
//! where compression counts.

#![allow(
    clippy::unwrap_used,
    reason = "in a measurement a surprise should end it"
)]

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};
use varve_format::{Lsn, SegmentSequence};
use varve_store::{Compression, Image, VolumeStore};
use varve_tests::sample::{Sample, VOLUME};

const VOLUME_BYTES: u64 = 1 << 40;
const SEGMENT_BYTES: u64 = 64 << 20;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [what, seed, count, target] = &arguments[..]
        && what == "write"
    {
        return write(
            seed.parse().unwrap(),
            count.parse().unwrap(),
            Path::new(target),
        );
    }
    let Some(directory) = arguments.first() else {
        eprintln!("store-bench DIR [MILLIONS OF RECORDS...] | store-bench write SEED COUNT TARGET");
        std::process::exit(2);
    };
    for millions in &arguments[1..] {
        history(Path::new(directory), millions.parse().unwrap());
    }
    content(Path::new(directory));
    pruning(Path::new(directory));
}

fn random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

fn memory_mib(field: &str) -> f64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = text.lines().find(|line| line.starts_with(field)).unwrap();
    let kib: f64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    kib / 1024.0
}

fn milliseconds(times: &mut [Duration]) -> (f64, f64) {
    times.sort_unstable();
    let at = |index: usize| times[index].as_secs_f64() * 1e3;
    (at(times.len() / 2), at(times.len() - 1))
}

/// How long an instant takes to open, by the length of the history.
fn history(directory: &Path, millions: u64) {
    let root = directory.join(format!("history-{millions}"));
    let records = millions * 1_000_000;
    let began = Instant::now();
    let mut sample = Sample::new(&root, VOLUME_BYTES, SEGMENT_BYTES, false);
    let payload = vec![0u8; 512];
    for _ in 0..records {
        let block = sample.random() % (VOLUME_BYTES / 4096);
        sample.write(block * 4096, payload.clone());
        // As the daemon does it, while the history grows.
        if sample.random().is_multiple_of(100_000) {
            sample.map_all();
            sample.settle_all(Compression::Lz4);
        }
    }
    let end = sample.seal();
    sample.map_all();
    sample.settle_all(Compression::Lz4);
    let made = began.elapsed();
    drop(sample);
    let before = memory_mib("VmRSS");
    let began = Instant::now();
    let store = VolumeStore::open(&root, VOLUME).unwrap();
    let opened = began.elapsed();
    let mut seed = 0x1234_5678_9abc_def1;
    let (mut opens, mut firsts, mut layers) = (Vec::new(), Vec::new(), 0);
    let mut bytes = vec![0u8; 4096];
    for _ in 0..40 {
        let lsn = Lsn(3 + random(&mut seed) % (end.0 - 3));
        let began = Instant::now();
        let image = Image::open(&store, lsn).unwrap();
        opens.push(began.elapsed());
        layers = layers.max(image.layer_count());
        let block = random(&mut seed) % (VOLUME_BYTES / 4096);
        let began = Instant::now();
        image.read(block * 4096, &mut bytes).unwrap();
        firsts.push(began.elapsed());
    }
    let image = Image::open(&store, end).unwrap();
    let grown = memory_mib("VmRSS") - before;
    let (open, open_most) = milliseconds(&mut opens);
    let (first, first_most) = milliseconds(&mut firsts);
    println!(
        "{millions} M records over 1 TiB, {} segments, {:.0} MiB stored, made in {:.0} s: store opened in {:.0} ms; an instant in {open:.1} ms (most {open_most:.1}; \
         limit 1000), first 4 KiB in {first:.2} ms (most {first_most:.2}; limit 10), at most {layers} layers; memory {grown:.0} MiB (limit 96)",
        store.segments().count(),
        store.stored_bytes() as f64 / f64::from(1 << 20),
        made.as_secs_f64(),
        opened.as_secs_f64() * 1e3,
    );
    drop(image);
    drop(store);
    std::fs::remove_dir_all(&root).unwrap();
}

/// A page as a database writes it: a header, rows of text, numbers, some of it free.
fn page(seed: &mut u64) -> Vec<u8> {
    let mut page = Vec::with_capacity(4096);
    while page.len() < 3600 {
        let (id, amount) = (random(seed) % 1_000_000, random(seed));
        let row = format!(
            "{id:08};customer-{:05};2026-11-{:02};{amount:016x};open;",
            id % 40_000,
            id % 28
        );
        page.extend_from_slice(row.as_bytes());
    }
    page.resize(4096, 0);
    page
}

/// Writes pages, and says where.
fn write(seed: u64, count: u64, target: &Path) {
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .open(target)
        .unwrap();
    let pages = std::io::Seek::seek(&mut &file, std::io::SeekFrom::End(0)).unwrap() / 4096;
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let places: Vec<u64> = match count {
        0 => (0..pages).collect(),
        count => (0..count).map(|_| random(&mut state) % pages).collect(),
    };
    for place in &places {
        file.write_all_at(&page(&mut state), place * 4096).unwrap();
    }
    file.sync_all().unwrap();
    if count > 0 {
        places.iter().for_each(|place| println!("{}", place * 4096));
    }
}

/// Settling, reading, scrubbing, on content that compresses like a database.
fn content(directory: &Path) {
    let root = directory.join("content");
    let (volume, records) = (512u64 << 20, 131_072u64);
    let mut sample = Sample::new(&root, volume, SEGMENT_BYTES, false);
    let mut seed = 0x0dd0_b1a5_e5ba_d5ee;
    let flat = std::fs::File::create_new(directory.join("flat")).unwrap();
    flat.set_len(volume).unwrap();
    for number in 0..records {
        let block = (number * 7919) % (volume / 4096);
        let bytes = page(&mut seed);
        flat.write_all_at(&bytes, block * 4096).unwrap();
        sample.write(block * 4096, bytes);
    }
    // What the kernel still had to write would be measured, too.
    flat.sync_all().unwrap();
    let end = sample.seal();
    sample.map_all();
    let sealed = reads("sealed", &sample.store, end, &flat_reader(directory));
    settling(&mut sample, &root);
    let settled = reads("settled", &sample.store, end, &flat_reader(directory));
    println!("random reads, settled : sealed = {:.2}", settled / sealed);
    scrubbing(&sample, &root);
    drop(sample);
    std::fs::remove_dir_all(&root).unwrap();
    std::fs::remove_file(directory.join("flat")).unwrap();
}

/// A scrub of what lies on the disk, not in memory, beside a plain read of the same files.
fn scrubbing(sample: &Sample, root: &Path) {
    let folder = varve_store::volume_directory(root, VOLUME).join("segments");
    let each = |work: &mut dyn FnMut(&std::fs::File)| {
        for entry in std::fs::read_dir(&folder).unwrap() {
            work(&std::fs::File::open(entry.unwrap().path()).unwrap());
        }
    };
    let forget = || {
        each(&mut |file| {
            posix_fadvise(file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
        });
    };
    let mut buffer = vec![0u8; 1 << 20];
    let mut plain = 0;
    forget();
    let began = Instant::now();
    each(&mut |mut file| loop {
        match std::io::Read::read(&mut file, &mut buffer).unwrap() {
            0 => break,
            read => plain += read as u64,
        }
    });
    let alone = began.elapsed();
    let rate = |bytes: u64, time: Duration| bytes as f64 / 1e6 / time.as_secs_f64();
    let disk = rate(plain, alone);
    println!("a plain read of the segments from the disk: {disk:.0} MB/s");
    let limit = (0.8 * disk).min(1500.0);
    for (what, stored) in [("scrub", false), ("scrub --stored", true)] {
        forget();
        let job = sample.store.scrub();
        let job = if stored { job.stored() } else { job };
        let began = Instant::now();
        let found = job.run(SegmentSequence(0), |_, _| {
            std::ops::ControlFlow::Continue(())
        });
        let took = began.elapsed();
        assert!(found.damage.is_empty(), "{:?}", found.damage);
        let files = rate(found.bytes, took);
        println!(
            "{what}, from the disk, one core: {files:.0} MB/s of files ({:.2} of the limit: 0.8 of a plain read, or 1500 MB/s), {:.0} MB/s of history",
            files / limit,
            rate(found.history_bytes, took)
        );
    }
}

/// Bytes that this process has read and written, whatever they came from.
fn moved_bytes() -> (u64, u64) {
    let text = std::fs::read_to_string("/proc/self/io").unwrap();
    let field = |name: &str| {
        let line = text.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    };
    (field("rchar"), field("wchar"))
}

/// What pruning reads and writes, beside what stays. Pages of a hot set are written eight times over; ten instants are kept.
fn pruning(directory: &Path) {
    let root = directory.join("pruning");
    let mut sample = Sample::new(&root, 64 << 20, SEGMENT_BYTES / 4, false);
    let mut seed = 0x0123_4567_89ab_cdef;
    for _ in 0..131_072 {
        let block = sample.random() % (16 << 10);
        let bytes = page(&mut seed);
        sample.write(block * 4096, bytes);
    }
    let end = sample.seal();
    sample.settle_all(Compression::Zstd(3));
    let store = &mut sample.store;
    let time = |store: &VolumeStore, lsn| store.time_of(lsn).unwrap().0;
    let span = time(store, end) - time(store, Lsn(3));
    let policy = varve_store::Policy {
        ladder: varve_store::Ladder {
            all: Some(span / 100),
            rungs: vec![varve_store::Rung {
                step: span / 10,
                age: span * 2,
            }],
        },
        immutable: 0,
    };
    let now = varve_format::WallTime(time(store, end));
    let before = store.stored_bytes();
    let began = Instant::now();
    let plan = store.plan(&policy, now).run().unwrap().unwrap();
    store.keep(&plan).unwrap();
    let (read, written) = moved_bytes();
    let mut sweep = store.sweep(Compression::Zstd(3)).unwrap();
    loop {
        match sweep.step().unwrap() {
            varve_store::Swept::Done => break,
            varve_store::Swept::Read => {}
            varve_store::Swept::Stays(sequence, hash) => store.stays(sequence, hash),
            varve_store::Swept::Pruned(pruned) => store.replace_pruned(&pruned).unwrap(),
        }
    }
    let (read, written) = (moved_bytes().0 - read, moved_bytes().1 - written);
    let after = store.stored_bytes();
    println!(
        "pruning 512 MiB of writes to {} instants: {:.0} MiB stored, {:.0} before; read {:.2} times what stays, written {:.2} times (limit 1 and 1; \
         what is written is read again to prove it), in {:.1} s",
        plan.kept.entries.len(),
        after as f64 / f64::from(1 << 20),
        before as f64 / f64::from(1 << 20),
        read as f64 / after as f64,
        written as f64 / after as f64,
        began.elapsed().as_secs_f64()
    );
    drop(sample);
    std::fs::remove_dir_all(&root).unwrap();
}

fn flat_reader(directory: &Path) -> std::fs::File {
    std::fs::File::open(directory.join("flat")).unwrap()
}

/// Reads of an image beside those of a flat file with the same bytes; gives random reads a second.
fn reads(what: &str, store: &VolumeStore, end: Lsn, flat: &std::fs::File) -> f64 {
    let image = Image::open(store, end).unwrap();
    let blocks = image.bytes() / 4096;
    let (mut ours, mut theirs) = (vec![0u8; 1 << 20], vec![0u8; 1 << 20]);
    let mut seed = 0x5eed_5eed_5eed_5eed;
    let places: Vec<u64> = (0..40_000)
        .map(|_| random(&mut seed) % blocks * 4096)
        .collect();
    let began = Instant::now();
    for place in &places {
        image.read(*place, &mut ours[..4096]).unwrap();
    }
    let image_time = began.elapsed().as_secs_f64();
    let began = Instant::now();
    for place in &places {
        flat.read_exact_at(&mut theirs[..4096], *place).unwrap();
    }
    let flat_time = began.elapsed().as_secs_f64();
    let random_rate = places.len() as f64 / image_time;
    let (mut image_all, mut flat_all) = (Duration::ZERO, Duration::ZERO);
    for at in (0..image.bytes()).step_by(1 << 20) {
        let began = Instant::now();
        image.read(at, &mut ours).unwrap();
        image_all += began.elapsed();
        let began = Instant::now();
        flat.read_exact_at(&mut theirs, at).unwrap();
        flat_all += began.elapsed();
        assert!(ours == theirs, "the image is not the file at {at}");
    }
    println!(
        "reads of a {what} image (page cache): {random_rate:.0} random 4 KiB a second, flat file {:.0} (ratio {:.2}); 1 MiB in a row {:.0} MiB/s, flat file {:.0} \
         (ratio {:.2})",
        places.len() as f64 / flat_time,
        flat_time / image_time,
        image.bytes() as f64 / f64::from(1 << 20) / image_all.as_secs_f64(),
        image.bytes() as f64 / f64::from(1 << 20) / flat_all.as_secs_f64(),
        flat_all.as_secs_f64() / image_all.as_secs_f64(),
    );
    random_rate
}

/// Settling beside zstd alone on the same bytes on one core: on one thread and on two (`background_percent` up to 100, and 200). Our frames have 16 KiB;
/// zstd does better with 64.
fn settling(sample: &mut Sample, root: &Path) {
    let mut zstd = zstd::bulk::Compressor::new(3).unwrap();
    let mut alone_on = |bytes: &[u8], piece: usize| {
        let began = Instant::now();
        for frame in bytes.chunks(piece) {
            zstd.compress(frame).unwrap();
        }
        began.elapsed()
    };
    let folder = varve_store::volume_directory(root, VOLUME).join("segments");
    let (mut input, mut alone, mut alone_small) = (0, Duration::ZERO, Duration::ZERO);
    let mut ours = [Duration::ZERO; 2];
    // In turns, segment by segment: machines have moods.
    let mut taken = std::collections::BTreeSet::new();
    let next = |sample: &Sample, taken: &std::collections::BTreeSet<u64>| {
        let except = |sequence| taken.contains(&sequence);
        sample.store.next_to_settle(Compression::Zstd(3), &except)
    };
    while let Some(job) = next(sample, &taken) {
        let sequence = job.sequence();
        let bytes = std::fs::read(folder.join(format!("{sequence:020}.seg"))).unwrap();
        input += bytes.len() as u64;
        alone += alone_on(&bytes, 64 << 10);
        alone_small += alone_on(&bytes, 16 << 10);
        for (threads, time) in (1..).zip(&mut ours) {
            let job = next(sample, &taken).unwrap();
            let began = Instant::now();
            job.compress(threads).unwrap();
            *time += began.elapsed();
        }
        taken.insert(sequence);
    }
    let rate = |time: Duration| input as f64 / f64::from(1 << 20) / time.as_secs_f64();
    let ratio = |time: Duration| alone.as_secs_f64() / time.as_secs_f64();
    println!(
        "zstd:3 alone, one core: {:.0} MiB/s; in pieces of 16 KiB {:.0}",
        rate(alone),
        rate(alone_small)
    );
    for (threads, only) in (1..).zip(ours) {
        let whole = settle_beside_proof(sample, threads, threads == 2);
        println!(
            "settling zstd:3, {threads} thread(s): {:.0} MiB/s (ratio to zstd alone {:.2}, limit 0.90); flushed, and proved beside it on one thread more, {:.0} MiB/s ({:.2})",
            rate(only),
            ratio(only),
            rate(whole),
            ratio(whole),
        );
    }
    println!(
        "{:.2} of the bytes are left",
        sample.store.stored_bytes() as f64 / input as f64
    );
}

/// Compresses all that is sealed while what was compressed is proved, as the daemon does it; it takes the place of what was sealed only if `replace`. Gives
/// how long that took.
fn settle_beside_proof(sample: &mut Sample, threads: usize, replace: bool) -> Duration {
    let began = Instant::now();
    let (sender, jobs) = std::sync::mpsc::sync_channel::<varve_store::Settling>(1);
    let prover = std::thread::spawn(move || {
        let proved = jobs.into_iter().map(|settling| settling.prove().unwrap());
        proved.collect::<Vec<_>>()
    });
    let mut taken = std::collections::BTreeSet::new();
    loop {
        let job = sample
            .store
            .next_to_settle(Compression::Zstd(3), &|sequence| taken.contains(&sequence));
        let Some(job) = job else { break };
        taken.insert(job.sequence());
        sender.send(job.compress(threads).unwrap()).unwrap();
    }
    drop(sender);
    let proved = prover.join().unwrap();
    for proved in proved.iter().filter(|_| replace) {
        sample.store.replace(proved).unwrap();
    }
    began.elapsed()
}
