//! Copying bytes out: several threads read, zeroes become holes, the rest is written where it belongs; then the target is read again, and must have the
//! digests that were taken of what was read, before it was written.
//!
//! Order: the progress record is there before the target is touched, so that whatever a crash leaves is known as ours; what the record calls done was
//! flushed before the record was. A target that was there before is written over, not replaced: a device,
//! or a file that holds an older copy. Reads go past the page cache where the file systems allow it, so that what is verified comes from the disk; so do
//! writes to devices. A file is written through the cache, so that its file system lays it out in large pieces; they are given to its disk while the rest
//! is still being read.

use super::resume::Resume;
use crate::device::mounted_on;
use nix::errno::Errno;
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use varve_control::ControlError;

const O_DIRECT: i32 = 0o40000;
/// Bytes of one piece of work.
const CHUNK: usize = 1 << 20;
/// Zeroes become holes in pieces of this size.
const HOLE: usize = 64 << 10;
/// As many as keep a disk busy whose answers are slow; each holds one piece.
const THREADS: usize = 32;
/// How often progress is made durable.
const NOTE_EVERY: Duration = Duration::from_secs(2);
const ALIGN: usize = 4096;
/// Places at which a target is looked at for whether it is the older copy that it should be.
const SAMPLES: u64 = 1024;
/// So much of a file is given to its disk at once.
const SEND: u64 = 16 << 20;

/// What is to be done.
pub struct Plan {
    /// What is read.
    pub source: PathBuf,
    /// What is written.
    pub target: PathBuf,
    /// Bytes of the source.
    pub bytes: u64,
    /// Everything below is done already.
    pub from: u64,
    /// Only these ranges (offset, length) differ from what the target holds.
    pub only: Option<Vec<(u64, u64)>>,
    /// Whether the target is read again.
    pub verify: bool,
    /// What the target holds may be overwritten.
    pub overwrite: bool,
}

/// What was done.
#[derive(Clone, Copy, Debug, Default)]
pub struct Job {
    /// Bytes read from the source.
    pub read: u64,
    /// Bytes written to the target.
    pub written: u64,
}

/// Memory that direct I/O accepts.
struct Aligned {
    bytes: Vec<u8>,
    start: usize,
}

impl Aligned {
    fn new() -> Aligned {
        let bytes = vec![0u8; CHUNK + ALIGN];
        let start = bytes.as_ptr().align_offset(ALIGN);
        Aligned { bytes, start }
    }

    fn get(&mut self, length: usize) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + length]
    }
}

fn open(path: &Path, options: &mut OpenOptions) -> io::Result<File> {
    match options.custom_flags(O_DIRECT).open(path) {
        Err(error) if error.raw_os_error() == Some(22) => options.custom_flags(0).open(path), // No direct I/O here (tmpfs).
        result => result,
    }
}

/// The end of a file may be no multiple of what direct I/O wants: that piece goes through the page cache.
struct Ends {
    direct: File,
    cached: File,
}

impl Ends {
    fn source(path: &Path) -> io::Result<Ends> {
        Ok(Ends {
            direct: open(path, OpenOptions::new().read(true))?,
            cached: File::open(path)?,
        })
    }

    fn target(path: &Path) -> io::Result<Ends> {
        Ok(Ends {
            direct: open(path, OpenOptions::new().read(true).write(true))?,
            cached: OpenOptions::new().read(true).write(true).open(path)?,
        })
    }

    fn file(&self, offset: u64, length: usize) -> &File {
        if (offset | length as u64).is_multiple_of(ALIGN as u64) {
            &self.direct
        } else {
            &self.cached
        }
    }
}

fn is_zero(bytes: &[u8]) -> bool {
    match bytes {
        [] => true,
        [first, rest @ ..] => *first == 0 && bytes[..rest.len()] == *rest,
    }
}

