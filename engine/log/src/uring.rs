//! The kernel's medium: a few file descriptors and one io_uring.
//!
//! The ring is either our own, or one that somebody else drives (ublk's queue ring: then one system call per turn serves requests,
//! origin and log alike). Short reads and writes are continued here, so that whoever submitted sees whole or failed.

// UNSAFETY: pushes entries that carry raw pointers into a ring; each operation's buffer is kept alive until its completion.
#![expect(unsafe_code)]

use crate::medium::{Completion, Disk, IoError, Medium, Now, Operation};
use io_uring::{IoUring, cqueue, opcode, squeue, types};
use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};
use varve_format::WallTime;

/// Marks a completion as ours in a ring that ublk commands share (libublk's "target I/O" bit).
pub const TARGET_BIT: u64 = 1 << 63;
/// Marks an operation of a medium; other users of the ring (timers, wake-ups) leave it clear.
const MEDIUM_BIT: u64 = 1 << 48;

/// A disk that does not answer for so long at a start or close is taken for broken.
const REAP_SECONDS: u64 = 5;

/// Where entries are pushed.
pub trait Port {
    /// Queues an entry; submits to make room if it must.
    ///
    /// # Safety
    /// What the entry points at must stay valid until its completion.
    unsafe fn push(&mut self, entry: &squeue::Entry);
    /// Takes a completion, if this port is the one that reaps. `wait` blocks for one.
    fn reap(&mut self, wait: bool) -> Option<cqueue::Entry>;
}

/// A ring of our own.
pub struct OwnRing {
    ring: IoUring,
}

impl OwnRing {
    /// A ring with `entries` places.
    pub fn new(entries: u32) -> std::io::Result<OwnRing> {
        Ok(OwnRing {
            ring: IoUring::new(entries)?,
        })
    }

    /// Submits what is queued and waits until a completion is there or `timeout_ns` has passed.
    pub fn submit_and_wait(&mut self, timeout_ns: u64) -> std::io::Result<()> {
        let timeout = types::Timespec::new()
            .sec(timeout_ns / 1_000_000_000)
            .nsec((timeout_ns % 1_000_000_000) as u32);
        let arguments = types::SubmitArgs::new().timespec(&timeout);
        match self.ring.submitter().submit_with_args(1, &arguments) {
            Ok(_) => Ok(()),
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(libc::ETIME | libc::EINTR | libc::EBUSY)
                ) =>
            {
                Ok(())
            }
            Err(error) => Err(error),
        }
    }
}

impl Port for OwnRing {
    unsafe fn push(&mut self, entry: &squeue::Entry) {
        loop {
            // SAFETY: the caller's promise.
            if unsafe { self.ring.submission().push(entry) }.is_ok() {
                return;
            }
            let _ = self.ring.submit();
        }
    }

    fn reap(&mut self, wait: bool) -> Option<cqueue::Entry> {
        if let Some(entry) = self.ring.completion().next() {
            return Some(entry);
        }
        if !wait {
            let _ = self.ring.submit();
            return self.ring.completion().next();
        }
        loop {
            let timeout = types::Timespec::new().sec(REAP_SECONDS);
            let arguments = types::SubmitArgs::new().timespec(&timeout);
            match self.ring.submitter().submit_with_args(1, &arguments) {
                Ok(_) => {}
                Err(error) if matches!(error.raw_os_error(), Some(libc::EINTR | libc::EBUSY)) => {
                    continue;
                }
                Err(_) => return self.ring.completion().next(),
            }
            let entry = self.ring.completion().next();
            if entry.is_some() {
                return entry;
            }
        }
    }
}

struct Pending {
    token: u64,
    disk: Disk,
    operation: Operation,
    done_bytes: usize,
}

/// The kernel's medium.
pub struct UringMedium<P> {
    port: P,
    /// By [`Disk`]; operations on one that is not there fail.
    files: [Option<File>; DISKS],
    origin_is_block_device: bool,
    pending: Vec<Option<Pending>>,
    free: Vec<u16>,
    /// By [`Disk`]: how many of `pending` are its.
    in_flight: [usize; DISKS],
    /// By [`Disk`]: what has no place yet, in order.
    waiting: [VecDeque<Pending>; DISKS],
    clock: Clock,
}

