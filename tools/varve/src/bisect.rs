//! `varve bisect`: the last instant at which something was still good. One change from good to bad is assumed: with several, one of them is found.

use crate::command::{self, Verdict};
use crate::image::{HeldImage, looking};
use crate::past::{instant, middle};
use crate::{Context, daemons};
use clap::Args;
use serde::Serialize;
use varve_cli::{MountMode, keep_mounts_private, show_time};
use varve_control::{ControlError, Instant};

/// So many instants that cannot be told about are passed over.
const SKIPPED_MAX: usize = 64;

#[derive(Args)]
pub struct BisectArgs {
    /// An instant at which it was good.
    #[arg(long, value_name = "INSTANT")]
    good: String,
    /// A later one at which it was bad.
    #[arg(long, value_name = "INSTANT", default_value = "now")]
    bad: String,
    /// Run in the image's directory (also $VARVE_IMAGE); exit code 0: good, 1 to 124: bad, 125: cannot tell.
    #[arg(long, value_name = "COMMAND")]
    exec: String,
    /// Partition of a whole disk's image.
    #[arg(long, value_name = "N")]
    partition: Option<u32>,
}

/// An instant and what it was found to be.
#[derive(Clone, Copy, Debug, Serialize, PartialEq, Eq)]
struct Found {
    lsn: u64,
    time_ns: i64,
}

#[derive(Serialize)]
struct Answer {
    volume: String,
    last_good: Found,
    first_bad: Found,
    /// Instants that were looked at.
    looked_at: usize,
    /// Between the two, and nothing could be said about them.
    skipped: Vec<u64>,
}

/// Searches.
pub fn run(
    context: &Context,
    volume: Option<String>,
    args: &BisectArgs,
) -> Result<(), ControlError> {
    let volume = daemons::volume(context, volume)?;
    keep_mounts_private()?;
    let mut looked_at = 0;
    let mut look = |instant: &Instant| {
        looked_at += 1;
        look(context, &volume, args, instant)
    };
    let (good, verdict) = look(&instant(&args.good)?)?;
    expect(good, verdict, Verdict::Good)?;
    let (bad, verdict) = look(&instant(&args.bad)?)?;
    expect(bad, verdict, Verdict::Bad)?;
    if bad.lsn <= good.lsn {
        return Err(ControlError::new(
            "I005-instant",
            format!(
                "the good instant (lsn:{}) must lie before the bad one (lsn:{})",
                good.lsn, bad.lsn
            ),
        ));
    }
    let middle = |after: u64, before: u64| middle(context, &volume, after, before);
    let (last_good, first_bad, skipped) =
        search(good, bad, middle, |lsn| look(&Instant::Lsn(lsn)))?;
    let answer = Answer {
        volume,
        last_good,
        first_bad,
        looked_at,
        skipped,
    };
    context.output.result(&answer, || {
        println!(
            "last good  {}  lsn:{}",
            show_time(last_good.time_ns),
            last_good.lsn
        );
        println!(
            "first bad  {}  lsn:{}",
            show_time(first_bad.time_ns),
            first_bad.lsn
        );
        if !answer.skipped.is_empty() {
            println!(
                "nothing could be said about {} instants between them",
                answer.skipped.len()
            );
        }
        context.output.say(format!(
            "{} instants were looked at; one change from good to bad was assumed. Next: varve mount lsn:{} DIR, or varve rewind lsn:{}",
            answer.looked_at, last_good.lsn, last_good.lsn
        ));
    });
    Ok(())
}

fn expect(found: Found, verdict: Verdict, wanted: Verdict) -> Result<(), ControlError> {
    if verdict == wanted {
        return Ok(());
    }
    let name = |verdict: Verdict| match verdict {
        Verdict::Good => "good",
        Verdict::Bad => "bad",
        Verdict::Skip => "neither (exit code 125)",
    };
    Err(ControlError::new(
        "X013-bisect",
        format!(
            "the command finds {} (lsn:{}) {}, which was said to be {}. Nothing was searched",
            show_time(found.time_ns),
            found.lsn,
            name(verdict),
            name(wanted)
        ),
    ))
}

