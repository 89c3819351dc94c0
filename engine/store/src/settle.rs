//! Settling: a sealed segment becomes a compressed one, in the same place and with the same addresses.
//!
//!   sealed file ──blocks──▶ zero? seen before? ──kept──▶ frames ──▶ N.new ──flush──▶ read back from the disk, against the root ──▶ N.seg
//!
//! Crash, step by step (the store's disk keeps what was flushed, nothing else): before the rename there is the sealed file, and a `.new` that the next
//! open removes; after it, before the directory is flushed, either of the two comes back whole; later the settled one. At no step does history depend
//! on a file that was not read back from the disk, because the sealed one goes with the rename.
//! It needs no lock of the store but for the rename. Images that have the sealed file open go on reading it.

use crate::compression::Packer;
use crate::segment::segment_path;
use crate::segment_file::{SegmentBytes, SegmentFile};
use crate::{Compression, StoreError, StoredSegment, VolumeStore, durable};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use std::collections::HashMap;
use std::fs::File;
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use varve_format::{
    BLOCK_BYTES, BLOCK_IS_ZERO, FRAME_BYTES, FrameEntry, SETTLED_BYTES_MAX, SettledHeader, crc32c,
    frame_crc,
};
use varve_log::ReadAt;
use zerocopy::{FromZeros, IntoBytes};

const BLOCK: usize = BLOCK_BYTES as usize;
/// Bytes that are read at a time.
const STEP_BYTES: usize = 1 << 20;

/// A segment to be settled.
pub struct SettleJob {
    segment: Arc<StoredSegment>,
    new: PathBuf,
    compression: Compression,
    /// While it is there, nobody deletes the history.
    lease: Arc<()>,
}

/// A segment that is compressed and flushed, and not proved yet.
pub struct Settling {
    segment: Arc<StoredSegment>,
    new: PathBuf,
    lease: Arc<()>,
}

/// A segment whose compressed form came back from the disk as it was.
pub struct Proved {
    segment: Arc<StoredSegment>,
    new: PathBuf,
    stored_bytes: u64,
    _lease: Arc<()>,
}

impl VolumeStore {
    /// The oldest segment that is not settled, but for those in `except`.
    #[must_use]
    pub fn next_to_settle(
        &self,
        compression: Compression,
        except: &dyn Fn(u64) -> bool,
    ) -> Option<SettleJob> {
        let fits = |segment: &&StoredSegment| {
            !segment.settled
                && segment.stored_bytes > 0
                && segment.data_bytes <= SETTLED_BYTES_MAX
                && !except(segment.sequence.0)
        };
        let sequence = self.segments().find(fits)?.sequence;
        Some(SettleJob {
            segment: Arc::clone(self.segment(sequence)?),
            new: durable::unfinished(&segment_path(self.directory(), sequence)),
            compression,
            lease: self.lease(),
        })
    }

    /// Puts a settled segment into its place.
    pub fn replace(&mut self, proved: &Proved) -> Result<(), StoreError> {
        let sequence = proved.segment.sequence;
        if self.segment(sequence).is_none() {
            let _ = std::fs::remove_file(&proved.new);
            return Err(StoreError::Missing(sequence));
        }
        durable::name(&proved.new, &proved.segment.path())?;
        self.replaced(sequence, proved.stored_bytes);
        Ok(())
    }
}

impl SettleJob {
    /// The segment.
    #[must_use]
    pub fn sequence(&self) -> u64 {
        self.segment.sequence.0
    }

    /// Bytes of the sealed segment.
    #[must_use]
    pub fn data_bytes(&self) -> u64 {
        self.segment.data_bytes
    }

    /// Compresses it into a new file, durably.
    pub fn compress(self) -> Result<Settling, StoreError> {
        let source = SegmentFile::open(&self.segment)?;
        let written = write(&source, &self.new, self.compression);
        if written.is_err() {
            let _ = std::fs::remove_file(&self.new);
        }
        written?;
        Ok(Settling {
            segment: self.segment,
            new: self.new,
            lease: self.lease,
        })
    }
}

impl Settling {
    /// Reads the new file from the disk, not from memory, and compares it with what was sealed.
    pub fn prove(self) -> Result<Proved, StoreError> {
        let stored_bytes = self.read_back().inspect_err(|_| {
            let _ = std::fs::remove_file(&self.new);
        })?;
        Ok(Proved {
            segment: self.segment,
            new: self.new,
            stored_bytes,
            _lease: self.lease,
        })
    }

    fn read_back(&self) -> Result<u64, StoreError> {
        let file = File::open(&self.new).map_err(StoreError::io(&self.new))?;
        // What is clean leaves memory, and all of it is clean: it was flushed.
        let _ = posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
        let stored_bytes = file.metadata().map_err(StoreError::io(&self.new))?.len();
        let unproved = || StoreError::Proof(self.new.clone());
        let settled = SegmentFile::of(file, &self.new).map_err(|_| unproved())?;
        if root_of(&settled).map_err(|_| unproved())? == self.segment.root {
            return Ok(stored_bytes);
        }
        // Which of the two is wrong?
        let sealed = SegmentFile::open(&self.segment)?;
        match root_of(&sealed)? == self.segment.root {
            true => Err(unproved()),
            false => Err(StoreError::Root(self.segment.sequence)),
        }
    }
}

