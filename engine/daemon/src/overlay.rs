//! A scratch overlay: what is written to an image goes into an unlinked sparse file, sector by sector, and is gone with the export.

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

const SECTOR: u64 = 512;

/// What was written over an image.
pub struct Overlay {
    file: File,
    written: HashSet<u64>,
}

impl Overlay {
    /// An empty overlay for `bytes`; its file lives in `directory` and has no name.
    pub fn new(directory: &Path, bytes: u64) -> io::Result<Overlay> {
        std::fs::create_dir_all(directory)?;
        let path = directory.join(format!(
            "overlay-{}-{:p}",
            std::process::id(),
            &raw const bytes
        ));
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path)?;
        std::fs::remove_file(&path)?;
        file.set_len(bytes)?;
        Ok(Overlay {
            file,
            written: HashSet::new(),
        })
    }

    /// Writes over the image.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, offset)?;
        self.written
            .extend(offset / SECTOR..(offset + bytes.len() as u64) / SECTOR);
        Ok(())
    }

    /// Puts what was written over `bytes`, which hold the image from `offset`.
    pub fn cover(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        if self.written.is_empty() {
            return Ok(());
        }
        let first = offset / SECTOR;
        for (index, part) in bytes.chunks_mut(SECTOR as usize).enumerate() {
            let sector = first + index as u64;
            if self.written.contains(&sector) {
                self.file.read_exact_at(part, sector * SECTOR)?;
            }
        }
        Ok(())
    }
}
