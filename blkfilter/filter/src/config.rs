//! What a volume is told at its start: sizes and bounds, each with its arithmetic, and the rules that make it safe.

use varve_format::VolumeId;

/// When a write is acknowledged (after DRBD's protocols A, B, C).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AckPolicy {
    /// When the origin has completed it.
    Async,
    /// When origin and log hold it durably.
    Local,
}

/// A volume's parameters.
#[derive(Clone, Copy, Debug)]
pub struct VolumeConfig {
    /// Its identity.
    pub volume: VolumeId,
    /// Size in bytes.
    pub volume_bytes: u64,
    /// Logical sector.
    pub sector_bytes: u32,
    /// Granularity of intents: what one open region costs to read again after a crash.
    pub region_bytes: u32,
    /// Regions open at most; `region_bytes` × this bounds the bytes that are read again after a crash.
    pub open_regions_max: usize,
    /// A checkpoint is made after so many logged bytes…
    pub stable_bytes: u64,
    /// …or after so long, if anything was written.
    pub stable_interval_ns: u64,
    /// No request waits for the log longer than this.
    pub log_wait_max_ns: u64,
    /// First pause before a bypassed log is tried again; doubles up to 30 times this.
    pub heal_interval_ns: u64,
    /// A volume in doubt waits so long for somebody to compare it with its history; 0: not at all.
    pub verify_wait_ns: u64,
    /// When writes are acknowledged.
    pub ack: AckPolicy,
    /// Size of one log segment.
    pub segment_bytes: u64,
    /// Segments in the log ring.
    pub segment_count: u64,
    /// Slots of the batch buffer (each 264 KiB).
    pub slots: usize,
    /// Requests in flight at most.
    pub depth: usize,
    /// Bytes that a span copies with one read.
    pub copy_bytes: u64,
}

impl VolumeConfig {
    /// Defaults for a volume of this size.
    #[must_use]
    pub fn new(volume: VolumeId, volume_bytes: u64, sector_bytes: u32) -> VolumeConfig {
        VolumeConfig {
            volume,
            volume_bytes,
            sector_bytes,
            region_bytes: 1 << 20,
            open_regions_max: 512, // × 1 MiB: 512 MiB are read again after a power cut at most, about a second from a fast disk.
            stable_bytes: 64 << 20,
            stable_interval_ns: 5_000_000_000,
            log_wait_max_ns: 250_000_000,
            heal_interval_ns: 1_000_000_000,
            verify_wait_ns: 10_000_000_000,
            ack: AckPolicy::Async,
            segment_bytes: 32 << 20,
            segment_count: 16, // × 32 MiB: half a GiB for the store to fall behind.
            slots: 24, // × 264 KiB = 6.2 MiB: stays below the usual 8 MiB limit for locked memory.
            depth: 128,
            copy_bytes: 256 << 10,
        }
    }
}

/// The protections. The real one is [`Law`]; a test leaves one out and sees the simulated machine catch it.
pub trait Rules {
    /// A write to a cold region starts on the origin only after the log durably holds it.
    const LOG_BEFORE_COLD_WRITE: bool = true;
    /// A checkpoint retires only what an origin flush has covered.
    const STABLE_AFTER_FLUSH: bool = true;
    /// Overlapping writes are never in flight together.
    const OVERLAP_WAITS: bool = true;
    /// A write bypasses the log only after the mark is durable.
    const MARK_BEFORE_BYPASS: bool = true;
    /// What a hot copy needs is saved before it is overwritten.
    const SAVE_BEFORE_OVERWRITE: bool = true;
    /// For a copy that must survive a power cut, saving means durably.
    const SPOOL_FLUSH_BEFORE_OVERWRITE: bool = true;
    /// That such copies are valid no more is durable before anything is overwritten that they lack.
    const MARK_BEFORE_LOSING_COPIES: bool = true;
}

/// All protections on.
pub struct Law;
impl Rules for Law {}
