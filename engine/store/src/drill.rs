//! What drills found: the last one, and the last that proved its instant. A line each, replaced at once and durable.

use crate::{StoreError, VolumeStore, durable};
use std::io::Write;
use varve_format::{Lsn, WallTime};

const NAME: &str = "drills";

/// What a drill found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Drill {
    /// When it was, by the wall clock, nanoseconds.
    pub held: WallTime,
    /// The instant that was looked at.
    pub lsn: Lsn,
    /// Its time.
    pub time: WallTime,
    /// Whether everything in it was found good.
    pub proven: bool,
    /// What was looked at and what was found, in one line.
    pub found: String,
}

impl Drill {
    fn line(&self) -> String {
        let found: String = self
            .found
            .chars()
            .map(|c| if c.is_control() { ' ' } else { c })
            .collect();
        let Drill {
            held,
            lsn,
            time,
            proven,
            ..
        } = self;
        format!("{} {} {} {proven} {found}\n", held.0, lsn.0, time.0)
    }

    fn parse(line: &str) -> Option<Drill> {
        let mut words = line.splitn(5, ' ');
        Some(Drill {
            held: WallTime(words.next()?.parse().ok()?),
            lsn: Lsn(words.next()?.parse().ok()?),
            time: WallTime(words.next()?.parse().ok()?),
            proven: words.next()?.parse().ok()?,
            found: words.next()?.to_owned(),
        })
    }
}

impl VolumeStore {
    /// The last drill, and the last one that proved its instant. What cannot be read counts as none.
    #[must_use]
    pub fn drills(&self) -> (Option<Drill>, Option<Drill>) {
        let text = std::fs::read_to_string(self.directory().join(NAME)).unwrap_or_default();
        let mut all: Vec<Drill> = text.lines().filter_map(Drill::parse).collect();
        all.sort_by_key(|drill| drill.held);
        let proven = all.iter().rfind(|drill| drill.proven).cloned();
        (all.pop(), proven)
    }

    /// Notes what a drill found.
    pub fn note_drill(&self, drill: &Drill) -> Result<(), StoreError> {
        let path = self.directory().join(NAME);
        let (_, proven) = self.drills();
        let kept = proven.filter(|_| !drill.proven);
        let text: String = kept.iter().chain([drill]).map(Drill::line).collect();
        durable::create(&path, |file| {
            file.write_all(text.as_bytes())
                .map_err(StoreError::io(&path))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::Drill;
    use varve_format::{Lsn, WallTime};

    #[test]
    fn a_line_says_all_of_it_and_half_of_one_nothing() {
        let drill = Drill {
            held: WallTime(5),
            lsn: Lsn(7),
            time: WallTime(-3),
            proven: false,
            found: "ext4: two\nlines, and 3 words".to_owned(),
        };
        let line = drill.line();
        let read = Drill::parse(line.trim_end()).unwrap();
        assert_eq!(read.found, "ext4: two lines, and 3 words");
        assert_eq!(
            Drill {
                found: drill.found.clone(),
                ..read
            },
            drill
        );
        assert_eq!(Drill::parse("5 7 -3 fal"), None);
    }
}
