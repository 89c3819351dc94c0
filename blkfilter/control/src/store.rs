//! What the store's daemon is asked, and what it answers.

use crate::{ControlError, PolicyChange};
use serde::{Deserialize, Serialize};

/// An instant as somebody names it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Instant {
    /// Every record below this LSN.
    Lsn(u64),
    /// Every record up to this wall time, in nanoseconds since the epoch.
    Time(i64),
    /// A recovery point's name.
    Point(String),
    /// All there is.
    Now,
}

/// A question to `varved`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "kebab-case")]
pub enum StoreOp {
    /// Are you there?
    Ping,
    /// Span, gaps and points of a volume.
    History {
        /// Name.
        volume: String,
    },
    /// Which LSN is it?
    Resolve {
        /// Name.
        volume: String,
        /// Instant.
        instant: Instant,
    },
    /// Show an image as a block device.
    Export {
        /// Name.
        volume: String,
        /// Instant.
        instant: Instant,
        /// Writable through a scratch overlay (else read-only).
        writable: bool,
        /// Serve NBD on this Unix socket instead of a block device.
        nbd: Option<String>,
        /// Over NBD: also say what was written since then, as a dirty bitmap.
        since: Option<Instant>,
        /// It ends with the connection on which it was asked for.
        held: bool,
    },
    /// The instant in the middle of two, by records.
    Middle {
        /// Name.
        volume: String,
        /// LSN of an instant.
        after: u64,
        /// LSN of a later one.
        before: u64,
    },
    /// End an export.
    Unexport {
        /// What `Export` answered.
        device: String,
    },
    /// What is exported?
    Exports,
    /// Which ranges differ between two instants?
    Diff {
        /// Name.
        volume: String,
        /// The older.
        from: Instant,
        /// The newer.
        to: Instant,
    },
    /// Compare the origin with the image at the end of history.
    Compare {
        /// Name.
        volume: String,
    },
    /// Write an image back over the origin.
    Rewind {
        /// Name.
        volume: String,
        /// Instant.
        instant: Instant,
        /// Only say what would be written.
        dry_run: bool,
    },
    /// Read all of a volume's history again.
    Scrub {
        /// Name.
        volume: String,
        /// Not faster than this.
        bytes_per_second: Option<u64>,
        /// How.
        #[serde(default)]
        how: Scrubbing,
    },
    /// Take all that a volume's log holds, as far as it can be taken; an error says what is not in the history then.
    TakeAll {
        /// Name.
        volume: String,
    },
    /// Give up the instants that lists named which are lost.
    GiveUpKept {
        /// Name.
        volume: String,
    },
    /// What is shown for this connection only stays when that ends.
    KeepShown {
        /// The image's device, or socket.
        device: String,
    },
    /// Whether something that was read of an image could not be read, or what was written to it had no room: then what it shows says nothing of the past.
    ImageTrouble {
        /// The image's device, or socket.
        device: String,
    },
    /// Look at the structure of a volume's history.
    Check {
        /// Name.
        volume: String,
    },
    /// Copy all that can be read of the store into a new one.
    Salvage {
        /// An empty directory.
        to: String,
    },
    /// Note what a drill found.
    Drilled {
        /// Name.
        volume: String,
        /// It.
        drill: DrillInfo,
    },
    /// What is kept of a volume's history, or would be.
    Policy {
        /// Name.
        volume: String,
        /// What is otherwise than in the store's.
        change: PolicyChange,
        /// Also say how many bytes go: all records below the limit are looked at.
        bytes: bool,
    },
    /// Keep an instant whatever the policy says, or no more.
    Pin {
        /// Name.
        volume: String,
        /// Instant.
        instant: Instant,
        /// Or unpinned.
        pinned: bool,
    },
    /// The keys of an encrypted store. Secrets and files of keys are attached, in this order: what opens it, what is to open it, a file.
    Keys {
        /// What is to be done.
        ask: KeysAsk,
        /// Bytes of the first secret that is attached.
        secret_bytes: usize,
        /// It is the content of a key file, not a passphrase.
        is_key_file: bool,
    },
    /// Forget a volume's history.
    Forget {
        /// Volume ID.
        id: String,
    },
    /// Exit.
    Shutdown,
}

/// How history is read again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Scrubbing {
    /// Everything is unpacked and proved.
    #[default]
    Everything,
    /// What is stored is compared with its checksums.
    Stored,
    /// As everything, and all indexes are made anew.
    ForIndexes,
}

/// What is asked of a store's keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KeysAsk {
    /// Is it encrypted, and open?
    Status,
    /// Encrypt what is settled from now on, and what is settled already. Attached: the secret.
    Init,
    /// Open it. Attached: the secret.
    Unlock,
    /// Another secret opens it from now on. Attached: the new one.
    Rotate,
    /// A file with all keys. Attached: the secret that opens the file.
    Export,
    /// That file is written, durably.
    Exported,
    /// Take keys out of such a file. Attached: the secret that opens the file, then the file.
    Import,
}

