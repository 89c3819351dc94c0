//! A volume's history at rest: immutable segments with an index run each, and images of any instant.
//!
//!   log ring ──ingest──▶ segments/N.seg + runs/N.run ──▶ timeline (spans, gaps, points) ──▶ image at an LSN
//!
//! Order: a run is durable before its segment gets its name; a segment is durable before the log is told to recycle it.
//! Crash: a file without its final name is removed at the next open; a segment without a run gets a new one.
//! Absent on purpose, for now: compression, retention, encryption (they come behind the same interface).

mod check;
mod error;
mod image;
mod ingest;
mod timeline;
mod volume;

pub use check::Check;
pub use error::StoreError;
pub use image::{Image, ImageRange, RangeKind};
pub use ingest::{Ingested, ingest};
pub use timeline::{Closed, Event, Nearest, Timeline};
pub use volume::{StoredSegment, VolumeStore};

#[cfg(test)]
mod tests;