/// BLAKE3 of a segment's bytes before its footer.
fn root_of(file: &SegmentFile) -> Result<[u8; 32], StoreError> {
    let mut hasher = blake3::Hasher::new();
    each_step(file, |bytes| {
        hasher.update(bytes);
        Ok(())
    })?;
    Ok(*hasher.finalize().as_bytes())
}

fn each_step(
    file: &SegmentFile,
    mut step: impl FnMut(&[u8]) -> Result<(), StoreError>,
) -> Result<(), StoreError> {
    let mut source = SegmentBytes::new(file);
    let mut buffer = vec![0u8; STEP_BYTES];
    let bytes = file.footer().data_bytes.get();
    let mut at = 0;
    while at < bytes {
        let part = (bytes - at).min(STEP_BYTES as u64) as usize;
        source
            .read_at(at, &mut buffer[..part])
            .map_err(StoreError::io(file.path()))?;
        step(&buffer[..part])?;
        at += part as u64;
    }
    Ok(())
}

/// Frames on their way into a file.
struct FrameWriter<'a> {
    out: BufWriter<File>,
    path: &'a Path,
    sequence: u64,
    packer: Packer,
    frame: Vec<u8>,
    table: Vec<FrameEntry>,
    at: u64,
}

impl FrameWriter<'_> {
    fn keep(&mut self, block: &[u8]) -> Result<(), StoreError> {
        self.frame.extend_from_slice(block);
        if self.frame.len() == FRAME_BYTES {
            self.end_frame()?;
        }
        Ok(())
    }

    fn end_frame(&mut self) -> Result<(), StoreError> {
        if self.frame.is_empty() {
            return Ok(());
        }
        let io = StoreError::io(self.path);
        let (codec, stored) = self.packer.pack(&self.frame).map_err(&io)?;
        let mut entry = FrameEntry::new_zeroed();
        entry.offset = self.at.into();
        entry.length = (stored.len() as u32).into();
        entry.crc = frame_crc(stored, self.sequence, self.table.len() as u64).into();
        entry.codec = codec as u8;
        self.table.push(entry);
        self.at += stored.len() as u64;
        self.out.write_all(stored).map_err(&io)?;
        self.frame.clear();
        Ok(())
    }
}

fn write(source: &SegmentFile, new: &Path, compression: Compression) -> Result<(), StoreError> {
    let io = StoreError::io(new);
    let file = File::create(new).map_err(&io)?;
    let mut writer = FrameWriter {
        out: BufWriter::with_capacity(STEP_BYTES, file),
        path: new,
        sequence: source.sequence().0,
        packer: Packer::new(compression).map_err(&io)?,
        frame: Vec::with_capacity(FRAME_BYTES),
        table: Vec::new(),
        at: BLOCK_BYTES,
    };
    writer.out.write_all(&[0u8; BLOCK]).map_err(&io)?;
    let (blocks, kept) = write_blocks(source, &mut writer)?;
    writer.end_frame()?;
    let mut tables = writer.table.as_bytes().to_vec();
    tables.extend(blocks.iter().flat_map(|block| block.to_le_bytes()));
    let footer = source.footer();
    let mut header = SettledHeader::empty();
    header.volume = footer.volume;
    header.sequence = footer.sequence;
    header.data_bytes = footer.data_bytes;
    header.kept_blocks = kept.into();
    header.tables_at = writer.at.into();
    header.tables_crc = crc32c(&tables).into();
    let mut out = writer.out;
    out.write_all(&tables).map_err(&io)?;
    out.write_all(&footer.to_block()).map_err(&io)?;
    out.seek(SeekFrom::Start(0)).map_err(&io)?;
    out.write_all(&header.to_block()).map_err(&io)?;
    let file = out.into_inner().map_err(|error| io(error.into_error()))?;
    file.sync_all().map_err(&io)
}

/// Gives the block table and the number of kept blocks.
fn write_blocks(
    source: &SegmentFile,
    writer: &mut FrameWriter<'_>,
) -> Result<(Vec<u32>, u64), StoreError> {
    let mut blocks: Vec<u32> = Vec::new();
    // Kept blocks by checksum: where the first of its kind lies in the source, and its number.
    let mut seen: HashMap<u32, (u64, u32)> = HashMap::new();
    let mut earlier = vec![0u8; BLOCK];
    let mut again = SegmentBytes::new(source);
    let mut kept = 0u32;
    each_step(source, |bytes| {
        for block in bytes.chunks_exact(BLOCK) {
            let at = blocks.len() as u64 * BLOCK_BYTES;
            if block == [0u8; BLOCK] {
                blocks.push(BLOCK_IS_ZERO);
                continue;
            }
            // A checksum only says where to look; what counts are the bytes.
            match seen.entry(crc32c(block)) {
                std::collections::hash_map::Entry::Occupied(found) => {
                    let (there, number) = *found.get();
                    again
                        .read_at(there, &mut earlier)
                        .map_err(StoreError::io(source.path()))?;
                    if earlier == block {
                        blocks.push(number);
                        continue;
                    }
                }
                std::collections::hash_map::Entry::Vacant(free) => {
                    free.insert((at, kept));
                }
            }
            blocks.push(kept);
            kept += 1;
            writer.keep(block)?;
        }
        Ok(())
    })?;
    Ok((blocks, u64::from(kept)))
}
