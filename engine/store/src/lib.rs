//! A volume's history at rest: immutable segments with a run each, maps over many of them, and images of any instant.
//!
//!   log ring ──ingest──▶ segments/N.seg + runs/N.run ──settle──▶ segments/N.seg, compressed
//!                                           └──merge──▶ maps/LEVEL-GROUP.map ──▶ image at an LSN
//!
//! Order: a segment is durable before its run, both before the log is told to recycle it; whatever replaces a file is proved before it gets the name.
//! Crash: a file without its final name is removed at the next open; a segment without a run gets a new one; a map can always be made again.
//! Encryption (`crypt`, `keys`) lies below frames: whoever reads a segment does not see it.

mod cache;
mod changed;
mod check;
mod compression;
mod crypt;
mod drill;
mod durable;
mod error;
mod image;
mod ingest;
mod kept;
mod key_list;
mod keys;
mod ladder;
mod lists;
mod map_file;
mod map_merge;
mod maps;
mod point_names;
mod prune;
mod replay;
mod retention;
mod run_file;
mod salvage;
mod scrub;
mod segment;
mod segment_file;
mod settle;
mod settled_file;
mod space;
mod structure;
mod timeline;
mod used_keys;
mod volume;

pub use changed::Changes;
pub use check::Check;
pub use compression::Compression;
pub use drill::Drill;
pub use durable::private_directory;
pub use error::StoreError;
pub use image::{Image, ImageRange, RangeKind};
pub use ingest::{Ingested, ingest};
pub use kept::KeptInstants;
pub use keys::{KeysInfo, Secret, SecretKey, StoreKeys, VolumeKeys};
pub use ladder::{Ladder, Nanoseconds, Rung, parse_span, show_span};
pub use maps::MapJob;
pub use point_names::{NamesJob, PointNames};
pub use prune::{PrunedSegment, Sweep, Swept, UnprovedSegment, Verdict, Written};
pub use retention::{Plan, Policy, RetentionJob};
pub use salvage::{Salvaged, salvage};
pub use scrub::{Damage, ScrubJob, Scrubbed};
pub use segment::StoredSegment;
pub use settle::{Proved, SettleJob, Settling};
pub use space::Thinning;
pub use timeline::{Closed, Event, Nearest, Outside, Timeline};
pub use volume::{VolumeStore, volume_directory};

#[cfg(test)]
mod tests;
