//! Retention on a live volume: instants thin out while it is written, what is kept are instants of the writer's, what is not is refused by name.

use crate::copies::{expect_refused, fields};
use crate::{Outcome, export, protect, stamper_on_zeroes};
use std::time::{Duration, Instant};
use varve_tests::scenario::{Installation, pause, run, say};
use varve_tests::stamps::{Stamper, read_stamps};

const BLOCKS: u64 = 1024;

/// What the device holds after `count` stamps.
fn model(count: u64) -> Vec<u64> {
    let mut model = vec![0; BLOCKS as usize];
    for stamp in 1..=count {
        model[Stamper::place(stamp, BLOCKS) as usize] = stamp;
    }
    model
}

/// An image must be an instant of the writer's: gives how many stamps it holds.
fn stamps_at(varve: &Installation, instant: &str) -> Result<u64, String> {
    let image = export(varve, instant, false)?;
    let found = read_stamps(&image, BLOCKS)?;
    varve.varve(&["unexport", &image])?;
    let count = found.iter().copied().max().unwrap_or(0);
    if found != model(count) {
        return Err(format!(
            "{instant} is no instant that ever was ({count} stamps)"
        ));
    }
    Ok(count)
}

fn number(json: &str, name: &str) -> Result<u64, String> {
    let found = fields(json, name).into_iter().next().unwrap_or_default();
    found.parse().map_err(|_| format!("no {name} in {json}"))
}

/// The instants that are kept, by LSN.
fn kept(history: &str) -> Vec<u64> {
    let list = history.split("\"kept\": [").nth(1).unwrap_or_default();
    let list = list.split(']').next().unwrap_or_default();
    fields(list, "lsn")
        .iter()
        .filter_map(|lsn| lsn.parse().ok())
        .collect()
}

/// A file of which a part is wrong says nothing, although another part would prune at once; nor does its absence for a moment.
fn nothing_by_a_broken_policy(varve: &Installation) -> Outcome {
    let file = varve.root().join("etc/varve/store.toml");
    let before = std::fs::read_to_string(&file).map_err(|e| e.to_string())?;
    let pruned = || number(&varve.varve(&["--json", "history"])?, "pruned_below_lsn");
    for wrong in [
        "keep = \"all 3s, 5s 1h\"\nspace = \"rubbish\"\n",
        "keep = \"all 3s, 5s 1h\"\nkeeps = 3\n",
        "keep = \"all 3s, 5s 1h\"\nkeep",
    ] {
        std::fs::write(&file, wrong).map_err(|e| e.to_string())?;
        pause(5000);
        if pruned()? != 0 {
            return Err(format!("pruned by a policy that is none: {wrong}"));
        }
        if !varve.messages().contains("Nothing is pruned") {
            return Err(format!("nothing is said of {wrong}: {}", varve.messages()));
        }
        expect_refused(
            varve.varve(&["policy", "simulate", "--keep", "all 3s, 5s 1h"]),
            "X006-policy",
        )?;
        expect_refused(
            varve.varve(&["policy", "set", "--keep", "all"]),
            "store.toml",
        )?;
    }
    std::fs::write(&file, before).map_err(|e| e.to_string())
}

