//! Copying a device that does not change out: to a file or device (sparse, resumable, verified), to standard output, to NBD, or as qcow2.

mod engine;
mod resume;
mod target;

pub use resume::{Identity, Resume};
pub use target::{Allowed, Target};

use crate::device::size;
use crate::{Output, show_bytes};
use engine::{Job, Plan, copy_ranges, stream};
use serde::Serialize;
use std::path::Path;
use std::time::Instant;
use varve_control::{ControlError, Progress, keep_memory_secret};

/// What is read.
#[derive(Clone, Copy, Debug)]
pub struct Source<'a> {
    /// A device or file.
    pub path: &'a Path,
    /// Its bytes.
    pub bytes: u64,
    /// Who it is, if an interrupted copy of it can be gone on with.
    pub identity: Option<&'a Identity>,
}

/// How.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Only these ranges (offset, length) differ from what the target holds.
    pub only: Option<Vec<(u64, u64)>>,
    /// What the target holds may be overwritten.
    pub overwrite: bool,
    /// The target is read again.
    pub verify: bool,
}

/// What was done.
#[derive(Clone, Debug, Serialize)]
pub struct Copied {
    /// What was read.
    pub source: String,
    /// What was written.
    pub target: String,
    /// Bytes of the source.
    pub bytes: u64,
    /// Bytes that were read now.
    pub read_bytes: u64,
    /// Bytes that were written now.
    pub written_bytes: u64,
    /// The target was read again, and holds what was read.
    pub verified: bool,
    /// How long it took.
    pub seconds: f64,
}

/// Copies. An interrupted copy of the same source to the same file goes on where it was.
pub fn copy_out(
    output: &Output,
    source: Source<'_>,
    target: &Target,
    options: Options,
) -> Result<Copied, ControlError> {
    // What is read may be encrypted where it lies.
    keep_memory_secret(output.program);
    let begun = Instant::now();
    let bar = |what: &str| {
        let mut show = output.bar(what);
        move |done, total| show(Progress { done, total })
    };
    let mut copied = Copied {
        source: source.path.display().to_string(),
        target: target.to_string(),
        bytes: source.bytes,
        read_bytes: 0,
        written_bytes: 0,
        verified: false,
        seconds: 0.0,
    };
    match target {
        Target::Stdout => {
            copied.read_bytes = stream(source.path, source.bytes, bar("copying"))?;
            copied.written_bytes = copied.read_bytes;
        }
        Target::Nbd(uri) => target::by_tool(source.path, uri)?,
        Target::Qcow2(path) => {
            target::qcow2(source.path, path, options.verify)?;
            copied.verified = options.verify;
        }
        Target::File(path) => {
            // Only what this copy began, in a file that is still as it was left.
            let part = Resume::load(path).filter(|part| {
                Some(&part.source) == source.identity && size(path) >= Some(source.bytes)
            });
            let from = part.as_ref().map_or(0, |part| part.done);
            if from > 0 {
                output.say(format!("  going on behind the first {}", show_bytes(from)));
            }
            let plan = Plan {
                source: source.path.to_path_buf(),
                target: path.clone(),
                bytes: source.bytes,
                from,
                only: options.only,
                verify: options.verify,
                overwrite: options.overwrite || part.is_some(),
            };
            let record = source.identity.map(|identity| Resume::of(path, identity));
            let Job { read, written } = copy_ranges(&plan, record.as_ref(), bar)?;
            (copied.read_bytes, copied.written_bytes) = (read, written);
            copied.verified = plan.verify;
        }
    }
    copied.seconds = begun.elapsed().as_secs_f64();
    Ok(copied)
}

impl Copied {
    /// In words.
    #[must_use]
    pub fn words(&self) -> String {
        let verified = if self.verified { ", verified" } else { "" };
        format!(
            "{} copied to {} in {:.1} s ({} read, {} written{verified})",
            show_bytes(self.bytes),
            self.target,
            self.seconds,
            show_bytes(self.read_bytes),
            show_bytes(self.written_bytes)
        )
    }
}
