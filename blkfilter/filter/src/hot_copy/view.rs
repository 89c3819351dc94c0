//! A copy as its reader sees it: for each block, where its bytes are.

use super::memory::{CopyMemory, Saved, SpoolMemory};
use crate::bitmap::{BITMAP_BLOCK_BYTES, Bitmap};

/// Where a block's bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// On the origin, if [`View::is_origins`] still says so once they were read.
    Origin,
    /// In the spool, or on the way to it.
    Spool(Saved),
    /// Written to the copy itself.
    Overlay,
    /// The origin could not read it when it was about to be overwritten.
    Unreadable,
}

/// The view.
pub struct View {
    spool: SpoolMemory,
    copy: CopyMemory,
    changed: Bitmap,
    overlaid: Bitmap,
    generation: u32,
}

impl View {
    /// A view through mappings of its own.
    #[must_use]
    pub fn new(spool: SpoolMemory, copy: CopyMemory) -> View {
        View {
            generation: copy.generation(),
            changed: copy.changed(),
            overlaid: copy.overlaid(),
            spool,
            copy,
        }
    }

    /// Whether the copy is valid. To be asked after everything else was read.
    #[must_use]
    pub fn is_valid(&self) -> bool {
        self.copy.lost().is_none()
    }

    /// Where a block's bytes are now.
    #[must_use]
    pub fn source(&self, block: u64) -> Source {
        if self.overlaid.contains(block) {
            return Source::Overlay;
        }
        if !self.changed.contains(block) {
            return Source::Origin;
        }
        match self.spool.find(block, self.generation) {
            Some(saved) if saved.unreadable => Source::Unreadable,
            Some(saved) => Source::Spool(saved),
            // The bit says that it was saved. Not to know where is damage, and nobody must take the origin's bytes for the copy's.
            None => Source::Unreadable,
        }
    }

    /// Whether the origin still held the block's bytes at the time of this call: what was read from it before is right.
    #[must_use]
    pub fn is_origins(&self, block: u64) -> bool {
        !self.changed.contains(block) && self.is_valid()
    }

    /// Copies a page that is on its way to the spool.
    #[must_use]
    pub fn read_buffered(&self, saved: Saved, target: &mut [u8]) -> bool {
        self.spool.read_buffered(saved.page, target)
    }

    /// From here on the block's bytes are the overlay's.
    pub fn overlay(&mut self, block: u64) {
        self.overlaid.set(block * BITMAP_BLOCK_BYTES, 1);
    }
}