/// Everything in one life.
pub fn retention(varve: &Installation, device: &str) -> Outcome {
    let start = Instant::now();
    let mapped = protect(varve, device)?;
    varve.wait_protected()?;
    expect_refused(
        varve.varve(&["policy", "set", "--keep", "all 3s, 2s 1m, 3s 2m"]),
        "multiple of 2s",
    )?;
    expect_refused(
        varve.varve(&["policy", "set", "--keep", "everything"]),
        "X006-policy",
    )?;
    varve.varve(&["policy", "set", "--keep", "all"])?;
    let mut writer = stamper_on_zeroes(&mapped, BLOCKS)?;
    let mut lsns = Vec::new();
    for second in 0..16 {
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_secs(1) {
            for step in 0..60 {
                writer.write(step == 59)?;
            }
        }
        varve.varve(&["mark", &format!("second-{second}")])?;
        // A look at the past seals a segment.
        let history = varve.varve(&["--json", "history"])?;
        lsns.push(number(&history, "last_lsn")?);
    }
    let pinned = stamps_at(varve, &format!("lsn:{}", lsns[2]))?;
    varve.varve(&["pin", &format!("lsn:{}", lsns[2])])?;
    let simulated = varve.varve(&["--json", "policy", "simulate", "--keep", "all 3s, 5s 1h"])?;
    let gone = fields(&simulated, "gone_and_kept_bytes");
    if number(&simulated, "below_lsn")? == 0 || gone.is_empty() {
        return Err(format!("a simulation says nothing: {simulated}"));
    }
    let before = varve.varve(&["--json", "history"])?;
    if number(&before, "pruned_below_lsn")? != 0 {
        return Err(format!("a simulation has pruned: {before}"));
    }
    print!(
        "{}",
        varve.varve(&["policy", "simulate", "--keep", "all 3s, 5s 1h"])?
    );
    nothing_by_a_broken_policy(varve)?;
    varve.varve(&["policy", "set", "--keep", "all 3s, 5s 1h"])?;
    let since = Instant::now();
    let mut rounds = 0;
    let history = loop {
        // The daemon dies again and again meanwhile.
        if rounds < 3 {
            // Once pruning has begun: something has gone, or a file that is to replace another is there.
            let unfinished = format!(
                "ls {}/var/lib/varve/store/volumes/*/segments/*.new",
                varve.root().display()
            );
            let begun = Instant::now();
            let stored = || number(&varve.varve(&["--json", "history"])?, "stored_bytes");
            let first = stored()?;
            while run("sh", &["-c", &unfinished]).is_err()
                && stored()? >= first
                && begun.elapsed() < Duration::from_secs(10)
            {
                pause(20);
            }
            run(
                "pkill",
                &[
                    "-KILL",
                    "-f",
                    &format!("varved --root {}", varve.root().display()),
                ],
            )?;
            pause(200);
            varve.varve(&["up"])?;
            rounds += 1;
        }
        pause(500);
        writer.write(true)?;
        let history = varve.varve(&["--json", "history"])?;
        if number(&history, "stored_bytes")? * 3 < number(&before, "stored_bytes")? * 2 {
            break history;
        }
        if since.elapsed() > Duration::from_secs(120) {
            return Err(format!(
                "it is never pruned: {history}\n{}",
                varve.messages()
            ));
        }
    };
    let below = number(&history, "pruned_below_lsn")?;
    let kept = kept(&history);
    say(
        start,
        &format!(
            "{} instants are kept below lsn:{below}; {} KiB stored, {} KiB before",
            kept.len(),
            number(&history, "stored_bytes")? >> 10,
            number(&before, "stored_bytes")? >> 10
        ),
    );
    let mut last = 0;
    let listed = kept.clone();
    for lsn in &listed {
        let count = match stamps_at(varve, &format!("lsn:{lsn}")) {
            Ok(count) => count,
            // The ladder goes on with the time: another instant of the same step is kept instead.
            Err(told) if told.contains("I007-pruned") => {
                let now = varve.varve(&["--json", "history"])?;
                match self::kept(&now).contains(lsn) {
                    true => return Err(told),
                    false => continue,
                }
            }
            Err(told) => return Err(told),
        };
        if count < last {
            return Err(format!("lsn:{lsn} holds less than one before it"));
        }
        last = count;
    }
    if kept.len() < 3 || stamps_at(varve, &format!("lsn:{}", lsns[2]))? != pinned {
        return Err(format!("too little is kept: {kept:?}"));
    }
    let refused = lsns
        .iter()
        .filter(|lsn| **lsn + 7 < below && !kept.contains(&(**lsn + 7)));
    for lsn in refused.clone().take(5) {
        expect_refused(
            varve.varve(&["export", &format!("lsn:{}", lsn + 7)]),
            "I007-pruned",
        )?;
    }
    if refused.count() < 5 {
        return Err("nothing was pruned".to_owned());
    }
    // A point lives as long as the last rung.
    stamps_at(varve, "second-0")?;
    varve.varve(&["unpin", &format!("lsn:{}", lsns[2])])?;
    expect_refused(
        varve.varve(&["unpin", &format!("lsn:{}", lsns[2])]),
        "I008-pin",
    )?;
    varve.compare()?;
    print!("{}", varve.varve(&["scrub"])?);
    print!("{}", varve.varve(&["check"])?);
    print!("{}", varve.varve(&["history"])?);
    print!("{}", varve.varve(&["policy"])?);
    say(start, "what is kept are instants that were");
    varve.varve(&["down"])?;
    Ok(())
}
