//! A writer that stamps blocks and knows what it wrote, what was flushed, and what a power cut may have taken: an oracle of its own.

use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;

/// Bytes of a block.
const BLOCK: usize = 4096;
/// Marks in a journal, in the place of a block number.
const FLUSHED: u64 = u64::MAX;
const BEGUN: u64 = u64::MAX - 1;

/// Stamps blocks one after another.
pub struct Stamper {
    file: File,
    blocks: u64,
    /// What each block must hold.
    pub model: Vec<u64>,
    next: u64,
    journal: Option<File>,
}

impl Stamper {
    /// Writes stamps to `path`, which holds `blocks` blocks of 4 KiB.
    pub fn new(path: &str, blocks: u64) -> Result<Stamper, String> {
        use std::os::unix::fs::OpenOptionsExt;
        const O_DIRECT: i32 = 0o40000;
        let file = File::options()
            .write(true)
            .custom_flags(O_DIRECT)
            .open(path)
            .map_err(|e| format!("{path}: {e}"))?;
        Ok(Stamper {
            file,
            blocks,
            model: vec![0; blocks as usize],
            next: 1,
            journal: None,
        })
    }

    /// The same, with stamps from `first` on: a stranger's.
    pub fn from(path: &str, blocks: u64, first: u64) -> Result<Stamper, String> {
        let mut stamper = Stamper::new(path, blocks)?;
        stamper.next = first;
        Ok(stamper)
    }

    /// The same, with a journal that outlives the machine: what was written before it was, what was flushed after it was. Goes on where an earlier
    /// one ended.
    pub fn with_journal(path: &str, blocks: u64, journal: &Path) -> Result<Stamper, String> {
        let mut stamper = Stamper::new(path, blocks)?;
        let before = std::fs::read(journal).unwrap_or_default();
        let stamps = before
            .chunks_exact(16)
            .map(|entry| u64::from_le_bytes(entry[8..].try_into().unwrap()));
        stamper.next = stamps.max().unwrap_or(0) + 1;
        let file = File::options().create(true).append(true).open(journal);
        stamper.journal = Some(file.map_err(|e| e.to_string())?);
        stamper.note(BEGUN, 0)?;
        Ok(stamper)
    }

    fn note(&mut self, block: u64, stamp: u64) -> Result<(), String> {
        let Some(journal) = self.journal.as_mut() else {
            return Ok(());
        };
        let mut entry = [0u8; 16];
        entry[..8].copy_from_slice(&block.to_le_bytes());
        entry[8..].copy_from_slice(&stamp.to_le_bytes());
        journal.write_all(&entry).map_err(|e| e.to_string())
    }

    /// The block that a stamp goes to.
    #[must_use]
    pub fn place(stamp: u64, blocks: u64) -> u64 {
        stamp.wrapping_mul(0x9e37_79b9_7f4a_7c15) % blocks
    }

    /// Writes one stamp somewhere; flushes if asked.
    pub fn write(&mut self, flush: bool) -> Result<(), String> {
        let stamp = self.next;
        self.next += 1;
        let block = Stamper::place(stamp, self.blocks);
        self.note(block, stamp)?;
        let mut space = vec![0u8; 2 * BLOCK];
        let skip = space.as_ptr().align_offset(BLOCK);
        for part in space[skip..skip + BLOCK].chunks_exact_mut(8) {
            part.copy_from_slice(&stamp.to_le_bytes());
        }
        std::os::unix::fs::FileExt::write_all_at(
            &self.file,
            &space[skip..skip + BLOCK],
            block * BLOCK as u64,
        )
        .map_err(|e| e.to_string())?;
        if flush {
            self.file.sync_data().map_err(|e| e.to_string())?;
            self.note(FLUSHED, 0)?;
        }
        self.model[block as usize] = stamp;
        Ok(())
    }
}

/// Reads the stamps of an image or device; every block must be whole.
pub fn read_stamps(path: &str, blocks: u64) -> Result<Vec<u64>, String> {
    let sectors = read_sector_stamps(path, blocks)?;
    sectors
        .iter()
        .enumerate()
        .map(|(block, stamps)| {
            let torn = stamps.iter().any(|stamp| *stamp != stamps[0]);
            (!torn)
                .then_some(stamps[0])
                .ok_or(format!("block {block} is torn"))
        })
        .collect()
}

/// Reads the stamps of each sector of 512 bytes: what a power cut leaves may be torn between sectors, never within one.
pub fn read_sector_stamps(path: &str, blocks: u64) -> Result<Vec<[u64; 8]>, String> {
    let mut file = File::open(path).map_err(|e| format!("{path}: {e}"))?;
    let mut block = vec![0u8; BLOCK];
    (0..blocks)
        .map(|index| {
            file.read_exact(&mut block).map_err(|e| e.to_string())?;
            let mut stamps = [0; 8];
            for (stamp, sector) in stamps.iter_mut().zip(block.chunks_exact(512)) {
                *stamp = u64::from_le_bytes(sector[..8].try_into().map_err(|_| "short")?);
                if sector.chunks_exact(8).any(|part| part != &sector[..8]) {
                    return Err(format!("a sector of block {index} is torn"));
                }
            }
            Ok(stamps)
        })
        .collect()
}

/// What each block may hold, by the journal of a [`Stamper`] that power cuts interrupted.
///
/// # Errors
/// If the journal cannot be read.
pub fn possible_stamps(journal: &Path, blocks: u64) -> Result<Vec<Vec<u64>>, String> {
    let bytes = std::fs::read(journal).map_err(|e| e.to_string())?;
    let mut possible = vec![vec![0u64]; blocks as usize];
    let mut pending: Vec<(usize, u64)> = Vec::new();
    for entry in bytes.chunks_exact(16) {
        let word = |at: usize| u64::from_le_bytes(entry[at..at + 8].try_into().unwrap());
        match word(0) {
            FLUSHED => {
                for (block, stamp) in pending.drain(..) {
                    possible[block] = vec![stamp];
                }
            }
            BEGUN => {
                for (block, stamp) in pending.drain(..) {
                    possible[block].push(stamp);
                }
            }
            block => pending.push((block as usize, word(8))),
        }
    }
    for (block, stamp) in pending {
        possible[block].push(stamp);
    }
    Ok(possible)
}