/// What is known of a store's keys.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct KeysStatus {
    /// The store is encrypted.
    pub encrypted: bool,
    /// It is open: history can be read.
    pub open: bool,
    /// `passphrase` or `key file`.
    pub kind: String,
    /// Keys of volumes.
    pub keys: usize,
    /// Of those, the ones that were never exported.
    pub not_exported: usize,
    /// Segments that are not encrypted (yet), and those that are; by volumes that are open.
    pub plain_and_encrypted: (u64, u64),
    /// Keys that an import brought.
    pub imported: usize,
}

/// A recovery point.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PointInfo {
    /// Name.
    pub name: String,
    /// LSN.
    pub lsn: u64,
    /// Wall time, ns.
    pub time_ns: i64,
    /// Its file systems are clean: they were frozen, or not mounted.
    pub file_system_consistent: bool,
    /// Applications had been told.
    pub application_consistent: bool,
    /// It was made by itself.
    pub automatic: bool,
}

/// What the store knows of a volume.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct VolumeHistory {
    /// First LSN that resolves.
    pub first_lsn: u64,
    /// Its wall time, ns.
    pub first_ns: i64,
    /// Last LSN that resolves.
    pub last_lsn: u64,
    /// Its wall time, ns.
    pub last_ns: i64,
    /// Records.
    pub records: u64,
    /// Bytes in the store.
    pub stored_bytes: u64,
    /// Bytes of payload.
    pub payload_bytes: u64,
    /// Of the bytes in the store, those that are still to be compressed.
    pub unsettled_bytes: u64,
    /// Intervals in which no instant resolves: (from LSN, to LSN, from ns, to ns, why).
    pub closed: Vec<(u64, u64, i64, i64, String)>,
    /// Intervals without single writes: (from ns, to ns).
    pub gaps: Vec<(i64, i64)>,
    /// Recovery points.
    pub points: Vec<PointInfo>,
    /// Below this LSN only the instants that are kept resolve; 0: nothing was pruned.
    pub pruned_below_lsn: u64,
    /// Its wall time, ns.
    pub pruned_below_ns: i64,
    /// The instants that are kept below it, and what is pinned.
    pub kept: Vec<KeptInfo>,
    /// Why what is newer is not in the store, if it could not be taken, or was not recorded.
    pub behind: Option<ControlError>,
    /// The store is encrypted and waits for its key: nothing can be read, and nothing is compressed.
    pub locked: bool,
    /// The space of all histories together.
    pub space: SpaceInfo,
    /// Keys of this volume that were never exported.
    pub keys_not_exported: usize,
    /// The last comparison of device and history.
    pub last_check: Option<CheckInfo>,
    /// The last drill.
    pub last_drill: Option<DrillInfo>,
    /// The last drill that proved its instant.
    pub last_proven: Option<DrillInfo>,
}

/// An instant that retention keeps.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct KeptInfo {
    /// LSN.
    pub lsn: u64,
    /// Wall time, ns.
    pub time_ns: i64,
    /// Whatever the policy says.
    pub pinned: bool,
}

/// What a policy keeps of a history.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct PolicyInfo {
    /// The ladder, in words.
    pub keep: String,
    /// What is younger than this is never pruned, in words; empty: there is no such window.
    pub immutable: String,
    /// The store's clock, ns.
    pub now_ns: i64,
    /// Below this LSN not every instant is kept; 0: all of them are.
    pub below_lsn: u64,
    /// Its wall time, ns.
    pub below_ns: i64,
    /// Instants below it that each rung keeps: (rung, number).
    pub rungs: Vec<(String, u64)>,
    /// Recovery points that are kept besides.
    pub points: u64,
    /// How often one is made, in words; empty: on no schedule.
    pub points_every: String,
    /// Those on the schedule are made with file systems frozen.
    pub points_freeze: bool,
    /// Instants that are pinned.
    pub pinned: u64,
    /// Instants below the limit now, without what the policy would change: LSN and time of the first.
    pub first: Option<(u64, i64)>,
    /// Payload that would go and stay below the limit, in bytes, if asked for.
    pub gone_and_kept_bytes: Option<(u64, u64)>,
    /// Bytes in the store now.
    pub stored_bytes: u64,
    /// Bytes that were added a day, lately.
    pub bytes_per_day: u64,
    /// The space of all histories together.
    pub space: SpaceInfo,
}

/// The space that all histories together take.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct SpaceInfo {
    /// What the policy says; empty: as much as there is.
    pub policy: String,
    /// The same in bytes; 0: no limit.
    pub limit_bytes: u64,
    /// Bytes in the store.
    pub stored_bytes: u64,
    /// Of these, bytes that are still to be compressed.
    pub unsettled_bytes: u64,
    /// Bytes that are free on its disk.
    pub free_bytes: u64,
    /// Bytes that were added a day, lately.
    pub bytes_per_day: u64,
    /// For how long the oldest history has been recorded, ns.
    pub history_ns: i64,
    /// It is too much, and nothing may go now.
    pub stuck: bool,
    /// The volume whose history holds that up, because a part of it is not known; empty: none.
    pub held_up_by: String,
}

