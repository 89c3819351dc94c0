//! The store's own clock, by which history ages. It never goes faster than the machine runs: whoever sets the wall clock ahead ages nothing.
//!
//! Within one boot it advances by the lesser of what the wall clock and the boot clock (which goes on in suspend) have advanced; over a reboot, when
//! there is no boot clock, by what the wall clock says, but seven days at most, and not before the machine has run for ten minutes: a clock that was ahead
//! when it started is set back by then, and by so much less time has passed. A wall clock that is set back stops it for that moment. What it lags
//! behind it never catches up: history is kept longer, and `varve policy` says so.

use nix::time::{ClockId, clock_gettime};
use std::path::{Path, PathBuf};

/// How much time a machine that was off is believed to have been off.
const OFF_MAX_NS: i64 = 7 * 86_400_000_000_000;
/// For how long the time that a machine was off is not believed yet.
const DOUBT_NS: i64 = 600_000_000_000;
/// How often it is written down.
const NOTE_EVERY_NS: i64 = 60_000_000_000;

/// What the clocks say.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Reading {
    wall_ns: i64,
    boot_ns: i64,
    boot_id: String,
}

/// The clock: its time, and what the others said then.
#[derive(Clone, Debug, PartialEq, Eq)]
struct State {
    time_ns: i64,
    /// What the machine was off, as far as it is not believed yet.
    off_ns: i64,
    then: Reading,
}

impl State {
    fn advance(&self, now: Reading) -> State {
        let wall = now.wall_ns.saturating_sub(self.then.wall_ns);
        let (mut passed, mut off) = (0, self.off_ns);
        if now.boot_id == self.then.boot_id {
            let boot = now.boot_ns.saturating_sub(self.then.boot_ns);
            passed = wall.min(boot).max(0);
            let set_back = boot.saturating_sub(wall).max(0);
            off = off.saturating_sub(set_back).max(0);
        } else {
            off = off.saturating_add(wall.max(0)).min(OFF_MAX_NS);
        }
        if now.boot_ns >= DOUBT_NS {
            passed = passed.saturating_add(std::mem::take(&mut off));
        }
        State {
            time_ns: self.time_ns.saturating_add(passed),
            off_ns: off,
            then: now,
        }
    }

    fn parse(text: &str) -> Option<State> {
        let mut words = text.split_whitespace();
        let mut number = || words.next()?.parse().ok();
        let (time_ns, wall_ns, boot_ns) = (number()?, number()?, number()?);
        let boot_id = words.next()?.to_owned();
        let off_ns = words.next().map_or(Some(0), |off| off.parse().ok())?;
        Some(State {
            time_ns,
            off_ns,
            then: Reading {
                wall_ns,
                boot_ns,
                boot_id,
            },
        })
    }

    fn text(&self) -> String {
        let then = &self.then;
        format!(
            "{} {} {} {} {}\n",
            self.time_ns, then.wall_ns, then.boot_ns, then.boot_id, self.off_ns
        )
    }
}

fn read() -> Reading {
    let time = |id| clock_gettime(id).map_or(0, |t| t.tv_sec() * 1_000_000_000 + t.tv_nsec());
    let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id");
    Reading {
        wall_ns: time(ClockId::CLOCK_REALTIME),
        boot_ns: time(ClockId::CLOCK_BOOTTIME),
        boot_id: boot_id.unwrap_or_default().trim().to_owned(),
    }
}

/// The clock of a store.
pub(crate) struct StoreClock {
    path: PathBuf,
    state: State,
    noted_ns: i64,
}

impl StoreClock {
    /// The clock of the store in `store`; a new store's begins with the wall clock.
    pub(crate) fn open(store: &Path) -> StoreClock {
        let path = store.join("clock");
        let now = read();
        let noted = std::fs::read_to_string(&path).ok();
        let state = noted.as_deref().and_then(State::parse).map_or_else(
            || State {
                // One that is damaged was right when it was written.
                time_ns: written_ns(&path).map_or(now.wall_ns, |then| then.min(now.wall_ns)),
                off_ns: 0,
                then: now.clone(),
            },
            |state| state.advance(now.clone()),
        );
        StoreClock {
            path,
            state,
            noted_ns: i64::MIN,
        }
    }

    /// Its time in nanoseconds since 1970.
    pub(crate) fn now_ns(&mut self) -> i64 {
        self.state = self.state.advance(read());
        if self.state.time_ns.saturating_sub(self.noted_ns) >= NOTE_EVERY_NS {
            // What is lost of it makes history younger, not older.
            if self.note().is_ok() {
                self.noted_ns = self.state.time_ns;
            }
        }
        self.state.time_ns
    }

    fn note(&self) -> std::io::Result<()> {
        let new = self.path.with_extension("new");
        let mut file = std::fs::File::create(&new)?;
        std::io::Write::write_all(&mut file, self.state.text().as_bytes())?;
        file.sync_all()?;
        std::fs::rename(&new, &self.path)
    }
}

fn written_ns(path: &Path) -> Option<i64> {
    let modified = std::fs::metadata(path).ok()?.modified().ok()?;
    let since = modified.duration_since(std::time::UNIX_EPOCH).ok()?;
    Some(since.as_nanos() as i64)
}

#[cfg(test)]
mod tests {
    use super::{DOUBT_NS, OFF_MAX_NS, Reading, State};

    fn reading(wall_ns: i64, boot_ns: i64, boot_id: &str) -> Reading {
        Reading {
            wall_ns,
            boot_ns,
            boot_id: boot_id.to_owned(),
        }
    }

    #[test]
    fn no_jump_of_the_wall_clock_ages_anything() {
        let start = State {
            time_ns: 1000,
            off_ns: 0,
            then: reading(1000, 10, "a"),
        };
        let later = start.advance(reading(1100, 110, "a"));
        assert_eq!(later.time_ns, 1100);
        let ahead = later.advance(reading(1_000_000, 120, "a"));
        assert_eq!(ahead.time_ns, 1110);
        let back = ahead.advance(reading(1130, 130, "a"));
        assert_eq!(back.time_ns, 1110);
        assert_eq!(back.advance(reading(1140, 140, "a")).time_ns, 1120);
        // Off for a while, and off for longer than is believed; neither at once.
        let off = back.advance(reading(1630, 5, "b"));
        assert_eq!(off.time_ns, 1110);
        let believed = off.advance(reading(1625 + DOUBT_NS, DOUBT_NS, "b"));
        assert_eq!(believed.time_ns, 1110 + 500 + DOUBT_NS - 5);
        let far = back.advance(reading(i64::MAX, DOUBT_NS, "b"));
        assert_eq!(far.time_ns, 1110 + OFF_MAX_NS);
        // It was ahead when the machine started, and is set back.
        let corrected = off.advance(reading(1240, 15, "b"));
        assert_eq!((corrected.time_ns, corrected.off_ns), (1110, 100));
        // Another reboot within that time forgets nothing.
        let again = off.advance(reading(1730, 5, "c"));
        assert_eq!((again.time_ns, again.off_ns), (1110, 600));
    }

    #[test]
    fn it_is_read_as_it_was_written() {
        let state = State {
            time_ns: 7,
            off_ns: 3,
            then: reading(8, 9, "boot"),
        };
        assert_eq!(State::parse(&state.text()), Some(state));
        assert_eq!(State::parse("1 2 3 boot").unwrap().off_ns, 0);
        for bad in ["", "1 2 3", "1 2 x boot", "1 2 3 boot x"] {
            assert_eq!(State::parse(bad), None);
        }
    }
}