/// Looks at one instant. One that cannot be mounted is bad: something broke its file system.
fn look(
    context: &Context,
    volume: &str,
    args: &BisectArgs,
    instant: &Instant,
) -> Result<(Found, Verdict), ControlError> {
    let mut image = HeldImage::open(context, volume, instant, true)?;
    let directory = looking(context);
    let verdict = match image.mount(
        args.partition,
        &directory,
        MountMode::ReadOnly,
        &["nosuid", "nodev"],
    ) {
        Ok(()) => command::run(&args.exec, &image, &directory)?,
        Err(failed) if failed.code == "X006-mount" => {
            eprintln!("{}: {}", image.instant(), failed.message);
            Verdict::Bad
        }
        Err(failed) => return Err(failed),
    };
    // Neither damage to the history nor a full disk is what is searched for.
    let trouble = match verdict {
        Verdict::Bad => image.trouble(),
        Verdict::Good | Verdict::Skip => None,
    };
    let verdict = match trouble {
        Some(why) => {
            eprintln!("{}: {why}", image.instant());
            Verdict::Skip
        }
        None => verdict,
    };
    let found = Found {
        lsn: image.lsn,
        time_ns: image.time_ns,
    };
    context.output.say(format!(
        "{}  {}",
        image.instant(),
        match verdict {
            Verdict::Good => "good",
            Verdict::Bad => "bad",
            Verdict::Skip => "cannot tell",
        }
    ));
    image.close()?;
    Ok((found, verdict))
}

/// Halves until nothing lies between good and bad but what cannot be told about.
fn search(
    mut good: Found,
    mut bad: Found,
    mut middle: impl FnMut(u64, u64) -> Result<Option<u64>, ControlError>,
    mut look: impl FnMut(u64) -> Result<(Found, Verdict), ControlError>,
) -> Result<(Found, Found, Vec<u64>), ControlError> {
    let mut skipped: Vec<u64> = Vec::new();
    loop {
        skipped.retain(|lsn| *lsn > good.lsn && *lsn < bad.lsn);
        // The middle of the widest interval between good, what was skipped, and bad.
        let mut borders = vec![good.lsn];
        borders.extend(&skipped);
        borders.push(bad.lsn);
        let mut intervals: Vec<(u64, u64)> =
            borders.windows(2).map(|two| (two[0], two[1])).collect();
        intervals.sort_by_key(|(after, before)| std::cmp::Reverse(before - after));
        let mut next = None;
        for (after, before) in intervals {
            next = middle(after, before)?;
            if next.is_some() {
                break;
            }
        }
        let Some(next) = next.filter(|_| skipped.len() < SKIPPED_MAX) else {
            return Ok((good, bad, skipped));
        };
        match look(next)? {
            (found, Verdict::Good) => good = found,
            (found, Verdict::Bad) => bad = found,
            (_, Verdict::Skip) => {
                skipped.push(next);
                skipped.sort_unstable();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Found, search};
    use crate::command::Verdict;

    fn bisect(verdict: impl Fn(u64) -> Verdict) -> (u64, u64, Vec<u64>, usize) {
        let at = |lsn: u64| Found {
            lsn,
            time_ns: lsn as i64,
        };
        let mut looked = 0;
        let (good, bad, skipped) = search(
            at(0),
            at(1_000_000),
            |after, before| Ok((before > after + 1).then_some(after + (before - after) / 2)),
            |lsn| {
                looked += 1;
                Ok((at(lsn), verdict(lsn)))
            },
        )
        .unwrap();
        (good.lsn, bad.lsn, skipped, looked)
    }

    fn change(lsn: u64, at: u64) -> Verdict {
        match lsn < at {
            true => Verdict::Good,
            false => Verdict::Bad,
        }
    }

    #[test]
    fn the_record_that_broke_it_is_found() {
        for at in [1, 2, 500_000, 777_777, 1_000_000] {
            let (good, bad, skipped, looked) = bisect(|lsn| change(lsn, at));
            assert_eq!((good, bad), (at - 1, at));
            assert!(skipped.is_empty() && looked <= 20, "{looked}");
        }
    }

    #[test]
    fn what_cannot_be_told_about_is_passed_over() {
        let (good, bad, skipped, _) = bisect(|lsn| match lsn {
            499_990..500_003 => Verdict::Skip,
            _ => change(lsn, 500_001),
        });
        assert_eq!((good, bad), (499_989, 500_003));
        assert_eq!(skipped.len(), 13);
    }
}
