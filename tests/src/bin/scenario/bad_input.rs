//! What people do wrong, and what disks do: each gets a named error, nothing is lost, the origin is not touched.

use crate::copies::fields;
use crate::encrypted::restart;
use crate::rewinds::begin;
use crate::{Outcome, export};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};
use varve_tests::scenario::{Installation, pause, run};

const MIB: u64 = 1 << 20;

/// Fails unless the command is refused with this code.
fn refused(varve: &Installation, code: &str, arguments: &[&str]) -> Outcome {
    match varve.varve(arguments) {
        Err(text) if text.contains(code) => Ok(()),
        Err(text) => Err(format!("{arguments:?}: not refused as {code}: {text}")),
        Ok(text) => Err(format!("{arguments:?}: not refused at all: {text}")),
    }
}

fn sh(script: &str) -> Result<String, String> {
    run("sh", &["-c", script])
}

fn file_of(directory: &Path, name: &str, bytes: u64) -> Result<PathBuf, String> {
    let path = directory.join(name);
    let file = File::create(&path).map_err(|e| e.to_string())?;
    file.set_len(bytes).map_err(|e| e.to_string())?;
    Ok(path)
}

fn sum(path: &Path) -> Result<String, String> {
    run("sha256sum", &[&path.display().to_string()])
}

/// Until `test` holds, at most a minute.
fn until(what: &str, mut test: impl FnMut() -> bool) -> Outcome {
    let start = Instant::now();
    while !test() {
        if start.elapsed() > Duration::from_secs(60) {
            return Err(format!("{what}: not within a minute"));
        }
        pause(200);
    }
    Ok(())
}

/// The whole table.
pub fn bad_input(varve: &Installation, root: &Path) -> Outcome {
    let files = root.join("files");
    std::fs::create_dir_all(&files).map_err(|e| e.to_string())?;
    varve.varve(&["up"])?;
    devices(varve, &files)?;
    second_daemon(varve, root)?;
    instants_and_clients(varve, &files)?;
    full_and_read_only(varve, root, &files)?;
    own_writes(varve, root, &files)?;
    varve.varve(&["down"]).map(|_| ())
}

