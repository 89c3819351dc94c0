//! The write log: appends records to a ring of segments and finds them again after a crash.
//!
//!   filter ──records──▶ [ batch buffer ] ──one write per batch──▶ [ open segment ] ──seal──▶ [ sealed ] ──▶ store
//!
//! Order: a record is durable before [`LogWriter::durable_lsn`] passes it. A segment is drained and flushed before the next
//! one's header is written, so that recovery needs the newest valid segment only.
//! Crash: any suffix of the open segment after its last flush may be lost; a sealed segment, never.
//! All I/O, time and randomness come in through [`Medium`]: the kernel's, or a simulated machine that crashes on demand.
//! Absent on purpose: retention, lookup by block (the store), when to flush and what to wait for (the filter).

mod buffer;
mod direct;
mod medium;
mod memory;
mod scan;
mod segment_reader;
mod sim;
mod uring;
mod writer;

pub use buffer::{BatchBuffer, Chunk, SLOT_BYTES, SurvivingRecord};
pub use direct::{DirectFile, open_for_reading};
pub use medium::{
    BLOCKING_TOKENS, Completion, Disk, IoError, Medium, Now, Operation, run_all_blocking,
    run_blocking,
};
pub use memory::{Buffer, Memory};
pub use scan::{RingSegment, ScanResult, Tail, note_record, read_headers, scan};
pub use segment_reader::{ReadAt, SegmentError, SegmentReader, SegmentRecord};
pub use sim::{CrashPlan, DiskFault, SimDisk, SimMachine, SimMedium};
pub use uring::{OwnRing, Port, TARGET_BIT, UringMedium};
pub use writer::{LogGeometry, LogWriter, SegmentOpening, WriterStatus};

#[cfg(test)]
mod tests;
