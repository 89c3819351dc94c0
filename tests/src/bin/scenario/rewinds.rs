//! A rewind is interrupted: by the death of either daemon, or of the machine. It is finished before the device is offered again, and can be undone.

use crate::{Outcome, export, protect};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use varve_tests::scenario::{Installation, digest, pause, run, say};

const MIB: u64 = 96;

fn fill(mapped: &str) -> Result<String, String> {
    run(
        "dd",
        &[
            "if=/dev/urandom",
            &format!("of={mapped}"),
            "bs=1M",
            &format!("count={MIB}"),
            "oflag=direct",
            "conv=fsync",
            "status=none",
        ],
    )?;
    digest(mapped)
}

/// Two contents with a name each; their digests.
fn two_instants(varve: &Installation, device: &str) -> Result<(String, String), String> {
    let mapped = protect(varve, device)?;
    varve.wait_protected()?;
    let first = fill(&mapped)?;
    varve.wait_protected()?;
    varve.varve(&["mark", "first"])?;
    let second = fill(&mapped)?;
    varve.wait_protected()?;
    varve.varve(&["mark", "second"])?;
    Ok((first, second))
}

fn spawn(varve: &Installation, instant: &str) -> Result<std::process::Child, String> {
    Command::new(varve.program("varve"))
        .arg("--root")
        .arg(varve.root())
        .args(["rewind", instant, "--yes"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|e| e.to_string())
}

/// Starts a rewind that may be interrupted.
pub fn begin(varve: &Installation, instant: &str) -> Result<std::process::Child, String> {
    let child = spawn(varve, instant)?;
    let start = Instant::now();
    while !status(varve).contains("\"rewinding\"") {
        if start.elapsed() > Duration::from_secs(30) {
            return Err("the rewind does not begin".to_owned());
        }
        pause(20);
    }
    Ok(child)
}

fn status(varve: &Installation) -> String {
    varve
        .varve(&["--json", "status"])
        .unwrap_or_else(|text| text)
}

/// The device is back, and holds what it should.
fn holds(varve: &Installation, expected: &str, what: &str) -> Outcome {
    let start = Instant::now();
    let found = loop {
        if varve.varve(&["status"]).is_ok()
            && let Ok(mapped) = varve.device("disk")
        {
            break digest(&mapped)?;
        }
        if start.elapsed() > Duration::from_secs(120) {
            return Err(format!("{what}: never finished\n{}", varve.messages()));
        }
        pause(100);
    };
    if found != expected {
        return Err(format!(
            "{what}: the device is not what it was\n{}",
            varve.messages()
        ));
    }
    varve.compare()
}

/// Either daemon is killed in the middle.
pub fn killed(varve: &Installation, device: &str) -> Outcome {
    let start = Instant::now();
    let (first, second) = two_instants(varve, device)?;
    for (program, instant, expected) in [
        ("blkfilter", "first", &first),
        ("varved", "second", &second),
    ] {
        let said = || varve.messages().matches("the interrupted rewind").count();
        // One that is over already was not interrupted: it is begun once more.
        let mut tries = 0;
        let interrupted = loop {
            let before = said();
            let mut client = begin(varve, instant)?;
            run("pkill", &["-KILL", program])?;
            let _ = client.wait();
            if varve.device("disk").is_ok() && status(varve).contains("rewinding") {
                return Err("a device is offered that is half rewound".to_owned());
            }
            varve.varve(&["up"])?;
            holds(varve, expected, &format!("{program} was killed"))?;
            tries += 1;
            if said() > before || tries == 4 {
                break said() > before;
            }
            let other = if instant == "first" {
                "second"
            } else {
                "first"
            };
            varve.varve(&["rewind", other, "--yes"])?;
        };
        if !interrupted {
            return Err(format!("no rewind was interrupted:\n{}", varve.messages()));
        }
        say(
            start,
            &format!("{program} killed in a rewind: finished by itself"),
        );
    }
    varve.varve(&["down"]).map(|_| ())
}

/// An instant lacks a block: that keeps nobody from the device.
pub fn unreadable(varve: &Installation, device: &str) -> Outcome {
    let (_, second) = two_instants(varve, device)?;
    let second = second.as_str();
    let store = format!("{}/var/lib/varve/store/volumes", varve.root().display());
    let list = || run("sh", &["-c", &format!("ls {store}/*/segments/*.seg")]);
    let mapped = varve.device("disk")?;
    let before = list()?;
    fill(&mapped)?;
    varve.varve(&["mark", "third"])?;
    varve.varve(&["history"])?;
    let all = list()?;
    let new: Vec<&str> = all.lines().filter(|file| !before.contains(file)).collect();
    varve.varve(&["rewind", "second", "--yes"])?;
    varve.varve(&["history"])?;
    let damage = || {
        let file = new[new.len() / 2];
        let script = format!(
            "dd if=/dev/zero of={file} bs=4k seek=32 count=$(($(stat -c %s {file}) / 8192)) conv=notrunc status=none"
        );
        run("sh", &["-c", &script]).map(|_| ())
    };
    // Found before anything is touched.
    let expect = |arguments: &[&str], codes: &[&str]| match varve.varve(arguments) {
        Err(told) if codes.iter().all(|code| told.contains(code)) => Ok(()),
        other => Err(format!("{arguments:?}: not {codes:?}: {other:?}")),
    };
    // A rewind that began while it was whole, and is interrupted.
    let mut client = begin(varve, "third")?;
    run("pkill", &["-KILL", "varved"])?;
    let _ = client.wait();
    damage()?;
    varve.varve(&["up"])?;
    let begun = Instant::now();
    while !status(varve).contains("R003-unfinished") && !status(varve).contains("it was before") {
        if begun.elapsed() > Duration::from_secs(60) {
            return Err(format!(
                "it is not said that it cannot be finished: {}",
                status(varve)
            ));
        }
        pause(300);
    }
    expect(
        &["rewind", "third", "--yes"],
        &["S006", "nothing was changed"],
    )?;
    let told = status(varve);
    let undo = told
        .split("`varve rewind ")
        .nth(1)
        .and_then(|rest| rest.split(" --yes").next());
    let undo = undo.ok_or_else(|| format!("it is not said how to undo it: {told}"))?;
    // That is interrupted in its turn: it goes on to where it was taken back to.
    let mut client = spawn(varve, undo)?;
    let noted = format!("ls {}/var/lib/varve/store/rewind-*", varve.root().display());
    let begun = Instant::now();
    while run("sh", &["-c", &noted]).is_err() {
        if begun.elapsed() > Duration::from_secs(60) {
            return Err("the rewind is not taken back".to_owned());
        }
        pause(20);
    }
    run("pkill", &["-KILL", "varved"])?;
    let _ = client.wait();
    varve.varve(&["up"])?;
    let what = "a rewind that could not be finished is undone";
    holds(varve, second, what)?;
    if run("sh", &["-c", &noted]).is_ok() {
        return Err("where it went is noted for ever".to_owned());
    }
    expect(
        &["rewind", "third", "--yes"],
        &["S006", "nothing was changed"],
    )?;
    holds(varve, second, "a rewind that was refused")?;
    varve.varve(&["down"]).map(|_| ())
}

/// A rewind until the power goes.
pub fn load(varve: &Installation, device: &str) -> Outcome {
    let (first, second) = two_instants(varve, device)?;
    let write = |name: &str, text: &str| {
        std::fs::write(varve.root().join(name), text).map_err(|e| e.to_string())
    };
    write("digest-first", &first)?;
    write("digest-second", &second)?;
    run("sync", &[])?;
    begin(varve, "first")?;
    println!("LOADED");
    loop {
        pause(1000);
    }
}

/// The power is back.
pub fn after_cut(varve: &Installation) -> Outcome {
    let read =
        |name: &str| std::fs::read_to_string(varve.root().join(name)).map_err(|e| e.to_string());
    let (first, second) = (read("digest-first")?, read("digest-second")?);
    varve.varve(&["up"])?;
    holds(varve, &first, "after a power cut in a rewind")?;
    if !varve.messages().contains("the interrupted rewind") {
        return Err(format!(
            "the cut interrupted no rewind:\n{}",
            varve.messages()
        ));
    }
    // It was recorded: it can be undone, and the past is still there.
    let image = export(varve, "second", false)?;
    let found = digest(&image)?;
    varve.varve(&["unexport", &image])?;
    if found != second {
        return Err("the instant before the rewind is not what it was".to_owned());
    }
    varve.varve(&["rewind", "second", "--yes"])?;
    holds(varve, &second, "the rewind is undone")?;
    varve.varve(&["down"]).map(|_| ())
}
