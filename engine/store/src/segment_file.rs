//! A segment's file, sealed or settled, read by the addresses of the sealed one.

use crate::cache::Cache;
use crate::crypt::FileCipher;
use crate::settled_file::WINDOW_FRAMES_BYTES;
use crate::{StoreError, StoredSegment, VolumeKeys, compression};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use varve_format::{
    BLOCK_BYTES, BLOCK_IS_GONE, BLOCK_IS_ZERO, Codec, EpochId, FRAME_BLOCKS_MAX, FormatError,
    FrameEntry, SEGMENT_FOOTER_BYTES, SegmentFooter, SegmentSequence, SettledHeader, frame_crc,
    parse_settled_tables,
};
use varve_log::ReadAt;

/// Frames that were decompressed, by open file and number.
pub(crate) type FrameCache = Cache<(u64, u64), Arc<Vec<u8>>>;

/// A cache for frames of so many bytes together.
pub(crate) fn frame_cache(bytes: usize) -> FrameCache {
    Cache::weighed(bytes, |frame| frame.len())
}

/// Stored bytes that are read at a time to be checked; more than any frame has.
const CHECKED_BYTES: usize = 1 << 20;
const _: () = assert!(CHECKED_BYTES as u64 > (FRAME_BLOCKS_MAX as u64 + 1) * BLOCK_BYTES);

/// What lies between two frames and is read with them rather than with two system calls.
const NEAR_BYTES: u64 = 8 << 10;
/// Frames that are read together, and unpacked by one processor: at most 256 KiB of them, and what lies between.
const TOGETHER_FRAMES: usize = 16;

struct Settled {
    header: SettledHeader,
    frames: Vec<FrameEntry>,
    blocks: Vec<u32>,
    /// Of an encrypted one whose key is there.
    cipher: Option<FileCipher>,
}

fn next_number() -> u64 {
    static OPENED: AtomicU64 = AtomicU64::new(0);
    OPENED.fetch_add(1, Ordering::Relaxed)
}

/// The header of a settled file, by its first block; none if there is none that is whole.
fn settled_header(path: &Path) -> io::Result<Option<SettledHeader>> {
    let file = File::open(path)?;
    let bytes = file.metadata()?.len();
    if bytes < BLOCK_BYTES {
        return Ok(None);
    }
    let mut block = vec![0u8; BLOCK_BYTES as usize];
    file.read_exact_at(&mut block, 0)?;
    Ok(SettledHeader::parse(&block, bytes).ok())
}

/// Whether a file is settled and not encrypted. What cannot be told is no.
pub(crate) fn is_plain(path: &Path) -> bool {
    let header = settled_header(path).ok().flatten();
    header.is_some_and(|header| !header.is_encrypted())
}

/// The key that a file is encrypted with, if it is.
pub(crate) fn key_of(path: &Path) -> io::Result<Option<[u8; 16]>> {
    let header = settled_header(path)?.filter(SettledHeader::is_encrypted);
    Ok(header.map(|header| header.key))
}

/// An open segment file. It stays readable when the file gets another one's place.
pub(crate) struct SegmentFile {
    /// No two that were ever open have the same: a segment's file may get another one's place, with other frames.
    number: u64,
    file: File,
    path: PathBuf,
    footer: SegmentFooter,
    keys: Arc<VolumeKeys>,
    settled: Option<Settled>,
}

impl SegmentFile {
    /// Opens a segment's file and checks that it is the one that the store knows.
    pub(crate) fn open(segment: &StoredSegment) -> Result<SegmentFile, StoreError> {
        let path = segment.path();
        let opened = SegmentFile::open_path(&path, &segment.keys)?;
        let footer = &opened.footer;
        let same = footer.root == segment.root
            && footer.epoch == segment.epoch.0
            && footer.sequence.get() == segment.sequence.0
            && footer.data_bytes.get() == segment.data_bytes;
        if !same || footer.volume != segment.volume.0 {
            return Err(StoreError::Damaged(path, FormatError::Foreign("segment")));
        }
        Ok(opened)
    }

    /// Opens a file by its own words.
    pub(crate) fn open_path(
        path: &Path,
        keys: &Arc<VolumeKeys>,
    ) -> Result<SegmentFile, StoreError> {
        let file = File::open(path).map_err(StoreError::io(path))?;
        SegmentFile::of(file, path, keys)
    }

