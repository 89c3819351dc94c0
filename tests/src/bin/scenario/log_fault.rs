//! The log breaks in every way a disk can, and comes back.

use crate::copies::expect_refused;
use crate::{Outcome, export, stamper_on_zeroes};
use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};
use varve_tests::scenario::{Installation, pause, run, say};
use varve_tests::stamps::{Stamper, read_stamps};

/// The disk under the log.
const LOG_DISK: &str = "/dev/ubdc";
/// Milliseconds that a write to the slow disk takes.
const SLOWNESS: &str = "/tmp/log-disk-milliseconds";

/// How the log breaks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fault {
    /// It does not answer.
    Stalled,
    /// Every operation fails.
    Failing,
    /// The store stops taking: the ring fills up.
    Full,
    /// Every write takes a second.
    Slow,
    /// The disk is gone, and comes back under another number.
    Pulled,
}

impl Fault {
    /// By its name.
    pub fn parse(name: &str) -> Result<Fault, String> {
        match name {
            "stalled" => Ok(Fault::Stalled),
            "failing" => Ok(Fault::Failing),
            "full" => Ok(Fault::Full),
            "slow" => Ok(Fault::Slow),
            "pulled" => Ok(Fault::Pulled),
            other => Err(format!("no fault is named {other}")),
        }
    }
}

fn sh(script: &str) -> Result<String, String> {
    run("sh", &["-c", script])
}

/// The log's disk, on a device-mapper device, so that it can be taken away; or on one of our own, so that it can be slow or be pulled.
struct LogDisk {
    fault: Fault,
    server: Option<Child>,
    number: u32,
}

impl LogDisk {
    fn new(fault: Fault) -> Result<LogDisk, String> {
        let mut disk = LogDisk {
            fault,
            server: None,
            number: 40,
        };
        disk.plug()?;
        sh(&format!(
            "dmsetup create log --table '{}' && dmsetup mknodes",
            disk.table()?
        ))?;
        Ok(disk)
    }

    /// Starts the server of a disk that has one.
    fn plug(&mut self) -> Outcome {
        if matches!(self.fault, Fault::Slow | Fault::Pulled) {
            let program = std::env::current_exe().map_err(|e| e.to_string())?;
            let server = Command::new(program)
                .args(["slow-disk", SLOWNESS, LOG_DISK, &self.number.to_string()])
                .spawn();
            self.server = Some(server.map_err(|e| e.to_string())?);
            let path = format!("/dev/ublkb{}", self.number);
            let waiting = Instant::now();
            while !Path::new(&path).exists() {
                if waiting.elapsed() > Duration::from_secs(60) {
                    return Err(format!("{path} does not come"));
                }
                pause(50);
            }
        }
        Ok(())
    }

    fn table(&self) -> Result<String, String> {
        let under = match self.server {
            Some(_) => format!("/dev/ublkb{}", self.number),
            None => LOG_DISK.to_owned(),
        };
        let sectors = run("blockdev", &["--getsz", &under])?;
        Ok(format!("0 {} linear {under} 0", sectors.trim()))
    }

    /// Breaks the log.
    fn fail(&mut self) -> Outcome {
        match self.fault {
            Fault::Stalled => sh("dmsetup suspend --nolockfs --noflush log")?,
            Fault::Failing => {
                let sectors = run("blockdev", &["--getsz", LOG_DISK])?;
                sh(&format!(
                    "dmsetup suspend --nolockfs --noflush log && dmsetup load log --table '0 {} error' && dmsetup resume log",
                    sectors.trim()
                ))?
            }
            Fault::Full => run("pkill", &["-KILL", "varved"])?,
            Fault::Slow => sh(&format!("echo 1000 > {SLOWNESS}"))?,
            Fault::Pulled => {
                if let Some(mut server) = self.server.take() {
                    let _ = server.kill();
                    let _ = server.wait();
                }
                String::new()
            }
        };
        Ok(())
    }

