//! Disks break under hot copies, and power is cut: the volume goes on, a copy says what it lacks or that it is no more.

use crate::Outcome;
use crate::copies::{copy, end, expect_refused, fields, hcp, sh, zeroed};
use std::io::Write;
use std::time::{Duration, Instant};
use varve_tests::scenario::{Installation, digest, pause, run, say};
use varve_tests::writers::Writers;

/// Sectors that are written: 16 MiB.
const SECTORS: u64 = 32 << 10;
/// The disk for changed blocks.
const STORE_DISK: &str = "/dev/ubdc";

fn table(name: &str, table: &str) -> Outcome {
    sh(&format!(
        "dmsetup suspend --nolockfs --noflush {name} && dmsetup load {name} --table '{table}' && dmsetup resume {name}"
    ))
    .map(|_| ())
}

fn sectors(path: &str) -> Result<String, String> {
    Ok(run("blockdev", &["--getsz", path])?.trim().to_owned())
}

/// The longest time that a write takes while `work` runs.
fn longest_write<T>(
    mapped: &str,
    work: impl FnOnce() -> Result<T, String>,
) -> Result<Duration, String> {
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let (seen, path) = (std::sync::Arc::clone(&stop), mapped.to_owned());
    let writer = std::thread::spawn(move || {
        let mut longest = Duration::ZERO;
        let mut block = 0;
        while !seen.load(std::sync::atomic::Ordering::Acquire) {
            let since = Instant::now();
            sh(&format!(
                "dd if=/dev/zero of={path} bs=4096 seek={} count=1 oflag=direct conv=notrunc status=none",
                5000 + block % 4000
            ))?;
            block += 1;
            longest = longest.max(since.elapsed());
        }
        Ok::<Duration, String>(longest)
    });
    let worked = work();
    stop.store(true, std::sync::atomic::Ordering::Release);
    let longest = writer
        .join()
        .map_err(|_| "the writer panicked".to_owned())?;
    worked?;
    longest
}

fn wait_lost(varve: &Installation, why: &str) -> Outcome {
    let since = Instant::now();
    loop {
        let lost = fields(&hcp(varve, &["--json", "-l"])?, "lost");
        if lost.first().map(String::as_str) == Some(why) {
            return Ok(());
        }
        if since.elapsed() > Duration::from_secs(30) {
            return Err(format!(
                "{why} was expected, the copies say {lost:?}\n{}",
                varve.messages()
            ));
        }
        pause(100);
    }
}

/// The disk for changed blocks fails, stalls; the origin cannot be read.
pub fn disks_break(varve: &Installation, device: &str) -> Outcome {
    let start = Instant::now();
    let (store_size, origin_size) = (sectors(STORE_DISK)?, sectors(device)?);
    let store_table = format!("0 {store_size} linear {STORE_DISK} 0");
    let origin_table = format!("0 {origin_size} linear {device} 0");
    sh(&format!(
        "dmsetup create store --table '{store_table}' && dmsetup create origin --table '{origin_table}' && dmsetup mknodes"
    ))?;
    let store = "/dev/mapper/store";
    let mapped = zeroed(varve, "/dev/mapper/origin")?;
    let mut writers = Writers::start(&[&mapped], 2, SECTORS)?;
    for (persist, fault, why) in [
        (false, "error", "failed"),
        (true, "error", "failed"),
        (true, "stall", "late"),
    ] {
        run(
            "dd",
            &[
                "if=/dev/zero",
                &format!("of={STORE_DISK}"),
                "bs=1M",
                "count=1",
                "conv=fsync,notrunc",
                "status=none",
            ],
        )?;
        let mut arguments = vec!["disk", "-c", store];
        if persist {
            arguments.push("--persist");
        }
        let before = writers.before();
        let (name, path) = copy(varve, &arguments)?
            .into_iter()
            .next()
            .ok_or("no copy")?;
        writers.check(&[&path], &before)?;
        let longest = longest_write(&mapped, || {
            if fault == "stall" {
                sh("dmsetup suspend --nolockfs --noflush store")?;
            } else {
                table("store", &format!("0 {store_size} error"))?;
            }
            wait_lost(varve, why)?;
            pause(300);
            Ok(())
        })?;
        if longest > Duration::from_secs(3) {
            return Err(format!("store {fault}: a write took {longest:?}"));
        }
        if fault == "stall" {
            sh("dmsetup resume store")?;
        } else {
            table("store", &store_table)?;
        }
        hcp(varve, &["-r", &name])?;
        say(
            start,
            &format!(
                "store {fault} (persist {persist}): {why}; the longest write took {longest:?}"
            ),
        );
    }
    writers.stop()?;

    // A block that the origin cannot read: the write goes on, the copy lacks that block and says so.
    let (name, path) = copy(varve, &["disk"])?
        .into_iter()
        .next()
        .ok_or("no copy")?;
    let block = |path: &str, block: u64| {
        sh(&format!(
            "dd if={path} bs=4096 skip={block} count=1 iflag=direct status=none | sha256sum && dd if={path} bs=4096 skip={block} count=1 iflag=direct status=none of=/dev/null"
        ))
    };
    let kept = block(&path, 11)?;
    table(
        "origin",
        &format!("0 {origin_size} flakey {device} 0 0 600 1 error_reads"),
    )?;
    sh(&format!(
        "dd if=/dev/urandom of={mapped} bs=4096 seek=10 count=1 oflag=direct conv=notrunc status=none"
    ))?;
    table("origin", &origin_table)?;
    if block(&path, 10).is_ok() {
        return Err("the copy shows a block that could not be saved".to_owned());
    }
    if block(&path, 11)? != kept {
        return Err("the neighbour of a lost block has changed".to_owned());
    }
    hcp(varve, &["-r", &name])?;
    say(
        start,
        "an origin that cannot be read: the write goes on, the copy lacks one block",
    );
    expect_refused(hcp(varve, &["-r", &name]), "H001-unknown")?;
    end(varve)?;
    sh("dmsetup remove --retry store; dmsetup remove --retry origin")?;
    Ok(())
}

