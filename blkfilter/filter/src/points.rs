//! Recovery points: an instant of a volume gets a name, if need be while its file systems are frozen.
//!
//! Order: freeze (what they hold in memory is on its way before), the point gets its place among the records, thaw; then it is waited for until it is durable.
//! Power cut before that: there is no such point, and nobody was told of one.

use crate::driver::Message;
use crate::freeze::{DEADLINE, Frozen};
use crate::manager::{ANSWER_WAIT, Manager, error};
use crossbeam_channel::bounded;
use std::time::{Duration, Instant};
use varve_control::{ControlError, is_used_beside};
use varve_format::{Lsn, PointDetail};

/// For so long a device that nobody has open is believed to stay so.
const UNMOUNTED_FOR: Duration = Duration::from_secs(1);
const SLACK: Duration = Duration::from_millis(200);

/// A point that is to be.
#[derive(Clone, Debug)]
pub struct PointLabel {
    /// Its name, 1 to 255 bytes.
    pub name: String,
    /// Bits of [`PointDetail`].
    pub detail: u8,
    /// File systems are frozen no longer than until then.
    pub frozen_until: Option<Instant>,
}

impl PointLabel {
    /// The bits of a point that gets its place now.
    pub(crate) fn detail_now(&self) -> u8 {
        match self.frozen_until {
            Some(until) if Instant::now() >= until => self.detail & !PointDetail::FILE_SYSTEM,
            _ => self.detail,
        }
    }
}

/// A point that is.
pub struct Marked {
    /// Every record before it is below this.
    pub lsn: Lsn,
    /// For how long file systems were frozen.
    pub frozen: Option<Duration>,
    /// It is file-system-consistent.
    pub clean: bool,
    /// What came in between, in words.
    pub note: String,
}

impl Manager {
    /// Appends a recovery point. `freeze`: with the file systems frozen; a volume that is not mounted is clean without.
    pub fn mark(
        &self,
        mut label: PointLabel,
        volume: &str,
        freeze: bool,
    ) -> Result<Marked, ControlError> {
        if label.name.is_empty() || label.name.len() > 255 {
            return Err(error("V021-label", "a point's name has 1 to 255 bytes"));
        }
        let mut note = String::new();
        let mut frozen = None;
        let mut clean = false;
        if freeze {
            let mapped = self.mapped(volume)?;
            match self.freeze_devices(std::iter::once(mapped.as_str()), Vec::new())? {
                Ok(now) => {
                    // What is in use elsewhere is not clean because nothing was found to freeze.
                    let places = now.as_ref().map_or(&[][..], Frozen::directories);
                    clean = !is_used_beside(&mapped, places);
                    if !clean {
                        note = format!(
                            "{mapped} is in use by more than file systems that could be frozen, or has a part of one that lies on other devices, too: the point is crash-consistent"
                        );
                    }
                    frozen = now;
                }
                Err(why) => note = format!("not frozen ({why}): the point is crash-consistent"),
            }
        }
        if clean {
            label.detail |= PointDetail::FILE_SYSTEM;
        }
        label.frozen_until = clean.then(|| match &frozen {
            Some(frozen) => frozen.until() - SLACK,
            None => Instant::now() + UNMOUNTED_FOR,
        });
        let (placed_in, placed) = bounded(1);
        let (reply, answer) = bounded(1);
        let asked = self.tell(volume, Message::Mark(label, placed_in, reply));
        if clean && asked.is_ok() {
            let detail = placed.recv_timeout(DEADLINE).unwrap_or(0);
            if detail & PointDetail::FILE_SYSTEM == 0 {
                clean = false;
                note = "the point had its place too late: the file system may have been written to by then, and it is crash-consistent".to_owned();
            }
        }
        let frozen = frozen.map(Frozen::thaw);
        asked?;
        let marked = answer.recv_timeout(ANSWER_WAIT).map_err(|_| {
            let waited = ANSWER_WAIT.as_secs();
            error(
                "V020-late",
                format!("volume {volume} did not answer in {waited} s"),
            )
        })?;
        let lsn = marked.ok_or_else(|| {
            error("V022-unprotected", format!("volume {volume} records no writes now (bypass, or no room): no point was made; see `varve status`"))
        })?;
        let state = self
            .info(volume)
            .map_or_else(|_| String::new(), |info| info.state);
        if note.is_empty() && !matches!(state.as_str(), "" | "protected") {
            note = format!(
                "{volume} is {state}: what is copied meanwhile is no instant, and this point may lie in that. Make it again once `varve status` says protected"
            );
        }
        Ok(Marked {
            lsn,
            frozen,
            clean,
            note,
        })
    }
}
