//! Image against device: where do they differ, and make them equal. Shared by rewind, compare, verification and (later) restore.
//!
//! Crash: writing is idempotent; after any cut the same difference is computed again and only what still differs is written.

use std::fs::File;
use std::os::unix::fs::FileExt;
use varve_store::{Image, RangeKind, StoreError};

/// Granularity of differences.
pub const BLOCK_BYTES: u64 = 4096;
/// Bytes compared at a time.
const STEP_BYTES: u64 = 1 << 20;

/// Why it stopped.
#[derive(Debug)]
pub enum RestoreError {
    /// The store.
    Store(StoreError),
    /// The device.
    Device(std::io::Error),
    /// Whoever was told of a difference said so.
    Stopped(String),
}

impl std::fmt::Display for RestoreError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            RestoreError::Store(error) => error.fmt(f),
            RestoreError::Device(error) => write!(f, "reading the device: {error}"),
            RestoreError::Stopped(why) => f.write_str(why),
        }
    }
}

impl std::error::Error for RestoreError {}

/// Calls `differs` with (offset, the image's bytes) for every run of blocks in which `device` is not what `image` is. Undefined ranges are
/// skipped. `progress` hears (done, total) and says whether to go on. Returns the bytes that differ.
pub fn differences(
    image: &Image,
    device: &File,
    mut differs: impl FnMut(u64, &[u8]) -> Result<(), String>,
    mut progress: impl FnMut(u64, u64) -> bool,
) -> Result<u64, RestoreError> {
    let total = image.bytes();
    // Aligned for direct I/O.
    let mut space = vec![0u8; (STEP_BYTES + BLOCK_BYTES) as usize];
    let skip = space.as_ptr().align_offset(BLOCK_BYTES as usize);
    let theirs = &mut space[skip..skip + STEP_BYTES as usize];
    let mut ours = vec![0u8; STEP_BYTES as usize];
    let mut different = 0;
    let mut at = 0;
    while at < total {
        let length = (total - at).min(STEP_BYTES);
        for range in image
            .ranges(at, length)
            .map_err(RestoreError::Store)?
            .into_iter()
            .filter(|range| range.kind != RangeKind::Undefined)
        {
            let size = range.length as usize;
            image
                .read(range.offset, &mut ours[..size])
                .map_err(RestoreError::Store)?;
            device
                .read_exact_at(&mut theirs[..size], range.offset)
                .map_err(RestoreError::Device)?;
            different += each_run(range.offset, &ours[..size], &theirs[..size], &mut differs)
                .map_err(RestoreError::Stopped)?;
        }
        at += length;
        if !progress(at, total) {
            return Err(RestoreError::Stopped("interrupted".to_owned()));
        }
    }
    Ok(different)
}

/// Runs of blocks (first byte, length) in which `theirs`, the device's bytes from `offset`, are not what `image` is. Undefined ranges are skipped.
pub fn differing(image: &Image, offset: u64, theirs: &[u8]) -> Result<Vec<(u64, u64)>, StoreError> {
    let mut runs = Vec::new();
    for range in image.ranges(offset, theirs.len() as u64)? {
        if range.kind == RangeKind::Undefined {
            continue;
        }
        let mut ours = vec![0u8; range.length as usize];
        image.read(range.offset, &mut ours)?;
        let from = (range.offset - offset) as usize;
        let theirs = &theirs[from..from + ours.len()];
        let note = &mut |at, bytes: &[u8]| {
            runs.push((at, bytes.len() as u64));
            Ok(())
        };
        // It says nothing that could go wrong.
        let _ = each_run(range.offset, &ours, theirs, note);
    }
    Ok(runs)
}

/// Calls `step` with (end, ranges below it that equal the image) for every MiB of a device of `bytes`, in whole blocks; it says whether to go on. What
/// is undefined in the image, or lies behind its end, counts as different.
pub fn equal_blocks(
    image: &Image,
    device: &File,
    bytes: u64,
    mut step: impl FnMut(u64, Vec<(u64, u64)>) -> Result<bool, String>,
) -> Result<(), RestoreError> {
    let mut space = vec![0u8; (STEP_BYTES + BLOCK_BYTES) as usize];
    let skip = space.as_ptr().align_offset(BLOCK_BYTES as usize);
    let mut ours = vec![0u8; STEP_BYTES as usize];
    let mut at = 0;
    while at < bytes {
        let end = (at + STEP_BYTES).min(bytes);
        let known = end.min(image.bytes().max(at));
        let theirs = &mut space[skip..skip + (known - at) as usize];
        device
            .read_exact_at(theirs, at)
            .map_err(RestoreError::Device)?;
        let ours = &mut ours[..(known - at) as usize];
        image.read(at, ours).map_err(RestoreError::Store)?;
        let ranges = image.ranges(at, known - at).map_err(RestoreError::Store)?;
        let undefined: Vec<_> = ranges
            .iter()
            .filter(|range| range.kind == RangeKind::Undefined)
            .collect();
        let mut equal: Vec<(u64, u64)> = Vec::new();
        let blocks = ours.chunks(BLOCK_BYTES as usize);
        for (index, (left, right)) in blocks.zip(theirs.chunks(BLOCK_BYTES as usize)).enumerate() {
            let (start, length) = (at + index as u64 * BLOCK_BYTES, left.len() as u64);
            let touches = |range: &&varve_store::ImageRange| {
                range.offset < start + length && start < range.offset + range.length
            };
            // The last block of a smaller image is not a whole block of the device.
            let whole = length == BLOCK_BYTES || start + length == bytes;
            if left != right || !whole || undefined.iter().any(touches) {
                continue;
            }
            match equal.last_mut() {
                Some(last) if last.0 + last.1 == start => last.1 += length,
                _ => equal.push((start, length)),
            }
        }
        if !step(end, equal).map_err(RestoreError::Stopped)? {
            return Ok(());
        }
        at = end;
    }
    Ok(())
}

fn each_run(
    base: u64,
    ours: &[u8],
    theirs: &[u8],
    differs: &mut impl FnMut(u64, &[u8]) -> Result<(), String>,
) -> Result<u64, String> {
    let block = BLOCK_BYTES as usize;
    let mut different = 0;
    let mut start = None;
    for (index, (left, right)) in ours.chunks(block).zip(theirs.chunks(block)).enumerate() {
        let at = index * block;
        match (left == right, start) {
            (false, None) => start = Some(at),
            (true, Some(from)) => {
                differs(base + from as u64, &ours[from..at])?;
                different += (at - from) as u64;
                start = None;
            }
            _ => {}
        }
    }
    if let Some(from) = start {
        differs(base + from as u64, &ours[from..])?;
        different += (ours.len() - from) as u64;
    }
    Ok(different)
}
