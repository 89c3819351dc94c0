//! A hot copy behind a front end, on a thread of its own: it never asks the volume's thread for anything.
//!
//! A read takes each block from where it is: the origin, the spool, a batch on its way there, the copy's overlay. What came from the origin counts only
//! if the block is still unsaved *after* the read: the volume saves a block before it overwrites it. Otherwise the request is done again; a block is
//! saved once, so that ends. Every page of the spool is checked against its CRC.
//! Writes go to the overlay, a sparse file, by whole blocks. They survive the process, not the machine.

use super::memory::{CopyMemory, Saved, SpoolMemory};
use super::view::{Source, View};
use crate::bitmap::BITMAP_BLOCK_BYTES;
use std::collections::VecDeque;
use std::fs::File;
use std::os::unix::fs::FileExt;
use varve_format::{SPOOL_EXTENTS_AT, crc32c};
use varve_front::{Answer, Device, Errno, Request, RequestKind, RingPort};
use varve_log::{Buffer, Disk, IoError, Medium, Memory, Operation, UringMedium};

const PAGE: usize = BITMAP_BLOCK_BYTES as usize;
/// Blocks of one request at most: 256 KiB that begin and end inside a block.
const PARTS_MAX: usize = 66;
/// A request is not done again more often than it has blocks.
const ATTEMPTS_MAX: usize = PARTS_MAX + 1;

/// What a copy's device reads and writes, opened for it alone.
pub struct CopyFiles {
    /// The origin, for reading.
    pub origin: File,
    /// The spool, for reading.
    pub spool: File,
    /// What is written to the copy; none: it is read-only.
    pub overlay: Option<File>,
    /// The spool's memory.
    pub spool_memory: File,
    /// Extents of the spool.
    pub extents: u64,
    /// The copy's memory.
    pub copy_memory: File,
    /// Size of the volume.
    pub volume_bytes: u64,
}

/// One run of blocks of a request, from one place.
#[derive(Clone, Copy)]
struct Part {
    /// First byte in the volume, and length.
    offset: u64,
    length: usize,
    /// `None`: the origin.
    saved: Option<Saved>,
    /// It was read into the request's bounce page, because the request wants only a part of the block.
    bounced: bool,
}

#[derive(Default)]
struct Active {
    request: Option<Request>,
    parts: Vec<Part>,
    outstanding: usize,
    error: Option<Errno>,
    attempts: usize,
    /// Where partial blocks of the spool go: the first one and the last one.
    bounce: Option<Buffer>,
}

/// The device.
pub struct CopyDevice {
    name: String,
    view: View,
    medium: Option<UringMedium<RingPort>>,
    files: CopyFiles,
    table: Vec<Active>,
    answers: VecDeque<Answer>,
    page: Buffer,
    told: bool,
}

impl CopyDevice {
    /// A device over a copy, for a front end with tags below `depth`.
    pub fn new(
        name: &str,
        files: CopyFiles,
        port: RingPort,
        depth: usize,
    ) -> std::io::Result<CopyDevice> {
        let spool_bytes = SpoolMemory::bytes_needed(files.extents);
        let spool = SpoolMemory::new(
            Memory::of_file(&files.spool_memory, spool_bytes)?,
            files.extents,
        );
        let copy_bytes = CopyMemory::bytes_needed(files.volume_bytes);
        let copy = CopyMemory::new(
            Memory::of_file(&files.copy_memory, copy_bytes)?,
            files.volume_bytes,
        );
        let mut medium = UringMedium::new(port, files.origin.try_clone()?)?;
        medium.set(Disk::Spool, Some(files.spool.try_clone()?));
        let active = || -> std::io::Result<Active> {
            Ok(Active {
                parts: Vec::with_capacity(PARTS_MAX),
                bounce: Some(Buffer::anonymous(2 * PAGE)?),
                ..Active::default()
            })
        };
        Ok(CopyDevice {
            name: name.to_owned(),
            view: View::new(spool, copy),
            medium: Some(medium),
            files,
            table: (0..depth).map(|_| active()).collect::<Result<_, _>>()?,
            answers: VecDeque::with_capacity(depth),
            page: Buffer::anonymous(PAGE)?,
            told: false,
        })
    }