fn failed(what: &str, path: &Path, resumes: bool, error: &io::Error) -> ControlError {
    let code = if what == "reading" {
        "H016-read"
    } else {
        "H017-write"
    };
    ControlError::new(
        code,
        format!(
            "{what} {}: {error}{}",
            path.display(),
            match resumes {
                true => ". What was copied so far stays; the same command goes on from there",
                false => "",
            }
        ),
    )
}

/// Pieces of work: the ranges, cut at chunk borders.
fn pieces(plan: &Plan) -> Vec<(u64, usize)> {
    let whole = [(0, plan.bytes)];
    let ranges = plan.only.as_deref().unwrap_or(&whole);
    let mut pieces = Vec::new();
    for (offset, length) in ranges {
        let end = (offset + length).min(plan.bytes);
        let mut at = (*offset).max(plan.from);
        while at < end {
            let stop = ((at / CHUNK as u64 + 1) * CHUNK as u64).min(end);
            pieces.push((at, (stop - at) as usize));
            at = stop;
        }
    }
    pieces
}

/// Runs `work` on every piece, several at a time; `tell` hears how many bytes are done, `below` up to where all of them are.
fn in_parallel(
    pieces: &[(u64, usize)],
    work: impl Fn(&mut Aligned, u64, usize) -> Result<(), ControlError> + Sync,
    mut tell: impl FnMut(u64, u64) -> Result<(), ControlError>,
) -> Result<(), ControlError> {
    let (next, done) = (AtomicU64::new(0), AtomicU64::new(0));
    let stop = AtomicBool::new(false);
    let outcome: Mutex<Result<(), ControlError>> = Mutex::new(Ok(()));
    // Which piece each thread is at: what is below all of them is done.
    let at: Vec<AtomicU64> = (0..THREADS).map(|_| AtomicU64::new(0)).collect();
    let running = AtomicU64::new(THREADS as u64);
    std::thread::scope(|scope| {
        for place in &at {
            let (next, done, stop, outcome, running, work) =
                (&next, &done, &stop, &outcome, &running, &work);
            scope.spawn(move || {
                let mut buffer = Aligned::new();
                loop {
                    let index = next.fetch_add(1, Ordering::AcqRel);
                    place.store(index, Ordering::Release);
                    let Some((offset, length)) = pieces.get(index as usize) else {
                        break;
                    };
                    if stop.load(Ordering::Acquire) {
                        break;
                    }
                    if let Err(error) = work(&mut buffer, *offset, *length) {
                        stop.store(true, Ordering::Release);
                        if let Ok(mut outcome) = outcome.lock()
                            && outcome.is_ok()
                        {
                            *outcome = Err(error);
                        }
                        break;
                    }
                    done.fetch_add(*length as u64, Ordering::AcqRel);
                }
                running.fetch_sub(1, Ordering::AcqRel);
            });
        }
        while running.load(Ordering::Acquire) > 0 {
            std::thread::sleep(Duration::from_millis(5));
            let lowest = at
                .iter()
                .map(|place| place.load(Ordering::Acquire))
                .min()
                .unwrap_or(0);
            let below = pieces
                .get(lowest as usize)
                .map_or(u64::MAX, |piece| piece.0);
            let told = if stop.load(Ordering::Acquire) {
                Ok(())
            } else {
                tell(done.load(Ordering::Acquire), below)
            };
            if let Err(error) = told {
                stop.store(true, Ordering::Release);
                if let Ok(mut outcome) = outcome.lock() {
                    *outcome = Err(error);
                }
            }
        }
    });
    outcome.into_inner().unwrap_or(Ok(()))
}

