//! The log breaks in every way a disk can, and comes back.

use crate::{Outcome, export};
use std::time::Instant;
use varve_tests::scenario::{Installation, run, say};
use varve_tests::stamps::{Stamper, read_stamps};

/// The log lies on a device-mapper device, so that it can be taken away. Its disk is /dev/ubdc.
pub fn log_on_mapper() -> Outcome {
    let sectors = run("blockdev", &["--getsz", "/dev/ubdc"])?;
    run(
        "dmsetup",
        &[
            "create",
            "log",
            "--table",
            &format!("0 {} linear /dev/ubdc 0", sectors.trim()),
        ],
    )?;
    run("dmsetup", &["mknodes"]).map(|_| ())
}

pub fn protect_with_log(
    varve: &Installation,
    device: &str,
    log: &str,
    megabytes: &str,
) -> Result<String, String> {
    varve.varve(&["up"])?;
    varve
        .varve(&[
            "protect",
            device,
            "--name",
            "disk",
            "--log",
            log,
            "--log-size",
            megabytes,
        ])
        .map_err(|e| format!("{e}\n{}", varve.messages()))?;
    varve.device("disk")
}

/// Breaks the log in the way asked for.
pub fn break_log(kind: &str) -> Outcome {
    match kind {
        "stalled" => run("dmsetup", &["suspend", "--nolockfs", "--noflush", "log"]),
        "failing" => {
            let sectors = run("blockdev", &["--getsz", "/dev/ubdc"])?;
            run("dmsetup", &["suspend", "--nolockfs", "--noflush", "log"])?;
            run(
                "dmsetup",
                &[
                    "load",
                    "log",
                    "--table",
                    &format!("0 {} error", sectors.trim()),
                ],
            )?;
            run("dmsetup", &["resume", "log"])
        }
        // The store stops taking: the ring fills up.
        _ => run("pkill", &["-KILL", "varved"]),
    }
    .map(|_| ())
}

pub fn mend_log(varve: &Installation, kind: &str) -> Outcome {
    if kind == "full" {
        return varve.varve(&["up"]).map(|_| ());
    }
    if kind == "failing" {
        let sectors = run("blockdev", &["--getsz", "/dev/ubdc"])?;
        run("dmsetup", &["suspend", "--nolockfs", "--noflush", "log"])?;
        run(
            "dmsetup",
            &[
                "load",
                "log",
                "--table",
                &format!("0 {} linear /dev/ubdc 0", sectors.trim()),
            ],
        )?;
    }
    run("dmsetup", &["resume", "log"]).map(|_| ())
}

/// The log stalls, fails or fills: production goes on, the gap is declared, it heals, nothing is silently wrong.
pub fn log_fault(varve: &Installation, device: &str, kind: &str) -> Outcome {
    const BLOCKS: u64 = 4096;
    let start = Instant::now();
    log_on_mapper()?;
    let mapped = protect_with_log(
        varve,
        device,
        "/dev/mapper/log",
        if kind == "full" { "16" } else { "128" },
    )?;
    run(
        "blkdiscard",
        &[
            "-z",
            "-f",
            "-o",
            "0",
            "-l",
            &(BLOCKS * 4096).to_string(),
            &mapped,
        ],
    )?;
    let mut writer = Stamper::new(&mapped, BLOCKS)?;
    for step in 0..300 {
        writer.write(step % 20 == 0)?;
    }
    varve.varve(&["mark", "before"])?;
    let model = writer.model.clone();
    // What is marked must be in the store before the log goes away.
    varve.varve(&["history"])?;
    break_log(kind)?;
    let broken = Instant::now();
    let mut longest = 0.0f64;
    let mut seen_bypass = false;
    for step in 0..100_000u32 {
        let one = Instant::now();
        writer.write(step % 9 == 0)?;
        longest = longest.max(one.elapsed().as_secs_f64());
        if step % 100 == 0 {
            let status = varve
                .varve(&["--json", "status"])
                .unwrap_or_else(|text| text);
            seen_bypass |= status.contains("\"state\": \"bypass\"");
            if seen_bypass && broken.elapsed().as_secs() >= 3 {
                break;
            }
            if broken.elapsed().as_secs() > 60 {
                return Err(format!("no bypass within a minute: {status}"));
            }
        }
    }
    say(
        start,
        &format!("{kind}: the longest write or flush took {longest:.3} s"),
    );
    if longest > 2.0 {
        return Err(format!("production waited {longest:.1} s for a broken log"));
    }
    mend_log(varve, kind)?;
    varve.wait_protected()?;
    for step in 0..100 {
        writer.write(step % 10 == 0)?;
    }
    varve.compare()?;
    let history = varve.varve(&["--json", "history"])?;
    if history.contains("\"gaps\": []") {
        return Err("no gap was declared".to_owned());
    }
    let image = export(varve, "before", false)?;
    let found = read_stamps(&image, BLOCKS)?;
    varve.varve(&["unexport", &image])?;
    if found != model {
        return Err("the image before the fault is not what the writer had written".to_owned());
    }
    let now = export(varve, "now", false)?;
    let found = read_stamps(&now, BLOCKS)?;
    varve.varve(&["unexport", &now])?;
    if found != writer.model {
        return Err("after healing the newest image is not what the writer has written".to_owned());
    }
    say(start, "the gap is declared, both sides of it are right");
    drop(writer);
    varve.varve(&["down"]).map(|_| ())
}

/// The log is broken under load; then the power goes.
pub fn log_fault_load(varve: &Installation, device: &str, kind: &str) -> Outcome {
    log_on_mapper()?;
    let mapped = protect_with_log(varve, device, "/dev/mapper/log", "128")?;
    let mut writer = Stamper::new(&mapped, 4096)?;
    for step in 0..300 {
        writer.write(step % 20 == 0)?;
    }
    break_log(kind)?;
    for step in 0..600 {
        writer.write(step % 9 == 0)?;
    }
    let status = varve
        .varve(&["--json", "status"])
        .unwrap_or_else(|text| text);
    if !status.contains("\"state\": \"bypass\"") {
        return Err(format!("not in bypass: {status}"));
    }
    println!("LOADED");
    loop {
        writer.write(true)?;
    }
}

/// The log is back and looks whole. It must not be believed.
pub fn after_bypass_cut(varve: &Installation) -> Outcome {
    log_on_mapper()?;
    varve.varve(&["up"])?;
    let messages = varve.messages();
    if !messages.contains("power was lost in bypass") {
        return Err(format!("the bypass was not remembered:\n{messages}"));
    }
    varve.wait_protected()?;
    varve.compare()?;
    varve.varve(&["down"]).map(|_| ())
}
