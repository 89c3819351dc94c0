//! History is lost: the store is gone, or a part of the log is damaged before it was taken. It is said, and made whole again by a comparison.

use crate::{Outcome, export, protect, stamper_on_zeroes};
use std::os::unix::fs::FileExt;
use varve_tests::scenario::{Installation, digest, pause, run};
use varve_tests::stamps::read_stamps;

const BLOCKS: u64 = 4096;

fn until_said(varve: &Installation, what: &str) -> Outcome {
    for _ in 0..1200 {
        if varve.messages().contains(what) {
            return Ok(());
        }
        pause(100);
    }
    Err(format!("never said: {what}\n{}", varve.messages()))
}

/// Log and state file are restored from an older copy, as with a backup of the system's disk; the store and the device are not.
fn put_back(varve: &Installation) -> Outcome {
    let spec = varve.root().join("etc/varve/volumes/disk.toml");
    let spec = std::fs::read_to_string(&spec).map_err(|e| format!("{}: {e}", spec.display()))?;
    let path = |field: &str| {
        let line = spec.lines().find(|line| line.starts_with(field));
        let path = line.and_then(|line| line.split('"').nth(1));
        path.map(str::to_owned)
            .ok_or(format!("no {field} in {spec}"))
    };
    let files = [path("log")?, path("state")?];
    let write = |seek: u32| {
        let mapped = varve.device("disk")?;
        run(
            "sh",
            &[
                "-c",
                &format!(
                    "dd if=/dev/urandom of={mapped} bs=1M count=12 seek={seek} oflag=direct status=none"
                ),
            ],
        )
    };
    let digest_of = |instant: &str| {
        let image = export(varve, instant, false)?;
        let found = digest(&image)?;
        varve.varve(&["unexport", &image])?;
        Ok::<_, String>(found)
    };
    varve.varve(&["down"])?;
    for file in &files {
        run("cp", &["--sparse=always", file, &format!("{file}.older")])?;
    }
    varve.varve(&["up"])?;
    varve.wait_protected()?;
    write(32)?;
    varve.varve(&["mark", "before-the-restore"])?;
    let before = digest_of("before-the-restore")?;
    varve.varve(&["down"])?;
    for file in &files {
        run("mv", &[&format!("{file}.older"), file])?;
    }
    varve.varve(&["up"])?;
    write(40)?;
    until_said(
        varve,
        "the log is another one than the history was taken from",
    )?;
    varve.wait_protected()?;
    write(48)?;
    varve.varve(&["mark", "after-the-restore"])?;
    varve.compare()?;
    let mapped = varve.device("disk")?;
    if digest_of("after-the-restore")? != digest(&mapped)? {
        return Err("behind a log that was put back the history is not the device".to_owned());
    }
    if digest_of("before-the-restore")? != before {
        return Err("a log that was put back has changed an instant".to_owned());
    }
    // What the damaged segment held is lost; nothing else.
    match varve.varve(&["scrub"]) {
        Err(told) if told.matches("DAMAGED").count() == 1 => Ok(()),
        told => Err(format!("a log that was put back: {told:?}")),
    }
}

/// Both losses, one after the other.
pub fn holes(varve: &Installation, device: &str) -> Outcome {
    let mapped = protect(varve, device)?;
    let mut writer = stamper_on_zeroes(&mapped, BLOCKS)?;
    for step in 0..500 {
        writer.write(step % 50 == 49)?;
    }
    varve.compare()?;

    // A segment of the log is damaged while nobody takes it.
    run("pkill", &["-KILL", "varved"])?;
    let before: String = varve
        .varve(&["--json", "status"])
        .unwrap_or_else(|text| text);
    let sequence: u64 = before
        .split("\"sequence\": ")
        .nth(1)
        .and_then(|rest| rest.split(',').next())
        .and_then(|number| number.parse().ok())
        .ok_or(format!("no sequence in {before}"))?;
    // 128 MiB in 16 places: enough that several are sealed.
    for round in 0..24 {
        run(
            "dd",
            &[
                "if=/dev/urandom",
                &format!("of={mapped}"),
                "bs=1M",
                "count=1",
                &format!("seek={}", 32 + round),
                "oflag=direct",
                "status=none",
            ],
        )?;
    }
    for step in 0..300 {
        writer.write(step % 50 == 49)?;
    }
    let log = varve.root().join("var/lib/varve/log/disk.log");
    let file = std::fs::File::options()
        .write(true)
        .open(&log)
        .map_err(|e| format!("{}: {e}", log.display()))?;
    let place = (sequence + 1) % 16 * (8 << 20);
    file.write_all_at(&[0x5a; 8192], place + (2 << 20))
        .and_then(|()| file.sync_all())
        .map_err(|e| e.to_string())?;
    varve.varve(&["up"])?;
    until_said(varve, "is damaged")?;
    until_said(varve, "compared with its history")?;
    varve.wait_protected()?;
    varve.compare()?;
    let image = export(varve, "now", false)?;
    let (now, then) = (digest(&mapped)?, digest(&image)?);
    varve.varve(&["unexport", &image])?;
    if now != then {
        return Err("the newest image is not the device".to_owned());
    }

    drop(writer);
    put_back(varve)?;

    // The whole store is gone.
    varve.varve(&["down"])?;
    run(
        "rm",
        &[
            "-r",
            &varve
                .root()
                .join("var/lib/varve/store/volumes")
                .display()
                .to_string(),
        ],
    )?;
    varve.varve(&["up"])?;
    // Nothing is known of the device, until it was compared with nothing, and copied.
    let mut tries = 0;
    while varve
        .varve(&["export", "now"])
        .is_err_and(|told| told.contains("I001-none"))
    {
        tries += 1;
        if tries > 600 {
            return Err(format!("no history is made anew\n{}", varve.messages()));
        }
        pause(100);
    }
    if tries == 0 {
        return Err("a store that is gone shows an instant".to_owned());
    }
    if !varve.messages().contains("nothing can be restored") {
        return Err(format!("it is not said\n{}", varve.messages()));
    }
    varve.wait_protected()?;
    let mapped = varve.device("disk")?;
    let stamps = read_stamps(&mapped, BLOCKS)?;
    let image = export(varve, "now", false)?;
    let found = read_stamps(&image, BLOCKS)?;
    varve.varve(&["unexport", &image])?;
    if found != stamps || stamps.iter().all(|stamp| *stamp == 0) {
        return Err("with a new store the newest image is not the device".to_owned());
    }
    varve.compare()?;
    varve.varve(&["down"]).map(|_| ())
}