/// Copies, flushes, and reads again.
pub fn copy_ranges<Bar: FnMut(u64, u64)>(
    plan: &Plan,
    record: Option<&Resume>,
    bar: impl Fn(&str) -> Bar,
) -> Result<Job, ControlError> {
    let resumes = record.is_some() && plan.only.is_none();
    let reading = |error: io::Error| failed("reading", &plan.source, resumes, &error);
    let writing = |error: io::Error| failed("writing", &plan.target, resumes, &error);
    let is_device = std::fs::metadata(&plan.target).is_ok_and(|m| m.file_type().is_block_device());
    // In a file that is new, what is not written reads zero.
    let fresh = !is_device && plan.only.is_none();
    check_target(plan, is_device).map_err(|error| match error.raw_os_error() {
        Some(errno) if errno == Errno::EBUSY as i32 => {
            let mounted = mounted_on(&plan.target);
            let place = match mounted.first() {
                Some(place) => format!("mounted on {place}"),
                None => "in use (`lsblk` shows by what)".to_owned(),
            };
            ControlError::new(
                "V012-busy",
                format!("{} is {place}. Nothing was written", plan.target.display()),
            )
        }
        Some(_) => unread(&plan.target, &error),
        None => ControlError::new("H018-target", error),
    })?;
    let source = Ends::source(&plan.source).map_err(reading)?;
    if let Some(only) = &plan.only {
        holds_an_older_copy(plan, only, &source, is_device)?;
    }
    // An empty file is nothing yet; from then on it is known which one is ours.
    if !is_device {
        new_or_old(&plan.target).map_err(writing)?;
    }
    let record = record.map(|record| record.now(&plan.target));
    let record = record.as_ref();
    if let Some(record) = record {
        record.note(plan.from).map_err(writing)?;
    }
    make_target(plan, is_device).map_err(writing)?;
    let target = Ends::target(&plan.target).map_err(writing)?;
    let pieces = pieces(plan);
    let total: u64 = pieces.iter().map(|piece| piece.1 as u64).sum();
    let (read, written) = (AtomicU64::new(0), AtomicU64::new(0));
    let mut show = bar("copying");
    let mut noted = Instant::now();
    let mut sent = plan.from;
    let digests = Digests::default();
    in_parallel(
        &pieces,
        |buffer, offset, length| {
            let bytes = buffer.get(length);
            source
                .file(offset, length)
                .read_exact_at(bytes, offset)
                .map_err(reading)?;
            read.fetch_add(length as u64, Ordering::Relaxed);
            if plan.verify {
                digests.keep(offset, bytes);
            }
            // Neighbouring parts that are not zero go with one write.
            let mut at = 0;
            while at < length {
                let part = HOLE.min(length - at);
                if fresh && is_zero(&bytes[at..at + part]) {
                    at += part;
                    continue;
                }
                let mut stop = at + part;
                while stop < length && !(fresh && is_zero(&bytes[stop..(stop + HOLE).min(length)]))
                {
                    stop = (stop + HOLE).min(length);
                }
                let place = offset + at as u64;
                let to = match is_device {
                    true => target.file(place, stop - at),
                    false => &target.cached,
                };
                to.write_all_at(&bytes[at..stop], place).map_err(writing)?;
                written.fetch_add((stop - at) as u64, Ordering::Relaxed);
                at = stop;
            }
            Ok(())
        },
        |done, below| {
            show(done, total);
            // The disk begins with what is whole, while the rest is still being read.
            let below_now = below.min(plan.bytes);
            if !is_device && below_now >= sent + SEND {
                let (from, length) = (sent as i64, (below_now - sent) as i64);
                let advice = PosixFadviseAdvice::POSIX_FADV_DONTNEED;
                let _ = posix_fadvise(&target.cached, from, length, advice);
                sent = below_now;
            }
            if let Some(record) = record
                && plan.only.is_none()
                && noted.elapsed() >= NOTE_EVERY
            {
                target
                    .direct
                    .sync_data()
                    .and_then(|()| target.cached.sync_data())
                    .map_err(writing)?;
                record.note(below.min(plan.bytes)).map_err(writing)?;
                noted = Instant::now();
            }
            Ok(())
        },
    )?;
    target.cached.sync_all().map_err(writing)?;
    show(total, total);
    if plan.verify {
        verify(plan, &source, &target, &digests, bar("verifying")).inspect_err(|_| {
            // What is there cannot be gone on from, but it is ours: the same command begins anew.
            if let Some(record) = record
                && record.note(0).is_err()
            {
                record.forget();
            }
        })?;
    }
    if let Some(record) = record {
        record.forget();
    }
    Ok(Job {
        read: read.into_inner(),
        written: written.into_inner(),
    })
}

