//! How much of the past is kept, in words: `all 48h, 1m 7d, 1h 30d, 1d 1y` keeps every write for 48 hours, then an instant a minute until 7 days, one
//! an hour until 30 days, one a day until a year. `all` keeps everything.
//!
//! Instants are kept at multiples of the step since 1970, and each step is a multiple of the one before: what the next rung wants was kept by this one.

use std::fmt;
use std::str::FromStr;

/// A span of time in nanoseconds.
pub type Nanoseconds = i64;

/// Longest span: what is added to a time stays a time.
const SPAN_MAX: Nanoseconds = 100 * 365 * 86_400_000_000_000;
/// Instants that a ladder may keep: each of them is looked up at every plan.
const INSTANTS_MAX: i64 = 1_000_000;

const UNITS: [(&str, Nanoseconds); 7] = [
    ("y", 365 * 86_400_000_000_000),
    ("w", 7 * 86_400_000_000_000),
    ("d", 86_400_000_000_000),
    ("h", 3_600_000_000_000),
    ("m", 60_000_000_000),
    ("s", 1_000_000_000),
    ("ms", 1_000_000),
];

/// One instant for each `step`, until it is `age` old.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rung {
    /// Distance of two instants.
    pub step: Nanoseconds,
    /// Until when.
    pub age: Nanoseconds,
}

/// What is kept for how long.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ladder {
    /// Every write until it is this old; none: for ever.
    pub all: Option<Nanoseconds>,
    /// Then these, the youngest first.
    pub rungs: Vec<Rung>,
}

/// Reads `48h`, `7d`, `90s`.
pub fn parse_span(word: &str) -> Result<Nanoseconds, String> {
    let digits = word
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(word.len());
    let (number, unit) = word.split_at(digits);
    let unit = UNITS.iter().find(|(name, _)| *name == unit);
    number
        .parse::<i64>()
        .ok()
        .filter(|number| *number > 0)
        .zip(unit)
        .and_then(|(number, (_, unit))| number.checked_mul(*unit))
        .filter(|span| *span <= SPAN_MAX)
        .ok_or_else(|| {
            format!("`{word}` is not a span of time; write it like 90s, 15m, 48h, 7d, 4w or 1y (up to 100y)")
        })
}

/// The same in words.
#[must_use]
pub fn show_span(span: Nanoseconds) -> String {
    let unit = UNITS
        .iter()
        .find(|(_, unit)| span >= *unit && span % unit == 0);
    unit.map_or_else(
        || format!("{span}ns"),
        |(name, unit)| format!("{}{name}", span / unit),
    )
}

impl FromStr for Ladder {
    type Err = String;

    fn from_str(text: &str) -> Result<Ladder, String> {
        let mut parts = text.split(',').map(str::split_whitespace);
        let mut first = parts.next().into_iter().flatten();
        if first.next() != Some("all") {
            return Err(format!(
                "`{text}` must begin with `all`: `all 48h, 1m 7d, 1h 30d, 1d 1y`, or just `all` to keep everything"
            ));
        }
        let all = first.next().map(parse_span).transpose()?;
        if let Some(word) = first.next() {
            return Err(format!(
                "`{word}` in `{text}`: after `all` comes one span, then a comma"
            ));
        }
        let mut ladder = Ladder {
            all,
            rungs: Vec::new(),
        };
        for mut words in parts {
            let (Some(step), Some(age), None) = (words.next(), words.next(), words.next()) else {
                return Err(format!(
                    "`{text}`: after the first comma there are pairs like `1m 7d`: an instant a minute, until it is 7 days old"
                ));
            };
            let rung = Rung {
                step: parse_span(step)?,
                age: parse_span(age)?,
            };
            let Some(all) = all else {
                return Err(format!(
                    "`{text}`: `all` without a span keeps everything already"
                ));
            };
            let (before_step, before_age) =
                ladder.rungs.last().map_or((1, all), |r| (r.step, r.age));
            if rung.age <= before_age {
                return Err(format!(
                    "`{text}`: {age} must be longer than {}",
                    show_span(before_age)
                ));
            }
            if rung.step % before_step != 0 || rung.step <= before_step {
                return Err(format!(
                    "`{text}`: {step} must be a multiple of {}: only what was kept until then can be kept on",
                    show_span(before_step)
                ));
            }
            if rung.step > rung.age {
                return Err(format!("`{text}`: {step} is longer than {age}"));
            }
            ladder.rungs.push(rung);
        }
        let instants = ladder.rungs.iter().map(|rung| rung.age / rung.step);
        let instants: i64 = instants.fold(0, i64::saturating_add);
        if instants > INSTANTS_MAX {
            return Err(format!(
                "`{text}` would keep {instants} instants; {INSTANTS_MAX} are the most. Take longer steps"
            ));
        }
        Ok(ladder)
    }
}

impl fmt::Display for Ladder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("all")?;
        if let Some(all) = self.all {
            write!(f, " {}", show_span(all))?;
        }
        for rung in &self.rungs {
            write!(f, ", {} {}", show_span(rung.step), show_span(rung.age))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::{Ladder, parse_span, show_span};

    #[test]
    fn ladders_are_read_and_shown() {
        for text in [
            "all",
            "all 48h",
            "all 2d, 1m 1w, 1h 30d, 1d 1y",
            "all 1s, 100ms 5s",
        ] {
            let ladder = text.parse::<Ladder>().unwrap();
            assert_eq!(ladder.to_string().parse::<Ladder>().unwrap(), ladder);
        }
        assert_eq!("all 48h".parse::<Ladder>().unwrap().to_string(), "all 2d");
        assert_eq!(show_span(parse_span("1y").unwrap()), "1y");
    }

    #[test]
    fn what_makes_no_sense_is_refused_in_words() {
        for (text, why) in [
            ("", "begin with `all`"),
            ("1m 7d", "begin with `all`"),
            ("all 5", "not a span"),
            ("all 0h", "not a span"),
            ("all 99999999999y", "not a span"),
            ("all 48h 3d", "comma"),
            ("all 48h, 1m", "pairs"),
            ("all 101y", "not a span"),
            ("all 1h, 1s 30d", "instants"),
            ("all 1h, 3d 2d", "longer than 2d"),
            ("all, 1m 7d", "already"),
            ("all 48h, 1m 1d", "longer than 2d"),
            ("all 48h, 1h 7d, 1m 30d", "multiple of 1h"),
            ("all 48h, 7m 7d, 1h 30d", "multiple of 7m"),
        ] {
            let said = text.parse::<Ladder>().unwrap_err();
            assert!(said.contains(why), "{text}: {said}");
        }
    }
}