impl SpaceInfo {
    /// Bytes that are too much. What waits to be compressed will become less: of that a tenth of the limit is let pass for now.
    #[must_use]
    pub fn excess_bytes(&self) -> u64 {
        if self.limit_bytes == 0 {
            return 0;
        }
        let passing = self.unsettled_bytes.min(self.limit_bytes / 10);
        self.stored_bytes
            .saturating_sub(self.limit_bytes.saturating_add(passing))
    }

    /// Whether the disk is full before the limit is reached: then nothing more is recorded, whereas at the limit the oldest instants go.
    #[must_use]
    pub fn ends_with_disk(&self) -> bool {
        self.limit_bytes == 0
            || self.limit_bytes.saturating_sub(self.stored_bytes) > self.free_bytes
    }

    /// Bytes that still fit until one or the other.
    #[must_use]
    pub fn room_bytes(&self) -> u64 {
        match self.ends_with_disk() {
            true => self.free_bytes,
            false => self.limit_bytes.saturating_sub(self.stored_bytes),
        }
    }
}

/// What a comparison of device and history found.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct CheckInfo {
    /// When, ns.
    pub time_ns: i64,
    /// At which LSN.
    pub lsn: u64,
    /// Bytes that differed.
    pub differing_bytes: u64,
}

/// What a drill found.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DrillInfo {
    /// When it was held, ns.
    pub held_ns: i64,
    /// The instant that was looked at.
    pub lsn: u64,
    /// Its time, ns.
    pub time_ns: i64,
    /// Everything in it was found good.
    pub proven: bool,
    /// What was looked at and found, in one line.
    pub found: String,
}

/// Something in a store that is not what it was.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DamageInfo {
    /// In words.
    pub what: String,
    /// The segment, if it is one.
    pub segment: Option<u64>,
    /// Bytes of the volume that cannot be read: (offset, length). Empty: nothing that was recorded is lost, unless it is `unplaced`.
    pub blocks: Vec<(u64, u64)>,
    /// First instant that lacks them: LSN and time, ns.
    pub from: Option<(u64, i64)>,
    /// First instant that has them again; none if the newest lacks them, too.
    pub until: Option<(u64, i64)>,
    /// Whether something is lost by it is said in `what`, or with other damage.
    pub unplaced: bool,
}

/// An answer.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "kebab-case")]
pub enum StoreReply {
    /// Done.
    Done,
    /// Span, gaps, points.
    History {
        /// They.
        history: Box<VolumeHistory>,
    },
    /// An instant.
    Resolved {
        /// Its LSN.
        lsn: u64,
        /// Wall time of the last record below it, ns.
        time_ns: i64,
    },
    /// There is no instant between two.
    Nothing,
    /// An image is shown.
    Shown {
        /// The block device or socket.
        device: String,
        /// Its LSN.
        lsn: u64,
        /// Its time, ns.
        time_ns: i64,
    },
    /// What an image could not do.
    ImageTrouble {
        /// Blocks that were asked for are lacking.
        lacks_blocks: bool,
        /// Something was written to it, and there was no room for it.
        no_room: bool,
    },
    /// What is shown: (device, what).
    Exports {
        /// They.
        exports: Vec<(String, String)>,
    },
    /// Ranges: (offset, length).
    Ranges {
        /// They.
        ranges: Vec<(u64, u64)>,
        /// Their bytes.
        bytes: u64,
    },
    /// A scrub or a check has ended.
    Scrubbed {
        /// Segments that were looked at.
        segments: u64,
        /// Bytes of files that were read.
        bytes: u64,
        /// Bytes of history in them.
        history_bytes: u64,
        /// Where it began: an earlier one was broken off there.
        from_segment: u64,
        /// What is wrong.
        damage: Vec<DamageInfo>,
    },
    /// A store's keys.
    Keys {
        /// They.
        keys: KeysStatus,
        /// An exported file, in hex.
        file: String,
    },
    /// A store was salvaged.
    Salvaged {
        /// Files that were copied.
        files: u64,
        /// Their bytes.
        bytes: u64,
        /// What could not be read: file, first byte, bytes; no bytes: nothing of the file could.
        unreadable: Vec<(String, u64, u64)>,
        /// What the new store lacks by that.
        damage: Vec<DamageInfo>,
    },
    /// What a policy keeps.
    Policy {
        /// It.
        policy: Box<PolicyInfo>,
    },
    /// A rewind was done (or computed).
    Rewound {
        /// The instant.
        lsn: u64,
        /// Its time, ns.
        time_ns: i64,
        /// Bytes that differed.
        written_bytes: u64,
        /// Rewind to this LSN to undo it; 0 for a dry run.
        undo_lsn: u64,
    },
}