/// Devices that cannot be protected, names that cannot be, logs that are something else.
fn devices(varve: &Installation, files: &Path) -> Outcome {
    let text = |path: &Path| path.display().to_string();
    refused(varve, "V027-missing", &["protect", "/nowhere/at/all"])?;
    refused(varve, "V013-device", &["protect", "/tmp"])?;
    let small = file_of(files, "small", 64 << 10)?;
    refused(varve, "V032-small", &["protect", &text(&small)])?;
    let device = file_of(files, "device", 8 * MIB)?;
    sh(&format!(
        "dd if=/dev/urandom of={} bs=1M count=8 conv=notrunc status=none",
        text(&device)
    ))?;
    let before = sum(&device)?;
    refused(
        varve,
        "V033-name",
        &["protect", &text(&device), "--name", "../x"],
    )?;
    // A log that is somebody's file: refused, and not written to.
    let other = file_of(files, "other", 40 * MIB)?;
    sh(&format!(
        "dd if=/dev/urandom of={} bs=1M count=40 conv=notrunc status=none",
        text(&other)
    ))?;
    let other_before = sum(&other)?;
    let with_log = |log: &str| {
        varve.varve(&[
            "protect",
            &text(&device),
            "--name",
            "d",
            "--log",
            log,
            "--log-size",
            "16",
        ])
    };
    match with_log(&text(&other)) {
        Err(refusal) if refusal.contains("B002") || refusal.contains("V014-log") => {}
        outcome => return Err(format!("somebody's file as a log: {outcome:?}")),
    }
    // The same as a state file; and one that has no place, or is a device that is in use.
    let with_state = |state: &str| {
        let device = text(&device);
        let arguments = [
            "protect",
            &device,
            "--name",
            "d",
            "--state",
            state,
            "--log-size",
            "16",
        ];
        varve.varve(&arguments)
    };
    let nowhere = text(&files.join("small").join("state"));
    for state in [&text(&other), &nowhere] {
        match with_state(state) {
            Err(refusal) if refusal.contains("V015-state") => {}
            outcome => return Err(format!("{state} as a state file: {outcome:?}")),
        }
    }
    if sum(&other)? != other_before {
        return Err("somebody's file was overwritten".to_owned());
    }
    refused(
        varve,
        "V037-same",
        &["protect", &text(&device), "--state", &text(&device)],
    )?;
    // Things that would overwrite each other.
    refused(
        varve,
        "V037-same",
        &["protect", &text(&device), "--log", &text(&device)],
    )?;
    let place = text(&files.join("both"));
    refused(
        varve,
        "V037-same",
        &[
            "protect",
            &text(&device),
            "--log",
            &place,
            "--state",
            &place,
        ],
    )?;
    // A log that has no room, or may not be written.
    let tight = files.join("tight");
    std::fs::create_dir_all(&tight).map_err(|e| e.to_string())?;
    sh(&format!("mount -t tmpfs -o size=4m none {}", text(&tight)))?;
    let full = with_log(&text(&tight.join("log")));
    sh(&format!("mount -o remount,ro {}", text(&tight)))?;
    let read_only = with_log(&text(&tight.join("log2")));
    sh(&format!("umount {}", text(&tight)))?;
    for outcome in [full, read_only] {
        match outcome {
            Err(refusal) if refusal.contains("V014-log") => {}
            outcome => return Err(format!("a log without room: {outcome:?}")),
        }
    }
    // In use.
    let loop_device = run("losetup", &["--find", "--show", &text(&device)])?;
    let loop_device = loop_device.trim().to_owned();
    let busy = (|| {
        run("mkfs.ext4", &["-q", "-F", &loop_device])?;
        let place = files.join("mounted");
        std::fs::create_dir_all(&place).map_err(|e| e.to_string())?;
        run("mount", &[&loop_device, &text(&place)])?;
        let named = refused(
            varve,
            &format!("mounted on {}", text(&place)),
            &["protect", &loop_device],
        );
        let coded = refused(varve, "V012-busy", &["protect", &loop_device]);
        run("umount", &[&text(&place)])?;
        named.and(coded)
    })();
    run("losetup", &["--detach", &loop_device])?;
    busy?;
    // Twice, and of a size that is no number of sectors: the rest is left alone.
    sh(&format!(
        "dd if=/dev/urandom of={} bs=1M count=8 conv=notrunc status=none; printf rest >> {}",
        text(&device),
        text(&device)
    ))?;
    let odd = sum(&device)?;
    varve.varve(&["protect", &text(&device), "--name", "d", "--log-size", "16"])?;
    refused(
        varve,
        "V010-exists",
        &["protect", &text(&device), "--name", "twice"],
    )?;
    refused(
        varve,
        "V010-exists",
        &[
            "protect",
            &text(&small.with_file_name("other")),
            "--name",
            "d",
        ],
    )?;
    varve.compare()?;
    varve.varve(&["unprotect", "d", "--forget"])?;
    if sum(&device)? != odd || odd == before {
        return Err("the origin was changed by being protected".to_owned());
    }
    refused(varve, "V019-unknown", &["unprotect", "d"])
}

fn second_daemon(varve: &Installation, root: &Path) -> Outcome {
    for program in ["blkfilter", "varved"] {
        let path = varve.program(program);
        let output = Command::new(path)
            .arg("--root")
            .arg(root)
            .output()
            .map_err(|e| e.to_string())?;
        if output.status.code() != Some(5) {
            return Err(format!("a second {program}: {output:?}"));
        }
    }
    let told = varve.varve(&["--json", "doctor"]);
    let told = told.unwrap_or_else(|told| told);
    match told.contains("\"schema\"") && told.contains("ublk") {
        true => Ok(()),
        false => Err(format!("doctor says nothing: {told}")),
    }
}

