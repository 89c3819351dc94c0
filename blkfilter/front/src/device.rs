//! What a front end drives: a device that lives on the front end's thread and shares its ring.

// UNSAFETY: implements the unsafe `Port`; it only hands the entry on.
#![expect(unsafe_code)]

use crate::Request;
use io_uring::{cqueue, squeue};
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use varve_log::Port;

/// An error number of the kernel.
pub type Errno = i32;

/// The end of a request.
#[derive(Clone, Copy, Debug)]
pub struct Answer {
    /// The request's tag.
    pub tag: u32,
    /// How it went.
    pub result: Result<(), Errno>,
}

/// A device behind a front end.
pub trait Device {
    /// Takes a request; its answer comes later through [`Device::take_answer`].
    fn submit(&mut self, request: Request);
    /// A completion of the shared ring that is not the front end's.
    fn completion(&mut self, user_data: u64, result: i32);
    /// Somebody rang the [`Waker`]: look at the messages.
    fn woken(&mut self);
    /// Does what can be done now.
    fn run(&mut self);
    /// The next answer.
    fn take_answer(&mut self) -> Option<Answer>;
    /// The turn is over: monotonic time now (as the turn saw it) and the nanoseconds until [`Device::run`] must be called if nothing happens.
    fn end_turn(&mut self) -> (u64, u64);
    /// Whether it has nothing in the ring and owes no answer.
    fn is_quiet(&self) -> bool;
    /// The front end has stopped and everything is quiet.
    fn closed(&mut self);
}

/// Makes the device on the front end's own thread.
pub type DeviceFactory = Box<dyn FnOnce(RingPort) -> Box<dyn Device> + Send>;

/// The front end's ring, for the device's I/O.
#[derive(Clone)]
pub struct RingPort {
    pub(crate) push: fn(&squeue::Entry),
}

impl Port for RingPort {
    unsafe fn push(&mut self, entry: &squeue::Entry) {
        (self.push)(entry);
    }

    fn reap(&mut self, _wait: bool) -> Option<cqueue::Entry> {
        None // The front end reaps.
    }
}

/// Rings a device's thread from another one.
#[derive(Clone)]
pub struct Waker {
    event: Arc<EventFd>,
}

impl Waker {
    /// A new bell.
    pub fn new() -> std::io::Result<Waker> {
        let event =
            EventFd::from_value_and_flags(0, EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?;
        Ok(Waker {
            event: Arc::new(event),
        })
    }

    /// Rings it.
    pub fn wake(&self) {
        let _ = self.event.write(1); // Full means that it rings already.
    }

    pub(crate) fn clear(&self) {
        let _ = self.event.read();
    }

    pub(crate) fn descriptor(&self) -> RawFd {
        self.event.as_fd().as_raw_fd()
    }
}

/// Asks a front end to stop, from another thread.
#[derive(Clone)]
pub struct Stopper {
    pub(crate) flag: Arc<AtomicBool>,
    pub(crate) waker: Waker,
}

impl Stopper {
    /// A stopper that rings `waker`.
    #[must_use]
    pub fn new(waker: &Waker) -> Stopper {
        Stopper {
            flag: Arc::new(AtomicBool::new(false)),
            waker: waker.clone(),
        }
    }

    /// Stops the front end: no new requests; those that are there are answered.
    pub fn stop(&self) {
        self.flag.store(true, Ordering::Release);
        self.waker.wake();
    }

    pub(crate) fn is_stopping(&self) -> bool {
        self.flag.load(Ordering::Acquire)
    }
}
