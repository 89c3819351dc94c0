//! Writes a settled segment: blocks of a segment in, frames out; all of them, or those that somebody still needs.
//!
//! Blocks lie in the order of the volume, not of time: whoever reads a range of an image finds its neighbours in the same frame, however scattered they
//! were written. That goes for each window of 16 MiB by itself, so that whoever reads in the order of time needs no more than a window's frames at once.
//! Where a block belongs is only a hint; addresses go through the block table.

use crate::compression::Packer;
use crate::crypt::FileCipher;
use crate::segment_file::{SegmentBytes, SegmentFile};
use crate::{Compression, StoreError};
use rayon::prelude::*;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fs::File;
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::path::Path;
use varve_format::{
    BLOCK_BYTES, BLOCK_IS_GONE, BLOCK_IS_ZERO, FRAME_BLOCKS, FrameEntry, RecordKind, RunEntry,
    SETTLED_IS_ENCRYPTED, SETTLED_IS_PRUNED, SettledHeader, crc32c, frame_crc,
};
use varve_log::ReadAt;
use zerocopy::{FromZeros, IntoBytes};

const BLOCK: usize = BLOCK_BYTES as usize;
const FRAME_BYTES: usize = FRAME_BLOCKS as usize * BLOCK;
/// Bytes that are read at a time.
const STEP_BYTES: usize = 1 << 20;

/// What one thread packs at a time: whole frames.
const LANE_BYTES: usize = 16 * FRAME_BYTES;
/// Blocks that are put in order together, and are in memory meanwhile: 16 MiB.
const WINDOW_BLOCKS: u64 = 4096;
/// Frames that reading in the order of time needs at hand: a window's, and some that later blocks are copies of. In bytes.
pub(crate) const WINDOW_FRAMES_BYTES: usize = (WINDOW_BLOCKS as usize + 256) * BLOCK;

/// What a pruned segment keeps.
pub(crate) struct Kept<'a> {
    /// By block of the sealed segment.
    pub(crate) blocks: &'a [bool],
    /// Its run.
    pub(crate) run: &'a [u8],
}

/// BLAKE3 of a segment's blocks, read one behind the other: of all of them, or of those that are not gone.
pub(crate) fn root_of(file: &SegmentFile) -> Result<[u8; 32], StoreError> {
    root_and(file, |_, _| {})
}

/// The same; after each part `also` may look at what lies before a byte, which still is at hand.
pub(crate) fn root_and(
    file: &SegmentFile,
    mut also: impl FnMut(&mut SegmentBytes<'_>, u64),
) -> Result<[u8; 32], StoreError> {
    let mut hasher = blake3::Hasher::new();
    let mut source = SegmentBytes::new(file);
    let mut buffer = vec![0u8; STEP_BYTES];
    let count = file.footer().data_bytes.get() / BLOCK_BYTES;
    let mut block = 0;
    while block < count {
        let most = (STEP_BYTES / BLOCK) as u64;
        let is_gone = file.is_gone(block);
        let more = (block..count.min(block + most)).skip(1);
        let same = more.take_while(|next| file.is_gone(*next) == is_gone);
        let part = 1 + same.count() as u64;
        if !is_gone {
            let bytes = &mut buffer[..part as usize * BLOCK];
            source
                .read_at(block * BLOCK_BYTES, bytes)
                .map_err(StoreError::io(file.path()))?;
            hasher.update(bytes);
        }
        block += part;
        also(&mut source, block * BLOCK_BYTES);
    }
    Ok(*hasher.finalize().as_bytes())
}

/// One thread's share of the frames that are packed at a time.
struct Lane {
    packer: Packer,
    /// Frames as they are stored, one behind the other, and what is to be said of each; their places come later.
    stored: Vec<u8>,
    entries: Vec<FrameEntry>,
    sealed: Vec<u8>,
}

impl Lane {
    /// Packs frames, of which the first has the number `first`.
    fn pack(
        &mut self,
        frames: &[u8],
        first: u64,
        sequence: u64,
        cipher: Option<&FileCipher>,
    ) -> std::io::Result<()> {
        self.stored.clear();
        self.entries.clear();
        for (number, frame) in (first..).zip(frames.chunks(FRAME_BYTES)) {
            let (codec, mut stored) = self.packer.pack(frame)?;
            if let Some(cipher) = cipher {
                self.sealed.clear();
                self.sealed.extend_from_slice(stored);
                cipher.seal(number, &mut self.sealed)?;
                stored = &self.sealed;
            }
            let mut entry = FrameEntry::new_zeroed();
            entry.length = (stored.len() as u32).into();
            entry.crc = frame_crc(stored, sequence, number).into();
            entry.codec = codec as u8;
            self.entries.push(entry);
            self.stored.extend_from_slice(stored);
        }
        Ok(())
    }
}

/// Frames on their way into a file.
struct FrameWriter<'a> {
    out: BufWriter<File>,
    path: &'a Path,
    sequence: u64,
    lanes: Vec<Lane>,
    cipher: Option<FileCipher>,
    /// Blocks that are not packed yet: whole frames, and at the end perhaps a part of one.
    pending: Vec<u8>,
    table: Vec<FrameEntry>,
    at: u64,
}

