//! A point on the schedule, with the user's commands around it.
//!
//! The second command always follows the first, whatever comes in between: it lets go of what that one holds (a database's locks). Killed at any step:
//!
//!   note "begun" ── before ── point ── after ── the note goes
//!
//! Before the note is there nothing was run. From then on until it goes, the next start of the daemon runs the second command: perhaps although the first
//! never ran, or once more. The note is not flushed: after a power cut what the first command held is gone, too.

use crate::hook;
use crate::points::{Point, named};
use crate::service::Service;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use varve_control::{PointPolicy, StorePolicy};

/// Begins the names of points on the schedule.
const SCHEDULED: &str = "scheduled";

pub(crate) struct ScheduledPoint {
    pub(crate) service: Arc<Service>,
    pub(crate) volume: String,
    pub(crate) policy: PointPolicy,
    /// Where it is noted that it was begun.
    pub(crate) begun: PathBuf,
}

impl ScheduledPoint {
    /// Makes it; gives the volume's counter of writes afterwards.
    pub(crate) fn run(&self) -> Option<u64> {
        let mut point = Point {
            name: named(SCHEDULED),
            freeze: self.policy.freeze,
            application: false,
        };
        if let Err(why) = self.note(&point.name) {
            // Unnoted, a kill would leave held what the first command holds: it is not run.
            self.say(&format!("before: not run: {}: {why}", self.begun.display()));
        } else {
            match self.command(&self.policy.before, &point.name) {
                Ok(ran) => point.application = ran,
                Err(why) => self.say(&format!("before: {why}")),
            }
        }
        let made = point.make(&self.service, &self.volume).or_else(|refused| {
            // What cannot be frozen gets its point without.
            self.say(&refused.to_string());
            match refused.code.starts_with('H') {
                true => {
                    point.freeze = false;
                    point.make(&self.service, &self.volume)
                }
                false => Ok(String::new()),
            }
        });
        match made {
            Ok(note) if note.is_empty() => {}
            Ok(note) => self.say(&note),
            Err(failed) => self.say(&failed.to_string()),
        }
        self.end(&point.name);
        self.service.info(&self.volume).ok().map(|info| info.writes)
    }

    /// Notes which point is begun, if there are commands.
    fn note(&self, point: &str) -> std::io::Result<()> {
        let commands = [&self.policy.before, &self.policy.after];
        match commands.iter().all(|command| command.trim().is_empty()) {
            true => Ok(()),
            false => std::fs::write(&self.begun, point),
        }
    }

    /// Runs the second command. Failed or not, it has had its turn.
    fn end(&self, point: &str) {
        if let Err(why) = self.command(&self.policy.after, point) {
            self.say(&format!("after: {why}"));
        }
        let _ = std::fs::remove_file(&self.begun);
    }

    fn say(&self, text: &str) {
        eprintln!("varved: {}: scheduled point: {text}", self.volume);
    }

    /// Runs a command; false: there is none.
    fn command(&self, command: &str, point: &str) -> Result<bool, String> {
        if command.trim().is_empty() {
            return Ok(false);
        }
        hook::refuse_others(&self.service.paths().store_policy())?;
        let limit = Duration::from_secs(self.policy.hook_seconds.max(1));
        let variables = [
            ("VARVE_VOLUME", self.volume.as_str()),
            ("VARVE_POINT", point),
        ];
        hook::run(command, &variables, limit).map(|()| true)
    }
}

/// At the daemon's start: the second command of each point at which it was killed. Volumes: (ID, name).
pub(crate) fn end_what_was_begun(service: &Arc<Service>, volumes: &[(String, String)]) {
    for (id, name) in volumes {
        let begun = service.begun_point(id);
        let Ok(point) = std::fs::read_to_string(&begun) else {
            continue;
        };
        let policy = StorePolicy::load(&service.paths().store_policy());
        let job = ScheduledPoint {
            service: Arc::clone(service),
            volume: name.clone(),
            policy: policy.map(|policy| policy.points).unwrap_or_default(),
            begun,
        };
        job.say(&format!(
            "varved was ended in the midst of {point}: the command `after` is run now"
        ));
        job.end(&point);
    }
}