/// Whether the target is an older copy of the source, as far as a sample tells: of its size, and the same where nothing is said to have changed. Nothing is
/// touched.
fn holds_an_older_copy(
    plan: &Plan,
    only: &[(u64, u64)],
    source: &Ends,
    is_device: bool,
) -> Result<(), ControlError> {
    let no_base = |why: String| {
        ControlError::new(
            "H015-base",
            format!(
                "{} is no older copy of this: {why}. Nothing was written",
                plan.target.display()
            ),
        )
    };
    let target = File::open(&plan.target).map_err(|error| unread(&plan.target, &error))?;
    let metadata = target.metadata();
    let bytes = metadata
        .map_err(|error| unread(&plan.target, &error))?
        .len();
    if !is_device && bytes != plan.bytes {
        return Err(no_base(format!("it has {bytes} bytes, not {}", plan.bytes)));
    }
    let step = (plan.bytes / SAMPLES)
        .next_multiple_of(ALIGN as u64)
        .max(ALIGN as u64);
    let (mut ours, mut theirs) = (vec![0u8; ALIGN], vec![0u8; ALIGN]);
    for at in (0..plan.bytes).step_by(step as usize) {
        let end = plan.bytes.min(at + ALIGN as u64);
        let has_changed = |(offset, length): &(u64, u64)| *offset < end && at < offset + length;
        if only.iter().any(has_changed) {
            continue;
        }
        let length = (end - at) as usize;
        let (ours, theirs) = (&mut ours[..length], &mut theirs[..length]);
        let read = source.cached.read_exact_at(ours, at);
        read.map_err(|error| unread(&plan.source, &error))?;
        let read = target.read_exact_at(theirs, at);
        read.map_err(|error| unread(&plan.target, &error))?;
        if ours != theirs {
            return Err(no_base(format!(
                "byte {at} and those behind it are not the same, and did not change since"
            )));
        }
    }
    Ok(())
}

fn unread(path: &Path, error: &io::Error) -> ControlError {
    ControlError::new(
        "H016-read",
        format!("reading {}: {error}. Nothing was written", path.display()),
    )
}

/// Digests of the pieces that were read: (first byte, bytes) → BLAKE3. 40 bytes for each MiB.
#[derive(Default)]
struct Digests {
    known: Mutex<HashMap<(u64, usize), blake3::Hash>>,
}

impl Digests {
    fn keep(&self, offset: u64, bytes: &[u8]) {
        let digest = blake3::hash(bytes);
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.insert((offset, bytes.len()), digest);
    }

    fn of(&self, offset: u64, length: usize) -> Option<blake3::Hash> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.get(&(offset, length)).copied()
    }
}

/// Whether the target may be written. Nothing is touched.
fn check_target(plan: &Plan, is_device: bool) -> io::Result<()> {
    if is_device {
        // Nobody else's: not mounted, not held.
        const O_EXCL: i32 = 0o200;
        let device = OpenOptions::new()
            .write(true)
            .custom_flags(O_EXCL)
            .open(&plan.target)?;
        let bytes = io::Seek::seek(&mut &device, io::SeekFrom::End(0))?;
        if bytes < plan.bytes {
            return Err(io::Error::other(format!(
                "{} has {bytes} bytes, {} are needed. Nothing was written",
                plan.target.display(),
                plan.bytes
            )));
        }
        return Ok(());
    }
    let holds = std::fs::metadata(&plan.target).is_ok_and(|metadata| metadata.len() > 0);
    if holds && !goes_on(plan) && !plan.overwrite {
        return Err(io::Error::other(format!(
            "{} exists already. Nothing was written; remove it, choose another name, or say --overwrite",
            plan.target.display()
        )));
    }
    Ok(())
}

