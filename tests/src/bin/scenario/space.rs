//! Histories may take so much space: the oldest instants go, what must stay stays, and the volume is protected all the while. A full store gets room again.

use crate::copies::{expect_refused, fields};
use crate::encrypted::{restart, restart_with};
use crate::{Outcome, export};
use std::path::Path;
use std::time::{Duration, Instant};
use varve_tests::sample::newer;
use varve_tests::scenario::{Installation, digest, pause, run, say};

const MIB: u64 = 1 << 20;
/// What `varve status` says of it.
const HELD_UP: &str = "nothing may go while a part of the oldest one is not known";
/// What histories may take, of a disk of 64 MiB.
const SPACE: u64 = 24 * MIB;

fn sh(script: &str) -> Outcome {
    run("sh", &["-c", script]).map(|_| ())
}

fn stored(varve: &Installation) -> Result<u64, String> {
    let history = varve.varve(&["--json", "history"])?;
    let stored = fields(&history, "stored_bytes").into_iter().next();
    let stored = stored.and_then(|bytes| bytes.parse().ok());
    stored.ok_or_else(|| format!("no stored_bytes in {history}"))
}

/// Until `test` holds, at most a minute.
fn until(
    varve: &Installation,
    what: &str,
    mut test: impl FnMut() -> Result<bool, String>,
) -> Outcome {
    let start = Instant::now();
    while !test()? {
        if start.elapsed() > Duration::from_secs(60) {
            return Err(format!("{what}: not within a minute\n{}", varve.messages()));
        }
        pause(300);
    }
    Ok(())
}

/// Everything in one life, with the store on a small disk of its own.
pub fn space(varve: &Installation, root: &Path) -> Outcome {
    let store = root.join("var/lib/varve/store");
    let store = store.display().to_string();
    let device = root.join("device").display().to_string();
    sh(&format!(
        "truncate -s 8M {device} && mkdir -p {store} && mount -t tmpfs -o size=64m none {store}"
    ))?;
    varve.varve(&["up"])?;
    varve.varve(&["protect", &device, "--name", "disk", "--log-size", "128"])?;
    let outcome = life(varve);
    let down = varve.varve(&["down"]);
    let _ = run("umount", &["-l", &store]);
    outcome.and(down.map(|_| ()))
}

/// What a day adds is what was added, by the day; of less than a minute nothing is concluded.
fn rate_is_told(varve: &Installation, start: Instant) -> Outcome {
    let stored = stored(varve)?;
    let policy = varve.varve(&["--json", "policy"])?;
    let told = fields(&policy, "bytes_per_day").into_iter().next();
    let told = told.and_then(|bytes| bytes.parse::<f64>().ok());
    let told = told.ok_or_else(|| format!("no bytes_per_day in {policy}"))?;
    let right = stored as f64 * 86400.0 / start.elapsed().as_secs_f64().max(60.0);
    match told > right / 2.0 && told < right * 2.0 {
        true => Ok(()),
        false => Err(format!(
            "{told} bytes a day are told, of {stored} in {:?}",
            start.elapsed()
        )),
    }
}

/// A segment and its run were written by a newer version. What they hold is not known: there is too much, and all of it stays until they can be read again.
fn nothing_goes_while_a_part_is_unknown(varve: &Installation) -> Outcome {
    let volumes = format!("{}/var/lib/varve/store/volumes/*", varve.root().display());
    let middle = |kind: &str| -> Result<String, String> {
        let listed = run("sh", &["-c", &format!("ls {volumes}/{kind}")])?;
        let all: Vec<&str> = listed.lines().collect();
        all.get(all.len() / 2)
            .map(|path| (*path).to_owned())
            .ok_or_else(|| format!("no {kind}"))
    };
    let segment = middle("segments/*.seg")?;
    let victims = [
        segment.clone(),
        segment
            .replace("/segments/", "/runs/")
            .replace(".seg", ".run"),
    ];
    let read = |path: &String| std::fs::read(path).map_err(|e| format!("{path}: {e}"));
    let write =
        |path: &String, bytes: &[u8]| std::fs::write(path, bytes).map_err(|e| e.to_string());
    let mut before = Vec::new();
    restart_with(varve, || {
        for path in &victims {
            let bytes = read(path)?;
            write(path, &newer(&bytes))?;
            before.push(bytes);
        }
        Ok(())
    })?;
    let there = stored(varve)?;
    varve.varve(&["policy", "set", "--space", "12M", "--yes"])?;
    until(varve, "it is said what holds it up", || {
        let status = varve.varve(&["--json", "status"]);
        let status = status.unwrap_or_else(|told| told);
        Ok(status.contains(HELD_UP) && status.contains("varve check --volume disk"))
    })?;
    pause(5000);
    // Compressing may take off a little.
    if stored(varve)? < there / 10 * 9 {
        return Err("something went beside what is not known".to_owned());
    }
    varve.varve(&["policy", "set", "--space", "24M"])?;
    restart_with(varve, || {
        victims
            .iter()
            .zip(&before)
            .try_for_each(|(path, bytes)| write(path, bytes))
    })?;
    until(varve, "nothing is held up any more", || {
        let status = varve.varve(&["--json", "status"])?;
        Ok(!status.contains(HELD_UP))
    })
}

