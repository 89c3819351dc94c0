//! After a power cut or a reboot: what copies that must last need is found again by reading the spool.

use super::memory::{BUFFERS, SpoolMemory};
use super::spool::{HotCopies, HotCopy};
use crate::bitmap::BITMAP_BLOCK_BYTES;
use varve_format::{
    SPOOL_EXTENT_PAGES, SPOOL_EXTENTS_AT, SavedBlock, SavedKind, SpoolBatch, crc32c,
};
use varve_log::{Buffer, Disk, IoError, Medium, Operation, run_blocking};

/// At most [`BUFFERS`] batches were on their way at once, so whatever is older than twice as many was flushed before its blocks were overwritten.
const CHECKED_BATCHES: u64 = 2 * BUFFERS as u64;

struct Found {
    page: u64,
    sequence: u64,
    generation: u32,
    blocks: Vec<SavedBlock>,
}

impl HotCopies {
    /// Reads a spool into empty memory. `copies` are those whose record says that they are valid. Gives also the highest generation that the spool
    /// knows. Blocks.
    pub fn rebuild(
        medium: &mut dyn Medium,
        memory: SpoolMemory,
        spool: [u8; 16],
        copies: Vec<HotCopy>,
    ) -> Result<(HotCopies, u32), IoError> {
        let oldest = copies.iter().map(|copy| copy.generation).min().unwrap_or(0);
        let mut batches = Vec::new();
        for extent in 0..memory.pages() / SPOOL_EXTENT_PAGES {
            read_extent(medium, extent, spool, &mut batches)?;
        }
        let newest = batches.iter().map(|found| found.sequence).max();
        let newest_generation = batches.iter().map(|found| found.generation).max();
        let checked_from = newest.unwrap_or(0).saturating_sub(CHECKED_BATCHES);
        memory.raise_sequence(newest.map_or(0, |newest| newest + 1));
        let mut copies = copies;
        for found in batches.iter().filter(|found| found.generation >= oldest) {
            for (index, saved) in found.blocks.iter().enumerate() {
                let page = found.page + 1 + index as u64;
                let (block, crc) = (saved.block.get(), saved.crc.get());
                let kind = saved.kind();
                if kind == SavedKind::Void {
                    continue;
                }
                if found.sequence >= checked_from
                    && kind == SavedKind::Saved
                    && read_page(medium, page)?.read_with(crc32c) != crc
                {
                    continue; // Never flushed: nothing was overwritten for it.
                }
                memory.insert(page, block, found.generation, kind, crc);
                for copy in &mut copies {
                    if copy.generation <= found.generation {
                        copy.changed.set(block * BITMAP_BLOCK_BYTES, 1);
                    }
                }
            }
        }
        Ok((
            HotCopies::new(memory, spool, copies),
            newest_generation.unwrap_or(0),
        ))
    }
}

/// The batches of an extent's latest use.
fn read_extent(
    medium: &mut dyn Medium,
    extent: u64,
    spool: [u8; 16],
    batches: &mut Vec<Found>,
) -> Result<(), IoError> {
    let end = (extent + 1) * SPOOL_EXTENT_PAGES;
    let mut page = extent * SPOOL_EXTENT_PAGES;
    let mut least = 0;
    while page + 1 < end {
        let header = read_page(medium, page)?;
        let Ok(batch) = header.read_with(|bytes| SpoolBatch::parse(bytes, spool, page)) else {
            break;
        };
        let sequence = batch.sequence.get();
        if sequence < least {
            break; // What an earlier use of the extent left behind.
        }
        least = sequence + 1;
        let next = page + 1 + batch.blocks().len() as u64;
        batches.push(Found {
            page,
            sequence,
            generation: batch.generation.get(),
            blocks: batch.blocks().to_vec(),
        });
        page = next;
    }
    Ok(())
}

fn read_page(medium: &mut dyn Medium, page: u64) -> Result<Buffer, IoError> {
    let buffer = Buffer::anonymous(BITMAP_BLOCK_BYTES as usize)
        .map_err(|error| IoError(error.raw_os_error().unwrap_or(libc::ENOMEM)))?;
    let operation = Operation::Read {
        offset: SPOOL_EXTENTS_AT + page * BITMAP_BLOCK_BYTES,
        buffer: buffer.clone(),
    };
    run_blocking(medium, Disk::Spool, operation)?;
    Ok(buffer)
}