impl FrameWriter<'_> {
    fn keep(&mut self, block: &[u8]) -> Result<(), StoreError> {
        self.pending.extend_from_slice(block);
        if self.pending.len() == self.lanes.len() * LANE_BYTES {
            self.pack()?;
        }
        Ok(())
    }

    /// Packs what is pending, each lane its part, and writes it in order.
    fn pack(&mut self) -> Result<(), StoreError> {
        let io = StoreError::io(self.path);
        let first = self.table.len() as u64;
        let (sequence, cipher) = (self.sequence, self.cipher.as_ref());
        let parts = self.pending.chunks(LANE_BYTES);
        let count = parts.len();
        let mut jobs = self.lanes.iter_mut().zip(parts).enumerate();
        let run = |(index, (lane, part)): (usize, (&mut Lane, &[u8]))| {
            let before = index * (LANE_BYTES / FRAME_BYTES);
            lane.pack(part, first + before as u64, sequence, cipher)
        };
        let packed = match count {
            0 | 1 => jobs.try_for_each(run),
            _ => jobs.collect::<Vec<_>>().into_par_iter().try_for_each(run),
        };
        packed.map_err(&io)?;
        for lane in &self.lanes[..count] {
            self.out.write_all(&lane.stored).map_err(&io)?;
            for entry in &lane.entries {
                let mut entry = *entry;
                entry.offset = self.at.into();
                self.at += u64::from(entry.length.get());
                self.table.push(entry);
            }
        }
        self.pending.clear();
        Ok(())
    }
}

/// Writes `source`, whose records are `entries`, into a new file, which is not flushed yet. `kept`: only what is named there.
pub(crate) fn write(
    source: &SegmentFile,
    entries: &[RunEntry],
    new: &Path,
    (compression, threads): (Compression, usize),
    kept: Option<&Kept<'_>>,
) -> Result<File, StoreError> {
    let io = StoreError::io(new);
    let encryption = source.keys().new_file(source.footer())?;
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(new)
        .map_err(&io)?;
    let lane = |_| {
        Ok(Lane {
            packer: Packer::new(compression)?,
            stored: Vec::new(),
            entries: Vec::new(),
            sealed: Vec::new(),
        })
    };
    let lanes: std::io::Result<Vec<Lane>> = (0..threads.max(1)).map(lane).collect();
    let lanes = lanes.map_err(&io)?;
    let mut writer = FrameWriter {
        out: BufWriter::with_capacity(STEP_BYTES, file),
        path: new,
        sequence: source.sequence().0,
        lanes,
        cipher: None,
        pending: Vec::with_capacity(threads.max(1) * LANE_BYTES),
        table: Vec::new(),
        at: BLOCK_BYTES,
    };
    let mut header = SettledHeader::empty();
    if let Some(new) = encryption {
        (header.key, header.salt) = (new.key, new.salt);
        header.incompat = (header.incompat.get() | SETTLED_IS_ENCRYPTED).into();
        writer.cipher = Some(new.cipher);
    }
    writer.out.write_all(&[0u8; BLOCK]).map_err(&io)?;
    let written = write_blocks(source, &mut writer, entries, kept.map(|kept| kept.blocks))?;
    writer.pack()?;
    let mut tables = writer.table.as_bytes().to_vec();
    tables.extend(
        written
            .numbers
            .iter()
            .flat_map(|number| number.to_le_bytes()),
    );
    let footer = source.footer();
    header.volume = footer.volume;
    header.sequence = footer.sequence;
    header.data_bytes = footer.data_bytes;
    header.kept_blocks = u64::from(written.kept).into();
    header.tables_at = writer.at.into();
    header.tables_crc = crc32c(&tables).into();
    let cipher = writer.cipher;
    let mut out = writer.out;
    if let Some(kept) = kept {
        // Whatever the policy: the tables of a segment of which little is left are nearly all the same.
        let packed = zstd::bulk::compress(&tables, 3).map_err(&io)?;
        header.incompat = (header.incompat.get() | SETTLED_IS_PRUNED).into();
        header.tables_bytes = (packed.len() as u64).into();
        header.run_bytes = (kept.run.len() as u64).into();
        header.kept_root = written.root;
        out.write_all(&packed).map_err(&io)?;
        out.write_all(kept.run).map_err(&io)?;
    } else {
        out.write_all(&tables).map_err(&io)?;
    }
    if let Some(cipher) = cipher {
        let tagged = header.tagged(&tables, kept.map_or(&[], |kept| kept.run));
        header.tables_tag = cipher.tag(&tagged).map_err(&io)?;
    }
    out.write_all(&footer.to_block()).map_err(&io)?;
    out.seek(SeekFrom::Start(0)).map_err(&io)?;
    out.write_all(&header.to_block()).map_err(&io)?;
    out.into_inner().map_err(|error| io(error.into_error()))
}

