//! What a disk with a volatile cache holds after a power cut: the log of a dm-log-writes device, replayed.
//!
//! The kernel's log lists a write only once a flush (or FUA) after it has made it lasting; so all of it, applied to what the disk held before, is
//! the disk with every unflushed write lost. Layout (little endian, in sectors of `sector_bytes`): a super block {magic, version, entries,
//! sector_bytes: u32}, then entries {sector, sectors, flags, mark length}, each in a sector of its own and followed by its data (discards: none).

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

const MAGIC: u64 = 0x006a_7366_7773_6872;
const DISCARD: u64 = 4;
const MARK: u64 = 8;
/// Unit in which a disk keeps or loses what it was not told to keep.
const SECTOR: usize = 512;

/// What came of it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Lost {
    /// Entries that were replayed.
    pub entries: u64,
    /// Sectors whose newest content the cut took.
    pub sectors_lost: u64,
    /// Sectors that had not been flushed and are kept all the same.
    pub sectors_kept: u64,
}

/// Turns `disk` into what it holds after the cut. `base`: what it held when logging began. `keep`: whether an unflushed sector (by number) happens
/// to survive. A disk that `lies` loses the later half of what it had flushed, too.
pub fn lose_unflushed(
    disk: &Path,
    base: &Path,
    log: &Path,
    mut keep: impl FnMut(u64) -> bool,
    lies: bool,
) -> std::io::Result<Lost> {
    let log = File::open(log)?;
    let mut head = [0u8; 28];
    log.read_exact_at(&mut head, 0)?;
    let word = |bytes: &[u8], index: usize| {
        u64::from_le_bytes(bytes[index * 8..index * 8 + 8].try_into().unwrap())
    };
    assert_eq!(word(&head, 0), MAGIC, "not a log of dm-log-writes");
    let sector_bytes = u64::from(u32::from_le_bytes(head[24..28].try_into().unwrap()));
    let entries = word(&head, 2) / if lies { 2 } else { 1 };
    let safe = File::options().read(true).write(true).open(base)?;
    let mut at = sector_bytes;
    for _ in 0..entries {
        let mut entry = [0u8; 32];
        log.read_exact_at(&mut entry, at)?;
        at += sector_bytes;
        let (offset, length) = (
            word(&entry, 0) * sector_bytes,
            word(&entry, 1) * sector_bytes,
        );
        if word(&entry, 2) & MARK != 0 || length == 0 {
            continue;
        }
        let mut data = vec![0u8; length as usize];
        if word(&entry, 2) & DISCARD == 0 {
            log.read_exact_at(&mut data, at)?;
            at += length;
        }
        safe.write_all_at(&data, offset)?;
    }
    let mut lost = Lost {
        entries,
        ..Lost::default()
    };
    let disk = File::options().read(true).write(true).open(disk)?;
    let bytes = disk.metadata()?.len();
    let (mut now, mut then) = (vec![0u8; 1 << 20], vec![0u8; 1 << 20]);
    for start in (0..bytes).step_by(1 << 20) {
        let length = ((bytes - start) as usize).min(1 << 20);
        disk.read_exact_at(&mut now[..length], start)?;
        safe.read_exact_at(&mut then[..length], start)?;
        if now[..length] == then[..length] {
            continue;
        }
        for sector in (0..length).step_by(SECTOR) {
            let range = sector..sector + SECTOR;
            if now[range.clone()] == then[range.clone()] {
                continue;
            }
            let offset = start + sector as u64;
            if keep(offset / SECTOR as u64) {
                lost.sectors_kept += 1;
            } else {
                lost.sectors_lost += 1;
                disk.write_all_at(&then[range], offset)?;
            }
        }
    }
    Ok(lost)
}
