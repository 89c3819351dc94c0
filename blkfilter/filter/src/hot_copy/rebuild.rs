//! After a power cut or a reboot: what copies that must last need is found again by reading the spool.

use super::memory::{BUFFERS, SpoolMemory};
use super::spool::{HotCopies, HotCopy};
use crate::bitmap::BITMAP_BLOCK_BYTES;
use varve_format::{
    SPOOL_EXTENT_PAGES, SPOOL_EXTENTS_AT, SavedBlock, SavedKind, SpoolBatch, crc32c,
};
use varve_log::{Buffer, Disk, IoError, Medium, Operation, run_all_blocking};

/// At most [`BUFFERS`] batches were on their way at once, so whatever is older than twice as many was flushed before its blocks were overwritten.
const CHECKED_BATCHES: u64 = 2 * BUFFERS as u64;

/// Headers that are read at once.
const AT_ONCE: u64 = 64;
/// Extents are first used in their order, at most [`BUFFERS`] of them at once: behind so many that were never used there is nothing.
const UNUSED_MAX: u64 = 64;
/// A volume's start does not wait longer for its copies.
const TIME_MAX_NS: u64 = 30_000_000_000;

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
        let begun = medium.now().monotonic_ns;
        let extents = memory.pages() / SPOOL_EXTENT_PAGES;
        let mut unused = 0;
        let mut first = 0;
        while first < extents && unused < UNUSED_MAX {
            let pages: Vec<u64> = (first..(first + AT_ONCE).min(extents))
                .map(|extent| extent * SPOOL_EXTENT_PAGES)
                .collect();
            for (page, header) in pages.iter().zip(read_pages(medium, &pages)?) {
                let is_zero = header.read_with(|bytes| bytes.iter().all(|byte| *byte == 0));
                unused = if is_zero { unused + 1 } else { 0 };
                read_extent(medium, *page, header, spool, &mut batches)?;
            }
            if medium.now().monotonic_ns.saturating_sub(begun) > TIME_MAX_NS {
                return Err(IoError(libc::ETIMEDOUT));
            }
            first += AT_ONCE;
        }
        // Of two saved blocks of one generation the older one is found: it must be linked first.
        batches.sort_by_key(|found| found.sequence);
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

/// The batches of an extent's latest use. One that was never flushed ends them: what lies behind it in the extent was not flushed either.
fn read_extent(
    medium: &mut dyn Medium,
    first: u64,
    header: Buffer,
    spool: [u8; 16],
    batches: &mut Vec<Found>,
) -> Result<(), IoError> {
    let end = first + SPOOL_EXTENT_PAGES;
    let (mut page, mut header, mut least) = (first, header, 0);
    loop {
        let Ok(batch) = header.read_with(|bytes| SpoolBatch::parse(bytes, spool, page)) else {
            return Ok(());
        };
        let sequence = batch.sequence.get();
        if sequence < least {
            return Ok(()); // What an earlier use of the extent left behind.
        }
        least = sequence + 1;
        let next = page + 1 + batch.blocks().len() as u64;
        batches.push(Found {
            page,
            sequence,
            generation: batch.generation.get(),
            blocks: batch.blocks().to_vec(),
        });
        if next + 1 >= end {
            return Ok(());
        }
        page = next;
        header = read_page(medium, page)?;
    }
}

fn read_page(medium: &mut dyn Medium, page: u64) -> Result<Buffer, IoError> {
    read_pages(medium, &[page])?.pop().ok_or(IoError::EIO)
}

/// Reads pages, all at once.
fn read_pages(medium: &mut dyn Medium, pages: &[u64]) -> Result<Vec<Buffer>, IoError> {
    let bytes = BITMAP_BLOCK_BYTES as usize;
    let memory = Buffer::anonymous(bytes * pages.len())
        .map_err(|error| IoError(error.raw_os_error().unwrap_or(libc::ENOMEM)))?;
    let buffers: Vec<Buffer> = (0..pages.len())
        .map(|index| memory.slice(index * bytes, bytes))
        .collect();
    let operations = pages
        .iter()
        .zip(&buffers)
        .map(|(page, buffer)| Operation::Read {
            offset: SPOOL_EXTENTS_AT + page * BITMAP_BLOCK_BYTES,
            buffer: buffer.clone(),
        });
    run_all_blocking(medium, Disk::Spool, operations.collect())?;
    Ok(buffers)
}
