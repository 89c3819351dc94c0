//! A file is made whole and durable before it gets its name.
//!
//! Crash: before the rename a `.new` file is left, which the next open of the store removes; after it the whole file is there. The directory is
//! flushed last: until then the old file, or none, may come back, never a half one.
//!
//! History holds what every user of the machine ever wrote, deleted files included: nobody but its owner may read it.

use crate::StoreError;
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use std::fs::{File, Permissions};
use std::io::ErrorKind;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// What files are called until they are whole.
pub(crate) const UNFINISHED: &str = "new";

/// The name under which `path` is written.
pub(crate) fn unfinished(path: &Path) -> PathBuf {
    path.with_extension(UNFINISHED)
}

/// An empty file, whatever was there.
pub(crate) fn begin(new: &Path) -> Result<File, StoreError> {
    let made = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(new);
    made.map_err(StoreError::io(new))
}

/// Makes a directory that only its owner may look into, durably; one that is there, and open to others, is closed. What lies above it is made, if need be.
pub fn private_directory(path: &Path) -> std::io::Result<()> {
    if let Ok(found) = std::fs::metadata(path) {
        let mode = found.permissions().mode();
        return match found.is_dir() && mode & 0o077 != 0 {
            true => or_fixed(std::fs::set_permissions(
                path,
                Permissions::from_mode(0o700),
            )),
            false => Ok(()),
        };
    }
    let parent = path.parent().unwrap_or(path);
    std::fs::create_dir_all(parent)?;
    match std::fs::DirBuilder::new().mode(0o700).create(path) {
        // Another made it meanwhile.
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
        made => made?,
    }
    File::open(parent)?.sync_all()
}

/// What cannot be changed can be used all the same: a file system that is read-only, or keeps no modes.
fn or_fixed(changed: std::io::Result<()>) -> std::io::Result<()> {
    const FIXED: [ErrorKind; 3] = [
        ErrorKind::ReadOnlyFilesystem,
        ErrorKind::PermissionDenied,
        ErrorKind::Unsupported,
    ];
    match changed {
        Err(error) if FIXED.contains(&error.kind()) => Ok(()),
        other => other,
    }
}

/// Makes `path` with what `write` puts into it.
pub(crate) fn create<T>(
    path: &Path,
    write: impl FnOnce(&mut File) -> Result<T, StoreError>,
) -> Result<T, StoreError> {
    let new = unfinished(path);
    let mut file = begin(&new)?;
    let written = write(&mut file).and_then(|done| {
        file.sync_all().map_err(StoreError::io(&new))?;
        name(&new, path)?;
        Ok(done)
    });
    if written.is_err() {
        // On a full disk half a file would keep it full.
        let _ = std::fs::remove_file(&new);
    }
    written
}

/// Gives a whole and durable file its name.
pub(crate) fn name(new: &Path, path: &Path) -> Result<(), StoreError> {
    std::fs::rename(new, path).map_err(StoreError::io(path))?;
    let parent = path.parent().unwrap_or(path);
    File::open(parent)
        .and_then(|directory| directory.sync_all())
        .map_err(StoreError::io(parent))
}

/// What is in memory of a file leaves it, but for what is not on the disk yet: who reads it next reads the disk. The kernel may refuse; then memory is read.
pub(crate) fn forget_cached(path: &Path) {
    if let Ok(file) = File::open(path) {
        let _ = posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
    }
}

/// The files of a directory, in order; what was left unfinished is removed.
pub(crate) fn list(folder: &Path) -> Result<Vec<PathBuf>, StoreError> {
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(StoreError::io(folder))? {
        let path = entry.map_err(StoreError::io(folder))?.path();
        if path.extension().is_some_and(|end| end == UNFINISHED) {
            match std::fs::remove_file(&path).map_err(StoreError::io(&path)) {
                // Nothing is taken for what it is called. What can still be read is to be.
                Ok(()) | Err(StoreError::ReadOnly(_)) => {}
                Err(error) => return Err(error),
            }
        } else {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}