/// Whether the target holds a part of the copy, or an older one.
fn goes_on(plan: &Plan) -> bool {
    plan.from > 0 || plan.only.is_some()
}

fn new_or_old(target: &Path) -> io::Result<File> {
    OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(target)
}

fn make_target(plan: &Plan, is_device: bool) -> io::Result<()> {
    if is_device {
        return Ok(());
    }
    let file = new_or_old(&plan.target)?;
    if !goes_on(plan) {
        file.set_len(0)?;
    }
    file.set_len(plan.bytes)
}

/// Reads all of the target again. What was copied now must have the digest that was taken before; the rest is compared with the source.
fn verify(
    plan: &Plan,
    source: &Ends,
    target: &Ends,
    digests: &Digests,
    mut show: impl FnMut(u64, u64),
) -> Result<(), ControlError> {
    let whole = Plan {
        source: plan.source.clone(),
        target: plan.target.clone(),
        bytes: plan.bytes,
        from: 0,
        only: None,
        verify: true,
        overwrite: false,
    };
    in_parallel(
        &pieces(&whole),
        |buffer, offset, length| {
            let found = buffer.get(length);
            target
                .file(offset, length)
                .read_exact_at(found, offset)
                .map_err(|error| failed("reading", &plan.target, false, &error))?;
            let same = match digests.of(offset, length) {
                Some(digest) => digest == blake3::hash(found),
                None => {
                    let mut other = Aligned::new();
                    let wanted = other.get(length);
                    source
                        .file(offset, length)
                        .read_exact_at(wanted, offset)
                        .map_err(|error| failed("reading", &plan.source, false, &error))?;
                    wanted == found
                }
            };
            if same {
                return Ok(());
            }
            Err(ControlError::new(
                "H019-differs",
                format!(
                    "{} differs from what was copied within bytes {offset} to {}: its disk lies, or somebody else writes to it. Do not use it",
                    plan.target.display(),
                    offset + length as u64
                ),
            ))
        },
        |done, _| {
            show(done, plan.bytes);
            Ok(())
        },
    )?;
    show(plan.bytes, plan.bytes);
    Ok(())
}

