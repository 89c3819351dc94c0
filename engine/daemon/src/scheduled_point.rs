//! A point on the schedule, with the user's commands around it.
//!
//! The second command always follows the first, whatever comes in between: it lets go of what that one holds (a database's locks). Killed at any step:
//!
//!   note "begun" ── before (noted while it runs) ── point ── after ── the note goes
//!
//! Before the note is there nothing was run. From then on until it goes, the next start of the daemon runs the second command: perhaps although the first
//! never ran, or once more. A first command that outlived the daemon is waited for as long as it would have been, else the second would come before it. While
//! the policy cannot be read the note stays. It is not flushed: after a power cut most of what a command can hold is gone, too.
//!
//! A daemon that is told to end ends the first command, makes no point any more, and runs the second.

use crate::hook::{self, Running};
use crate::points::{Point, named};
use crate::service::Service;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use varve_control::PointPolicy;

/// Begins the names of points on the schedule.
const SCHEDULED: &str = "scheduled";

pub(crate) struct ScheduledPoint {
    pub(crate) service: Arc<Service>,
    pub(crate) volume: String,
    pub(crate) policy: PointPolicy,
    /// Where it is noted that it was begun.
    pub(crate) begun: PathBuf,
    /// The volume's ID, and when the point before this one was due, if that is known.
    pub(crate) before: (String, Option<i64>),
}

impl ScheduledPoint {
    /// Makes it; gives the volume's counter of writes afterwards, if it was made.
    pub(crate) fn run(&self) -> Option<u64> {
        let Some(_under_way) = self.service.point_under_way() else {
            self.put_off();
            return None;
        };
        let mut point = Point {
            name: named(SCHEDULED),
            freeze: self.policy.freeze,
            application: false,
        };
        if let Err(why) = self.note(&point.name, None) {
            // Unnoted, a kill would leave held what the first command holds: it is not run.
            self.say(&format!("before: not run: {}: {why}", self.begun.display()));
        } else {
            let noted = |running: &Running| {
                let _ = self.note(&point.name, Some(running));
            };
            let ends = || self.service.is_ending();
            match self.command(&self.policy.before, &point.name, &ends, noted) {
                Ok(ran) => point.application = ran,
                Err(why) => self.say(&format!("before: {why}")),
            }
        }
        let make = |point: &Point| match self.service.is_ending() {
            true => Ok(None),
            false => point.make(&self.service, &self.volume).map(Some),
        };
        let made = make(&point);
        let made = made.or_else(|refused| {
            // What cannot be frozen gets its point without.
            self.say(&refused.to_string());
            match refused.code.starts_with('H') {
                true => {
                    point.freeze = false;
                    make(&point)
                }
                false => Ok(None),
            }
        });
        let is_made = made.as_ref().is_ok_and(Option::is_some);
        if !is_made && self.service.is_ending() {
            self.put_off();
        }
        match made {
            Ok(note) => note
                .filter(|note| !note.is_empty())
                .iter()
                .for_each(|note| self.say(note)),
            Err(failed) => self.say(&failed.to_string()),
        }
        self.end(&point.name);
        // What no point covers is due again, written or not.
        let info = self.service.info(&self.volume).ok().filter(|_| is_made);
        info.map(|info| info.writes)
    }

    /// The daemon ends before it is made: it is due once more when the next one has started.
    fn put_off(&self) {
        if let (id, Some(last)) = &self.before {
            self.service.note_last_point(id, *last);
        }
    }

    /// Notes which point is begun, and the first command while it runs, if there are commands.
    fn note(&self, point: &str, running: Option<&Running>) -> std::io::Result<()> {
        let commands = [&self.policy.before, &self.policy.after];
        let running = running.map_or_else(String::new, Running::line);
        match commands.iter().all(|command| command.trim().is_empty()) {
            true => Ok(()),
            false => std::fs::write(&self.begun, format!("{point}\n{running}")),
        }
    }

    /// Ends a point at which an earlier daemon was killed.
    pub(crate) fn run_rest(&self) {
        let Some(_under_way) = self.service.point_under_way() else {
            return;
        };
        let note = std::fs::read_to_string(&self.begun).unwrap_or_default();
        let mut lines = note.lines();
        let point = lines.next().unwrap_or_default();
        self.say(&format!(
            "varved was ended in the midst of {point}: the command `after` is run now"
        ));
        if let Some(running) = lines.next().and_then(Running::parse) {
            running.end(self.limit());
        }
        self.end(point);
    }

    /// Runs the second command. Failed or not, it has had its turn.
    fn end(&self, point: &str) {
        if let Err(why) = self.command(&self.policy.after, point, &|| false, |_| ()) {
            self.say(&format!("after: {why}"));
        }
        let _ = std::fs::remove_file(&self.begun);
    }

    fn say(&self, text: &str) {
        eprintln!("varved: {}: scheduled point: {text}", self.volume);
    }

    fn limit(&self) -> Duration {
        Duration::from_secs(self.policy.hook_seconds.max(1))
    }

    /// Runs a command; false: there is none.
    fn command(
        &self,
        command: &str,
        point: &str,
        is_over: &dyn Fn() -> bool,
        begun: impl FnOnce(&Running),
    ) -> Result<bool, String> {
        if command.trim().is_empty() {
            return Ok(false);
        }
        hook::refuse_others(&self.service.paths().store_policy())?;
        let variables = [
            ("VARVE_VOLUME", self.volume.as_str()),
            ("VARVE_POINT", point),
        ];
        hook::run(command, &variables, self.limit(), is_over, begun).map(|()| true)
    }
}
