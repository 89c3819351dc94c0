//! `scenario NAME ROOT DEVICE [ARGUMENT]`: one story on a real device; exit code 0 if every promise held.

use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;
use varve_tests::scenario::{
    Installation, Stamper, check_file_system, digest, finish_fio, make_file_system, pause,
    read_stamps, run, say, start_fio,
};

type Outcome = Result<(), String>;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [name, root, device, rest @ ..] = arguments.as_slice() else {
        eprintln!("scenario NAME ROOT DEVICE [ARGUMENT...]");
        return ExitCode::from(2);
    };
    let argument = rest.first().map_or("", String::as_str);
    let number = rest.get(1).and_then(|text| text.parse().ok()).unwrap_or(0);
    let outcome = Installation::new(Path::new(root)).and_then(|installation| match name.as_str() {
        "instants" => instants(&installation, device, argument, number),
        "stamps" => stamps(&installation, device, argument.parse().unwrap_or(20)),
        "sqlite" => sqlite(&installation, device),
        "kill" => kill(&installation, device, argument.parse().unwrap_or(5)),
        "load" => load(&installation, device),
        "after-cut" => after_cut(&installation, device),
        "log-fault" => log_fault(&installation, device, argument),
        "log-fault-load" => log_fault_load(&installation, device, argument),
        "after-bypass-cut" => after_bypass_cut(&installation),
        "behind-our-back" => behind_our_back(&installation, device),
        other => Err(format!("no scenario is named {other}")),
    });
    match outcome {
        Ok(()) => {
            println!("scenario {name}: every promise held");
            ExitCode::SUCCESS
        }
        Err(broken) => {
            println!("scenario {name}: BROKEN: {broken}");
            ExitCode::FAILURE
        }
    }
}

fn protect(varve: &Installation, device: &str) -> Result<String, String> {
    varve.varve(&["up"])?;
    varve.varve(&["protect", device, "--name", "disk", "--log-size", "128"])?;
    varve.device("disk")
}

/// Images at many instants of a file system under load: frozen ones equal the device as it was read then; others mount, and pass the checker.
fn instants(varve: &Installation, device: &str, kind: &str, count: usize) -> Outcome {
    let start = Instant::now();
    let mapped = protect(varve, device)?;
    let (live, past) = ("/mnt/live", "/mnt/past");
    for directory in [live, past] {
        std::fs::create_dir_all(directory).map_err(|e| e.to_string())?;
    }
    make_file_system(kind, &mapped)?;
    run("mount", &[&mapped, live])?;
    say(start, &format!("{kind} on {mapped}"));
    let mut frozen = Vec::new();
    let mut loose = Vec::new();
    for index in 0..count {
        let fio = start_fio(live, 8, 2, 2)?;
        std::fs::write(
            format!("{live}/note-{index}"),
            format!("{index}").repeat(1000 + index),
        )
        .map_err(|e| e.to_string())?;
        if index % 3 == 0 {
            let name = format!("loose-{index}");
            varve.varve(&["mark", &name])?;
            loose.push(name);
        }
        finish_fio(fio)?;
        run("fsfreeze", &["--freeze", live])?;
        let name = format!("frozen-{index}");
        let outcome = varve.varve(&["mark", &name]).and_then(|_| digest(&mapped));
        run("fsfreeze", &["--unfreeze", live])?;
        frozen.push((name, outcome?));
    }
    say(
        start,
        &format!("{} frozen and {} loose instants", frozen.len(), loose.len()),
    );
    for (name, expected) in &frozen {
        let image = export(varve, name, false)?;
        let found = digest(&image)?;
        varve.varve(&["unexport", &image])?;
        if found != *expected {
            return Err(format!(
                "the image at {name} is not what the device was: {found} instead of {expected}"
            ));
        }
    }
    say(start, "every frozen image equals the device as it was");
    for name in loose.iter().take(3 + loose.len() / 4) {
        let image = export(varve, name, true)?;
        let options = if kind == "xfs" { "nouuid" } else { "rw" };
        // btrfs refuses a second file system of the same UUID beside the mounted one; it is checked as it is.
        if kind != "btrfs" {
            run("mount", &["-o", options, &image, past])?;
            run("umount", &[past])?;
        }
        check_file_system(kind, &image)?;
        varve.varve(&["unexport", &image])?;
    }
    say(
        start,
        "unfrozen images replay their journals and pass the checker",
    );
    run("umount", &[live])?;
    varve.compare()?;
    varve.varve(&["unprotect", "disk"])?;
    check_file_system(kind, device)?;
    run("mount", &[device, live])?;
    run("umount", &[live])?;
    varve.varve(&["down"])?;
    Ok(())
}