    fn answer(&mut self, tag: u32, result: Result<(), Errno>) {
        if result.is_err() && !self.told {
            self.told = true;
            let why = if self.view.is_valid() {
                "a block of it cannot be read"
            } else {
                "it is not valid any more: `hcp -l` says why"
            };
            eprintln!("blkfilter: hot copy {}: {why}", self.name);
        }
        self.answers.push_back(Answer { tag, result });
    }

    fn begin_read(&mut self, tag: u32) {
        let active = &mut self.table[tag as usize];
        let Some(request) = active.request.clone() else {
            return;
        };
        active.parts.clear();
        active.outstanding = 0;
        active.error = None;
        active.attempts += 1;
        let Some(buffer) = request.buffer.clone() else {
            active.error = Some(libc::EINVAL);
            return;
        };
        let end = request.offset + request.length;
        let mut at = request.offset;
        while at < end {
            let block = at / BITMAP_BLOCK_BYTES;
            let stop = ((block + 1) * BITMAP_BLOCK_BYTES).min(end);
            let target = buffer.slice((at - request.offset) as usize, (stop - at) as usize);
            match self.view.source(block) {
                Source::Origin => self.plan(tag, at, stop, None, false),
                Source::Spool(saved) => {
                    let whole = stop - at == BITMAP_BLOCK_BYTES;
                    let buffered = self.page.write_with(|page| {
                        let found =
                            self.view.read_buffered(saved, page) && crc32c(page) == saved.crc;
                        if found {
                            let skip = (at % BITMAP_BLOCK_BYTES) as usize;
                            target.write_with(|target| {
                                target.copy_from_slice(&page[skip..skip + target.len()]);
                            });
                        }
                        found
                    });
                    if !buffered {
                        self.plan(tag, at, stop, Some(saved), !whole);
                    }
                }
                Source::Overlay => {
                    let read = self
                        .files
                        .overlay
                        .as_ref()
                        .map(|file| target.write_with(|bytes| file.read_exact_at(bytes, at)));
                    if !matches!(read, Some(Ok(()))) {
                        self.table[tag as usize].error = Some(libc::EIO);
                    }
                }
                Source::Unreadable => self.table[tag as usize].error = Some(libc::EIO),
            }
            at = stop;
        }
        self.submit_parts(tag, &buffer, request.offset);
    }

    /// Adds a piece to the plan; to the part before it, where both are neighbours at their source, too.
    fn plan(&mut self, tag: u32, at: u64, stop: u64, saved: Option<Saved>, bounced: bool) {
        let parts = &mut self.table[tag as usize].parts;
        if let Some(last) = parts.last_mut()
            && last.offset + last.length as u64 == at
            && !bounced
            && !last.bounced
            && saved.is_none()
            && last.saved.is_none()
        {
            last.length += (stop - at) as usize;
            return;
        }
        parts.push(Part {
            offset: at,
            length: (stop - at) as usize,
            saved,
            bounced,
        });
    }

    fn submit_parts(&mut self, tag: u32, buffer: &Buffer, start: u64) {
        let Some(medium) = self.medium.as_mut() else {
            return;
        };
        let active = &mut self.table[tag as usize];
        if active.error.is_some() {
            return;
        }
        active.outstanding = active.parts.len();
        for (index, part) in active.parts.iter().enumerate() {
            let token = u64::from(tag) << 8 | index as u64;
            let direct = buffer.slice((part.offset - start) as usize, part.length);
            match part.saved {
                None => medium.submit(
                    Disk::Origin,
                    token,
                    Operation::Read {
                        offset: part.offset,
                        buffer: direct,
                    },
                ),
                Some(saved) => {
                    let target = match &active.bounce {
                        Some(bounce) if part.bounced => {
                            bounce.slice(if index == 0 { 0 } else { PAGE }, PAGE)
                        }
                        _ => direct,
                    };
                    medium.submit(
                        Disk::Spool,
                        token,
                        Operation::Read {
                            offset: SPOOL_EXTENTS_AT + saved.page * BITMAP_BLOCK_BYTES,
                            buffer: target,
                        },
                    );
                }
            }
        }
    }

