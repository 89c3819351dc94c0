//! Varve's bytes on disk: what a record, a batch, a segment (sealed, settled), a run, a map, a list of kept instants, a state file and a spool look like.
//!
//!   records ──▶ batch (4 KiB header + payload) ──▶ segment (header, batches…) ──▶ sealed file (… + footer) + run ──▶ settled file; maps
//!
//! Everything here is a plain little-endian struct with its checksum first. Reading is total: any byte string gives
//! either a checked value or a named [`FormatError`]; nothing panics and no length is trusted before it is bounded.
//! Absent on purpose: I/O, clocks, policy, `unsafe`.

mod batch;
mod checkpoint;
mod checksum;
mod error;
mod ids;
mod kept;
mod keys;
pub mod layout;
mod map;
mod record;
mod run;
mod segment;
mod settled;
mod spool;
mod state;

pub use batch::{
    BATCH_HEADER_BYTES, BATCH_PAYLOAD_BYTES_MAX, BATCH_RECORDS_MAX, BatchHeader, BatchPosition,
    BatchView,
};
pub use checkpoint::{CHECKPOINT_BYTES_MAX, Checkpoint, OPEN_REGIONS_MAX, VolumeState};
pub use checksum::{Hash128, crc32c, payload_crc};
pub use error::FormatError;
pub use ids::{EpochId, Lsn, SegmentSequence, VolumeId, WallTime};
pub use kept::{KEPT_ENTRY_BYTES, KEPT_IS_PINNED, KeptEntry, KeptHeader, encode_kept, parse_kept};
pub use keys::{
    KEYS_FILE_BYTES_MAX, KEYS_HEADER_BYTES, KeysHeader, SEALED_KEY_BYTES, SealedKey, SecretKind,
    encode_keys, parse_keys,
};
pub use map::{
    MAP_EXTENT_BYTES, MAP_FAN, MAP_GRANULE_BYTES, MAP_PAGE_BYTES, MAP_PAGE_EXTENTS, MAP_UNIT_BYTES,
    MapExtent, MapHeader, MapPageHead, encode_map_page, map_tag, parse_map_page,
};
pub use record::{
    PointDetail, RECORD_BYTES, RECORD_PAYLOAD_BYTES_MAX, Record, RecordFlags, RecordKind, SpanKind,
};
pub use run::{RUN_ENTRY_BYTES, RunEntry, RunHeader};
pub use segment::{SEGMENT_FOOTER_BYTES, SEGMENT_HEADER_BYTES, SegmentFooter, SegmentHeader};
pub use settled::{
    BLOCK_IS_GONE, BLOCK_IS_ZERO, Codec, FRAME_BLOCKS, FRAME_BLOCKS_MAX, FRAME_ENTRY_BYTES,
    FRAME_TAG_BYTES, FrameEntry, SETTLED_BYTES_MAX, SETTLED_IS_ENCRYPTED, SETTLED_IS_PRUNED,
    SettledHeader, frame_crc, parse_settled_tables,
};
pub use spool::{
    SPOOL_BATCH_BLOCKS, SPOOL_EXTENT_PAGES, SPOOL_EXTENTS_AT, SPOOL_GENERATIONS, SavedBlock,
    SavedKind, SpoolBatch, SpoolHead,
};
pub use state::{Fingerprint, STATE_SLOT_BYTES, STATE_SLOTS, StateKind, StateSlot};

/// The unit of every offset in a log or store file: 4 KiB, the largest logical sector that Varve accepts.
pub const BLOCK_BYTES: u64 = 4096;

/// The format version that this code writes.
///
/// 1: first version.
pub const VERSION: u16 = 1;

#[cfg(test)]
mod tests;
