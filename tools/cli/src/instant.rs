//! Instants as people write them: `2026-11-22 14:03:07.5`, `14:03`, `5 minutes ago`, `now`, `lsn:1234`, or a recovery point's name.

use jiff::civil::{DateTime, Time};
use jiff::{Span, Timestamp, Zoned};
use varve_control::Instant;

/// Reads an instant; times without a zone are this machine's. `now` is injected for tests.
///
/// What is no time and no LSN is a recovery point's name; `point:NAME` says so outright.
pub fn parse_instant(text: &str, now: &Zoned) -> Result<Instant, String> {
    let text = text.trim();
    if text.is_empty() {
        return Err("an instant is a time (`2026-11-22 14:03:07.5`, `5 minutes ago`), `lsn:N`, a point's name, or `now`".to_owned());
    }
    if text == "now" {
        return Ok(Instant::Now);
    }
    if let Some(number) = text.strip_prefix("lsn:") {
        return number
            .parse()
            .map(Instant::Lsn)
            .map_err(|_| format!("`{text}`: an LSN is a number, like `lsn:1234`"));
    }
    if let Some(name) = text.strip_prefix("point:") {
        return Ok(Instant::Point(name.to_owned()));
    }
    if let Some(seconds) = text.strip_prefix('@') {
        let seconds: f64 = seconds.parse().map_err(|_| {
            format!("`{text}`: seconds since 1970 are a number, like `@1795000000.5`")
        })?;
        return Ok(Instant::Time((seconds * 1e9) as i64));
    }
    if let Some(span) = text.strip_suffix(" ago") {
        let span: Span = span.parse().map_err(|_| {
            format!("`{text}`: a time span is like `5 minutes ago` or `1h 30m ago`")
        })?;
        let then = now.checked_sub(span).map_err(|e| e.to_string())?;
        return Ok(time(&then.timestamp()));
    }
    let iso = text.replacen(' ', "T", 1);
    // With a zone's name behind it that counts, not this machine's.
    if let Ok(zoned) = iso.parse::<Zoned>() {
        return Ok(time(&zoned.timestamp()));
    }
    if let Ok(stamp) = text.parse::<Timestamp>() {
        return Ok(time(&stamp));
    }
    let local = |civil: DateTime| {
        let here = now.time_zone().to_ambiguous_zoned(civil);
        let shown = |zoned: Result<Zoned, jiff::Error>| {
            zoned.map_or_else(
                |e| e.to_string(),
                |zoned| zoned.strftime("%FT%T%:z").to_string(),
            )
        };
        if here.is_ambiguous() {
            return Err(format!(
                "`{text}`: clocks were changed then, and it is not one instant. Say which: {} or {}",
                shown(here.clone().earlier()),
                shown(here.later())
            ));
        }
        let zoned = here.compatible().map_err(|e| e.to_string())?;
        Ok(time(&zoned.timestamp()))
    };
    if let Ok(civil) = iso.parse::<DateTime>() {
        return local(civil);
    }
    if text.contains(':')
        && let Ok(of_day) = text.parse::<Time>()
    {
        return local(now.date().to_datetime(of_day));
    }
    if text.starts_with(|c: char| c.is_ascii_digit()) && text.contains([':', ' ']) {
        return Err(format!(
            "`{text}` is not a time that I understand; write it like `2026-11-22 14:03:07.5` (a point's name: `point:{text}`)"
        ));
    }
    Ok(Instant::Point(text.to_owned()))
}

fn time(stamp: &Timestamp) -> Instant {
    Instant::Time(i64::try_from(stamp.as_nanosecond()).unwrap_or(i64::MAX))
}

/// A wall time as this machine's clock shows it, to the millisecond.
#[must_use]
pub fn show_time(ns: i64) -> String {
    Timestamp::from_nanosecond(i128::from(ns)).map_or_else(
        |_| "?".to_owned(),
        |stamp| {
            stamp
                .to_zoned(jiff::tz::TimeZone::system())
                .strftime("%Y-%m-%d %H:%M:%S%.3f")
                .to_string()
        },
    )
}

