//! The state file: whether the log may be believed at the next start (see `varve_format::StateSlot`).
//!
//! Crash: slots are written in turn, so a torn write leaves the older one, whose word is the safer: the newer state counts for nobody until it
//! is flushed, and whoever depends on it waits for that.

use varve_format::{
    EpochId, Fingerprint, FormatError, Lsn, STATE_SLOT_BYTES, STATE_SLOTS, SegmentSequence,
    StateKind, StateSlot, VolumeId,
};
use varve_log::{Buffer, Disk, IoError, Medium, Operation, run_blocking};

/// What to write.
#[derive(Clone, Copy, Debug)]
pub struct StateWord {
    /// The state.
    pub kind: StateKind,
    /// The epoch it speaks of.
    pub epoch: EpochId,
    /// Where that epoch began.
    pub start: (Lsn, SegmentSequence),
    /// What the origin looked like (clean close only).
    pub fingerprint: Fingerprint,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Step {
    Idle,
    Writing,
    Flushing,
}

/// The state file and the write that is under way, if any.
pub struct StateFile {
    volume: VolumeId,
    generation: u64,
    buffer: Buffer,
    token: u64,
    step: Step,
}

impl StateFile {
    /// Reads both slots. The newer valid one is returned; a slot of a newer version or of another volume is an error.
    pub fn open(
        medium: &mut dyn Medium,
        volume: VolumeId,
        token: u64,
    ) -> Result<(StateFile, Option<StateSlot>), StateError> {
        let buffer = Buffer::anonymous(STATE_SLOT_BYTES)
            .map_err(|e| IoError(e.raw_os_error().unwrap_or(libc::ENOMEM)))?;
        let mut newest: Option<StateSlot> = None;
        for slot in 0..STATE_SLOTS {
            let offset = (slot * STATE_SLOT_BYTES) as u64;
            let read = Operation::Read {
                offset,
                buffer: buffer.clone(),
            };
            if run_blocking(medium, Disk::State, read).is_err() {
                continue; // Nothing is known, then: everything is read again.
            }
            match buffer.read_with(StateSlot::parse) {
                Ok(found) if found.volume != volume.0 => {
                    return Err(StateError::Format(FormatError::Foreign("volume")));
                }
                Ok(found)
                    if newest
                        .as_ref()
                        .is_none_or(|n| found.generation.get() > n.generation.get()) =>
                {
                    newest = Some(found)
                }
                Err(error @ FormatError::Newer { .. }) => return Err(StateError::Format(error)),
                Ok(_) | Err(_) => {}
            }
        }
        let generation = newest.as_ref().map_or(0, |slot| slot.generation.get());
        Ok((
            StateFile {
                volume,
                generation,
                buffer,
                token,
                step: Step::Idle,
            },
            newest,
        ))
    }

    fn prepare(&mut self, medium: &dyn Medium, word: &StateWord) -> Operation {
        self.generation += 1;
        let block = StateSlot::encode(
            word.kind,
            self.volume,
            word.epoch,
            self.generation,
            medium.now().wall,
            word.start,
            word.fingerprint,
        );
        self.buffer
            .write_with(|bytes| bytes.copy_from_slice(&block));
        let offset = (self.generation % STATE_SLOTS as u64) * STATE_SLOT_BYTES as u64;
        Operation::Write {
            offset,
            buffer: self.buffer.clone(),
        }
    }

    /// Writes and flushes, waiting for it.
    pub fn write_blocking(
        &mut self,
        medium: &mut dyn Medium,
        word: &StateWord,
    ) -> Result<(), IoError> {
        let operation = self.prepare(medium, word);
        run_blocking(medium, Disk::State, operation)?;
        run_blocking(medium, Disk::State, Operation::Flush)
    }

    /// Whether a write is under way (its buffer is in use).
    pub fn is_busy(&self) -> bool {
        self.step != Step::Idle
    }

    /// Starts a write; [`StateFile::complete`] tells when it is durable. Not while busy.
    pub fn write(&mut self, medium: &mut dyn Medium, word: &StateWord) {
        assert!(!self.is_busy());
        let operation = self.prepare(medium, word);
        self.step = Step::Writing;
        medium.submit(Disk::State, self.token, operation);
    }

    /// Takes a completion. `Some(result)`: the write has ended.
    pub fn complete(
        &mut self,
        medium: &mut dyn Medium,
        result: Result<(), IoError>,
    ) -> Option<Result<(), IoError>> {
        match (self.step, result) {
            (Step::Writing, Ok(())) => {
                self.step = Step::Flushing;
                medium.submit(Disk::State, self.token, Operation::Flush);
                None
            }
            (_, result) => {
                self.step = Step::Idle;
                Some(result)
            }
        }
    }
}

/// Why a state file could not be read.
#[derive(Debug)]
pub enum StateError {
    /// The disk failed.
    Io(IoError),
    /// The bytes are another's.
    Format(FormatError),
}

impl From<IoError> for StateError {
    fn from(error: IoError) -> StateError {
        StateError::Io(error)
    }
}
