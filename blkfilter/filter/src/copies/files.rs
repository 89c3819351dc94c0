//! The files behind hot copies: spool, spool's memory, copies' memory. Opened by the daemon, brought to life on the volume's thread.

use crate::hot_copy::{CopyMemory, HotCopies, HotCopy, Lost, SpoolMemory};
use crate::{Law, Volume, origin};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use varve_control::{CopySet, Paths};
use varve_format::{SPOOL_EXTENT_PAGES, SPOOL_EXTENTS_AT, SpoolHead, VolumeId};
use varve_log::{Disk, Medium, Memory, Port, UringMedium};

const PAGE: u64 = 4096;
/// Bytes of one extent.
pub(crate) const EXTENT_BYTES: u64 = SPOOL_EXTENT_PAGES * PAGE;

/// A copy's memory, opened.
pub struct CopyMemoryFile {
    /// The file.
    pub file: File,
    /// The copy's generation.
    pub generation: u32,
    /// It must survive a power cut.
    pub persist: bool,
    /// Size of the volume.
    pub volume_bytes: u64,
    /// Boot, device and volume.
    pub identity: [u8; 16],
}

impl CopyMemoryFile {
    fn map(&self) -> io::Result<CopyMemory> {
        let memory = Memory::of_file(&self.file, CopyMemory::bytes_needed(self.volume_bytes))?;
        Ok(CopyMemory::new(memory, self.volume_bytes))
    }

    /// A copy of which nothing is known yet.
    pub(crate) fn fresh(&self) -> io::Result<HotCopy> {
        let memory = self.map()?;
        memory.format(self.identity, self.generation);
        memory.changed().clear_all();
        memory.overlaid().clear_all();
        Ok(HotCopy::new(memory, self.persist))
    }

    /// The copy as a process of this boot left it.
    fn survived(&self) -> io::Result<Option<HotCopy>> {
        let memory = self.map()?;
        let known = memory.is(self.identity, self.generation);
        Ok(known.then(|| HotCopy::new(memory, self.persist)))
    }
}

/// A volume's spool and copies, opened.
pub struct SpoolFiles {
    /// The spool, claimed.
    pub spool: File,
    /// Its memory.
    pub memory: File,
    /// Its name.
    pub id: [u8; 16],
    /// Its extents.
    pub extents: u64,
    /// Boot, device and volume.
    pub identity: [u8; 16],
    /// The copies whose record says that they are valid.
    pub copies: Vec<CopyMemoryFile>,
}

impl SpoolFiles {
    fn map(&self) -> io::Result<SpoolMemory> {
        let memory = Memory::of_file(&self.memory, SpoolMemory::bytes_needed(self.extents))?;
        Ok(SpoolMemory::new(memory, self.extents))
    }

    /// A new spool for a volume at work.
    pub(crate) fn attach_empty<P: Port>(
        self,
        volume: &mut Volume<Law>,
        medium: &mut UringMedium<P>,
    ) -> io::Result<()> {
        let memory = self.map()?;
        memory.format(self.identity, self.id);
        memory.complete();
        volume.attach_copies(HotCopies::new(memory, self.id, Vec::new()));
        medium.set(Disk::Spool, Some(self.spool));
        Ok(())
    }

    /// At a volume's start: goes on with what a dead process left in memory, or with what the spool holds of copies that had to last. Gives which
    /// copies did not outlive a reboot, and the highest generation that was ever used. Blocks.
    pub(crate) fn attach<P: Port>(
        self,
        volume: &mut Volume<Law>,
        medium: &mut UringMedium<P>,
        origin_in_doubt: bool,
    ) -> (Vec<u32>, u32) {
        let files: Vec<CopyMemory> = self
            .copies
            .iter()
            .filter_map(|file| file.map().ok())
            .collect();
        let all: Vec<u32> = self.copies.iter().map(|copy| copy.generation).collect();
        self.try_attach(volume, medium, origin_in_doubt)
            .unwrap_or_else(|error| {
                // Trouble with them never keeps the volume from starting; those that are shown must not go on as if nothing were.
                eprintln!("blkfilter: its hot copies are lost: {error}");
                files.iter().for_each(|copy| copy.lose(Lost::Failed));
                (all, 0)
            })
    }