/// As many as [`Disk`] has.
const DISKS: usize = 4;

/// How many operations of one disk the kernel has at once; more wait here. Each disk has its own places: one that hangs takes none of another's.
const DISK_PLACES: usize = 512;

/// The time, asked for once a turn: where the C library cannot read clocks without the kernel (guests, some clock sources) each reading is a
/// system call.
#[derive(Clone, Copy, Default)]
struct Clock {
    now: Now,
    /// Wall clock minus monotonic clock, and when that was last measured.
    wall_offset_ns: i64,
    offset_measured_ns: u64,
    /// While set, `now` holds.
    held: bool,
}

/// How long the wall clock is taken to go with the monotonic one: a step of it is seen after this.
const WALL_OFFSET_NS: u64 = 50_000_000;

fn read_clock(id: nix::time::ClockId) -> i64 {
    nix::time::clock_gettime(id).map_or(0, |t| t.tv_sec() * 1_000_000_000 + t.tv_nsec())
}

impl Clock {
    fn read(&self) -> Clock {
        let monotonic_ns = read_clock(nix::time::ClockId::CLOCK_MONOTONIC) as u64;
        let mut clock = *self;
        if self.offset_measured_ns == 0
            || monotonic_ns.saturating_sub(self.offset_measured_ns) > WALL_OFFSET_NS
        {
            clock.wall_offset_ns =
                read_clock(nix::time::ClockId::CLOCK_REALTIME) - monotonic_ns as i64;
            clock.offset_measured_ns = monotonic_ns;
        }
        clock.now = Now {
            monotonic_ns,
            wall: WallTime(monotonic_ns as i64 + clock.wall_offset_ns),
        };
        clock
    }
}

impl<P: Port> UringMedium<P> {
    /// A medium over an open origin; the other disks are [`UringMedium::set`]. All with O_DIRECT where their file system has it.
    pub fn new(port: P, origin: File) -> std::io::Result<UringMedium<P>> {
        const PENDING_MAX: usize = DISKS * DISK_PLACES;
        let origin_is_block_device =
            std::os::unix::fs::FileTypeExt::is_block_device(&origin.metadata()?.file_type());
        Ok(UringMedium {
            port,
            files: [Some(origin), None, None, None],
            origin_is_block_device,
            pending: (0..PENDING_MAX).map(|_| None).collect(),
            free: (0..PENDING_MAX as u16).rev().collect(),
            in_flight: [0; DISKS],
            waiting: [(); DISKS].map(|()| VecDeque::with_capacity(64)),
            clock: Clock::default(),
        })
    }

    /// Goes on with another ring. Operations that never came back (a disk that hangs) stay with the old one for ever, and so do their buffers.
    pub fn with_port<Q: Port>(mut self, port: Q) -> UringMedium<Q> {
        if self.in_flight() > 0 {
            let lost: Vec<Pending> = self.pending.iter_mut().filter_map(Option::take).collect();
            std::mem::forget(lost);
            self.free = (0..self.pending.len() as u16).rev().collect();
            self.in_flight = [0; DISKS];
            self.waiting.iter_mut().for_each(VecDeque::clear); // The kernel never had them.
        }
        let UringMedium {
            port: _old,
            files,
            origin_is_block_device,
            pending,
            free,
            in_flight,
            waiting,
            clock,
        } = self;
        UringMedium {
            port,
            files,
            origin_is_block_device,
            pending,
            free,
            in_flight,
            waiting,
            clock: Clock {
                held: false,
                ..clock
            },
        }
    }

    /// The ring.
    pub fn port(&mut self) -> &mut P {
        &mut self.port
    }

    /// Reads the clock and holds it until [`UringMedium::let_time_pass`]: one turn of a loop happens at one time. Does nothing if it is held already.
    pub fn hold_time(&mut self) {
        if !self.clock.held {
            self.clock = Clock {
                held: true,
                ..self.clock.read()
            };
        }
    }