    /// All parts are there: checks them, and answers or begins again.
    fn end_read(&mut self, tag: u32) {
        let active = &self.table[tag as usize];
        let Some(request) = active.request.clone() else {
            return;
        };
        let mut again = false;
        let mut error = active.error;
        for (index, part) in active.parts.iter().enumerate() {
            let Some(saved) = part.saved else {
                let blocks = part.offset / BITMAP_BLOCK_BYTES
                    ..(part.offset + part.length as u64).div_ceil(BITMAP_BLOCK_BYTES);
                again |= blocks.into_iter().any(|block| !self.view.is_origins(block));
                continue;
            };
            let Some(buffer) = &request.buffer else {
                continue;
            };
            let direct = buffer.slice((part.offset - request.offset) as usize, part.length);
            let page = match &active.bounce {
                Some(bounce) if part.bounced => {
                    bounce.slice(if index == 0 { 0 } else { PAGE }, PAGE)
                }
                _ => direct.clone(),
            };
            if page.read_with(crc32c) != saved.crc {
                error.get_or_insert(libc::EIO);
            } else if part.bounced {
                let skip = (part.offset % BITMAP_BLOCK_BYTES) as usize;
                page.slice(skip, part.length)
                    .read_with(|bytes| direct.write_with(|target| target.copy_from_slice(bytes)));
            }
        }
        if !self.view.is_valid() {
            error = Some(libc::EIO);
        }
        if error.is_none() && again && active.attempts < ATTEMPTS_MAX {
            self.begin_read(tag);
            self.end_if_done(tag);
            return;
        }
        let result = match error {
            Some(errno) => Err(errno),
            None if again => Err(libc::EIO),
            None => Ok(()),
        };
        self.table[tag as usize].request = None;
        self.answer(tag, result);
    }

    fn end_if_done(&mut self, tag: u32) {
        let active = &self.table[tag as usize];
        if active.request.is_some() && active.outstanding == 0 {
            self.end_read(tag);
        }
    }

    /// Reads one block, waiting for it: for a write that covers only a part of it.
    fn read_block(&self, block: u64, page: &mut [u8]) -> Result<(), Errno> {
        let errno = |error: std::io::Error| error.raw_os_error().unwrap_or(libc::EIO);
        let offset = block * BITMAP_BLOCK_BYTES;
        let length = (self.files.volume_bytes - offset).min(BITMAP_BLOCK_BYTES) as usize;
        for _ in 0..ATTEMPTS_MAX {
            page.fill(0);
            match self.view.source(block) {
                Source::Origin => {
                    self.files
                        .origin
                        .read_exact_at(&mut page[..length], offset)
                        .map_err(errno)?;
                    if self.view.is_origins(block) {
                        return Ok(());
                    }
                }
                Source::Spool(saved) => {
                    if !self.view.read_buffered(saved, page) || crc32c(page) != saved.crc {
                        let at = SPOOL_EXTENTS_AT + saved.page * BITMAP_BLOCK_BYTES;
                        self.files.spool.read_exact_at(page, at).map_err(errno)?;
                    }
                    if crc32c(page) == saved.crc && self.view.is_valid() {
                        return Ok(());
                    }
                    return Err(libc::EIO);
                }
                Source::Overlay => {
                    let overlay = self.files.overlay.as_ref().ok_or(libc::EROFS)?;
                    return overlay
                        .read_exact_at(&mut page[..length], offset)
                        .map_err(errno);
                }
                Source::Unreadable => return Err(libc::EIO),
            }
        }
        Err(libc::EIO)
    }

