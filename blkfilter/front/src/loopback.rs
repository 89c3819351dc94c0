//! The turn that every front end's thread takes: bell, timer, device. The ring is the thread's own, shared with the device.

// UNSAFETY: pushes entries into rings; the bell's and timers' entries point at nothing that can go away.
#![expect(unsafe_code)]

use crate::device::{Device, RingPort, Waker};
use io_uring::{IoUring, opcode, squeue, types};
use std::cell::RefCell;
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use varve_log::TARGET_BIT;

pub(crate) const BELL: u64 = TARGET_BIT | 1;
pub(crate) const TIMER: u64 = TARGET_BIT | 2;

thread_local! {
    static RING: RefCell<Option<IoUring>> = const { RefCell::new(None) };
}

/// Makes this thread's own ring (front ends other than ublk).
pub(crate) fn make_ring(entries: u32) -> std::io::Result<RingPort> {
    let ring = IoUring::builder()
        .setup_cqsize(entries * 4)
        .build(entries)?;
    RING.with(|cell| *cell.borrow_mut() = Some(ring));
    Ok(RingPort { push: push_own })
}

/// Drops this thread's ring; the kernel cancels what is left in it.
pub(crate) fn drop_ring() {
    RING.with(|cell| *cell.borrow_mut() = None);
}

fn push_own(entry: &squeue::Entry) {
    RING.with(|cell| {
        if let Some(ring) = cell.borrow_mut().as_mut() {
            push_into(ring, entry);
        }
    });
}

pub(crate) fn push_into(ring: &mut IoUring, entry: &squeue::Entry) {
    loop {
        // SAFETY: whoever made the entry keeps what it points at until its completion (see `Port::push`).
        if unsafe { ring.submission().push(entry) }.is_ok() {
            return;
        }
        let _ = ring.submit();
    }
}

/// Waits for completions of this thread's own ring and takes them.
pub(crate) fn wait_own(timeout_ns: u64, taken: &mut Vec<(u64, i32)>) -> std::io::Result<()> {
    RING.with(|cell| {
        let mut cell = cell.borrow_mut();
        let Some(ring) = cell.as_mut() else {
            return Ok(());
        };
        let timeout = types::Timespec::new()
            .sec(timeout_ns / 1_000_000_000)
            .nsec((timeout_ns % 1_000_000_000) as u32);
        let arguments = types::SubmitArgs::new().timespec(&timeout);
        match ring.submitter().submit_with_args(1, &arguments) {
            Ok(_) => {}
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(libc::ETIME | libc::EINTR | libc::EBUSY)
                ) => {}
            Err(error) => return Err(error),
        }
        taken.extend(
            ring.completion()
                .map(|entry| (entry.user_data(), entry.result())),
        );
        Ok(())
    })
}

/// Asks the ring to tell when the bell rings.
pub(crate) fn arm_bell(port: &RingPort, waker: &Waker) {
    let entry = opcode::PollAdd::new(types::Fd(waker.descriptor()), libc::POLLIN as u32)
        .build()
        .user_data(BELL);
    (port.push)(&entry);
}

/// Timers in the ring of a front end that waits without a time-out of its own. Those that are out are known, so that none is armed twice.
pub(crate) struct RingTimer {
    due_ns: BinaryHeap<Reverse<u64>>,
    /// The kernel copies the time when the entry is submitted, which may be later than the next arming: each timer has a place of its own.
    times: Box<[types::Timespec; TIMERS_MAX]>,
    next: usize,
}

/// Timers out at most; each later one is due earlier than all before it.
const TIMERS_MAX: usize = 64;

impl RingTimer {
    pub(crate) fn new() -> RingTimer {
        RingTimer {
            due_ns: BinaryHeap::with_capacity(TIMERS_MAX),
            times: Box::new([types::Timespec::new(); TIMERS_MAX]),
            next: 0,
        }
    }

    /// Makes sure that the ring completes something within `after_ns`.
    pub(crate) fn arm(&mut self, port: &RingPort, now_ns: u64, after_ns: u64) {
        let due = now_ns + after_ns;
        if self.due_ns.peek().is_some_and(|earliest| earliest.0 <= due)
            || self.due_ns.len() >= TIMERS_MAX
        {
            return;
        }
        self.due_ns.push(Reverse(due));
        self.next = (self.next + 1) % TIMERS_MAX;
        let time = &mut self.times[self.next];
        *time = types::Timespec::new()
            .sec(after_ns / 1_000_000_000)
            .nsec((after_ns % 1_000_000_000) as u32);
        let entry = opcode::Timeout::new(&raw const *time)
            .build()
            .user_data(TIMER);
        (port.push)(&entry);
    }

    /// The earliest of them has fired.
    pub(crate) fn fired(&mut self) {
        self.due_ns.pop();
    }
}

/// The monotonic clock in nanoseconds.
#[must_use]
pub fn now_ns() -> u64 {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)
        .map_or(0, |t| (t.tv_sec() * 1_000_000_000 + t.tv_nsec()) as u64)
}

/// Gives a completion to the device, unless it is the bell's or a timer's.
pub(crate) fn dispatch(
    device: &mut dyn Device,
    port: &RingPort,
    waker: &Waker,
    user_data: u64,
    result: i32,
) {
    match user_data {
        BELL => {
            waker.clear();
            device.woken();
            arm_bell(port, waker);
        }
        TIMER => {}
        _ => device.completion(user_data, result),
    }
}
