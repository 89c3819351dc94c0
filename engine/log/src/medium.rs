//! The world outside a volume: its disks, the clock, randomness. Everything that can fail comes in through here.
//!
//! Operations are submitted and complete later, in any order. The filter's and the log's code is a state machine between the
//! two; it runs the same over io_uring ([`crate::UringMedium`]) and over a simulated machine ([`crate::SimMedium`]).

use crate::Buffer;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use varve_format::WallTime;

/// Which disk an operation is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Disk {
    /// The protected device itself.
    Origin,
    /// The ring of log segments.
    Log,
    /// The state file, on another device than the log.
    State,
    /// Where hot copies keep what is overwritten; not there while there are none.
    Spool,
}

/// What to do with a disk.
#[derive(Clone)]
pub enum Operation {
    /// Fill the buffer from `offset`.
    Read {
        /// First byte.
        offset: u64,
        /// Where to.
        buffer: Buffer,
    },
    /// Write the buffer at `offset`.
    Write {
        /// First byte.
        offset: u64,
        /// What.
        buffer: Buffer,
    },
    /// Make everything durable whose completion was seen before this was submitted.
    Flush,
    /// The range's content no longer matters.
    Discard {
        /// First byte.
        offset: u64,
        /// Length in bytes.
        length: u64,
    },
    /// The range reads zero from now on.
    Zero {
        /// First byte.
        offset: u64,
        /// Length in bytes.
        length: u64,
    },
}

/// An error number of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoError(pub i32);

impl IoError {
    /// Input/output error.
    pub const EIO: IoError = IoError(libc::EIO);
}

impl fmt::Display for IoError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        std::io::Error::from_raw_os_error(self.0).fmt(f)
    }
}

impl std::error::Error for IoError {}

impl From<IoError> for std::io::Error {
    fn from(error: IoError) -> std::io::Error {
        std::io::Error::from_raw_os_error(error.0)
    }
}

/// The end of an operation.
#[derive(Clone, Copy, Debug)]
pub struct Completion {
    /// What the submitter gave.
    pub token: u64,
    /// How it went. Reads and writes are whole or failed.
    pub result: Result<(), IoError>,
}

/// The time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Now {
    /// Nanoseconds since some start; never runs backwards.
    pub monotonic_ns: u64,
    /// Wall clock; may jump.
    pub wall: WallTime,
}

/// A volume's disks, clock and randomness.
pub trait Medium {
    /// Starts an operation. Never blocks; trouble arrives as a completion.
    fn submit(&mut self, disk: Disk, token: u64, operation: Operation);
    /// Takes one completion. With `wait`, blocks until there is one; `None` then means that none can come, or that none came for very long.
    fn poll(&mut self, wait: bool) -> Option<Completion>;
    /// The time.
    fn now(&self) -> Now;
    /// Sixteen random bytes.
    fn random_id(&mut self) -> [u8; 16];
}

/// Submits one operation and waits for it: for starting and closing a volume, where nothing else that matters is in flight. A disk that does not
/// answer gives `ETIMEDOUT`; its late completion then belongs to nobody.
pub fn run_blocking(
    medium: &mut dyn Medium,
    disk: Disk,
    operation: Operation,
) -> Result<(), IoError> {
    run_all_blocking(medium, disk, vec![operation])
}

/// The same for several operations at once: waits for all of them, and gives the first error.
pub fn run_all_blocking(
    medium: &mut dyn Medium,
    disk: Disk,
    operations: Vec<Operation>,
) -> Result<(), IoError> {
    static CALLS: AtomicU64 = AtomicU64::new(0);
    let count = operations.len() as u64;
    let first = BLOCKING_TOKENS + CALLS.fetch_add(count, Ordering::Relaxed);
    for (token, operation) in (first..).zip(operations) {
        medium.submit(disk, token, operation);
    }
    let mut outcome = Ok(());
    let mut left = count;
    while left > 0 {
        match medium.poll(true) {
            Some(completion) if (first..first + count).contains(&completion.token) => {
                outcome = outcome.and(completion.result);
                left -= 1;
            }
            Some(_) => {}
            None => return Err(IoError(libc::ETIMEDOUT)),
        }
    }
    outcome
}

/// Tokens at and above this are [`run_blocking`]'s; a completion with one of them that nobody waits for is to be ignored.
pub const BLOCKING_TOKENS: u64 = 1 << 60;
