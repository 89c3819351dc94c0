//! Rewinds: the mapped device goes away, the volume restarts inside a rewind span, takes writes of the rewind only, and is shown again.

use crate::driver::Message;
use crate::manager::{Manager, START_WAIT, Slot, error};
use crate::running::{Mode, Running};
use varve_control::ControlError;
use varve_format::Lsn;
use varve_front::RequestKind;
use varve_front::channel::{self, JobSender};

impl Manager {
    /// Takes the device away and opens a rewind span, or goes on with one that was interrupted.
    pub fn rewind_begin(&self, name: &str, target: Lsn) -> Result<(), ControlError> {
        let _changing = self.changing();
        {
            let slots = self.slots();
            if let Some(Slot::Running(running)) = slots.get(name)
                && matches!(running.mode, Mode::Rewinding(_))
            {
                return match running.rewind_target {
                    Some(old) if old == target => Ok(()),
                    old => Err(error(
                        "V023-rewinding",
                        format!(
                            "a rewind to LSN {} was interrupted; finish it first: `varve rewind lsn:{}`",
                            old.unwrap_or_default(),
                            old.unwrap_or_default()
                        ),
                    )),
                };
            }
        }
        let spec = self.stop(name)?;
        self.open(spec.clone(), Some(target))
            .inspect_err(|failed| {
                eprintln!("blkfilter: {name}: rewind: {failed}");
                let _ = self.reopen(spec.clone());
            })?;
        let begun = |running: &Running| running.rewind_target == Some(target);
        if matches!(self.slots().get(name), Some(Slot::Running(running)) if begun(running)) {
            return Ok(());
        }
        // Another span had begun in that moment (something is to be copied): a rewind does not begin within it.
        let spec = self.stop(name)?;
        self.reopen(spec)?;
        Err(error(
            "V030-state",
            format!(
                "{name} has something to copy first; nothing was changed. Wait until `varve status` says protected, and say it again"
            ),
        ))
    }

    /// The way to a volume that is being rewound.
    fn rewind_jobs(&self, name: &str) -> Result<JobSender, ControlError> {
        let jobs = match self.slots().get(name) {
            Some(Slot::Running(running)) => running.jobs.clone(),
            _ => None,
        };
        jobs.ok_or_else(|| {
            error(
                "V024-no-rewind",
                format!("volume {name} is not being rewound"),
            )
        })
    }

    /// Writes in a rewind.
    pub fn rewind_write(&self, name: &str, offset: u64, data: Vec<u8>) -> Result<(), ControlError> {
        let jobs = self.rewind_jobs(name)?;
        let mut at = offset;
        for part in data.chunks(channel::JOB_BYTES_MAX) {
            let length = part.len() as u64;
            jobs.call(RequestKind::Write, at, length, part.to_vec(), false)
                .map_err(|errno| {
                    error(
                        "V025-write",
                        format!(
                            "writing at {at}: {}",
                            std::io::Error::from_raw_os_error(errno)
                        ),
                    )
                })?;
            at += length;
        }
        Ok(())
    }

    /// Ends the rewind and shows the device again.
    pub fn rewind_end(&self, name: &str) -> Result<(), ControlError> {
        let jobs = self.rewind_jobs(name)?;
        jobs.call(RequestKind::Flush, 0, 0, Vec::new(), false)
            .map_err(|errno| {
                error(
                    "V025-write",
                    format!("flushing: {}", std::io::Error::from_raw_os_error(errno)),
                )
            })?;
        if !self.ask(name, START_WAIT, Message::EndRewind)? {
            return Err(error(
                "V026-bypass",
                "the log is in bypass, or what it missed is still being copied: the rewind's end could not be recorded. Nothing of it is lost",
            ));
        }
        // What was waited for may have taken a while: other volumes were free to change.
        let _changing = self.changing();
        self.rewind_jobs(name)?;
        let spec = self.stop(name)?;
        self.reopen(spec)
    }
}
