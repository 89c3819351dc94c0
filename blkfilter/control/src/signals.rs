//! Signals that end a process, taken by one thread of it, which cleans up first. Children get them as usual: a mask would be handed down to them.

use nix::sys::signal::{SigSet, Signal, kill};
use nix::unistd::Pid;
use std::io;
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

static TAKEN: AtomicBool = AtomicBool::new(false);
/// The child that is waited for.
static CHILD: Mutex<Option<Pid>> = Mutex::new(None);
/// How long a child may take to end.
const CHILD_WAIT: Duration = Duration::from_secs(5);

/// Those that this process was not told to ignore (`nohup`): a signal that is blocked is not dropped for being ignored.
fn signals() -> SigSet {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let ignored = ignored.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    let is_heard = |signal: &Signal| (ignored.unwrap_or(0) >> (*signal as u64 - 1)) & 1 == 0;
    let ends = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP].into_iter();
    ends.filter(is_heard).collect()
}

fn child() -> MutexGuard<'static, Option<Pid>> {
    CHILD.lock().unwrap_or_else(PoisonError::into_inner)
}

/// From here on ^C, a hang-up and SIGTERM first end the child that is waited for, then do `work`, which says the exit code (it hears 128 and the signal's
/// number, as shells have it). To be called before other threads begin: these inherit that they leave the signals alone.
pub fn at_signal(work: impl FnOnce(i32) -> i32 + Send + 'static) {
    if signals().thread_block().is_err() {
        return;
    }
    TAKEN.store(true, Ordering::Release);
    std::thread::spawn(move || {
        let signal = signals().wait().map_or(0, |signal| signal as i32);
        let known = *child();
        if let Some(known) = known {
            let _ = kill(known, Signal::SIGTERM);
            let since = Instant::now();
            while child().is_some() && since.elapsed() < CHILD_WAIT {
                std::thread::sleep(Duration::from_millis(10));
            }
        }
        std::process::exit(work(128 + signal));
    });
}

/// Starts a child that gets signals as usual.
pub fn spawn(command: &mut Command) -> io::Result<Child> {
    if !TAKEN.load(Ordering::Acquire) {
        return command.spawn();
    }
    signals().thread_unblock()?;
    let spawned = command.spawn();
    signals().thread_block()?;
    spawned
}

/// The same, and waits for it: what it says is kept.
pub fn output(command: &mut Command) -> io::Result<Output> {
    let started = spawn(command.stdout(Stdio::piped()).stderr(Stdio::piped()))?;
    *child() = Some(Pid::from_raw(started.id() as i32));
    let output = started.wait_with_output();
    *child() = None;
    output
}
