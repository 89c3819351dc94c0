//! The state file: two 4 KiB slots on another device than the log, written in turn. The newer valid one counts.
//!
//! It says whether the log may be believed at the next start. While a volume is protected it reads `LogSpeaks(epoch)`; before
//! any write bypasses the log it is made to read `Bypass`, durably. So a log that comes back after production went on
//! without it is recognised, however whole it looks.

use crate::segment::check_head;
use crate::{
    BLOCK_BYTES, EpochId, FormatError, Lsn, SegmentSequence, VERSION, VolumeId, WallTime, crc32c,
};
use zerocopy::little_endian::{I64, U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Size of one slot.
pub const STATE_SLOT_BYTES: usize = BLOCK_BYTES as usize;
/// Slots in the file.
pub const STATE_SLOTS: usize = 2;

const MAGIC: [u8; 4] = *b"VSTA";

/// What the next start may believe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum StateKind {
    /// The log of this epoch holds everything that recovery needs.
    LogSpeaks = 1,
    /// Writes went past the log: what changed is unknown unless memory survived.
    Bypass = 2,
    /// The origin's content is not known to match the history.
    Unverified = 3,
    /// Closed cleanly; the fingerprint says what the origin looked like.
    Clean = 4,
}

/// What an origin looked like at a clean close. Any difference at the next start means it was written without Varve.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fingerprint {
    /// Size in bytes.
    pub volume_bytes: u64,
    /// BLAKE3 (128 bits) of label areas, superblocks and sampled blocks.
    pub content: [u8; 16],
    /// Writes that the kernel has counted on the device since boot.
    pub kernel_writes: u64,
    /// Hash of the boot ID under which `kernel_writes` was read; another boot makes it meaningless.
    pub boot: [u8; 16],
}

/// One slot.
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
pub struct StateSlot {
    /// CRC-32C of everything after itself.
    pub crc: U32,
    /// `VSTA`.
    pub magic: [u8; 4],
    /// Format version.
    pub version: U16,
    /// [`StateKind`].
    pub kind: u8,
    /// Zero.
    pub reserved: u8,
    /// Features that a reader must know.
    pub incompat: U32,
    /// The volume.
    pub volume: [u8; 16],
    /// The epoch that the state speaks of.
    pub epoch: [u8; 16],
    /// The greater of two valid slots counts.
    pub generation: U64,
    /// When it was written; for a bypass: when the gap began.
    pub wall_time: I64,
    /// Fingerprint: size.
    pub volume_bytes: U64,
    /// Fingerprint: kernel write counter.
    pub kernel_writes: U64,
    /// Fingerprint: content hash.
    pub content: [u8; 16],
    /// Fingerprint: boot.
    pub boot: [u8; 16],
    /// LSN at which the epoch began: if the log is lost, numbering goes on far above it.
    pub lsn_start: U64,
    /// Sequence of the epoch's first segment, for the same reason.
    pub sequence: U64,
    /// Zero.
    pub reserved_2: [u8; 3968],
}
const _: () = assert!(size_of::<StateSlot>() == STATE_SLOT_BYTES);

impl StateSlot {
    /// A slot's block with its checksum.
    #[must_use]
    pub fn encode(
        kind: StateKind,
        volume: VolumeId,
        epoch: EpochId,
        generation: u64,
        wall_time: WallTime,
        start: (Lsn, SegmentSequence),
        fingerprint: Fingerprint,
    ) -> [u8; STATE_SLOT_BYTES] {
        let mut slot: StateSlot = zerocopy::FromZeros::new_zeroed();
        slot.magic = MAGIC;
        slot.version = U16::new(VERSION);
        slot.kind = kind as u8;
        slot.volume = volume.0;
        slot.epoch = epoch.0;
        slot.generation = U64::new(generation);
        slot.wall_time = I64::new(wall_time.0);
        slot.lsn_start = U64::new(start.0.0);
        slot.sequence = U64::new(start.1.0);
        slot.volume_bytes = U64::new(fingerprint.volume_bytes);
        slot.kernel_writes = U64::new(fingerprint.kernel_writes);
        slot.content = fingerprint.content;
        slot.boot = fingerprint.boot;
        slot.crc = U32::new(crc32c(&slot.as_bytes()[4..]));
        let mut block = [0u8; STATE_SLOT_BYTES];
        block.copy_from_slice(slot.as_bytes());
        block
    }

    /// Checks and copies a slot out of its block.
    pub fn parse(block: &[u8]) -> Result<StateSlot, FormatError> {
        let (slot, _) = StateSlot::read_from_prefix(block).map_err(|_| FormatError::Truncated {
            needed: STATE_SLOT_BYTES as u64,
            found: block.len() as u64,
        })?;
        check_head(
            slot.magic == MAGIC,
            slot.crc.get(),
            slot.as_bytes(),
            slot.version.get(),
            slot.incompat.get(),
        )?;
        slot.kind()?;
        Ok(slot)
    }

    /// What it says.
    pub fn kind(&self) -> Result<StateKind, FormatError> {
        [
            StateKind::LogSpeaks,
            StateKind::Bypass,
            StateKind::Unverified,
            StateKind::Clean,
        ]
        .into_iter()
        .find(|kind| *kind as u8 == self.kind)
        .ok_or(FormatError::Field("state.kind"))
    }

    /// The fingerprint taken at a clean close.
    #[must_use]
    pub fn fingerprint(&self) -> Fingerprint {
        Fingerprint {
            volume_bytes: self.volume_bytes.get(),
            content: self.content,
            kernel_writes: self.kernel_writes.get(),
            boot: self.boot,
        }
    }
}