/// Times in the daemons' messages are seconds since 1970 (`@…`); people read clocks.
#[must_use]
pub fn with_clock_times(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some(at) = rest.find('@') {
        let number: String = rest[at + 1..]
            .chars()
            .take_while(|c| c.is_ascii_digit() || *c == '.')
            .collect();
        let number = number.trim_end_matches('.');
        out += &rest[..at];
        // As the daemons write them, and not a part of somebody's name.
        let is_time = number
            .split_once('.')
            .is_some_and(|(whole, rest)| whole.len() > 8 && rest.len() == 3);
        let stands_alone =
            !rest[..at].ends_with(|c: char| c.is_alphanumeric() || "-_./".contains(c));
        match number
            .parse::<f64>()
            .ok()
            .filter(|_| is_time && stands_alone)
            .ok_or(())
        {
            Ok(seconds) => out += &show_time((seconds * 1e9) as i64),
            Err(_) => out += &rest[at..at + 1 + number.len()],
        }
        rest = &rest[at + 1 + number.len()..];
    }
    out + rest
}

/// How long ago, in one unit.
#[must_use]
pub fn show_ago(ns: i64, now_ns: i64) -> String {
    let seconds = now_ns.saturating_sub(ns).max(0) as f64 / 1e9;
    match seconds {
        s if s < 120.0 => format!("{s:.1} s"),
        s if s < 7200.0 => format!("{:.0} min", s / 60.0),
        s if s < 172_800.0 => format!("{:.1} h", s / 3600.0),
        s => format!("{:.1} d", s / 86400.0),
    }
}

#[cfg(test)]
mod tests {
    use super::parse_instant;
    use jiff::Zoned;
    use varve_control::Instant;

    fn now() -> Zoned {
        "2026-11-22T15:00:00[UTC]".parse().unwrap()
    }

    fn at(text: &str) -> Result<Instant, String> {
        parse_instant(text, &now())
    }

    #[test]
    fn times_points_and_numbers_are_told_apart() {
        let base = 1_795_359_600_000_000_000; // 2026-11-22 15:00:00 UTC
        assert_eq!(
            at("2026-11-22 15:00:00.5"),
            Ok(Instant::Time(base + 500_000_000))
        );
        assert_eq!(at("2026-11-22T15:00:00Z"), Ok(Instant::Time(base)));
        assert_eq!(at("15:00"), Ok(Instant::Time(base)));
        assert_eq!(
            at("5 minutes ago"),
            Ok(Instant::Time(base - 300_000_000_000))
        );
        assert_eq!(
            at("1h 30m ago"),
            Ok(Instant::Time(base - 5_400_000_000_000))
        );
        assert_eq!(at("lsn:77"), Ok(Instant::Lsn(77)));
        assert_eq!(at("now"), Ok(Instant::Now));
        assert_eq!(
            at("before-upgrade"),
            Ok(Instant::Point("before-upgrade".to_owned()))
        );
        assert_eq!(at("point:15:00"), Ok(Instant::Point("15:00".to_owned())));
    }

    #[test]
    fn a_time_that_clocks_showed_twice_or_never_is_not_guessed() {
        let there: Zoned = "2026-11-22T15:00:00[Europe/Berlin]".parse().unwrap();
        let twice = parse_instant("2026-10-25 02:30", &there).unwrap_err();
        assert!(twice.contains("2026-10-25T02:30:00+02:00"), "{twice}");
        assert!(twice.contains("2026-10-25T02:30:00+01:00"), "{twice}");
        assert!(parse_instant("2026-03-29 02:30", &there).is_err());
        let first = parse_instant("2026-10-25T02:30:00+02:00", &there).unwrap();
        let second = parse_instant("2026-10-25T02:30:00+01:00", &there).unwrap();
        let Instant::Time(ns) = first else {
            panic!("{first:?}")
        };
        assert_eq!(second, Instant::Time(ns + 3_600_000_000_000));
        // Where the name of a zone is said it counts.
        let berlin = at("2026-11-22 16:00[Europe/Berlin]");
        assert_eq!(berlin, at("2026-11-22 15:00"));
    }

    #[test]
    fn what_looks_like_a_time_and_is_none_is_refused() {
        for text in [
            "",
            "lsn:x",
            "2026-13-45 99:00",
            "25:99",
            "five minutes ago",
            "@x",
        ] {
            assert!(at(text).is_err(), "{text:?}");
        }
    }
}