    /// The turn is over.
    pub fn let_time_pass(&mut self) {
        self.clock.held = false;
    }

    /// What a disk is from now on; nothing may be in flight to what it was before.
    pub fn set(&mut self, disk: Disk, file: Option<File>) {
        self.files[disk as usize] = file;
    }

    /// A disk's file.
    #[must_use]
    pub fn file(&self, disk: Disk) -> Option<&File> {
        self.files[disk as usize].as_ref()
    }

    /// Operations that the kernel has; while there are none, none waits either.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.pending.len() - self.free.len()
    }

    fn descriptor(&self, disk: Disk) -> RawFd {
        self.file(disk).map_or(-1, AsRawFd::as_raw_fd) // The kernel answers EBADF.
    }

    fn entry(&self, pending: &Pending) -> squeue::Entry {
        let fd = types::Fd(self.descriptor(pending.disk));
        match &pending.operation {
            Operation::Read { offset, buffer } => {
                let rest = buffer.slice(pending.done_bytes, buffer.len() - pending.done_bytes);
                opcode::Read::new(fd, rest.pointer(), rest.len() as u32)
                    .offset(offset + pending.done_bytes as u64)
                    .build()
            }
            Operation::Write { offset, buffer } => {
                let rest = buffer.slice(pending.done_bytes, buffer.len() - pending.done_bytes);
                opcode::Write::new(fd, rest.pointer(), rest.len() as u32)
                    .offset(offset + pending.done_bytes as u64)
                    .build()
            }
            Operation::Flush => opcode::Fsync::new(fd)
                .flags(types::FsyncFlags::DATASYNC)
                .build(),
            Operation::Discard { offset, length } => {
                let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
                opcode::Fallocate::new(fd, *length)
                    .offset(*offset)
                    .mode(mode)
                    .build()
            }
            Operation::Zero { offset, length } => {
                // On a file a hole reads zero; on a block device only ZERO_RANGE promises zeroes.
                let mode = if self.origin_is_block_device {
                    libc::FALLOC_FL_ZERO_RANGE
                } else {
                    libc::FALLOC_FL_PUNCH_HOLE
                };
                opcode::Fallocate::new(fd, *length)
                    .offset(*offset)
                    .mode(mode | libc::FALLOC_FL_KEEP_SIZE)
                    .build()
            }
        }
    }

    fn start(&mut self, operation: Pending) {
        let slot = self.free.pop().expect("each disk has its places");
        self.in_flight[operation.disk as usize] += 1;
        self.pending[slot as usize] = Some(operation);
        self.push(slot);
    }

    fn push(&mut self, slot: u16) {
        let pending = self.pending[slot as usize]
            .as_ref()
            .expect("slot is pending");
        let entry = self
            .entry(pending)
            .user_data(TARGET_BIT | MEDIUM_BIT | u64::from(slot));
        // SAFETY: `pending` owns the Buffer and stays in its slot until the completion is taken; the files live as long as self.
        unsafe { self.port.push(&entry) };
    }

    /// Takes a completion that somebody else reaped. `None`: it is not a medium's, or the operation goes on.
    pub fn take(&mut self, user_data: u64, result: i32) -> Option<Completion> {
        if user_data & MEDIUM_BIT == 0 || user_data & TARGET_BIT == 0 {
            return None;
        }
        let slot = (user_data & 0xffff) as u16;
        let pending = self.pending[slot as usize].as_mut()?;
        if result == -libc::EINTR || result == -libc::EAGAIN {
            self.push(slot);
            return None;
        }
        let outcome = match &pending.operation {
            _ if result < 0 => Err(IoError(-result)),
            Operation::Read { buffer, .. } | Operation::Write { buffer, .. } => {
                pending.done_bytes += result as usize;
                if result == 0 {
                    Err(IoError::EIO) // The end of the device or file: what should be there is not.
                } else if pending.done_bytes < buffer.len() {
                    self.push(slot);
                    return None;
                } else {
                    Ok(())
                }
            }
            _ => Ok(()),
        };
        let token = pending.token;
        let disk = pending.disk as usize;
        self.pending[slot as usize] = None;
        self.free.push(slot);
        self.in_flight[disk] -= 1;
        if let Some(next) = self.waiting[disk].pop_front() {
            self.start(next);
        }
        Some(Completion {
            token,
            result: outcome,
        })
    }
}