/// Instants that are none; commands whose terminal goes away.
fn instants_and_clients(varve: &Installation, files: &Path) -> Outcome {
    let device = file_of(files, "instants", 64 * MIB)?;
    varve.varve(&[
        "protect",
        &device.display().to_string(),
        "--name",
        "i",
        "--log-size",
        "256",
    ])?;
    let mapped = varve.device("i")?;
    sh(&format!(
        "dd if=/dev/urandom of={mapped} bs=1M count=64 oflag=direct status=none"
    ))?;
    varve.varve(&["mark", "full"])?;
    varve.varve(&["mark", "twin"])?;
    sh(&format!(
        "dd if=/dev/zero of={mapped} bs=1M count=64 oflag=direct status=none"
    ))?;
    // Of points of one name the newest is meant.
    varve.varve(&["mark", "twin"])?;
    let twin = export(varve, "twin", false)?;
    let newest = sh(&format!("cmp -n $((64 << 20)) {twin} /dev/zero"));
    varve.varve(&["unexport", &twin])?;
    newest?;
    for (code, instant) in [
        ("I002-before", "2001-01-01 00:00:00"),
        ("I005-future", "2101-01-01 00:00:00"),
        ("I004-closed", "lsn:1"),
        ("I004-closed", "lsn:999999999"),
        ("I003-point", "no-such-point"),
        ("not a time that I understand", "2026-13-45 99:00"),
    ] {
        refused(varve, code, &["export", instant])?;
    }
    // What would be read as a time, or as another instant, is no name for a point.
    for label in ["2026-11-22", "14:00", "now", "lsn:5", "5 minutes ago"] {
        refused(varve, "V021-label", &["mark", label])?;
    }
    // The terminal goes away in the middle of a rewind: it is finished all the same.
    let program = varve.program("varve").display().to_string();
    let root = varve.root().display().to_string();
    let mut terminal = begin(varve, "full")?;
    let _ = terminal.kill().and_then(|()| terminal.wait());
    until("the rewind is finished", || {
        varve.varve(&["status"]).is_ok() && varve.device("i").is_ok()
    })?;
    let _ = sh(&format!(
        "timeout -s KILL 0.05 {program} --root {root} compare"
    ));
    let _ = sh(&format!(
        "timeout -s KILL 0.05 {program} --root {root} export full"
    ));
    varve.compare()?;
    // Inside a span: the nearest instants are named.
    let history = varve.varve(&["--json", "history"])?;
    let spans = history.split("\"closed\": [").nth(1).unwrap_or_default();
    let numbers: Vec<u64> = spans
        .split(|c: char| !c.is_ascii_digit())
        .filter_map(|word| word.parse().ok())
        .collect();
    let rewound = numbers
        .chunks(4)
        .find(|span| span.len() == 4 && span[1] > span[0] + 2 && span[0] > 0);
    let inside = rewound
        .map(|span| span[0] + 1)
        .ok_or(format!("no span in {history}"))?;
    refused(
        varve,
        "the nearest instants",
        &["export", &format!("lsn:{inside}")],
    )?;
    let image = export(varve, "full", false)?;
    let (now, then) = (
        sum(Path::new(&varve.device("i")?))?,
        sum(Path::new(&image))?,
    );
    if now.split(' ').next() != then.split(' ').next() {
        return Err("after the rewind the device is not what it was".to_owned());
    }
    refused(varve, "S013-in-use", &["unprotect", "i", "--forget"])?;
    varve.device("i")?;
    for line in varve.varve(&["exports"])?.lines() {
        if let Some(device) = line
            .split_whitespace()
            .next()
            .filter(|word| word.starts_with("/dev/"))
        {
            let _ = varve.varve(&["unexport", device]);
        }
    }
    varve.varve(&["unprotect", "i", "--forget"]).map(|_| ())
}

