//! Freezing file systems for a cut, so that they end up thawed whatever happens.
//!
//! A helper process freezes, and thaws when it is told to, when whoever started it is gone (the pipe closes), or at its deadline. If the helper is
//! killed, the daemon thaws. If both are, the record in the run directory tells the next daemon. While a file system is frozen nobody here writes to
//! anything but pipes.

// UNSAFETY: two ioctls without arguments, on directories.
#![expect(unsafe_code)]

use crate::manager::Manager;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};
use varve_control::{ControlError, file_system_of, mounts_of};

/// No file system stays frozen longer.
pub const DEADLINE: Duration = Duration::from_secs(5);
const RECORD: &str = "frozen";
/// What file systems hold in memory is on its way for no longer, before they are frozen.
const FLUSH_MAX: Duration = Duration::from_secs(120);

// linux/fs.h: FIFREEZE, FITHAW.
mod ioctl {
    nix::ioctl_none_bad!(freeze, nix::request_code_readwrite!(b'X', 119, 4));
    nix::ioctl_none_bad!(thaw, nix::request_code_readwrite!(b'X', 120, 4));
}

fn freeze(directory: &File) -> io::Result<()> {
    // SAFETY: the ioctl takes no argument; the descriptor is open.
    unsafe { ioctl::freeze(directory.as_raw_fd()) }?;
    Ok(())
}

fn thaw(directory: &File) -> io::Result<()> {
    // SAFETY: as above.
    unsafe { ioctl::thaw(directory.as_raw_fd()) }?;
    Ok(())
}

/// The helper's whole life: `blkfilter --freeze DIR…`.
pub fn helper(directories: &[String]) -> io::Result<()> {
    let (told_in, told) = mpsc::channel();
    std::thread::spawn(move || {
        // A byte means "thaw", the end of the pipe that nobody is left who could say so.
        let _ = io::stdin().read(&mut [0u8; 1]);
        let _ = told_in.send(());
    });
    let frozen: Arc<Mutex<Vec<File>>> = Arc::default();
    let thaw_all = |frozen: &Mutex<Vec<File>>| {
        let mut frozen = frozen.lock().unwrap_or_else(PoisonError::into_inner);
        let mut outcome = Ok(());
        while let Some(directory) = frozen.pop() {
            if let Err(error) = thaw(&directory) {
                outcome = Err(error);
            }
        }
        outcome
    };
    let mut skipped: Vec<String> = Vec::new();
    let expired = Arc::new(AtomicBool::new(false));
    let mut since = Instant::now();
    let mut outcome = Ok(());
    let opened: Vec<File> = directories
        .iter()
        .map(File::open)
        .collect::<io::Result<_>>()?;
    for (index, directory) in opened.into_iter().enumerate() {
        if index == 0 {
            since = Instant::now();
            // The first one must not wait for ever for the last one to write what it holds.
            let (frozen, expired) = (Arc::clone(&frozen), Arc::clone(&expired));
            std::thread::spawn(move || {
                std::thread::sleep(DEADLINE);
                expired.store(true, Ordering::Release);
                let _ = thaw_all(&frozen);
            });
        }
        let done = freeze(&directory);
        if done
            .as_ref()
            .is_err_and(|error| error.raw_os_error() == Some(libc::EOPNOTSUPP))
        {
            // A file system that cannot be frozen (vfat) keeps no other from it; it was flushed.
            skipped.push(index.to_string());
            continue;
        }
        if let Err(error) = done {
            outcome = Err(io::Error::new(
                error.kind(),
                format!("{}: {error}", directories[index]),
            ));
            break;
        }
        frozen
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(directory);
        // The watcher thaws what it finds; what comes later is for us.
        if expired.load(Ordering::Acquire) {
            outcome = Err(io::Error::other("they were not frozen in time"));
            break;
        }
    }
    let mut out = io::stdout();
    if outcome.is_ok() {
        let _ = writeln!(out, "frozen {}", skipped.join(" ")).and_then(|()| out.flush());
        let _ = told.recv_timeout(DEADLINE);
    }
    if let Err(error) = thaw_all(&frozen)
        && outcome.is_ok()
    {
        outcome = Err(error);
    }
    let _ = writeln!(out, "thawed {}", since.elapsed().as_micros()).and_then(|()| out.flush());
    outcome
}

