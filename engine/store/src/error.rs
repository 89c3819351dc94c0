//! What can go wrong with a store: each with a stable code, what it was, and what to do.

use std::fmt;
use std::path::PathBuf;
use varve_format::{FormatError, SegmentSequence};
use varve_log::SegmentError;

/// An error of a store.
#[derive(Debug)]
pub enum StoreError {
    /// The disk or file system failed.
    Io(PathBuf, std::io::Error),
    /// No room on the store's disk.
    Full(PathBuf),
    /// The store may not be written.
    ReadOnly(PathBuf),
    /// A file is damaged.
    Damaged(PathBuf, FormatError),
    /// Another process has this volume's store open.
    Locked(PathBuf),
    /// The log no longer holds a segment that the store lacks.
    Missing(SegmentSequence),
    /// The log's segment is damaged before its end.
    LogDamaged(SegmentSequence, String),
    /// A payload's checksum does not match.
    Payload {
        /// The segment.
        segment: SegmentSequence,
        /// LSN of the record.
        lsn: u64,
        /// First byte of the volume that is lost.
        offset: u64,
        /// Bytes.
        length: u64,
        /// What is wrong.
        why: String,
    },
    /// Neither list of the instants that were kept can be read.
    KeptLost(PathBuf),
    /// The policy has pruned this instant.
    PrunedInstant(varve_format::Lsn),
    /// The policy has pruned what was asked for.
    Pruned(SegmentSequence),
    /// A frame of a settled segment is not what was stored.
    Frame {
        /// The segment.
        segment: SegmentSequence,
        /// Number of the frame.
        frame: u64,
    },
    /// A segment is not what it was when it was sealed.
    Root(SegmentSequence),
    /// The log does not go on where the history ends: this segment of it is another one than the history has, or begins before its end.
    OtherLog(SegmentSequence),
    /// What was written cannot be read back as it was.
    Proof(PathBuf),
    /// There is something where a new store is to be.
    NotEmpty(PathBuf),
    /// Whoever asked has gone.
    Interrupted,
    /// The history is encrypted, and its key is not open.
    NoKey,
    /// The history is encrypted with a key that is not among those of the store.
    OtherKey,
    /// A file of keys cannot be read: it may be newer than what could.
    Unread(String),
    /// The same secret again.
    SameSecret,
    /// The store is not encrypted.
    NoKeys,
    /// The store is encrypted already.
    HasKeys,
    /// Not what opens these keys.
    WrongKey,
    /// A secret that protects nothing.
    WeakKey,
}

impl StoreError {
    /// Whether it only wants a key.
    #[must_use]
    pub fn wants_key(&self) -> bool {
        matches!(self, StoreError::NoKey | StoreError::OtherKey)
    }

