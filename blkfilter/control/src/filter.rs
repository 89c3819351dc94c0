//! What the data path's daemon is asked, and what it answers.

use crate::{CopyInfo, NewCopy, VolumeSpec};
use serde::{Deserialize, Serialize};

/// A question to `blkfilter`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "kebab-case")]
pub enum FilterOp {
    /// Are you there?
    Ping,
    /// How are all volumes?
    Status,
    /// Protect a device from now on. The log ring and the state file are made.
    Protect {
        /// The volume.
        spec: VolumeSpec,
    },
    /// Make everything ready for a device that is in use: protection begins at the next boot.
    Prepare {
        /// The volume.
        spec: VolumeSpec,
    },
    /// Stop protecting: the device is closed cleanly and is a plain disk again.
    Unprotect {
        /// Name of the volume.
        name: String,
    },
    /// The device was grown or shrunk: follow it.
    Resize {
        /// Name of the volume.
        name: String,
    },
    /// Append a recovery point.
    Mark {
        /// Name of the volume.
        name: String,
        /// Name of the point.
        label: String,
        /// With the file systems frozen for that moment.
        freeze: bool,
        /// Applications were told, and are ready.
        application: bool,
        /// Nobody asked for this one.
        automatic: bool,
    },
    /// Seal the open segment, so that the store can take it.
    Seal {
        /// Name of the volume.
        name: String,
    },
    /// The store has every segment below this one.
    Release {
        /// Name of the volume.
        name: String,
        /// Sequence.
        below: u64,
    },
    /// The history has a hole, or is not there: compare the device with it, and copy what differs.
    Doubt {
        /// Name of the volume.
        name: String,
    },
    /// The history ends behind the log, which was put back to an older state: give up what the log holds, go on behind the history, compare the device.
    GoOnAbove {
        /// Name of the volume.
        name: String,
        /// The history's last segment.
        sequence: u64,
        /// Its end.
        lsn: u64,
        /// The time of that, ns.
        since_ns: i64,
    },
    /// A comparison of an unverified volume with its history has come this far.
    Verified {
        /// Name of the volume.
        name: String,
        /// The number that was asked for.
        number: u64,
        /// Everything below is compared; 2^64-1 ends it.
        below: u64,
        /// Ranges (offset, length) that are equal, since the last time.
        equal: Vec<(u64, u64)>,
    },
    /// Take the mapped device away and open a rewind span (or go on with one).
    RewindBegin {
        /// Name of the volume.
        name: String,
        /// The instant that is written back.
        target: u64,
    },
    /// Write attached bytes in a rewind.
    RewindWrite {
        /// Name of the volume.
        name: String,
        /// First byte.
        offset: u64,
    },
    /// The rewind has written everything: end the span, show the device again.
    RewindEnd {
        /// Name of the volume.
        name: String,
    },
    /// Make hot copies, all of one instant.
    CopyCreate {
        /// They, of different volumes.
        copies: Vec<NewCopy>,
        /// They survive a power cut.
        persist: bool,
        /// They can be written to.
        writable: bool,
        /// File systems are frozen for the cut, where they can be.
        freeze: bool,
    },
    /// End a hot copy.
    CopyRemove {
        /// Its name.
        name: String,
    },
    /// All hot copies.
    Copies,
    /// What was overwritten on the device since a hot copy was cut.
    CopyChanged {
        /// Its name.
        name: String,
    },
    /// Close all volumes cleanly and exit.
    Shutdown,
}

/// A volume as its daemon sees it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct VolumeInfo {
    /// Name.
    pub name: String,
    /// ID.
    pub id: String,
    /// The origin.
    pub device: String,
    /// The mapped device; empty while it is not offered.
    pub mapped: String,
    /// How it is shown.
    pub front: String,
    /// Size.
    pub bytes: u64,
    /// synchronising, protected, bypass, healing, unverified, rewinding, failed; waiting (for the next boot).
    pub state: String,
    /// In words, what happened at the last start, or why it failed.
    pub note: String,
    /// LSN of the next record.
    pub next_lsn: u64,
    /// Below it everything is durable in the log.
    pub durable_lsn: u64,
    /// Open segment.
    pub sequence: u64,
    /// Segments that the store has not taken.
    pub segments_held: u64,
    /// Segments in the ring.
    pub segment_count: u64,
    /// Wall time of the last record, ns.
    pub last_record_ns: i64,
    /// Bytes still to copy.
    pub marked_bytes: u64,
    /// Bytes that would be read again after a power cut.
    pub open_bytes: u64,
    /// Bytes that were read again at the last start.
    pub reread_bytes: u64,
    /// Bypassed since (ns), 0 if not.
    pub bypass_since_ns: i64,
    /// Why.
    pub bypass_reason: String,
    /// The bypass left no durable mark.
    pub bypass_unmarked: bool,
    /// A rewind was interrupted; its target.
    pub rewind_target: Option<u64>,
    /// Counters since start.
    pub writes: u64,
    /// Bytes of them.
    pub write_bytes: u64,
    /// Reads.
    pub reads: u64,
    /// Flushes.
    pub flushes: u64,
    /// Writes that waited for the log first.
    pub cold_writes: u64,
    /// Times in bypass.
    pub bypasses: u64,
    /// Bytes that went past the log.
    pub bypassed_bytes: u64,
    /// Bytes copied by spans.
    pub copied_bytes: u64,
    /// Bytes that a comparison found equal to the history.
    pub verified_bytes: u64,
    /// Number of the comparison with the history that is wanted; 0: none.
    pub verify_wanted: u64,
    /// Errors of the origin.
    pub origin_errors: u64,
    /// Bytes written to the log.
    pub log_bytes: u64,
    /// Whether surviving memory is locked in RAM.
    pub memory_locked: bool,
    /// Hot copies.
    pub copies: u64,
    /// Those of them that are valid no more.
    pub copies_lost: u64,
}

/// Where a sealed range ends.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct SealedInfo {
    /// Everything below this segment is sealed.
    pub below: u64,
    /// LSN after the last sealed record.
    pub lsn_end: u64,
}

/// An answer.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "kebab-case")]
pub enum FilterReply {
    /// Done.
    Done,
    /// All volumes.
    Status {
        /// They.
        volumes: Vec<VolumeInfo>,
        /// Version of the daemon.
        version: String,
    },
    /// One volume.
    Volume {
        /// It.
        volume: Box<VolumeInfo>,
    },
    /// A recovery point is there, durably.
    Marked {
        /// Every record before the point is below it.
        lsn: u64,
        /// Its file systems are clean.
        clean: bool,
        /// For how long they were frozen, in microseconds.
        frozen_us: Option<u64>,
        /// What came in between, in words.
        note: String,
    },
    /// Whether a comparison should go on.
    Wanted {
        /// It should.
        wanted: bool,
    },
    /// Hot copies.
    Copies {
        /// They.
        copies: Vec<CopyInfo>,
    },
    /// Ranges of a device: (offset, length).
    Ranges {
        /// They, in order.
        ranges: Vec<(u64, u64)>,
    },
    /// What is sealed.
    Sealed {
        /// It.
        sealed: SealedInfo,
    },
}