    fn try_attach<P: Port>(
        self,
        volume: &mut Volume<Law>,
        medium: &mut UringMedium<P>,
        origin_in_doubt: bool,
    ) -> io::Result<(Vec<u32>, u32)> {
        let memory = self.map()?;
        medium.set(Disk::Spool, Some(self.spool.try_clone()?));
        let mut gone = Vec::new();
        let mut newest = self.copies.iter().map(|copy| copy.generation).max();
        let mut hot = if memory.is(self.identity, self.id) {
            newest = newest.max(Some(memory.relink()));
            let mut copies = Vec::new();
            for file in &self.copies {
                match file.survived()? {
                    Some(copy) => copies.push(copy),
                    None => gone.push(file.generation),
                }
            }
            HotCopies::new(memory, self.id, copies)
        } else {
            memory.format(self.identity, self.id);
            let mut copies = Vec::new();
            for file in &self.copies {
                if file.persist {
                    copies.push(file.fresh()?);
                } else {
                    gone.push(file.generation);
                }
            }
            match HotCopies::rebuild(medium, memory.clone(), self.id, copies) {
                Ok((hot, generation)) => {
                    newest = newest.max(Some(generation));
                    memory.complete();
                    hot
                }
                Err(error) => {
                    eprintln!("blkfilter: the spool of the hot copies cannot be read: {error}");
                    gone = self.copies.iter().map(|copy| copy.generation).collect();
                    memory.format(self.identity, self.id);
                    memory.complete();
                    HotCopies::new(memory, self.id, Vec::new())
                }
            }
        };
        if origin_in_doubt {
            hot.lose_all(Lost::Doubt, medium.now().monotonic_ns);
        }
        volume.attach_copies(hot);
        Ok((gone, newest.unwrap_or(0)))
    }
}

/// The spool's memory.
pub(crate) fn spool_memory_path(paths: &Paths, volume_id: &str) -> PathBuf {
    paths.run().join(format!("{volume_id}.spool"))
}

/// A copy's memory.
pub(crate) fn copy_memory_path(paths: &Paths, volume_id: &str, generation: u32) -> PathBuf {
    paths.run().join(format!("{volume_id}.copy-{generation}"))
}

/// What is written to a copy.
pub(crate) fn overlay_path(paths: &Paths, volume_id: &str, generation: u32) -> PathBuf {
    paths
        .spools()
        .join(format!("{volume_id}.overlay-{generation}"))
}

/// Where a daemon leaves the number of a copy's ublk device.
pub(crate) fn copy_record(paths: &Paths, name: &str) -> PathBuf {
    paths.run().join(format!("{name}.copy-ublk"))
}

/// Opens and claims a spool: its writes in flight end with a dead daemon's claim.
pub(crate) fn claim_spool(path: &Path, wait: bool) -> io::Result<File> {
    origin::claim_origin(path, wait)
}

/// Makes a spool: a preallocated file, or a device that holds nothing. Durable when it returns.
pub(crate) fn make_spool(set: &CopySet, volume: VolumeId, id: [u8; 16]) -> io::Result<File> {
    let bytes = SPOOL_EXTENTS_AT + set.extents * EXTENT_BYTES;
    let is_device =
        std::fs::metadata(&set.spool).is_ok_and(|metadata| metadata.file_type().is_block_device());
    if is_device {
        origin::refuse_data(&set.spool)?;
    } else {
        if let Some(parent) = set.spool.parent() {
            std::fs::create_dir_all(parent)?;
        }
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&set.spool)?;
        let flags = nix::fcntl::FallocateFlags::empty();
        let made = nix::fcntl::fallocate(&file, flags, 0, bytes as i64).map_err(io::Error::from);
        made.and_then(|()| file.sync_all()).inspect_err(|_| {
            let _ = std::fs::remove_file(&set.spool);
        })?;
    }
    let head = SpoolHead::new(id, volume, set.volume_bytes, set.extents);
    let mut page = vec![0u8; PAGE as usize];
    head.write_to(&mut page);
    // Through the page cache: whoever reads it directly comes after the flush.
    let file = OpenOptions::new().write(true).open(&set.spool)?;
    file.write_all_at(&page, 0)?;
    file.sync_all()?;
    drop(file);
    claim_spool(&set.spool, false)
}

/// Opens the spool of a set for a volume that starts.
pub(crate) fn open_spool(set: &CopySet, volume: VolumeId, id: [u8; 16]) -> io::Result<File> {
    let spool = claim_spool(&set.spool, true)?;
    let mut page = vec![0u8; PAGE as usize];
    File::open(&set.spool)?.read_exact_at(&mut page, 0)?;
    let head = SpoolHead::parse(&page).map_err(io::Error::other)?;
    if head.spool != id || head.volume != volume.0 || head.extents.get() != set.extents {
        return Err(io::Error::other("it is another spool than the record says"));
    }
    Ok(spool)
}
