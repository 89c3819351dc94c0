//! Closing a volume cleanly, and the fingerprint by which the next start sees whether the origin was written meanwhile.
//!
//! Order: the log holds everything, durably; the origin is flushed; regions are closed; the clean end is durable in the log; the state file says `clean`.
//! Crash: until the state file says `clean`, the log speaks and the next start resyncs what is open (nothing, if the last checkpoint is durable).

use crate::config::Rules;
use crate::state_file::StateWord;
use crate::volume::Volume;
use varve_format::{Fingerprint, Hash128, Record, RecordKind, StateKind, VolumeState};
use varve_log::{Buffer, Disk, IoError, Medium, Operation, run_blocking};

/// Label areas and superblocks: ext4 at 1 KiB, XFS at 0, btrfs at 64 KiB, LVM and md labels in the first KiB, GPT and md 1.0 at the end.
const HEAD_BYTES: u64 = 256 << 10;
const TAIL_BYTES: u64 = 64 << 10;
/// Blocks sampled evenly between them.
const SAMPLES: u64 = 64;

impl<R: Rules> Volume<R> {
    /// Closes the volume. The front end must have stopped and every request must have been answered. Blocks.
    /// `kernel` is asked for the device's write counter after the last write.
    pub fn close(
        &mut self,
        medium: &mut dyn Medium,
        kernel: impl FnOnce() -> Fingerprint,
    ) -> Result<(), IoError> {
        if self.state == VolumeState::Bypass || !self.is_logging() {
            // The state file says so, and memory keeps the bitmap; memory does not last.
            if self.healer.unmarked && !self.state_file.is_busy() {
                let word = self.word(StateKind::Bypass);
                self.state_file.write_blocking(medium, &word)?;
            }
            return Ok(());
        }
        // Before regions are closed the log holds all of their records: a segment may begin in the midst of these, and its header would say that nothing is open.
        self.settle_log(medium)?;
        run_blocking(medium, Disk::Origin, Operation::Flush)?;
        self.regions.clear();
        let next = self.writer.next_lsn();
        self.append_checkpoint(medium, next);
        self.append(medium, Record::new(RecordKind::CleanClose, 0, 0, 0), &[]);
        self.settle_log(medium)?;
        let print = fingerprint(medium, self.config.volume_bytes, kernel())?;
        let word = StateWord {
            kind: StateKind::Clean,
            epoch: self.writer.epoch(),
            start: self.epoch_start,
            fingerprint: print,
        };
        self.state_file.write_blocking(medium, &word)?;
        self.surviving.disclaim();
        Ok(())
    }
}

/// Reads the origin's fingerprint; `kernel` brings counter and boot.
pub(crate) fn fingerprint(
    medium: &mut dyn Medium,
    volume_bytes: u64,
    kernel: Fingerprint,
) -> Result<Fingerprint, IoError> {
    let buffer =
        Buffer::anonymous(4096).map_err(|e| IoError(e.raw_os_error().unwrap_or(libc::ENOMEM)))?;
    let mut hashes = Vec::new();
    let mut read = |offset: u64| {
        let length = (volume_bytes - offset).min(4096) as usize;
        let part = buffer.slice(0, length);
        run_blocking(
            medium,
            Disk::Origin,
            Operation::Read {
                offset,
                buffer: part.clone(),
            },
        )?;
        hashes.extend_from_slice(&part.read_with(Hash128::of).0);
        Ok::<(), IoError>(())
    };
    let head = HEAD_BYTES.min(volume_bytes);
    let tail = volume_bytes.saturating_sub(TAIL_BYTES) / 4096 * 4096;
    for offset in (0..head)
        .step_by(4096)
        .chain((tail.max(head)..volume_bytes).step_by(4096))
    {
        read(offset)?;
    }
    for sample in 0..SAMPLES {
        let offset = (volume_bytes / SAMPLES * sample) / 4096 * 4096;
        if offset >= head && offset < tail {
            read(offset)?;
        }
    }
    Ok(Fingerprint {
        volume_bytes,
        content: Hash128::of(&hashes).0,
        ..kernel
    })
}