/// The store has no room, or may not be written: writes go on, it says so by name, and goes on by itself.
fn full_and_read_only(varve: &Installation, root: &Path, files: &Path) -> Outcome {
    let store = root.join("var/lib/varve/store");
    let place = store.display().to_string();
    varve.varve(&["down"])?;
    sh(&format!("mount -t tmpfs -o size=24m none {place}"))?;
    varve.varve(&["up"])?;
    let device = file_of(files, "store", 16 * MIB)?;
    varve.varve(&[
        "protect",
        &device.display().to_string(),
        "--name",
        "s",
        "--log-size",
        "64",
    ])?;
    let mapped = varve.device("s")?;
    let fill = |rounds: u32| {
        sh(&format!(
            "for n in $(seq {rounds}); do dd if=/dev/urandom of={mapped} bs=1M count=16 oflag=direct status=none || exit 1; done"
        ))
    };
    fill(2)?;
    let behind = |code: &str| match varve.varve(&["--json", "history"])? {
        told if told.contains(code) => Ok(()),
        told => Err(format!("nothing was said of {code}: {told}")),
    };
    behind("S007-full")?;
    refused(varve, "S007-full", &["export", "now"])?;
    // What it has it gives back, writable too.
    let history = varve.varve(&["--json", "history"])?;
    let last = fields(&history, "last_lsn").into_iter().next();
    let last = format!("lsn:{}", last.unwrap_or_default());
    for writable in [false, true] {
        let image = export(varve, &last, writable)?;
        let read = sh(&format!("cat {image} | wc -c"));
        let written = sh(&format!(
            "dd if=/dev/zero of={image} bs=4k count=1 oflag=direct"
        ));
        varve.varve(&["unexport", &image])?;
        if read?.trim() != (16 * MIB).to_string() || written.is_ok() != writable {
            return Err(format!(
                "of a full store, writable: {writable}: {written:?}"
            ));
        }
    }
    refused(varve, "S007-full", &["rewind", &last, "--yes"])?;
    // The log fills, too: production goes on, unrecorded.
    fill(5)?;
    until("bypass", || {
        let status = varve
            .varve(&["--json", "status"])
            .unwrap_or_else(|text| text);
        status.contains("\"bypasses\"") && !status.contains("\"bypasses\": 0,")
    })?;
    sh(&format!("mount -o remount,size=400m {place}"))?;
    varve.wait_protected()?;
    varve.compare()?;
    varve.varve(&["mark", "before"])?;
    let content = files.join("content");
    run("cp", &[&mapped, &content.display().to_string()])?;
    varve.varve(&["history"])?;
    // While a segment is being compressed its new file is open.
    until("the store is written to no more", || {
        sh(&format!("mount -o remount,ro {place}")).is_ok()
    })?;
    fill(1)?;
    // What is there can be gone back to, by a daemon that finds the store so, too; what is not, is refused.
    for _ in 0..2 {
        behind("S008-read-only")?;
        refused(varve, "S008-read-only", &["export", "now"])?;
        refused(varve, "S008-read-only", &["export", "no-such-point"])?;
        refused(varve, "S008-read-only", &["rewind", "before", "--yes"])?;
        // Writable, too: a mount has to replay its journal somewhere.
        for writable in [false, true] {
            let image = export(varve, "before", writable)?;
            let same = run("cmp", &[&image, &content.display().to_string()]);
            let written = sh(&format!(
                "dd if=/dev/zero of={image} bs=4k count=1 oflag=direct"
            ));
            varve.varve(&["unexport", &image])?;
            same?;
            if written.is_ok() != writable {
                return Err(format!("writable: {writable}, but: {written:?}"));
            }
        }
        let status = varve.varve(&["--json", "status"]);
        let told = status.unwrap_or_else(|told| told);
        if !told.contains("the log will fill up") {
            return Err(format!("status does not warn: {told}"));
        }
        restart(varve)?;
    }
    sh(&format!("mount -o remount,rw {place}"))?;
    varve.varve(&["history"])?;
    varve.compare()?;
    varve.varve(&["unprotect", "s", "--forget"])?;
    rewind_without_room(varve, files, &place)?;
    varve.varve(&["down"])?;
    sh(&format!("umount {place}"))?;
    varve.varve(&["up"]).map(|_| ())
}

fn begin_rewind(varve: &Installation, instant: &str) -> Result<Child, String> {
    let mut rewind = Command::new(varve.program("varve"));
    rewind.arg("--root").arg(varve.root());
    let rewind = rewind.args(["-q", "rewind", instant, "--yes"]).spawn();
    rewind.map_err(|e| e.to_string())
}