/// To standard output, from the first byte to the last.
pub fn stream(
    source: &Path,
    bytes: u64,
    mut show: impl FnMut(u64, u64),
) -> Result<u64, ControlError> {
    let reading = |error: io::Error| failed("reading", source, false, &error);
    let ends = Ends::source(source).map_err(reading)?;
    let mut buffer = Aligned::new();
    let mut out = io::stdout().lock();
    let mut at = 0;
    while at < bytes {
        let length = (bytes - at).min(CHUNK as u64) as usize;
        let part = buffer.get(length);
        ends.file(at, length)
            .read_exact_at(part, at)
            .map_err(reading)?;
        out.write_all(part).map_err(|error| {
            ControlError::new("H017-write", format!("standard output: {error}"))
        })?;
        at += length as u64;
        show(at, bytes);
    }
    out.flush()
        .map_err(|error| ControlError::new("H017-write", format!("standard output: {error}")))?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::{Digests, Ends, Plan, copy_ranges, is_zero, pieces, verify};
    use std::os::unix::fs::MetadataExt;

    fn plan(name: &str, bytes: u64) -> Plan {
        let base =
            std::env::temp_dir().join(format!("varve-copy-out-{}-{name}", std::process::id()));
        Plan {
            source: base.with_extension("source"),
            target: base.with_extension("target"),
            bytes,
            from: 0,
            only: None,
            verify: true,
            overwrite: false,
        }
    }

    #[test]
    fn zeroes_are_noticed() {
        assert!(is_zero(&[]) && is_zero(&[0]) && is_zero(&[0; 4096]));
        let mut bytes = [0u8; 4096];
        for at in [0, 1, 2048, 4095] {
            bytes[at] = 1;
            assert!(!is_zero(&bytes), "{at}");
            bytes[at] = 0;
        }
    }

    #[test]
    fn pieces_cover_the_ranges_and_nothing_else() {
        let mut plan = plan("pieces", (3 << 20) + 512);
        assert_eq!(
            pieces(&plan).iter().map(|piece| piece.1).sum::<usize>(),
            (3 << 20) + 512
        );
        plan.only = Some(vec![(4096, 8192), ((1 << 20) - 4096, 8192)]);
        assert_eq!(
            pieces(&plan),
            [(4096, 8192), ((1 << 20) - 4096, 4096), (1 << 20, 4096)]
        );
        plan.from = 1 << 20;
        assert_eq!(pieces(&plan), [(1 << 20, 4096)]);
    }

    #[test]
    fn a_copy_is_equal_sparse_and_goes_on_where_it_was() {
        let mut plan = plan("equal", (5 << 20) + 1536);
        let mut content = vec![0u8; plan.bytes as usize];
        for at in (0..content.len()).step_by(1 << 20) {
            let end = (at + 100_000).min(content.len());
            content[at..end].fill(7);
        }
        std::fs::write(&plan.source, &content).unwrap();
        let _ = std::fs::remove_file(&plan.target);
        let job = copy_ranges(&plan, None, |_| |_, _| {}).unwrap();
        assert_eq!(std::fs::read(&plan.target).unwrap(), content);
        assert!(job.written < plan.bytes / 2, "{}", job.written);
        assert!(std::fs::metadata(&plan.target).unwrap().blocks() * 512 < plan.bytes / 2);
        // What the target holds must be what was read, whatever the source holds by now.
        let check = |digests: &Digests| {
            let source = Ends::source(&plan.source).unwrap();
            let target = Ends::target(&plan.target).unwrap();
            verify(&plan, &source, &target, digests, |_, _| {})
        };
        let digests = Digests::default();
        for (offset, length) in pieces(&plan) {
            digests.keep(offset, &content[offset as usize..][..length]);
        }
        std::fs::write(&plan.source, vec![1u8; content.len()]).unwrap();
        check(&digests).unwrap();
        assert_eq!(check(&Digests::default()).unwrap_err().code, "H019-differs");
        digests.keep(0, &[1; 1 << 20]);
        assert_eq!(check(&digests).unwrap_err().code, "H019-differs");
        std::fs::write(&plan.source, &content).unwrap();
        // It is not overwritten unasked.
        assert_eq!(
            copy_ranges(&plan, None, |_| |_, _| {}).unwrap_err().code,
            "H018-target"
        );
        // Only a part of it is copied; the rest is what it was.
        content[3 << 20] = 9;
        std::fs::write(&plan.source, &content).unwrap();
        plan.only = Some(vec![(3 << 20, 4096)]);
        assert_eq!(
            copy_ranges(&plan, None, |_| |_, _| {}).unwrap().written,
            4096
        );
        assert_eq!(std::fs::read(&plan.target).unwrap(), content);
        // What the ranges leave out is noticed: by a sample before anything is written, or afterwards.
        for (at, code) in [(2 << 20, "H015-base"), ((2 << 20) + 4096, "H019-differs")] {
            let was = std::fs::read(&plan.target).unwrap();
            let mut other = content.clone();
            (other[at + 5], other[3 << 20]) = (1, 8);
            std::fs::write(&plan.source, &other).unwrap();
            let failed = copy_ranges(&plan, None, |_| |_, _| {}).unwrap_err();
            assert_eq!(failed.code, code, "{failed}");
            let same = std::fs::read(&plan.target).unwrap() == was;
            assert_eq!(same, code == "H015-base");
        }
        std::fs::write(&plan.target, &content[..1 << 20]).unwrap();
        let failed = copy_ranges(&plan, None, |_| |_, _| {}).unwrap_err();
        assert_eq!(failed.code, "H015-base", "{failed}");
        assert!(std::fs::read(&plan.target).unwrap() == content[..1 << 20]);
        for path in [&plan.source, &plan.target] {
            std::fs::remove_file(path).unwrap();
        }
    }
}