    /// The same of an open file.
    pub(crate) fn of(
        file: File,
        path: &Path,
        keys: &Arc<VolumeKeys>,
    ) -> Result<SegmentFile, StoreError> {
        let damaged = |error| StoreError::Damaged(path.to_path_buf(), error);
        let length = file.metadata().map_err(StoreError::io(path))?.len();
        let truncated = |needed| FormatError::Truncated {
            needed,
            found: length,
        };
        if length < BLOCK_BYTES + SEGMENT_FOOTER_BYTES as u64 {
            return Err(damaged(truncated(
                BLOCK_BYTES + SEGMENT_FOOTER_BYTES as u64,
            )));
        }
        let mut block = vec![0u8; SEGMENT_FOOTER_BYTES];
        let footer_at = length - SEGMENT_FOOTER_BYTES as u64;
        file.read_exact_at(&mut block, footer_at)
            .map_err(StoreError::io(path))?;
        let footer = SegmentFooter::parse(&block).map_err(damaged)?;
        file.read_exact_at(&mut block, 0)
            .map_err(StoreError::io(path))?;
        if !SettledHeader::is_settled(&block) {
            if footer.data_bytes.get() != footer_at {
                let needed = footer
                    .data_bytes
                    .get()
                    .saturating_add(SEGMENT_FOOTER_BYTES as u64);
                return Err(damaged(truncated(needed)));
            }
            return Ok(SegmentFile {
                number: next_number(),
                file,
                path: path.to_path_buf(),
                footer,
                keys: Arc::clone(keys),
                settled: None,
            });
        }
        let header = SettledHeader::parse(&block, length).map_err(damaged)?;
        if header.volume != footer.volume
            || header.sequence != footer.sequence
            || header.data_bytes != footer.data_bytes
        {
            return Err(damaged(FormatError::Foreign("segment")));
        }
        // The header's sizes were checked against the file's.
        let mut tables = vec![0u8; header.tables_stored_bytes() as usize];
        file.read_exact_at(&mut tables, header.tables_at.get())
            .map_err(StoreError::io(path))?;
        if header.is_pruned() {
            let whole = header.tables_whole_bytes() as usize;
            tables = compression::unpack(Codec::Zstd as u8, &tables, whole)
                .ok_or_else(|| damaged(FormatError::Field("settled.tables")))?;
        }
        let (frames, blocks) = parse_settled_tables(&header, &tables).map_err(damaged)?;
        let cipher = keys.of_file(header.key, &header.salt, &footer);
        if let Some(cipher) = cipher.as_ref().filter(|_| header.is_encrypted()) {
            let mut run = vec![0u8; header.run_place().map_or(0, |place| place.1 as usize)];
            if let Some((at, _)) = header.run_place() {
                file.read_exact_at(&mut run, at)
                    .map_err(StoreError::io(path))?;
            }
            let tag = cipher.tag(&header.tagged(&tables, &run));
            if tag.map_err(StoreError::io(path))? != header.tables_tag {
                return Err(damaged(FormatError::Checksum));
            }
        }
        let settled = Settled {
            cipher,
            frames: frames.to_vec(),
            blocks: blocks.iter().map(|block| block.get()).collect(),
            header,
        };
        Ok(SegmentFile {
            number: next_number(),
            file,
            path: path.to_path_buf(),
            footer,
            keys: Arc::clone(keys),
            settled: Some(settled),
        })
    }

    /// Whether it is in frames.
    pub(crate) fn is_settled(&self) -> bool {
        self.settled.is_some()
    }

    /// What a file that is made of this one is encrypted with.
    pub(crate) fn keys(&self) -> &VolumeKeys {
        &self.keys
    }

    pub(crate) fn footer(&self) -> &SegmentFooter {
        &self.footer
    }

    pub(crate) fn epoch(&self) -> EpochId {
        EpochId(self.footer.epoch)
    }

    pub(crate) fn sequence(&self) -> SegmentSequence {
        SegmentSequence(self.footer.sequence.get())
    }

    /// The run that a pruned segment carries, with the size that it says; none if it is not pruned.
    pub(crate) fn run(&self) -> Result<Option<Vec<u8>>, StoreError> {
        let place = self.settled.as_ref().and_then(|s| s.header.run_place());
        let Some((at, length)) = place else {
            return Ok(None);
        };
        let mut bytes = vec![0u8; length as usize];
        let read = self.file.read_exact_at(&mut bytes, at);
        read.map_err(StoreError::io(&self.path))?;
        Ok(Some(bytes))
    }

    /// BLAKE3 of the blocks that are not gone, if it is pruned.
    pub(crate) fn kept_root(&self) -> Option<[u8; 32]> {
        let settled = self.settled.as_ref()?;
        settled
            .header
            .is_pruned()
            .then_some(settled.header.kept_root)
    }