fn export(varve: &Installation, instant: &str, writable: bool) -> Result<String, String> {
    let mut arguments = vec!["--json", "export", instant];
    if writable {
        arguments.push("--writable");
    }
    let text = varve
        .varve(&arguments)
        .map_err(|e| format!("{e}\n{}", varve.messages()))?;
    let device = text
        .split("\"device\": \"")
        .nth(1)
        .and_then(|rest| rest.split('"').next());
    device
        .map(str::to_owned)
        .ok_or_else(|| format!("no device in {text}"))
}

/// An independent oracle: a writer that knows what every block holds at each instant, at flush boundaries and between.
fn stamps(varve: &Installation, device: &str, count: u64) -> Outcome {
    const BLOCKS: u64 = 512;
    let start = Instant::now();
    let mapped = protect(varve, device)?;
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
    let mut models = Vec::new();
    for index in 0..count {
        for step in 0..40 + index * 3 {
            writer.write(step % 11 == 10 || (index % 2 == 0 && step == 39 + index * 3))?;
        }
        let name = format!("stamp-{index}");
        varve.varve(&["mark", &name])?;
        models.push((name, writer.model.clone()));
    }
    for (name, model) in &models {
        let image = export(varve, name, false)?;
        let found = read_stamps(&image, BLOCKS)?;
        varve.varve(&["unexport", &image])?;
        if let Some(block) = (0..BLOCKS as usize).find(|block| found[*block] != model[*block]) {
            return Err(format!(
                "{name}: block {block} holds stamp {}, the writer had written {}",
                found[block], model[block]
            ));
        }
    }
    drop(writer);
    say(
        start,
        &format!("{count} instants equal the writer's own memory"),
    );
    varve.compare()?;
    varve.varve(&["down"])?;
    Ok(())
}

/// Every transaction that SQLite (synchronous=FULL) acknowledged before an instant is in the image of that instant.
fn sqlite(varve: &Installation, device: &str) -> Outcome {
    let start = Instant::now();
    let mapped = protect(varve, device)?;
    std::fs::create_dir_all("/mnt/live").map_err(|e| e.to_string())?;
    std::fs::create_dir_all("/mnt/past").map_err(|e| e.to_string())?;
    make_file_system("ext4", &mapped)?;
    run("mount", &[&mapped, "/mnt/live"])?;
    let sql = |statement: &str| run("sqlite3", &["/mnt/live/db", statement]);
    sql("PRAGMA journal_mode=WAL; CREATE TABLE t (n INTEGER PRIMARY KEY, pad TEXT);")?;
    let mut acknowledged = Vec::new();
    for n in 1..=40 {
        sql(&format!(
            "PRAGMA synchronous=FULL; INSERT INTO t VALUES ({n}, hex(randomblob(600)));"
        ))?;
        if n % 8 == 0 {
            let name = format!("row-{n}");
            varve.varve(&["mark", &name])?;
            acknowledged.push((name, n));
        }
    }
    for (name, rows) in acknowledged {
        varve
            .varve(&["mount", &name, "/mnt/past", "--writable"])
            .map_err(|e| format!("{e}\n{}", varve.messages()))?;
        let found = run(
            "sqlite3",
            &[
                "/mnt/past/db",
                "PRAGMA integrity_check; SELECT count(*) FROM t;",
            ],
        )?;
        varve.varve(&["umount", "/mnt/past"])?;
        if found.trim() != format!("ok\n{rows}") {
            return Err(format!(
                "{name}: {rows} rows were acknowledged, the image says {found:?}"
            ));
        }
    }
    run("umount", &["/mnt/live"])?;
    say(
        start,
        "every acknowledged transaction is in every later image",
    );
    varve.varve(&["down"])?;
    Ok(())
}

/// SIGKILL under verified load with all tags in flight: no I/O error, no mismatch, nothing lost.
fn kill(varve: &Installation, device: &str, kills: u32) -> Outcome {
    let start = Instant::now();
    std::fs::create_dir_all("/mnt/live").map_err(|e| e.to_string())?;
    std::fs::create_dir_all(
        Path::new(&std::env::args().nth(2).unwrap_or_default()).join("run/varve"),
    )
    .map_err(|e| e.to_string())?;
    let mut filter = varve.filter()?;
    pause(300);
    let mapped = protect(varve, device)?;
    make_file_system("ext4", &mapped)?;
    run("mount", &[&mapped, "/mnt/live"])?;
    let mut fio = start_fio("/mnt/live", 64, 16, 4 + kills * 2)?;
    for round in 0..kills {
        pause(700 + u64::from(round) * 130);
        if fio.try_wait().map_err(|e| e.to_string())?.is_some() {
            return Err("fio ended before the kill: nothing was interrupted".to_owned());
        }
        filter
            .kill()
            .and_then(|()| filter.wait())
            .map_err(|e| e.to_string())?;
        let killed = Instant::now();
        filter = varve.filter()?;
        // Back when a direct read of the device is answered again.
        run(
            "dd",
            &[
                &format!("if={mapped}"),
                "of=/dev/null",
                "bs=4k",
                "count=1",
                "iflag=direct",
                "status=none",
            ],
        )?;
        let stall = killed.elapsed().as_secs_f64();
        say(
            start,
            &format!("kill {}: stalled for {stall:.3} s", round + 1),
        );
        if stall > 5.0 {
            return Err(format!("stalled for {stall:.1} s: more than 5 s"));
        }
    }
    finish_fio(fio)?;
    let messages = varve.messages();
    let warm = messages.matches("restarted: nothing was lost").count();
    if warm != kills as usize {
        return Err(format!(
            "{warm} of {kills} restarts lost nothing:\n{messages}"
        ));
    }
    varve.wait_protected()?;
    run("umount", &["/mnt/live"])?;
    varve.compare()?;
    let history = varve.varve(&["--json", "history"])?;
    if !history.contains("\"gaps\": []") {
        return Err(format!("a gap was declared: {history}"));
    }
    varve.varve(&["down"])?;
    let _ = filter.wait();
    Ok(())
}