    /// Writes to the overlay, block by block.
    fn write(&mut self, request: &Request) -> Result<(), Errno> {
        if !self.view.is_valid() {
            return Err(libc::EIO);
        }
        let end = request.offset + request.length;
        let mut at = request.offset;
        while at < end {
            let block = at / BITMAP_BLOCK_BYTES;
            let (first, stop) = (
                block * BITMAP_BLOCK_BYTES,
                ((block + 1) * BITMAP_BLOCK_BYTES).min(end),
            );
            let scratch = self.page.clone();
            scratch.write_with(|page| -> Result<(), Errno> {
                let whole = at == first
                    && (stop - first == BITMAP_BLOCK_BYTES || stop == self.files.volume_bytes);
                if !whole {
                    self.read_block(block, page)?;
                }
                let target = &mut page[(at - first) as usize..(stop - first) as usize];
                match &request.buffer {
                    Some(buffer) => buffer
                        .slice((at - request.offset) as usize, target.len())
                        .read_with(|bytes| target.copy_from_slice(bytes)),
                    None => target.fill(0),
                }
                let length = (self.files.volume_bytes - first).min(BITMAP_BLOCK_BYTES) as usize;
                let overlay = self.files.overlay.as_ref().ok_or(libc::EROFS)?;
                overlay
                    .write_all_at(&page[..length], first)
                    .map_err(|error| error.raw_os_error().unwrap_or(libc::EIO))
            })?;
            self.view.overlay(block);
            at = stop;
        }
        Ok(())
    }
}

impl Device for CopyDevice {
    fn submit(&mut self, request: Request) {
        let tag = request.tag;
        let end = request.offset.checked_add(request.length);
        if request.kind != RequestKind::Flush && end.is_none_or(|end| end > self.files.volume_bytes)
        {
            self.answer(tag, Err(libc::EINVAL));
            return;
        }
        match request.kind {
            RequestKind::Flush => self.answer(tag, Ok(())),
            RequestKind::Read => {
                let active = &mut self.table[tag as usize];
                active.request = Some(request);
                active.attempts = 0;
                self.begin_read(tag);
                self.end_if_done(tag);
            }
            RequestKind::Write | RequestKind::Zero => {
                let result = self.write(&request);
                self.answer(tag, result);
            }
            RequestKind::Discard => self.answer(tag, Err(libc::EOPNOTSUPP)),
        }
    }

    fn completion(&mut self, user_data: u64, result: i32) {
        let taken = self
            .medium
            .as_mut()
            .and_then(|medium| medium.take(user_data, result));
        if let Some(completion) = taken {
            self.part_done((completion.token >> 8) as u32, completion.result);
        }
    }

    fn woken(&mut self) {}

    fn run(&mut self) {
        // Completions that never reached the kernel.
        while let Some(completion) = self.medium.as_mut().and_then(|medium| medium.poll(false)) {
            self.part_done((completion.token >> 8) as u32, completion.result);
        }
    }

    fn take_answer(&mut self) -> Option<Answer> {
        self.answers.pop_front()
    }

    fn end_turn(&mut self) -> (u64, u64) {
        (varve_front::monotonic_ns(), 1_000_000_000)
    }

    fn is_quiet(&self) -> bool {
        self.answers.is_empty() && self.table.iter().all(|active| active.request.is_none())
    }

    fn closed(&mut self) {
        self.medium = None;
    }
}

impl CopyDevice {
    fn part_done(&mut self, tag: u32, result: Result<(), IoError>) {
        let active = &mut self.table[tag as usize];
        active.outstanding -= 1;
        if let Err(IoError(errno)) = result {
            active.error.get_or_insert(errno);
        }
        self.end_if_done(tag);
    }
}