    /// Whether the block at this address of the sealed segment is gone.
    pub(crate) fn is_gone(&self, block: u64) -> bool {
        let blocks = self.settled.as_ref().map(|settled| &settled.blocks);
        blocks.is_some_and(|blocks| blocks.get(block as usize) == Some(&BLOCK_IS_GONE))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    fn settled(&self, frame: u64) -> Result<&Settled, StoreError> {
        self.settled.as_ref().ok_or_else(|| self.damaged(frame))
    }

    fn damaged(&self, frame: u64) -> StoreError {
        StoreError::Frame {
            segment: self.sequence(),
            frame,
        }
    }

    fn frame_entry(&self, frame: u64) -> Result<&FrameEntry, StoreError> {
        let entry = self.settled(frame)?.frames.get(frame as usize);
        entry.ok_or_else(|| self.damaged(frame))
    }

    /// Reads a frame past the cache, checks and decompresses it.
    pub(crate) fn read_frame(&self, frame: u64) -> Result<Arc<Vec<u8>>, StoreError> {
        let entry = self.frame_entry(frame)?;
        let mut stored = vec![0u8; entry.length.get() as usize];
        self.file
            .read_exact_at(&mut stored, entry.offset.get())
            .map_err(StoreError::io(&self.path))?;
        self.unpack_frame(frame, &mut stored)
    }

    /// Checks what is stored of a frame and decompresses it.
    fn unpack_frame(&self, frame: u64, stored: &mut [u8]) -> Result<Arc<Vec<u8>>, StoreError> {
        let (settled, entry) = (self.settled(frame)?, self.frame_entry(frame)?);
        let damaged = || self.damaged(frame);
        if frame_crc(stored, self.sequence().0, frame) != entry.crc.get() {
            return Err(damaged());
        }
        let whole = settled.header.frame_bytes(frame);
        let packed = match (settled.header.is_encrypted(), &settled.cipher) {
            (false, _) => &stored[..],
            (true, Some(cipher)) => cipher.open(frame, stored).ok_or_else(damaged)?,
            (true, None) => return Err(StoreError::NoKey),
        };
        let frame = compression::unpack(entry.codec, packed, whole);
        frame.map(Arc::new).ok_or_else(damaged)
    }

    /// Numbers of the frames that hold `length` bytes from `offset` of the sealed segment, as they come; none if it is not settled.
    pub(crate) fn frames_of(&self, offset: u64, length: u64) -> impl Iterator<Item = u64> {
        let blocks = offset / BLOCK_BYTES..offset.saturating_add(length).div_ceil(BLOCK_BYTES);
        self.settled.iter().flat_map(move |settled| {
            let in_frame = settled.header.blocks_in_frame();
            let kept = blocks
                .clone()
                .map_while(|block| settled.blocks.get(block as usize));
            kept.filter(|kept| !matches!(**kept, BLOCK_IS_ZERO | BLOCK_IS_GONE))
                .map(move |kept| u64::from(*kept) / in_frame)
        })
    }

    /// Divides frames, given in order, into those that are best read together: little lies between them.
    pub(crate) fn neighbours<'f>(&self, frames: &'f [u64]) -> impl Iterator<Item = &'f [u64]> {
        let end = |frame| {
            let entry = self.frame_entry(frame).ok()?;
            Some(entry.offset.get() + u64::from(entry.length.get()))
        };
        let is_near = move |before: &u64, next: &u64| {
            let (end, next) = (end(*before), self.frame_entry(*next).ok());
            let next = next.map(|entry| entry.offset.get());
            end.zip(next)
                .is_some_and(|(end, next)| (end..=end + NEAR_BYTES).contains(&next))
        };
        frames
            .chunk_by(is_near)
            .flat_map(|group| group.chunks(TOGETHER_FRAMES))
    }

    /// Brings neighbours into the cache with one read. What cannot be read is left out: whoever wants it reads it again, and says what is lost.
    pub(crate) fn fetch(&self, frames: &[u64], cache: &FrameCache) {
        let entries = frames.first().zip(frames.last()).map(|(first, last)| {
            let (first, last) = (self.frame_entry(*first), self.frame_entry(*last));
            first.and_then(|first| last.map(|last| (first, last)))
        });
        let Some(Ok((first, last))) = entries else {
            return;
        };
        let start = first.offset.get();
        let mut stored =
            vec![0u8; (last.offset.get() - start) as usize + last.length.get() as usize];
        if self.file.read_exact_at(&mut stored, start).is_err() {
            return;
        }
        for number in frames {
            let Ok(entry) = self.frame_entry(*number) else {
                return;
            };
            let at = (entry.offset.get() - start) as usize;
            let bytes = &mut stored[at..at + entry.length.get() as usize];
            if let Ok(frame) = self.unpack_frame(*number, bytes) {
                cache.put((self.number, *number), frame);
            }
        }
    }

    /// What a whole frame has unpacked, in bytes; 0 if it is not settled.
    pub(crate) fn frame_bytes(&self) -> u64 {
        let settled = self.settled.as_ref();
        settled.map_or(0, |settled| settled.header.blocks_in_frame() * BLOCK_BYTES)
    }

    /// Whether a frame is in the cache.
    pub(crate) fn has_frame(&self, frame: u64, cache: &FrameCache) -> bool {
        cache.has(&(self.number, frame))
    }

    /// Whether it is encrypted and its key is not there.
    pub(crate) fn is_locked(&self) -> bool {
        let settled = self.settled.as_ref();
        settled.is_some_and(|settled| settled.header.is_encrypted() && settled.cipher.is_none())
    }

    /// Reads all frames and compares them with their checksums, without unpacking them. Everything else was compared when the file was opened, but for the
    /// run of a pruned segment.
    pub(crate) fn check_stored(&self) -> Result<(), StoreError> {
        let Some(settled) = &self.settled else {
            return Ok(());
        };
        let mut part = vec![0u8; CHECKED_BYTES];
        // What of the file is in `part`. Frames lie one behind the other.
        let mut held = 0..0;
        for (number, entry) in (0..).zip(&settled.frames) {
            let (start, length) = (entry.offset.get(), u64::from(entry.length.get()));
            if start + length > held.end {
                let left = settled.header.tables_at.get() - start;
                held = start..start + left.min(CHECKED_BYTES as u64);
                let bytes = &mut part[..(held.end - start) as usize];
                self.file
                    .read_exact_at(bytes, start)
                    .map_err(StoreError::io(&self.path))?;
            }
            let within = (start - held.start) as usize;
            let stored = &part[within..within + length as usize];
            if frame_crc(stored, self.sequence().0, number) != entry.crc.get() {
                return Err(StoreError::Frame {
                    segment: self.sequence(),
                    frame: number,
                });
            }
        }
        Ok(())
    }

    /// Reads `bytes.len()` bytes from `offset` of the sealed segment.
    pub(crate) fn read(
        &self,
        offset: u64,
        bytes: &mut [u8],
        cache: &FrameCache,
    ) -> Result<(), StoreError> {
        let end = offset.checked_add(bytes.len() as u64);
        if end.is_none_or(|end| end > self.footer.data_bytes.get()) {
            let error = FormatError::Truncated {
                needed: end.unwrap_or(u64::MAX),
                found: self.footer.data_bytes.get(),
            };
            return Err(StoreError::Damaged(self.path.clone(), error));
        }
        let Some(settled) = &self.settled else {
            return self
                .file
                .read_exact_at(bytes, offset)
                .map_err(StoreError::io(&self.path));
        };
        let mut last: Option<(u64, Arc<Vec<u8>>)> = None;
        let mut done = 0;
        while done < bytes.len() {
            let at = offset + done as u64;
            let within = (at % BLOCK_BYTES) as usize;
            let part = (BLOCK_BYTES as usize - within).min(bytes.len() - done);
            let target = &mut bytes[done..done + part];
            done += part;
            let kept = settled.blocks[(at / BLOCK_BYTES) as usize];
            if kept == BLOCK_IS_ZERO {
                target.fill(0);
                continue;
            }
            if kept == BLOCK_IS_GONE {
                return Err(StoreError::Pruned(self.sequence()));
            }
            let in_frame = settled.header.blocks_in_frame();
            let (frame, index) = (u64::from(kept) / in_frame, u64::from(kept) % in_frame);
            if last.as_ref().is_none_or(|(number, _)| *number != frame) {
                let key = (self.number, frame);
                last = Some((frame, cache.get(key, || self.read_frame(frame))?));
            }
            if let Some((_, content)) = &last {
                let from = (index * BLOCK_BYTES) as usize + within;
                target.copy_from_slice(&content[from..from + part]);
            }
        }
        Ok(())
    }
}

/// A segment file read from one end to the other.
pub(crate) struct SegmentBytes<'a> {
    file: &'a SegmentFile,
    cache: FrameCache,
}

impl<'a> SegmentBytes<'a> {
    pub(crate) fn new(file: &'a SegmentFile) -> SegmentBytes<'a> {
        SegmentBytes {
            file,
            cache: frame_cache(WINDOW_FRAMES_BYTES),
        }
    }
}

impl ReadAt for SegmentBytes<'_> {
    fn read_at(&mut self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.file
            .read(offset, bytes, &self.cache)
            .map_err(|error| match error {
                StoreError::Io(_, error) => error,
                other => io::Error::new(io::ErrorKind::InvalidData, other),
            })
    }
}