/// Copies that must last, then load until the power goes.
pub fn persist_load(varve: &Installation, device: &str) -> Outcome {
    let mapped = zeroed(varve, device)?;
    let writers = Writers::start(&[&mapped], 4, SECTORS)?;
    for name in ["first", "second"] {
        pause(500);
        let before = writers.before();
        let (_, path) = copy(
            varve,
            &["disk", "--persist", "--name", name, "--store-size", "256"],
        )?
        .into_iter()
        .next()
        .ok_or("no copy")?;
        writers.check(&[&path], &before)?;
        println!("DIGEST {name} {}", digest(&path)?.trim());
    }
    copy(varve, &["disk", "--name", "volatile"])?;
    pause(500);
    println!("LOADED");
    let _ = std::io::stdout().flush();
    pause(600_000);
    drop(writers);
    Err("the power was not cut".to_owned())
}

/// After it: what had to last is what it was, what had not says so.
pub fn persist_after_cut(varve: &Installation, digests: &[String]) -> Outcome {
    let start = Instant::now();
    varve.varve(&["up"])?;
    varve.wait_protected()?;
    for name in ["first", "second"] {
        let shown = hcp(varve, &["--json", "-s", name])
            .map_err(|e| format!("{e}\n{}", varve.messages()))?;
        let field = |field: &str| fields(&shown, field).into_iter().next().unwrap_or_default();
        let found =
            digest(&field("copy")).map_err(|e| format!("{e}\n{shown}\n{}", varve.messages()))?;
        let place = if name == "first" { 0 } else { 1 };
        if digests.get(place).map(String::as_str)
            != Some(found.split_whitespace().next().unwrap_or_default())
        {
            return Err(format!(
                "{name} is not what it was before the power cut: {found}, {digests:?}\n{shown}"
            ));
        }
        say(
            start,
            &format!(
                "{name} survived: {} bytes were overwritten since",
                field("changed_bytes")
            ),
        );
        if field("changed_bytes") == "0" {
            return Err("nothing was overwritten: the cut proves nothing".to_owned());
        }
    }
    let shown = hcp(varve, &["--json", "-s", "volatile"])?;
    if fields(&shown, "lost").first().map(String::as_str) != Some("reboot") {
        return Err(format!("a copy that was not to last: {shown}"));
    }
    for name in ["volatile", "first", "second"] {
        hcp(varve, &["-r", name])?;
    }
    varve.compare()?;
    varve.varve(&["down"])?;
    Ok(())
}
