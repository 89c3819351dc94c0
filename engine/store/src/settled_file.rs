//! Writes a settled segment: blocks of a segment in, frames out; all of them, or those that somebody still needs.
//!
//! Blocks lie in the order of the volume, not of time: whoever reads a range of an image finds its neighbours in the same frame, however scattered they
//! were written. That goes for each window of 16 MiB by itself, so that whoever reads in the order of time needs no more than a window's frames at once.
//! Where a block belongs is only a hint; addresses go through the block table.

use crate::compression::Packer;
use crate::crypt::FileCipher;
use crate::segment_file::{SegmentBytes, SegmentFile};
use crate::{Compression, StoreError, durable};
use rayon::prelude::*;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fs::File;
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::LazyLock;
use varve_format::{
    BLOCK_BYTES, BLOCK_IS_GONE, BLOCK_IS_ZERO, FRAME_BLOCKS, FrameEntry, RecordKind, RunEntry,
    SETTLED_IS_ENCRYPTED, SETTLED_IS_PRUNED, SettledHeader, crc32c, frame_crc,
};
use varve_log::ReadAt;
use zerocopy::{FromZeros, IntoBytes};

const BLOCK: usize = BLOCK_BYTES as usize;
const FRAME_BYTES: usize = FRAME_BLOCKS as usize * BLOCK;
/// Bytes that are read at a time from one end to the other.
const STEP_BYTES: usize = 1 << 20;
/// Blocks of a window that are read at a time: what was just read is looked at while the processor's cache still has it.
const READ_BLOCKS: usize = 32;
/// Frames that one thread packs at a time.
const LANE_FRAMES: usize = 16;
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
    /// A frame's blocks, gathered: small enough that packing finds them in the processor's cache.
    frame: Vec<u8>,
    /// Frames as they are stored, one behind the other, and what is to be said of each; their places come later.
    stored: Vec<u8>,
    entries: Vec<FrameEntry>,
    sealed: Vec<u8>,
}

