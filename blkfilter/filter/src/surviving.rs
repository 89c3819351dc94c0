//! Memory that outlives the process: batch buffer and bitmap, behind a page that says whose they are.
//!
//! Believed only when boot, device, volume and epoch are the same: another boot means that a power cut may have lost what the origin's
//! cache held; another epoch means that somebody else wrote meanwhile. Otherwise it is set aside and reported.

use crate::bitmap::Bitmap;
use crate::config::VolumeConfig;
use std::rc::Rc;
use varve_format::{EpochId, Hash128, VolumeId};
use varve_log::{Memory, SLOT_BYTES};

const PAGE: usize = 4096;
const MAGIC: u64 = u64::from_le_bytes(*b"VSURV001");
const WORD_MAGIC: usize = 0;
const WORD_EPOCH: usize = 8;
const WORD_IDENTITY: usize = 24;

/// What must be the same for surviving memory to be believed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SurvivingIdentity {
    /// The kernel's boot ID.
    pub boot: String,
    /// The origin: device number, or file and inode.
    pub device: String,
    /// The volume.
    pub volume: VolumeId,
}

impl SurvivingIdentity {
    /// The identity in 16 bytes.
    #[must_use]
    pub fn hash(&self) -> [u8; 16] {
        Hash128::of(format!("{}\n{}\n{}", self.boot, self.device, self.volume).as_bytes()).0
    }
}

/// The memory of one volume.
#[derive(Clone)]
pub struct SurvivingMemory {
    memory: Rc<Memory>,
    identity: [u8; 16],
}

impl SurvivingMemory {
    /// Bytes that a volume needs.
    #[must_use]
    pub fn bytes_needed(config: &VolumeConfig) -> usize {
        (PAGE + config.slots * SLOT_BYTES + Bitmap::memory_bytes(config.volume_bytes))
            .next_multiple_of(PAGE)
    }

    /// Wraps a mapping of at least [`SurvivingMemory::bytes_needed`].
    #[must_use]
    pub fn new(memory: Rc<Memory>, identity: &SurvivingIdentity) -> SurvivingMemory {
        SurvivingMemory {
            memory,
            identity: identity.hash(),
        }
    }

    /// The mapping.
    #[must_use]
    pub fn memory(&self) -> &Rc<Memory> {
        &self.memory
    }

    pub(crate) fn slots_base() -> usize {
        PAGE
    }

    pub(crate) fn bitmap_base(config: &VolumeConfig) -> usize {
        PAGE + config.slots * SLOT_BYTES
    }

    fn words(bytes: [u8; 16]) -> [u64; 2] {
        let mut halves = [[0u8; 8]; 2];
        halves[0].copy_from_slice(&bytes[..8]);
        halves[1].copy_from_slice(&bytes[8..]);
        halves.map(u64::from_le_bytes)
    }

    /// The epoch that a dead process of this boot left here, if it is this volume's.
    #[must_use]
    pub fn epoch(&self) -> Option<EpochId> {
        let pair = |at| [self.memory.load(at), self.memory.load(at + 8)];
        if self.memory.load(WORD_MAGIC) != MAGIC
            || pair(WORD_IDENTITY) != Self::words(self.identity)
        {
            return None;
        }
        let mut epoch = [0u8; 16];
        epoch[..8].copy_from_slice(&self.memory.load(WORD_EPOCH).to_le_bytes());
        epoch[8..].copy_from_slice(&self.memory.load(WORD_EPOCH + 8).to_le_bytes());
        Some(EpochId(epoch))
    }

    /// From here on the memory speaks for `epoch`.
    pub(crate) fn claim(&self, epoch: EpochId) {
        self.memory.store(WORD_MAGIC, 0);
        for (at, bytes) in [(WORD_EPOCH, epoch.0), (WORD_IDENTITY, self.identity)] {
            let words = Self::words(bytes);
            self.memory.store(at, words[0]);
            self.memory.store(at + 8, words[1]);
        }
        self.memory.store(WORD_MAGIC, MAGIC);
    }

    /// The memory speaks for nobody (after a clean close).
    pub(crate) fn disclaim(&self) {
        self.memory.store(WORD_MAGIC, 0);
    }
}