impl<P: Port> Medium for UringMedium<P> {
    fn submit(&mut self, disk: Disk, token: u64, operation: Operation) {
        let operation = Pending {
            token,
            disk,
            operation,
            done_bytes: 0,
        };
        if self.in_flight[disk as usize] == DISK_PLACES {
            self.waiting[disk as usize].push_back(operation);
        } else {
            self.start(operation);
        }
    }

    fn poll(&mut self, wait: bool) -> Option<Completion> {
        loop {
            if wait && self.in_flight() == 0 {
                return None;
            }
            let entry = self.port.reap(wait)?;
            if let Some(completion) = self.take(entry.user_data(), entry.result()) {
                return Some(completion);
            }
        }
    }

    fn now(&self) -> Now {
        if self.clock.held {
            self.clock.now
        } else {
            self.clock.read().now
        }
    }

    fn random_id(&mut self) -> [u8; 16] {
        let mut id = [0u8; 16];
        let file = File::open("/dev/urandom");
        if file
            .and_then(|mut f| std::io::Read::read_exact(&mut f, &mut id))
            .is_err()
        {
            // Never seen: no /dev. Time and address still make it unlikely to meet twice.
            id[..8].copy_from_slice(&self.now().monotonic_ns.to_le_bytes());
            id[8..].copy_from_slice(&self.now().wall.0.to_le_bytes());
        }
        id
    }
}

#[cfg(test)]
mod tests {
    use super::{DISK_PLACES, OwnRing, UringMedium};
    use crate::{Buffer, Disk, Medium, Operation};
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    fn read(offset: u64, buffer: &Buffer) -> Operation {
        Operation::Read {
            offset,
            buffer: buffer.slice((offset % buffer.len() as u64) as usize, 512),
        }
    }

    fn medium(origin: File) -> UringMedium<OwnRing> {
        UringMedium::new(OwnRing::new(16).unwrap(), origin).unwrap()
    }

    fn origin() -> File {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[7; 1 << 16], 0).unwrap();
        file
    }

    #[test]
    fn more_operations_than_places_wait() {
        let mut medium = medium(origin());
        let buffer = Buffer::anonymous(1 << 16).unwrap();
        let count = 3 * DISK_PLACES as u64;
        for token in 0..count {
            medium.submit(Disk::Origin, token, read(token % 128 * 512, &buffer));
        }
        let mut seen = vec![false; count as usize];
        while let Some(completion) = medium.poll(true) {
            assert_eq!(completion.result, Ok(()), "{}", completion.token);
            assert!(!std::mem::replace(
                &mut seen[completion.token as usize],
                true
            ));
        }
        assert!(seen.iter().all(|done| *done));
        assert_eq!(medium.in_flight(), 0);
    }

    #[test]
    fn a_disk_that_hangs_takes_no_place_of_another() {
        let (silent, mouth) = nix::unistd::pipe().unwrap();
        let mut medium = medium(origin());
        medium.set(Disk::Spool, Some(File::from(silent)));
        let buffer = Buffer::anonymous(1 << 16).unwrap();
        for token in 0..5 * DISK_PLACES as u64 {
            medium.submit(Disk::Spool, token, read(0, &buffer));
        }
        for token in 0..100u64 {
            let token = 1 << 32 | token;
            medium.submit(Disk::Origin, token, read(512, &buffer));
        }
        for _ in 0..100 {
            let completion = medium.poll(true).unwrap();
            assert!(completion.token >> 32 == 1 && completion.result.is_ok());
        }
        drop(mouth); // The kernel's readers end.
        while medium.poll(true).is_some() {}
    }
}