    fn mend(&mut self, varve: &Installation) -> Outcome {
        match self.fault {
            Fault::Full => varve.varve(&["up"])?,
            Fault::Slow => sh(&format!("echo 0 > {SLOWNESS}"))?,
            Fault::Stalled => sh("dmsetup resume log")?,
            Fault::Failing => sh(&format!(
                "dmsetup suspend --nolockfs --noflush log && dmsetup load log --table '{}' && dmsetup resume log",
                self.table()?
            ))?,
            Fault::Pulled => {
                self.number += 1;
                self.plug()?;
                sh(&format!(
                    "dmsetup suspend --nolockfs --noflush log && dmsetup load log --table '{}' && dmsetup resume log",
                    self.table()?
                ))?
            }
        };
        Ok(())
    }
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

/// The log stalls, fails or fills: production goes on, the gap is declared, it heals, nothing is silently wrong.
pub fn log_fault(varve: &Installation, device: &str, fault: Fault) -> Outcome {
    const BLOCKS: u64 = 4096;
    let start = Instant::now();
    let mut log = LogDisk::new(fault)?;
    let mapped = protect_with_log(
        varve,
        device,
        "/dev/mapper/log",
        if fault == Fault::Full { "16" } else { "128" },
    )?;
    let mut writer = stamper_on_zeroes(&mapped, BLOCKS)?;
    for step in 0..300 {
        writer.write(step % 20 == 0)?;
    }
    varve.varve(&["mark", "before"])?;
    let model = writer.model.clone();
    // What is marked must be in the store before the log goes away.
    varve.varve(&["history"])?;
    log.fail()?;
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
        &format!("{fault:?}: the longest write or flush took {longest:.3} s"),
    );
    if longest > 2.0 {
        return Err(format!("production waited {longest:.1} s for a broken log"));
    }
    // A full ring, and a slow one, may have healed by now, and fill again.
    if !matches!(fault, Fault::Full | Fault::Slow) {
        expect_refused(varve.varve(&["export", "now"]), "I006-gap")?;
        let then = export(varve, "before", false)?;
        let found = read_stamps(&then, BLOCKS)?;
        varve.varve(&["unexport", &then])?;
        if found != model {
            return Err("in bypass another image is shown than was recorded".to_owned());
        }
    }
    log.mend(varve)?;
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
pub fn log_fault_load(varve: &Installation, device: &str, fault: Fault) -> Outcome {
    let mut log = LogDisk::new(fault)?;
    let megabytes = if fault == Fault::Full { "16" } else { "128" };
    let mapped = protect_with_log(varve, device, "/dev/mapper/log", megabytes)?;
    let mut writer = Stamper::new(&mapped, 4096)?;
    for step in 0..300 {
        writer.write(step % 20 == 0)?;
    }
    log.fail()?;
    let broken = Instant::now();
    loop {
        for step in 0..200 {
            writer.write(step % 9 == 0)?;
        }
        let status = varve
            .varve(&["--json", "status"])
            .unwrap_or_else(|text| text);
        if status.contains("\"state\": \"bypass\"") {
            break;
        }
        if broken.elapsed().as_secs() > 120 {
            return Err(format!("not in bypass: {status}"));
        }
    }
    println!("LOADED");
    loop {
        writer.write(true)?;
    }
}

/// The log is back and looks whole. It must not be believed.
pub fn after_bypass_cut(varve: &Installation, fault: Fault) -> Outcome {
    let _log = LogDisk::new(fault)?;
    varve.varve(&["up"])?;
    let messages = varve.messages();
    // A full ring heals into the place that is kept for that, and fills again: the cut may find it in any of these states.
    let full = fault == Fault::Full
        && ["not closed cleanly", "started in bypass"]
            .iter()
            .any(|said| messages.contains(said));
    if !messages.contains("power was lost in bypass") && !full {
        return Err(format!("the bypass was not remembered:\n{messages}"));
    }
    varve.wait_protected()?;
    varve.compare()?;
    varve.varve(&["down"]).map(|_| ())
}
