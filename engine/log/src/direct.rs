//! Reading a file or device past the page cache.
//!
//! The log is written by another process with direct, asynchronous I/O. On a block device the kernel drops cached pages before such a write, not
//! after it: pages that were read (ahead) in between stay, and are stale for good. Whoever reads a log must not go through the cache.

use crate::{Buffer, ReadAt};
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

const WINDOW_BYTES: u64 = 1 << 20;
const BLOCK_BYTES: u64 = 4096;

/// A file that is read directly, a window of 1 MiB at a time.
pub struct DirectFile {
    file: File,
    bytes: u64,
    window: Buffer,
    /// What the window holds: start and end; nothing if equal.
    start: u64,
    end: u64,
}

/// Opens for direct reads; where the file system has none (tmpfs), for ordinary ones: those have no cache beside the file itself.
pub fn open_for_reading(path: &Path) -> io::Result<File> {
    let open = |flags| File::options().read(true).custom_flags(flags).open(path);
    match open(libc::O_DIRECT) {
        Err(failed) if failed.raw_os_error() == Some(libc::EINVAL) => open(0),
        result => result,
    }
}

impl DirectFile {
    /// Opens `path`.
    pub fn open(path: &Path) -> io::Result<DirectFile> {
        let file = open_for_reading(path)?;
        let bytes = io::Seek::seek(&mut &file, io::SeekFrom::End(0))?;
        Ok(DirectFile {
            file,
            bytes,
            window: Buffer::anonymous(WINDOW_BYTES as usize)?,
            start: 0,
            end: 0,
        })
    }

    fn fill(&mut self, offset: u64) -> io::Result<()> {
        let start = offset / BLOCK_BYTES * BLOCK_BYTES;
        let end = (start + WINDOW_BYTES).min(self.bytes);
        if offset >= end {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        (self.start, self.end) = (0, 0);
        let mut done = 0;
        // The last block of a file may be short; a read that ends before it goes on at a block's start.
        while start + done < end {
            let part = self
                .window
                .slice(done as usize, (WINDOW_BYTES - done) as usize);
            let read = part.write_with(|bytes| self.file.read_at(bytes, start + done))? as u64;
            if read == 0 {
                break;
            }
            done = if start + done + read >= end {
                end - start
            } else {
                (done + read) / BLOCK_BYTES * BLOCK_BYTES
            };
        }
        (self.start, self.end) = (start, start + done);
        if offset >= self.end {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(())
    }
}

impl ReadAt for DirectFile {
    fn read_at(&mut self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        let mut done = 0;
        while done < bytes.len() {
            let at = offset + done as u64;
            if at < self.start || at >= self.end {
                self.fill(at)?;
            }
            let length = ((self.end - at) as usize).min(bytes.len() - done);
            let source = self.window.slice((at - self.start) as usize, length);
            source.read_with(|found| bytes[done..done + length].copy_from_slice(found));
            done += length;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::DirectFile;
    use crate::ReadAt;

    #[test]
    fn reads_what_is_there_and_nothing_behind_the_end() {
        let directory = std::env::temp_dir().join(format!("varve-direct-{}", std::process::id()));
        let content: Vec<u8> = (0..2_500_123u32).map(|n| (n * 7 / 5) as u8).collect();
        std::fs::write(&directory, &content).unwrap();
        let mut file = DirectFile::open(&directory).unwrap();
        for (offset, length) in [
            (0, 10),
            (4095, 2),
            (1_048_570, 20),
            (3, 2_000_000),
            (2_500_100, 23),
        ] {
            let mut found = vec![0; length];
            file.read_at(offset as u64, &mut found).unwrap();
            assert!(
                found == content[offset..offset + length],
                "{length} bytes at {offset}"
            );
        }
        assert!(file.read_at(2_500_120, &mut [0; 4]).is_err());
        std::fs::remove_file(&directory).unwrap();
    }
}
