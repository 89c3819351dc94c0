//! Salvage: everything of a store that its disk still gives, in a new store.
//!
//! Files are copied as they are. What cannot be read becomes zeroes, block by block; no checksum in a store matches zeroes, so exactly that is damaged in
//! the copy, and is told with its instants and blocks. A run is kept even if its segment is lost: it says what that held.
//! Nothing of the old store is changed, and the new place must be empty, or hold a salvage that was broken off: that goes on. Files that were read without
//! fault, and have not changed since, are not read again: each time costs a failing disk some of its life.

use crate::{StoreError, durable};
use std::fs::{File, Permissions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, PermissionsExt};
use std::path::{Path, PathBuf};

const BLOCK: usize = 4096;
const STEP: usize = 1 << 20;
/// Not worth a copy: it belongs to a process. Maps are: where a segment and its run are damaged they may be the last to know what it held.
const LEFT_OUT: [&str; 3] = ["lock", "scratch", "scrub"];
/// Is in the new store until it is whole.
const UNDER_WAY: &str = "salvage-unfinished";

/// What was salvaged.
#[derive(Clone, Debug, Default)]
pub struct Salvaged {
    /// Files that were copied.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
    /// What could not be read: file, first byte, bytes; no bytes: nothing of the file could.
    pub unreadable: Vec<(PathBuf, u64, u64)>,
}

/// A file that is to be copied.
struct Source {
    path: PathBuf,
    bytes: u64,
}

/// In which order files are copied.
fn rank(path: &Path) -> u8 {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let ending = path.extension().unwrap_or_default().to_string_lossy();
    match (name.as_ref(), ending.as_ref()) {
        (name, _) if name.starts_with("keys") => 0,
        (_, "run") => 1,
        (_, "seg") => 2,
        (name, _) if name.starts_with("kept") => 4,
        _ => 3,
    }
}

fn is_map(path: &Path) -> bool {
    path.extension().is_some_and(|ending| ending == "map")
}

/// All files below a directory.
fn list(
    directory: &Path,
    sources: &mut Vec<Source>,
    salvaged: &mut Salvaged,
) -> Result<(), StoreError> {
    let io = StoreError::io(directory);
    let mut entries = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(&io)? {
        match entry {
            Ok(entry) => entries.push(entry),
            // What stands behind it in the directory is not known.
            Err(_) => salvaged.unreadable.push((directory.to_path_buf(), 0, 0)),
        }
    }
    // Runs before segments: a segment that is taken meanwhile then is there without its run, which is made of it.
    entries.sort_by_key(std::fs::DirEntry::file_name);
    for entry in entries {
        let (path, name) = (entry.path(), entry.file_name());
        let unfinished = path
            .extension()
            .is_some_and(|end| end == durable::UNFINISHED);
        if unfinished || LEFT_OUT.iter().any(|left_out| *left_out == name) {
            continue;
        }
        match entry.metadata() {
            Ok(metadata) if metadata.is_dir() => {
                if list(&path, sources, salvaged).is_err() {
                    salvaged.unreadable.push((path, 0, 0));
                }
            }
            Ok(metadata) if metadata.is_file() => sources.push(Source {
                path,
                bytes: metadata.len(),
            }),
            Ok(_) | Err(_) => salvaged.unreadable.push((path, 0, 0)),
        }
    }
    Ok(())
}

/// Whether a file was copied before, whole, and is the same still.
fn is_there(source: &std::fs::Metadata, target: &Path) -> bool {
    std::fs::metadata(target).is_ok_and(|there| {
        let same_time = there.modified().ok() == source.modified().ok();
        there.is_file() && there.len() == source.len() && same_time
    })
}

/// Begins a salvage into an empty directory, or goes on with one; gives the file that says that it is not whole.
fn begin(to: &Path) -> Result<PathBuf, StoreError> {
    let io = StoreError::io(to);
    std::fs::create_dir_all(to).map_err(&io)?;
    let under_way = to.join(UNDER_WAY);
    let mut there = std::fs::read_dir(to).map_err(&io)?;
    if there.next().is_some() && !under_way.is_file() {
        return Err(StoreError::NotEmpty(to.to_path_buf()));
    }
    std::fs::set_permissions(to, Permissions::from_mode(0o700)).map_err(&io)?;
    drop(durable::begin(&under_way)?);
    Ok(under_way)
}