struct Written {
    /// The block table.
    numbers: Vec<u32>,
    kept: u32,
    /// BLAKE3 of what is not gone.
    root: [u8; 32],
}

/// Where each block of a segment belongs on the volume; all ones: nowhere, it is a batch's head.
fn places(source: &SegmentFile, entries: &[RunEntry]) -> Vec<u64> {
    let count = source.footer().data_bytes.get() / BLOCK_BYTES;
    let mut places = vec![u64::MAX; count as usize];
    let writes = entries
        .iter()
        .filter(|entry| entry.kind == RecordKind::Write as u8);
    for entry in writes {
        let (at, length) = (entry.payload.get(), entry.length.get());
        let blocks = at / BLOCK_BYTES..at.saturating_add(length).div_ceil(BLOCK_BYTES).min(count);
        for block in blocks {
            let within = (block * BLOCK_BYTES).saturating_sub(at);
            let place = &mut places[block as usize];
            *place = (*place).min(entry.offset.get().saturating_add(within));
        }
    }
    places
}

/// Reads the blocks `window` of `source` that are wanted, each to its place in `buffer`.
fn read_window(
    source: &mut SegmentBytes<'_>,
    window: &std::ops::Range<u64>,
    wanted: impl Fn(u64) -> bool,
    buffer: &mut [u8],
) -> std::io::Result<()> {
    let mut block = window.start;
    while block < window.end {
        let more = (block..window.end).take_while(|block| wanted(*block));
        let count = more.count().min(STEP_BYTES / BLOCK);
        let at = (block - window.start) as usize * BLOCK;
        source.read_at(block * BLOCK_BYTES, &mut buffer[at..at + count * BLOCK])?;
        block += count.max(1) as u64;
    }
    Ok(())
}

fn write_blocks(
    source: &SegmentFile,
    writer: &mut FrameWriter<'_>,
    entries: &[RunEntry],
    blocks: Option<&[bool]>,
) -> Result<Written, StoreError> {
    let io = StoreError::io(source.path());
    let count = source.footer().data_bytes.get() / BLOCK_BYTES;
    let wanted = |block: u64| blocks.is_none_or(|blocks| blocks.get(block as usize) == Some(&true));
    let places = places(source, entries);
    let mut bytes = SegmentBytes::new(source);
    let mut buffer = vec![0u8; count.min(WINDOW_BLOCKS) as usize * BLOCK];
    let mut numbers = vec![BLOCK_IS_GONE; count as usize];
    // Blocks by checksum: the first of its kind, and those that are the same.
    let mut seen: HashMap<u32, u32> = HashMap::new();
    let mut copies: Vec<(u32, u32)> = Vec::new();
    let mut earlier = vec![0u8; BLOCK];
    let mut hasher = blake3::Hasher::new();
    let mut number = 0;
    for start in (0..count).step_by(WINDOW_BLOCKS as usize) {
        let window = start..count.min(start + WINDOW_BLOCKS);
        read_window(&mut bytes, &window, wanted, &mut buffer).map_err(&io)?;
        let content = |block: u32| &buffer[(u64::from(block) - start) as usize * BLOCK..][..BLOCK];
        let mut kept: Vec<u32> = Vec::new();
        for block in window.filter(|block| wanted(*block)) {
            let block = block as u32;
            let this = content(block);
            if blocks.is_some() {
                hasher.update(this);
            }
            if this == [0u8; BLOCK] {
                numbers[block as usize] = BLOCK_IS_ZERO;
                continue;
            }
            // A checksum only says where to look; what counts are the bytes.
            match seen.entry(crc32c(this)) {
                Entry::Occupied(found) => {
                    let there = *found.get();
                    let same = if u64::from(there) < start {
                        let at = u64::from(there) * BLOCK_BYTES;
                        bytes.read_at(at, &mut earlier).map_err(&io)?;
                        earlier == this
                    } else {
                        content(there) == this
                    };
                    if same {
                        copies.push((block, there));
                        continue;
                    }
                }
                Entry::Vacant(free) => {
                    free.insert(block);
                }
            }
            kept.push(block);
        }
        kept.sort_by_key(|block| places[*block as usize]);
        for block in kept {
            numbers[block as usize] = number;
            number += 1;
            writer.keep(content(block))?;
        }
    }
    for (block, there) in copies {
        numbers[block as usize] = numbers[there as usize];
    }
    Ok(Written {
        numbers,
        kept: number,
        root: *hasher.finalize().as_bytes(),
    })
}
