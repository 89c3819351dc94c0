//! Front ends: how a block device of ours reaches the kernel.
//!
//! | front end | kernel needs | a dead daemon means |
//! |---|---|---|
//! | [`ublk`] | ublk_drv (6.0; user recovery) | I/O waits until the next daemon takes over |
//! | [`fuse`] | FUSE and loop | I/O errors until it is set up again |
//! | [`nbd`] | – (a socket) | the client's reconnect |
//! | [`channel`] | – (in-process) | – |
//!
//! Each turns requests into [`Request`]s for a [`Device`] and gives back its answers in any order. What stands behind it (a protected volume, an
//! image of the past) does not know which one it is. A device lives on one thread with one ring; front end and device share both.

pub mod channel;
mod device;
pub mod fuse;
mod loopback;
pub mod nbd;
pub mod nbd_context;
mod nbd_transmission;
mod partitions;
mod request;
mod show;
pub mod ublk;

/// Longest discard or write-zeroes that a front end passes on: 16 MiB. Longer ones are cut.
pub const RANGE_BYTES_MAX: u64 = 16 << 20;

pub use device::{Answer, Device, DeviceFactory, Errno, RingPort, Stopper, Waker};
pub use loopback::now_ns as monotonic_ns;
pub use nbd_transmission::ReadBytes;
pub use partitions::show_partitions;
pub use request::{Geometry, Request, RequestKind};
pub use show::{Showing, Shown, show};