/// Copies the store under `from` into the directory `to`, which is empty or holds a part of it. `go_on` hears (bytes done, bytes in all), and can end it.
pub fn salvage(
    from: &Path,
    to: &Path,
    mut go_on: impl FnMut(u64, u64) -> bool,
) -> Result<Salvaged, StoreError> {
    let under_way = begin(to)?;
    let (mut sources, mut salvaged) = (Vec::new(), Salvaged::default());
    list(from, &mut sources, &mut salvaged)?;
    // Pruning may go on meanwhile. It replaces a segment before its run, and strikes instants before either: so copied the other way round, the copy is what
    // some crash would have left. Keys come first: all depends on them.
    sources.sort_by_cached_key(|source| (rank(&source.path), source.path.clone()));
    let total: u64 = sources.iter().map(|source| source.bytes).sum();
    let mut buffer = vec![0u8; STEP];
    for source in &sources {
        let Ok(inside) = source.path.strip_prefix(from) else {
            continue;
        };
        let target = to.join(inside);
        if let Some(parent) = target.parent() {
            let mut private = std::fs::DirBuilder::new();
            let made = private.recursive(true).mode(0o700).create(parent);
            made.map_err(StoreError::io(parent))?;
        }
        let file = match File::open(&source.path) {
            Ok(file) => file,
            // A map that was given up meanwhile.
            Err(error) if error.kind() == ErrorKind::NotFound && is_map(&source.path) => continue,
            Err(_) => {
                salvaged.unreadable.push((source.path.clone(), 0, 0));
                continue;
            }
        };
        // Settling may have given it another's place since it was listed: what counts is what is open.
        let metadata = file.metadata();
        let bytes = metadata
            .as_ref()
            .map_or(source.bytes, std::fs::Metadata::len);
        if metadata
            .as_ref()
            .is_ok_and(|found| is_there(found, &target))
        {
            salvaged.files += 1;
            salvaged.bytes += bytes;
            continue;
        }
        let modified = metadata.and_then(|metadata| metadata.modified());
        let lost = salvaged.unreadable.len();
        durable::create(&target, |out| {
            let mut at = 0;
            while at < bytes {
                let part = &mut buffer[..STEP.min((bytes - at) as usize)];
                read(&file, source, at, part, &mut salvaged.unreadable);
                out.write_all(part).map_err(StoreError::io(&target))?;
                at += part.len() as u64;
                if !go_on(salvaged.bytes + at, total) {
                    return Err(StoreError::Interrupted);
                }
            }
            // By that it is known as whole; and where a run is lost history ages by it.
            match modified {
                Ok(modified) if salvaged.unreadable.len() == lost => {
                    out.set_modified(modified).map_err(StoreError::io(&target))
                }
                _ => Ok(()),
            }
        })?;
        salvaged.files += 1;
        salvaged.bytes += bytes;
    }
    std::fs::remove_file(&under_way).map_err(StoreError::io(&under_way))?;
    Ok(salvaged)
}

/// Reads a part of a file; where it cannot be read, block by block, and zeroes for those that cannot be read alone.
fn read(
    file: &File,
    source: &Source,
    at: u64,
    part: &mut [u8],
    unreadable: &mut Vec<(PathBuf, u64, u64)>,
) {
    if file.read_exact_at(part, at).is_ok() {
        return;
    }
    for (index, block) in part.chunks_mut(BLOCK).enumerate() {
        let offset = at + (index * BLOCK) as u64;
        if file.read_exact_at(block, offset).is_err() {
            block.fill(0);
            let bytes = block.len() as u64;
            match unreadable.last_mut() {
                Some((path, from, length))
                    if *path == source.path && *length > 0 && *from + *length == offset =>
                {
                    *length += bytes;
                }
                _ => unreadable.push((source.path.clone(), offset, bytes)),
            }
        }
    }
}