impl Lane {
    /// Packs frames, of which the first has the number `first`, each given by its blocks.
    fn pack<'b>(
        &mut self,
        frames: impl Iterator<Item = impl Iterator<Item = &'b [u8]>>,
        first: u64,
        sequence: u64,
        cipher: Option<&FileCipher>,
    ) -> std::io::Result<()> {
        self.stored.clear();
        self.entries.clear();
        for (number, blocks) in (first..).zip(frames) {
            self.frame.clear();
            blocks.for_each(|block| self.frame.extend_from_slice(block));
            let (codec, mut stored) = self.packer.pack(&self.frame)?;
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

/// Frames as they are stored, one behind the other, and what is to be said of each; their places come when they are written.
#[derive(Default)]
struct Packed {
    stored: Vec<u8>,
    entries: Vec<FrameEntry>,
}

/// Makes frames of blocks.
struct FramePacker {
    sequence: u64,
    lanes: Vec<Lane>,
    cipher: Option<FileCipher>,
    /// Blocks that are not packed yet: less than a frame.
    pending: Vec<u8>,
    /// Frames that were packed.
    count: u64,
}

impl FramePacker {
    /// Packs the next blocks. What of them makes no whole frame waits for those behind.
    fn keep(&mut self, window: &Window, packed: &mut Packed) -> std::io::Result<()> {
        packed.stored.clear();
        packed.entries.clear();
        let blocks = &window.kept[..];
        let missing = (FRAME_BYTES - self.pending.len()) / BLOCK;
        let (head, whole) = blocks.split_at(match self.pending.len() {
            0 => 0,
            _ => missing.min(blocks.len()),
        });
        for block in head {
            self.pending.extend_from_slice(window.block(*block));
        }
        if self.pending.len() == FRAME_BYTES {
            self.pack_pending(packed)?;
        }
        let (whole, tail) = whole.split_at(whole.len() - whole.len() % FRAME_BLOCKS as usize);
        let lane_blocks = LANE_FRAMES * FRAME_BLOCKS as usize;
        for part in whole.chunks(self.lanes.len() * lane_blocks) {
            self.pack(window, part, lane_blocks, packed)?;
        }
        for block in tail {
            self.pending.extend_from_slice(window.block(*block));
        }
        Ok(())
    }

    /// Packs blocks of a window that make whole frames, each lane its part.
    fn pack(
        &mut self,
        window: &Window,
        blocks: &[u32],
        lane_blocks: usize,
        packed: &mut Packed,
    ) -> std::io::Result<()> {
        let first = self.count;
        let (sequence, cipher) = (self.sequence, self.cipher.as_ref());
        let parts = blocks.chunks(lane_blocks);
        let count = parts.len();
        let mut jobs = self.lanes.iter_mut().zip(parts).enumerate();
        let run = |(index, (lane, part)): (usize, (&mut Lane, &[u32]))| {
            let frames = part.chunks(FRAME_BLOCKS as usize);
            let frames = frames.map(|frame| frame.iter().map(|block| window.block(*block)));
            lane.pack(
                frames,
                first + (index * LANE_FRAMES) as u64,
                sequence,
                cipher,
            )
        };
        match count {
            0 | 1 => jobs.try_for_each(run),
            _ => jobs.collect::<Vec<_>>().into_par_iter().try_for_each(run),
        }?;
        (0..count).for_each(|lane| self.take(lane, packed));
        Ok(())
    }

    /// Packs what is pending as a frame of its own.
    fn pack_pending(&mut self, packed: &mut Packed) -> std::io::Result<()> {
        if self.pending.is_empty() {
            return Ok(());
        }
        let frame = std::iter::once(std::iter::once(&self.pending[..]));
        self.lanes[0].pack(frame, self.count, self.sequence, self.cipher.as_ref())?;
        self.pending.clear();
        self.take(0, packed);
        Ok(())
    }

    /// Takes what a lane has packed.
    fn take(&mut self, lane: usize, packed: &mut Packed) {
        let lane = &self.lanes[lane];
        packed.stored.extend_from_slice(&lane.stored);
        packed.entries.extend_from_slice(&lane.entries);
        self.count += lane.entries.len() as u64;
    }
}

/// Frames on their way into a file.
struct FrameWriter<'a> {
    out: BufWriter<File>,
    path: &'a Path,
    table: Vec<FrameEntry>,
    at: u64,
}

impl FrameWriter<'_> {
    fn write(&mut self, packed: &Packed) -> Result<(), StoreError> {
        self.out
            .write_all(&packed.stored)
            .map_err(StoreError::io(self.path))?;
        for entry in &packed.entries {
            let mut entry = *entry;
            entry.offset = self.at.into();
            self.at += u64::from(entry.length.get());
            self.table.push(entry);
        }
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
    let file = durable::begin(new)?;
    let lane = |_| {
        Ok(Lane {
            packer: Packer::new(compression)?,
            frame: Vec::with_capacity(FRAME_BYTES),
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
        table: Vec::new(),
        at: BLOCK_BYTES,
    };
    let mut packer = FramePacker {
        sequence: source.sequence().0,
        lanes,
        cipher: None,
        pending: Vec::with_capacity(FRAME_BYTES),
        count: 0,
    };
    let mut header = SettledHeader::empty();
    if let Some(new) = encryption {
        (header.key, header.salt) = (new.key, new.salt);
        header.incompat = (header.incompat.get() | SETTLED_IS_ENCRYPTED).into();
        packer.cipher = Some(new.cipher);
    }
    writer.out.write_all(&[0u8; BLOCK]).map_err(&io)?;
    let mut sorter = BlockSorter::new(source, entries, kept.map(|kept| kept.blocks));
    write_blocks(&mut sorter, &mut packer, &mut writer)?;
    let mut tables = writer.table.as_bytes().to_vec();
    let numbers = sorter.numbers().iter();
    tables.extend(numbers.flat_map(|number| number.to_le_bytes()));
    let footer = source.footer();
    header.volume = footer.volume;
    header.sequence = footer.sequence;
    header.data_bytes = footer.data_bytes;
    header.kept_blocks = u64::from(sorter.kept).into();
    header.tables_at = writer.at.into();
    header.tables_crc = crc32c(&tables).into();
    let cipher = packer.cipher;
    let mut out = writer.out;
    if let Some(kept) = kept {
        // Whatever the policy: the tables of a segment of which little is left are nearly all the same.
        let packed = zstd::bulk::compress(&tables, 3).map_err(&io)?;
        header.incompat = (header.incompat.get() | SETTLED_IS_PRUNED).into();
        header.tables_bytes = (packed.len() as u64).into();
        header.run_bytes = (kept.run.len() as u64).into();
        header.kept_root = *sorter.hasher.finalize().as_bytes();
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

/// Blocks that are in memory together, and which of them are kept: in the order of the volume.
struct Window {
    start: u64,
    bytes: Vec<u8>,
    kept: Vec<u32>,
}

impl Window {
    fn block(&self, block: u32) -> &[u8] {
        &self.bytes[(u64::from(block) - self.start) as usize * BLOCK..][..BLOCK]
    }
}

/// Reads a segment's blocks, window by window, and decides for each where it goes.
struct BlockSorter<'a> {
    source: SegmentBytes<'a>,
    path: &'a Path,
    /// By block: whether somebody needs it; none: all are needed.
    needed: Option<&'a [bool]>,
    count: u64,
    places: Vec<u64>,
    /// The block table.
    numbers: Vec<u32>,
    kept: u32,
    /// Blocks by checksum: the first of its kind, and those that are the same.
    seen: HashMap<u32, u32>,
    copies: Vec<(u32, u32)>,
    earlier: Vec<u8>,
    /// Of what is not gone, if something is.
    hasher: blake3::Hasher,
    next: u64,
}

impl<'a> BlockSorter<'a> {
    fn new(
        source: &'a SegmentFile,
        entries: &[RunEntry],
        needed: Option<&'a [bool]>,
    ) -> BlockSorter<'a> {
        let count = source.footer().data_bytes.get() / BLOCK_BYTES;
        BlockSorter {
            source: SegmentBytes::new(source),
            path: source.path(),
            needed,
            count,
            places: places(source, entries),
            numbers: vec![BLOCK_IS_GONE; count as usize],
            kept: 0,
            seen: HashMap::new(),
            copies: Vec::new(),
            earlier: vec![0u8; BLOCK],
            hasher: blake3::Hasher::new(),
            next: 0,
        }
    }

    fn window(&self) -> Window {
        Window {
            start: 0,
            bytes: vec![0u8; self.count.min(WINDOW_BLOCKS) as usize * BLOCK],
            kept: Vec::new(),
        }
    }

    fn is_needed(&self, block: u64) -> bool {
        let is_needed = |needed: &[bool]| needed.get(block as usize) == Some(&true);
        self.needed.is_none_or(is_needed)
    }

    /// The next window; false: there is none.
    fn read(&mut self, window: &mut Window) -> Result<bool, StoreError> {
        window.kept.clear();
        window.start = self.next;
        let end = self.count.min(window.start + WINDOW_BLOCKS);
        while self.next < end {
            let more = (self.next..end).take(READ_BLOCKS);
            let count = more.take_while(|block| self.is_needed(*block)).count();
            if count > 0 {
                let within = (self.next - window.start) as usize * BLOCK;
                let bytes = &mut window.bytes[within..within + count * BLOCK];
                self.source
                    .read_at(self.next * BLOCK_BYTES, bytes)
                    .map_err(StoreError::io(self.path))?;
            }
            let next = self.next + count.max(1) as u64;
            for block in self.next..self.next + count as u64 {
                self.place(block as u32, window)
                    .map_err(StoreError::io(self.path))?;
            }
            self.next = next;
        }
        window
            .kept
            .sort_by_key(|block| self.places[*block as usize]);
        for block in &window.kept {
            self.numbers[*block as usize] = self.kept;
            self.kept += 1;
        }
        Ok(end > window.start)
    }

    /// What becomes of a block that was read: left out, because it is zero or there already, or kept.
    fn place(&mut self, block: u32, window: &mut Window) -> std::io::Result<()> {
        let this = window.block(block);
        if self.needed.is_some() {
            self.hasher.update(this);
        }
        if this == [0u8; BLOCK] {
            self.numbers[block as usize] = BLOCK_IS_ZERO;
            return Ok(());
        }
        // A checksum only says where to look; what counts are the bytes.
        match self.seen.entry(crc32c(this)) {
            Entry::Occupied(found) => {
                let there = *found.get();
                let is_same = if u64::from(there) < window.start {
                    let at = u64::from(there) * BLOCK_BYTES;
                    self.source.read_at(at, &mut self.earlier)?;
                    self.earlier == this
                } else {
                    window.block(there) == this
                };
                if is_same {
                    self.copies.push((block, there));
                    return Ok(());
                }
            }
            Entry::Vacant(free) => {
                free.insert(block);
            }
        }
        window.kept.push(block);
        Ok(())
    }

    /// The block table, once all was read.
    fn numbers(&mut self) -> &[u32] {
        for (block, there) in self.copies.drain(..) {
            self.numbers[block as usize] = self.numbers[there as usize];
        }
        &self.numbers
    }
}

/// Threads that pack. Not those that images are read on: whoever reads does not wait for what goes on behind the store's back.
fn packers() -> Option<&'static rayon::ThreadPool> {
    static PACKERS: LazyLock<Option<rayon::ThreadPool>> = LazyLock::new(|| {
        let named = |index| format!("pack-{index}");
        let pool = rayon::ThreadPoolBuilder::new().thread_name(named);
        pool.build().ok()
    });
    PACKERS.as_ref()
}

/// Moves all blocks into frames. While a window is packed the one before it is written and the next one is read.
fn write_blocks(
    sorter: &mut BlockSorter<'_>,
    packer: &mut FramePacker,
    writer: &mut FrameWriter<'_>,
) -> Result<(), StoreError> {
    let mut work = || write_windows(sorter, packer, writer);
    match packers() {
        Some(packers) => packers.install(work),
        None => work(),
    }
}

fn write_windows(
    sorter: &mut BlockSorter<'_>,
    packer: &mut FramePacker,
    writer: &mut FrameWriter<'_>,
) -> Result<(), StoreError> {
    let (mut now, mut next) = (sorter.window(), sorter.window());
    let (mut packed, mut done) = (Packed::default(), Packed::default());
    let mut more = sorter.read(&mut now)?;
    while more {
        let beside = || {
            writer.write(&done)?;
            sorter.read(&mut next)
        };
        let (read, kept) = rayon::join(beside, || packer.keep(&now, &mut packed));
        kept.map_err(StoreError::io(writer.path))?;
        more = read?;
        std::mem::swap(&mut now, &mut next);
        std::mem::swap(&mut packed, &mut done);
    }
    packer
        .pack_pending(&mut done)
        .map_err(StoreError::io(writer.path))?;
    writer.write(&done)
}