/// Writes what file systems hold in memory. One that does not come to an end with it (a dead disk beside the one that matters) is not waited for.
fn flush(directories: &[PathBuf]) -> Result<(), String> {
    let (told, outcome) = mpsc::channel();
    let all = directories.to_vec();
    std::thread::spawn(move || {
        for directory in all {
            let flushed = File::open(&directory)
                .and_then(|file| nix::unistd::syncfs(&file).map_err(io::Error::from));
            let flushed = flushed.map_err(|error| format!("{}: {error}", directory.display()));
            if told.send(flushed).is_err() {
                return; // Nobody waits any more.
            }
        }
    });
    let until = Instant::now() + FLUSH_MAX;
    for directory in directories {
        let left = until.saturating_duration_since(Instant::now());
        outcome.recv_timeout(left).unwrap_or_else(|_| {
            let waited = FLUSH_MAX.as_secs();
            Err(format!(
                "{}: not flushed after {waited} s",
                directory.display()
            ))
        })?;
    }
    Ok(())
}

/// File systems that are frozen.
pub(crate) struct Frozen {
    helper: Child,
    order: Option<ChildStdin>,
    lines: mpsc::Receiver<String>,
    directories: Vec<PathBuf>,
    record: PathBuf,
    since: Instant,
}

impl Frozen {
    /// Freezes the file systems that are mounted there. What they hold in memory is written first, so that the pause is short.
    pub(crate) fn freeze(run: &Path, directories: &[PathBuf]) -> Result<Frozen, String> {
        flush(directories)?;
        // A record of its own: several may freeze at once.
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let record = run.join(format!("{RECORD}-{}-{number}", std::process::id()));
        let list: String = directories
            .iter()
            .map(|directory| format!("{}\n", directory.display()))
            .collect();
        std::fs::write(&record, list).map_err(|e| format!("{}: {e}", record.display()))?;
        let program = std::env::current_exe().map_err(|e| e.to_string())?;
        let since = Instant::now();
        let mut helper = Command::new(program)
            .arg("--freeze")
            .args(directories)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|e| e.to_string())?;
        let order = helper.stdin.take();
        let (said, lines) = mpsc::channel();
        if let Some(answers) = helper.stdout.take() {
            std::thread::spawn(move || {
                for line in BufReader::new(answers).lines().map_while(Result::ok) {
                    let _ = said.send(line);
                }
            });
        }
        let mut frozen = Frozen {
            helper,
            order,
            lines,
            directories: directories.to_vec(),
            record,
            since,
        };
        match frozen.lines.recv_timeout(DEADLINE) {
            Ok(line) if line.starts_with("frozen") => {
                let skipped: Vec<usize> = line
                    .split_whitespace()
                    .filter_map(|word| word.parse().ok())
                    .collect();
                let mut index = 0..;
                frozen
                    .directories
                    .retain(|_| index.next().is_some_and(|index| !skipped.contains(&index)));
                Ok(frozen)
            }
            Err(mpsc::RecvTimeoutError::Timeout) => {
                // The pipe closes: it thaws as soon as the kernel lets it.
                drop(frozen.order.take());
                std::thread::spawn(move || frozen.thaw());
                Err(format!("not frozen after {} s", DEADLINE.as_secs()))
            }
            other => {
                let mut why = String::new();
                if let Some(mut errors) = frozen.helper.stderr.take() {
                    let _ = errors.read_to_string(&mut why);
                }
                match other {
                    // The helper has thawed what it froze; by name we could thaw what somebody else has frozen.
                    Ok(line) if line.starts_with("thawed") => {
                        let _ = frozen.helper.wait();
                        let _ = std::fs::remove_file(&frozen.record);
                    }
                    _ => {
                        frozen.thaw();
                    }
                }
                Err(why.trim().trim_start_matches("blkfilter: ").to_owned())
            }
        }
    }

    /// Where they are mounted.
    pub(crate) fn directories(&self) -> &[PathBuf] {
        &self.directories
    }

    /// Until when they are surely frozen: the deadline counts from the first of them.
    pub(crate) fn until(&self) -> Instant {
        self.since + DEADLINE
    }

    /// Thaws; gives how long they were frozen.
    pub(crate) fn thaw(mut self) -> Duration {
        if let Some(mut order) = self.order.take() {
            let _ = order.write_all(b"t");
        }
        let micros = self.lines.iter().find_map(|line| {
            let text = line.strip_prefix("thawed ")?;
            text.parse().ok()
        });
        let _ = self.helper.wait();
        if micros.is_none() {
            thaw_all(&self.directories); // The helper was killed.
        }
        let _ = std::fs::remove_file(&self.record);
        micros.map_or_else(|| self.since.elapsed(), Duration::from_micros)
    }
}