    /// Stable code.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            StoreError::Io(..) => "S001-io",
            StoreError::Full(_) => "S007-full",
            StoreError::ReadOnly(_) => "S008-read-only",
            StoreError::Damaged(..) => "S002-damaged",
            StoreError::Locked(_) => "S003-locked",
            StoreError::Missing(_) => "S004-missing",
            StoreError::LogDamaged(..) => "S005-log-damaged",
            StoreError::Payload { .. } => "S006-payload",
            StoreError::Frame { .. } => "S009-frame",
            StoreError::Root(_) => "S010-root",
            StoreError::Proof(_) => "S011-proof",
            StoreError::OtherLog(_) => "S025-other-log",
            StoreError::Pruned(_) | StoreError::PrunedInstant(_) => "S014-pruned",
            StoreError::Interrupted => "S012-interrupted",
            StoreError::NotEmpty(_) => "S020-not-empty",
            StoreError::NoKey => "S015-no-key",
            StoreError::OtherKey => "S021-other-key",
            StoreError::Unread(_) => "S023-unread-keys",
            StoreError::KeptLost(_) => "S024-kept-lost",
            StoreError::SameSecret => "S022-same-secret",
            StoreError::NoKeys => "S016-not-encrypted",
            StoreError::HasKeys => "S017-encrypted",
            StoreError::WrongKey => "S018-wrong-key",
            StoreError::WeakKey => "S019-weak-key",
        }
    }

    pub(crate) fn io(path: &std::path::Path) -> impl Fn(std::io::Error) -> StoreError + '_ {
        // What was carried through a reader comes out as what it was.
        move |error| match error.downcast::<StoreError>() {
            Ok(inner) => inner,
            Err(error) => StoreError::of_io(path, error),
        }
    }

    fn of_io(path: &std::path::Path, error: std::io::Error) -> StoreError {
        match error.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT) => StoreError::Full(path.to_path_buf()),
            Some(libc::EROFS) => StoreError::ReadOnly(path.to_path_buf()),
            _ => StoreError::Io(path.to_path_buf(), error),
        }
    }

    pub(crate) fn segment(path: &std::path::Path) -> impl Fn(SegmentError) -> StoreError + '_ {
        move |error| match error {
            SegmentError::Io(error) => StoreError::io(path)(error),
            SegmentError::Format(error) => StoreError::Damaged(path.to_path_buf(), error),
        }
    }
}

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StoreError::Io(path, error) => write!(f, "{}: {error}", path.display()),
            StoreError::Full(path) => write!(
                f,
                "{}: the store's disk is full. The history waits in the log; when that is full, too, writes are not recorded any more (bypass). Make \
                 room on that file system (`varve unprotect VOLUME --forget` deletes a history); it goes on by itself then",
                path.display()
            ),
            StoreError::ReadOnly(path) => write!(
                f,
                "{}: the store is on a read-only file system. The history waits in the log. Look at `dmesg`, then remount it; it goes on by itself then",
                path.display()
            ),
            StoreError::Damaged(path, error) => write!(
                f,
                "{}: {error}. Other segments stay readable",
                path.display()
            ),
            StoreError::Locked(path) => write!(
                f,
                "{} is open in another varved; stop that one first",
                path.display()
            ),
            StoreError::Missing(sequence) => write!(
                f,
                "segment {sequence} is neither in the store nor in the log: the history has a hole there"
            ),
            StoreError::LogDamaged(sequence, why) => write!(
                f,
                "segment {sequence} of the log is damaged: {why}. Nothing of it is in the history; the volume goes on, and the device is compared with what there is"
            ),
            StoreError::Payload {
                segment,
                lsn,
                offset,
                length,
                why,
            } => write!(
                f,
                "segment {segment}, LSN {lsn}: bytes {offset} to {} of the volume are damaged from this instant until they were next written ({why}). \
                 `varve scrub` lists all damage",
                offset + length
            ),
            StoreError::Frame { segment, frame } => {
                write!(f, "segment {segment}: frame {frame} is damaged")
            }
            StoreError::Pruned(segment) => write!(
                f,
                "segment {segment}: retention has pruned what was asked for; `varve history` says which instants are kept"
            ),
            StoreError::PrunedInstant(lsn) => write!(
                f,
                "LSN {lsn} was pruned by the policy; `varve history` says which instants are kept"
            ),
            StoreError::KeptLost(path) => write!(
                f,
                "{}, and its copy: which instants were kept cannot be read. Nothing is pruned or pinned before that is decided: if a newer version wrote \
                 them, run that; if there is a copy of one elsewhere, put it back and restart varved; if not, `varve rebuild --give-up-kept` gives up those \
                 instants, and what only they needed",
                path.display()
            ),
            StoreError::Root(segment) => write!(
                f,
                "segment {segment} is not what it was when it was sealed; it is left as it is. `varve scrub` says what is lost"
            ),
            StoreError::OtherLog(segment) => write!(
                f,
                "the log does not go on where the history ends (its segment {segment} is another one): log and state file were restored from an older copy, or made anew. \
                 What the log holds is not part of the history"
            ),
            StoreError::NotEmpty(path) => write!(
                f,
                "{} is not empty: a new store needs a directory of its own. Nothing was written",
                path.display()
            ),
            StoreError::Interrupted => f.write_str("nobody waits for it any more"),
            StoreError::NoKey => f.write_str(
                "the history is encrypted and its key is not open: varve key unlock (new history is recorded meanwhile, and waits unencrypted)",
            ),
            StoreError::OtherKey => f.write_str(
                "a part of the history is encrypted with a key that this store does not have. If its keys were exported: varve key import FILE (in a store without \
                 keys: varve key init before)",
            ),
            StoreError::Unread(why) => write!(
                f,
                "a file of keys cannot be read ({why}): nothing is written over what may be newer. Mend it, or move that file away"
            ),
            StoreError::SameSecret => {
                f.write_str("that opens the store already. Nothing was changed")
            }
            StoreError::NoKeys => {
                f.write_str("the store is not encrypted; varve key init makes it so")
            }
            StoreError::HasKeys => f.write_str(
                "the store is encrypted already; varve key rotate changes what opens it",
            ),
            StoreError::WrongKey => f.write_str(
                "that is not the passphrase or key file that opens these keys. Nothing was changed",
            ),
            StoreError::WeakKey => f.write_str(
                "that protects nothing: a passphrase must not be empty, a key file must have 32 bytes or more",
            ),
            StoreError::Proof(path) => write!(
                f,
                "{}: what was written there does not come back from the disk as it was; nothing was replaced. Look at `dmesg`: the disk or its \
                 cabling is failing",
                path.display()
            ),
        }
    }
}

impl std::error::Error for StoreError {}