fn life(varve: &Installation) -> Outcome {
    let start = Instant::now();
    let mapped = varve.device("disk")?;
    varve.wait_protected()?;
    // Nothing of it compresses: what is kept is what is stored.
    let turn = std::cell::Cell::new(0u64);
    let write = || {
        turn.set(turn.get() + 1);
        let script = format!(
            "dd if=/dev/urandom of={mapped} bs=256k count=4 seek={} oflag=direct conv=notrunc status=none",
            turn.get() % 8 * 4
        );
        sh(&script)
    };
    for text in ["much", "0.5", "120%"] {
        expect_refused(
            varve.varve(&["policy", "set", "--space", text]),
            "X006-policy",
        )?;
    }
    varve.varve(&[
        "policy",
        "set",
        "--keep",
        "all 8s, 2s 1h",
        "--immutable",
        "2s",
        "--space",
        "24M",
    ])?;
    (0..8).try_for_each(|_| write())?;
    rate_is_told(varve, start)?;
    varve.varve(&["mark", "first"])?;
    varve.varve(&["mark", "pinned"])?;
    let content = digest(&mapped)?;
    varve.varve(&["pin", "pinned"])?;
    let since = Instant::now();
    let mut most = 0;
    while turn.get() * MIB < 5 * SPACE / 2 && since.elapsed() < Duration::from_secs(180) {
        write()?;
        pause(250);
        most = most.max(stored(varve)?);
    }
    let written = turn.get() * MIB;
    say(
        start,
        &format!(
            "{} MiB written, {} KiB stored at most",
            written / MIB,
            most >> 10
        ),
    );
    // What waits to be looked at, and a segment, may be too much for a moment.
    if written < 2 * SPACE || !(SPACE / 2..=SPACE * 2).contains(&most) {
        return Err(format!(
            "{most} bytes were stored of {written}\n{}",
            varve.messages()
        ));
    }
    until(varve, "the limit is kept", || {
        Ok(stored(varve)? <= SPACE + SPACE / 10)
    })?;
    if !varve.messages().contains("the oldest instants go") {
        return Err(format!("it is not said\n{}", varve.messages()));
    }
    expect_refused(varve.varve(&["export", "first"]), "I00")?;
    let image = export(varve, "pinned", false)?;
    let same = digest(&image)? == content;
    varve.varve(&["unexport", &image])?;
    let status = varve.varve(&["--json", "status"])?;
    if !same || !status.contains("\"bypasses\": 0") {
        return Err(format!(
            "what is pinned has changed, or it was in bypass: {status}"
        ));
    }
    print!("{}", varve.varve(&["policy"])?);
    print!("{}", varve.varve(&["history"])?);

    nothing_goes_while_a_part_is_unknown(varve)?;
    say(start, "nothing goes while a part is not known");

    // Less than what must stay: asked first, then said.
    expect_refused(varve.varve(&["policy", "set", "--space", "4M"]), "--yes")?;
    let policy = varve.varve(&["policy"])?;
    if !policy.contains("24.0 MiB (space = \"24M\")") {
        return Err(format!("what was refused counts: {policy}"));
    }
    varve.varve(&["policy", "set", "--space", "4M", "--yes"])?;
    until(varve, "nothing is left that may go", || {
        let status = varve
            .varve(&["--json", "status"])
            .unwrap_or_else(|told| told);
        Ok(status.contains("nothing of them may go"))
    })?;
    let policy = varve.varve(&["policy"])?;
    if !policy.contains("IT IS TOO MUCH") {
        return Err(format!("it is not said that it is too much: {policy}"));
    }
    print!("{policy}");
    let image = export(varve, "pinned", false)?;
    let same = digest(&image)? == content;
    varve.varve(&["unexport", &image])?;
    if !same {
        return Err("what is pinned has gone for space".to_owned());
    }
    varve.varve(&["unpin", "pinned"])?;
    say(
        start,
        "what must stay stays, and that it is too much is said",
    );

    // Without a limit the store fills up; a daemon that finds it so can still be told to keep less.
    varve.varve(&["policy", "set", "--keep", "all", "--space", "0"])?;
    until(varve, "the store is full", || {
        write()?;
        let history = varve
            .varve(&["--json", "history"])
            .unwrap_or_else(|told| told);
        Ok(history.contains("S007-full"))
    })?;
    restart(varve)?;
    let history = varve.varve(&["--json", "history"])?;
    if !history.contains("S007-full") {
        return Err(format!("it is full no more by itself: {history}"));
    }
    varve.varve(&["policy", "set", "--keep", "all 2s"])?;
    until(varve, "there is room again", || {
        let history = varve
            .varve(&["--json", "history"])
            .unwrap_or_else(|told| told);
        Ok(!history.contains("S007-full") && stored(varve)? < 2 * SPACE)
    })?;
    varve.wait_protected()?;
    let image = export(varve, "now", false)?;
    let same = digest(&image)? == digest(&mapped)?;
    varve.varve(&["unexport", &image])?;
    if !same {
        return Err("the present has changed".to_owned());
    }
    print!("{}", varve.varve(&["scrub"])?);
    say(start, "a full store has room again");
    Ok(())
}
