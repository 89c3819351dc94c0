//! Hot copies: a volume as it was at a cut, kept by copy-on-write while the volume goes on.
//!
//!   write ──▶ saved already? ──yes──▶ admission (LSN, log, origin)
//!                   │no
//!                   └▶ origin's old block ──read──▶ batch buffer ──▶ index, bit ──▶ admission
//!                                                        └── 63 blocks, one sequential write ──▶ spool
//!
//! A cut is a place in the order of admission, not a drain: what was admitted before it belongs to the copy, though it may still be on its way to the
//! origin. A saved block is stored once, with the generation of the newest copy; it serves that one and every older copy that has none of its own.
//!
//! Crash scenarios:
//! * The process dies (the machine lives on): index, bits and batch buffers are in memory that outlives it. A block whose read had not come back was
//!   not saved, and the write that wanted it was not admitted: it comes again. A batch that was on its way to the spool is written again, to the same
//!   place; the claim on the spool says that no old write can still land there.
//! * Power cut, copies that need not last: memory and spool are forgotten.
//! * Power cut, a copy that must last (`persist`): a write is admitted only when the spool durably holds what it overwrites (batch written, then
//!   flushed). So the origin differs from the copy only in blocks that the spool has. A batch whose flush had not come back may be torn: nothing was
//!   overwritten for it; the last batches are read and checked before they are believed ([`HotCopies::rebuild`]).
//! * A copy is given up (no room, a spool that fails or is late) and the next write overwrites what was not saved; power cut: the spool would still
//!   look like a copy. Hence that a copy that must last is no more is made durable elsewhere before such a write goes on ([`HotCopies::mark_wanted`]);
//!   whoever cannot say it within `copy_wait_max` is not waited for: the volume does not stall.
//! * The cut of a lasting copy is made, and power is lost before the record of it is durable: nobody was told that there is a copy. What was saved
//!   in its name serves the older ones; the next copy gets a generation above all that the spool knows.
//! * The origin's cache loses a write that the copy shows: hence a lasting copy is announced only after a flush of the origin.

mod device;
mod memory;
mod rebuild;
mod save;
mod spool;
mod view;

pub use device::{CopyDevice, CopyFiles};
pub use memory::{CopyMemory, Lost, SpoolMemory};
pub(crate) use save::Saving;
pub use spool::{HotCopies, HotCopy};
pub use view::{Source, View};
