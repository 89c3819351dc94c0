//! A scratch overlay: what is written to an image goes into an unlinked sparse file, sector by sector, and is gone with the export.
//!
//! It lies beside the store, but never takes the room that logs are drained into; where there is none, or the store cannot be written, in memory (/run): replaying
//! a file system's journal takes little, and on the worst day it has to go on.

use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::statvfs::fstatvfs;
use roaring::RoaringTreemap;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use varve_front::Errno;

const SECTOR: u64 = 512;
/// Room is asked for after so many bytes were written.
const LOOK_EVERY: u64 = 1 << 20;

/// Where an overlay may lie, and how many bytes it leaves free there.
pub struct Scratch<'a> {
    /// The directory.
    pub directory: &'a Path,
    /// It leaves so much.
    pub leaves: u64,
}

/// What was written over an image.
pub struct Overlay {
    file: File,
    written: RoaringTreemap,
    leaves: u64,
    /// Bytes until room is asked for again.
    unasked: u64,
    /// Something could not be written.
    failed: Arc<AtomicBool>,
}

impl Overlay {
    /// An empty overlay for `bytes` in the first of `places` that has room; its file has no name.
    pub fn new(places: &[Scratch<'_>], bytes: u64) -> io::Result<Overlay> {
        let mut last = io::Error::other("no place for it");
        for place in places {
            match Overlay::at(place, bytes) {
                Ok(overlay) => return Ok(overlay),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    fn at(place: &Scratch<'_>, bytes: u64) -> io::Result<Overlay> {
        varve_store::private_directory(place.directory)?;
        let path = place.directory.join(format!(
            "overlay-{}-{:p}",
            std::process::id(),
            &raw const bytes
        ));
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)?;
        std::fs::remove_file(&path)?;
        file.set_len(bytes)?;
        let overlay = Overlay {
            file,
            written: RoaringTreemap::new(),
            leaves: place.leaves,
            unasked: LOOK_EVERY,
            failed: Arc::default(),
        };
        overlay.has_room()?;
        Ok(overlay)
    }

    /// Becomes true once something could not be written.
    pub fn failed(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.failed)
    }

    fn has_room(&self) -> io::Result<()> {
        let disk = fstatvfs(&self.file)?;
        match disk.blocks_available() * disk.fragment_size() > self.leaves {
            true => Ok(()),
            false => Err(io::Error::from_raw_os_error(libc::ENOSPC)),
        }
    }

    /// Writes over the image. Whole sectors.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let written = self.try_write(offset, bytes);
        written.inspect_err(|_| self.failed.store(true, Ordering::Relaxed))
    }

    fn try_write(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let length = bytes.len() as u64;
        self.unasked = self.unasked.saturating_sub(length);
        if self.unasked == 0 {
            self.has_room()?;
            self.unasked = LOOK_EVERY;
        }
        self.file.write_all_at(bytes, offset)?;
        self.note(offset, length);
        Ok(())
    }

    /// Makes a range zero, which takes no room.
    pub fn zero(&mut self, offset: u64, length: u64) -> io::Result<()> {
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        match fallocate(&self.file, flags, offset as i64, length as i64) {
            Ok(()) => {
                self.note(offset, length);
                Ok(())
            }
            // A file system that knows no holes.
            Err(nix::errno::Errno::EOPNOTSUPP) => {
                let zeroes = vec![0u8; 1 << 20];
                let mut parts = (offset..offset + length).step_by(zeroes.len());
                parts.try_for_each(|at| {
                    let part = (offset + length - at).min(zeroes.len() as u64);
                    self.write(at, &zeroes[..part as usize])
                })
            }
            Err(errno) => {
                self.failed.store(true, Ordering::Relaxed);
                Err(errno.into())
            }
        }
    }

    fn note(&mut self, offset: u64, length: u64) {
        self.written
            .insert_range(offset / SECTOR..(offset + length) / SECTOR);
    }

    /// Reads what was written; what was not is asked of `below`, range by range: it may lack what was written over.
    pub fn read(
        &self,
        offset: u64,
        bytes: &mut [u8],
        below: impl Fn(u64, &mut [u8]) -> Result<(), Errno>,
    ) -> Result<(), Errno> {
        if self.written.is_empty() {
            return below(offset, bytes);
        }
        let (mut sector, end) = (offset / SECTOR, (offset + bytes.len() as u64) / SECTOR);
        while sector < end {
            let is_written = self.written.contains(sector);
            let alike = |next: &u64| self.written.contains(*next) == is_written;
            let next = sector + (sector..end).take_while(alike).count() as u64;
            let part = (sector * SECTOR - offset) as usize..(next * SECTOR - offset) as usize;
            match is_written {
                true => self
                    .file
                    .read_exact_at(&mut bytes[part], sector * SECTOR)
                    .map_err(|_| libc::EIO)?,
                false => below(sector * SECTOR, &mut bytes[part])?,
            }
            sector = next;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::{Overlay, Scratch};

    #[test]
    fn what_was_written_covers_the_rest_does_not() {
        let directory = tempfile::tempdir().unwrap();
        let place = |leaves| Scratch {
            directory: directory.path(),
            leaves,
        };
        let missing = directory.path().join("file");
        std::fs::write(&missing, "").unwrap();
        let nowhere = Scratch {
            directory: &missing,
            leaves: 0,
        };
        // Neither the first (no directory) nor the second (no room) will do.
        let mut overlay = Overlay::new(&[nowhere, place(u64::MAX / 2), place(0)], 1 << 40).unwrap();
        overlay.write(1024, &[1; 1024]).unwrap();
        overlay.zero(1536, 1 << 39).unwrap();
        overlay.write((1 << 40) - 512, &[2; 512]).unwrap();
        let mut bytes = [0; 4096];
        // What was written is not asked of what lies below: that may be damaged there.
        let below = |at: u64, part: &mut [u8]| match (1024..1 << 39).contains(&at) {
            true => Err(libc::EIO),
            false => {
                part.fill(9);
                Ok(())
            }
        };
        overlay.read(512, &mut bytes, below).unwrap();
        assert_eq!(bytes[..512], [9; 512]);
        assert_eq!(bytes[512..1024], [1; 512]);
        assert_eq!(bytes[1024..], [0; 3072]);
        let mut end = [0; 1024];
        overlay.read((1 << 40) - 1024, &mut end, below).unwrap();
        assert_eq!((end[0], end[1023]), (9, 2));
        overlay.leaves = u64::MAX / 2;
        let full = (0..3).find_map(|at| overlay.write(at << 20, &[3; 1 << 20]).err());
        assert_eq!(full.unwrap().raw_os_error(), Some(libc::ENOSPC));
        assert!(Overlay::new(&[place(u64::MAX / 2)], 512).is_err());
    }
}