fn thaw_all(directories: &[PathBuf]) {
    for directory in directories {
        match File::open(directory).and_then(|file| thaw(&file)) {
            Ok(()) => eprintln!("blkfilter: thawed {}", directory.display()),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {} // It is not frozen.
            Err(error) => eprintln!("blkfilter: thawing {}: {error}", directory.display()),
        }
    }
}

/// At a daemon's start: thaws what a dead one left frozen.
pub fn thaw_left_over(run: &Path) {
    let entries = std::fs::read_dir(run).into_iter().flatten().flatten();
    let records = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(RECORD));
    for record in records.map(|entry| entry.path()) {
        let Ok(text) = std::fs::read_to_string(&record) else {
            continue;
        };
        // On a thread of its own: thawing writes to devices that this daemon is about to serve.
        std::thread::spawn(move || {
            let directories: Vec<PathBuf> = text.lines().map(PathBuf::from).collect();
            thaw_all(&directories);
            let _ = std::fs::remove_file(record);
        });
    }
}

impl Manager {
    /// Freezes what is mounted from these devices; in `Err`, why it could not be. What Varve itself writes to is refused; `further` adds to that.
    pub(crate) fn freeze_devices<'a>(
        &self,
        mapped: impl Iterator<Item = &'a str>,
        further: Vec<PathBuf>,
    ) -> Result<Result<Option<Frozen>, String>, ControlError> {
        // A file system may lie on several of them.
        let mut places: Vec<PathBuf> = Vec::new();
        for place in mapped.flat_map(mounts_of) {
            if !places.contains(&place) {
                places.push(place);
            }
        }
        if places.is_empty() {
            return Ok(Ok(None));
        }
        let own: Vec<PathBuf> = self
            .specs()
            .into_iter()
            .flat_map(|spec| [spec.log, spec.state])
            .chain(further)
            .chain([self.paths.run(), self.paths.store(), self.paths.copy_sets()])
            .collect();
        let own: Vec<(PathBuf, Option<String>)> = own
            .into_iter()
            .map(|path| {
                let number = file_system_of(&path);
                (path, number)
            })
            .collect();
        for place in &places {
            let held = file_system_of(place);
            if let Some((path, _)) = own
                .iter()
                .find(|(_, number)| held.is_some() && *number == held)
            {
                return Err(ControlError::new(
                    "H009-own",
                    format!(
                        "{} cannot be frozen: Varve itself writes there ({}). Nothing was changed",
                        place.display(),
                        path.display()
                    ),
                ));
            }
        }
        Ok(Frozen::freeze(&self.paths.run(), &places).map(Some))
    }
}