/// A rewind whose records would have no room, neither in the store nor in the log, is not begun.
fn rewind_without_room(varve: &Installation, files: &Path, store: &str) -> Outcome {
    let device = file_of(files, "room", 48 * MIB)?;
    let device = device.display().to_string();
    varve.varve(&["protect", &device, "--name", "r", "--log-size", "16"])?;
    varve.wait_protected()?;
    varve.varve(&["mark", "empty"])?;
    let mapped = varve.device("r")?;
    for part in 0..12 {
        sh(&format!(
            "dd if=/dev/urandom of={mapped} bs=1M count=4 seek={} oflag=direct status=none",
            part * 4
        ))?;
        varve.varve(&["history"])?; // The store takes it, so that the log has room for the next.
    }
    varve.compare()?;
    let before = sum(Path::new(&mapped))?;
    let room = |mib: &str| sh(&format!("mount -o remount,size={mib} {store}"));
    room(&format!(
        "$(($(df --output=used -BM {store} | tail -n1 | tr -dc 0-9) + 2))m"
    ))?;
    refused(varve, "R004-room", &["rewind", "empty", "--yes"])?;
    if varve.device("r")? != mapped || sum(Path::new(&mapped))? != before {
        return Err("a rewind that was refused changed the device".to_owned());
    }
    varve.compare()?;
    room("400m")?;
    // It writes three times what the log holds, and waits for the store. The volume is known all the while.
    let mut rewind = begin_rewind(varve, "empty")?;
    let mut seen = 0;
    let ended = loop {
        if let Some(ended) = rewind.try_wait().map_err(|e| e.to_string())? {
            break ended;
        }
        let status = varve.varve(&["--json", "status"]);
        let status = status.unwrap_or_else(|told| told);
        if !status.contains("\"name\": \"r\"") {
            return Err(format!("in a rewind its volume is not known: {status}"));
        }
        seen += 1;
    };
    let status = varve.varve(&["--json", "status"])?;
    if !ended.success() || seen < 3 || !status.contains("\"bypasses\": 0,") {
        return Err(format!("{ended}, seen {seen} times: {status}"));
    }
    sh(&format!(
        "cmp -n $((48 << 20)) {} /dev/zero",
        varve.device("r")?
    ))?;
    varve.varve(&["unprotect", "r", "--forget"]).map(|_| ())
}

/// A log, or the store, on a device that is protected itself would record its own writes.
fn own_writes(varve: &Installation, root: &Path, files: &Path) -> Outcome {
    let device = file_of(files, "own", 64 * MIB)?;
    varve.varve(&[
        "protect",
        &device.display().to_string(),
        "--name",
        "o",
        "--log-size",
        "16",
    ])?;
    let mapped = varve.device("o")?;
    run("mkfs.ext4", &["-q", "-F", &mapped])?;
    let place = files.join("own-mount");
    std::fs::create_dir_all(&place).map_err(|e| e.to_string())?;
    run("mount", &[&mapped, &place.display().to_string()])?;
    let second = file_of(files, "second", 4 * MIB)?;
    let with_log = |log: &Path| {
        let (second, log) = (second.display().to_string(), log.display().to_string());
        let arguments = [
            "protect",
            &second,
            "--name",
            "p",
            "--log",
            &log,
            "--log-size",
            "16",
        ];
        refused(varve, "V034-loop", &arguments)
    };
    let outcome = with_log(&place.join("log"));
    // The same through a loop device.
    let inner = files.join("inner-mount").display().to_string();
    let disk = place.join("disk").display().to_string();
    sh(&format!(
        "truncate -s 32M {disk} && mkfs.ext4 -q -F {disk} && mkdir {inner} && mount -o loop {disk} {inner}"
    ))?;
    let through = with_log(&Path::new(&inner).join("log"));
    sh(&format!("umount {inner} && rm {disk}"))?;
    through?;
    // The store moves onto the protected device while it runs.
    let store = root.join("var/lib/varve/store").display().to_string();
    run("mount", &["--bind", &place.display().to_string(), &store])?;
    let looped = refused(varve, "V034-loop", &["history"]);
    run("umount", &[&store])?;
    run("umount", &[&place.display().to_string()])?;
    outcome.and(looped)?;
    varve.varve(&["history"])?;
    varve.compare()?;
    varve.varve(&["unprotect", "o", "--forget"]).map(|_| ())
}