/// Load until the power goes.
fn load(varve: &Installation, device: &str) -> Outcome {
    varve.varve(&["up"])?;
    let mapped = match varve.device("disk") {
        Ok(mapped) => mapped,
        Err(_) => {
            let mapped = protect(varve, device)?;
            make_file_system("ext4", &mapped)?;
            mapped
        }
    };
    std::fs::create_dir_all("/mnt/live").map_err(|e| e.to_string())?;
    run("mount", &[&mapped, "/mnt/live"])?;
    println!("LOADED");
    let fio = start_fio("/mnt/live", 16, 24, 120)?;
    for index in 0.. {
        std::fs::write(
            format!("/mnt/live/file-{}", index % 50),
            format!("{index}").repeat(5000),
        )
        .map_err(|e| e.to_string())?;
        if index % 7 == 0 {
            run("sync", &["-f", "/mnt/live"])?;
        }
        pause(5);
    }
    finish_fio(fio)?;
    Ok(())
}

/// The power is back: history and device are made whole, identical, within the bound.
fn after_cut(varve: &Installation, _device: &str) -> Outcome {
    varve.varve(&["up"])?;
    varve.wait_protected()?;
    let mapped = varve.device("disk")?;
    let status = varve.varve(&["--json", "status"])?;
    let reread = status
        .split("\"reread_bytes\": ")
        .nth(1)
        .and_then(|rest| rest.split(',').next())
        .and_then(|n| n.parse::<u64>().ok());
    let reread = reread.ok_or("no re-read bytes in the status")?;
    println!("re-read {} MiB", reread >> 20);
    let summary = varve.messages();
    if !summary.contains("not closed cleanly") && !summary.contains("first full copy") {
        return Err(format!("the start after a power cut says: {summary}"));
    }
    if reread > 512 << 20 {
        return Err(format!(
            "{reread} bytes were read again: more than the bound of 512 MiB"
        ));
    }
    varve.compare()?;
    std::fs::create_dir_all("/mnt/live").map_err(|e| e.to_string())?;
    run("mount", &[&mapped, "/mnt/live"])?;
    run("umount", &["/mnt/live"])?;
    check_file_system("ext4", &mapped)?;
    varve.compare()?;
    varve.varve(&["down"])?;
    Ok(())
}

/// The device is written without Varve: noticed, unverified, healed.
fn behind_our_back(varve: &Installation, device: &str) -> Outcome {
    let mapped = protect(varve, device)?;
    let mut writer = Stamper::new(&mapped, 256)?;
    for _ in 0..200 {
        writer.write(false)?;
    }
    drop(writer);
    varve.compare()?;
    varve.varve(&["down"])?;
    let mut stranger = Stamper::new(device, 256)?;
    for _ in 0..3 {
        stranger.write(true)?;
    }
    drop(stranger);
    varve.varve(&["up"])?;
    let messages = varve.messages();
    if !messages.contains("written without Varve") {
        return Err(format!("not noticed:\n{messages}"));
    }
    varve.wait_protected()?;
    varve.compare()?;
    varve.varve(&["down"])?;
    Ok(())
}

/// The log lies on a device-mapper device, so that it can be taken away. Its disk is /dev/ubdc.
fn log_on_mapper() -> Outcome {
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

fn protect_with_log(
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
fn break_log(kind: &str) -> Outcome {
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

fn mend_log(varve: &Installation, kind: &str) -> Outcome {
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
fn log_fault(varve: &Installation, device: &str, kind: &str) -> Outcome {
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
fn log_fault_load(varve: &Installation, device: &str, kind: &str) -> Outcome {
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
fn after_bypass_cut(varve: &Installation) -> Outcome {
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
