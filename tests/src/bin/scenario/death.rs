//! The daemon dies, or the machine does.

use crate::{Outcome, export, protect};
use std::path::Path;
use std::time::Instant;
use varve_tests::scenario::{
    Installation, check_file_system, finish_fio, make_file_system, pause, run, say, start_fio,
};
use varve_tests::stamps::{Stamper, possible_stamps, read_sector_stamps};

/// SIGKILL, or an upgrade in place (SIGTERM; another file of the program takes over), under verified load with all tags in flight: no I/O error, no
/// mismatch, nothing lost.
pub fn kill(varve: &Installation, device: &str, kills: u32) -> Outcome {
    let start = Instant::now();
    std::fs::create_dir_all("/mnt/live").map_err(|e| e.to_string())?;
    std::fs::create_dir_all(
        Path::new(&std::env::args().nth(2).unwrap_or_default()).join("run/varve"),
    )
    .map_err(|e| e.to_string())?;
    let mut filter = varve.filter()?;
    pause(300);
    // Minutes at full speed on one processor, emulated even: the store may fall behind without a bypass.
    varve.varve(&["up"])?;
    let log_size = (512 + kills * 80).to_string();
    varve.varve(&["protect", device, "--name", "disk", "--log-size", &log_size])?;
    let mapped = varve.device("disk")?;
    make_file_system("ext4", &mapped)?;
    run("mount", &[&mapped, "/mnt/live"])?;
    let mut fio = start_fio("/mnt/live", 64, 16, 4 + kills * 4)?;
    // Somebody looks: a tracer interrupts every system call.
    let _ = run(
        "timeout",
        &[
            "-s",
            "INT",
            "0.5",
            "strace",
            "-f",
            "-o",
            "/dev/null",
            "-p",
            &filter.id().to_string(),
        ],
    );
    if filter.try_wait().map_err(|e| e.to_string())?.is_some() {
        return Err("being traced ended blkfilter".to_owned());
    }
    for round in 0..kills {
        pause(700 + u64::from(round % 10) * 130);
        if fio.try_wait().map_err(|e| e.to_string())?.is_some() {
            return Err("fio ended before the kill: nothing was interrupted".to_owned());
        }
        let killed = Instant::now();
        let upgrade = round % 3 == 2;
        if upgrade {
            run("kill", &["-TERM", &filter.id().to_string()])?;
        } else {
            filter.kill().map_err(|e| e.to_string())?;
        }
        filter.wait().map_err(|e| e.to_string())?;
        filter = if upgrade {
            varve.filter_from(&varve.copy_of_filter(round)?)?
        } else {
            varve.filter()?
        };
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
            &format!(
                "{} {}: stalled for {stall:.3} s",
                if upgrade { "upgrade" } else { "kill" },
                round + 1
            ),
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

/// Blocks of the file that is stamped.
const STAMPED: u64 = 1024;

/// Load until the power goes. With `stop_after_ms`: the daemons are stopped then, as if all had ended at once, and what the disks were told to keep
/// comes to rest; the cut follows.
pub fn load(varve: &Installation, device: &str, journal: &str, stop_after_ms: u64) -> Outcome {
    varve.varve(&["up"])?;
    let fresh = varve.device("disk").is_err();
    if fresh {
        // So that pruning is at work when the power goes.
        let place = varve.root().join("etc/varve");
        std::fs::create_dir_all(&place)
            .and_then(|()| std::fs::write(place.join("store.toml"), "keep = \"all 3s, 1s 1h\"\n"))
            .map_err(|e| e.to_string())?;
        let mapped = protect(varve, device)?;
        make_file_system("ext4", &mapped)?;
    }
    std::fs::create_dir_all("/mnt/live").map_err(|e| e.to_string())?;
    run("mount", &[&varve.device("disk")?, "/mnt/live"])?;
    if fresh {
        std::fs::write("/mnt/live/stamps", vec![0u8; STAMPED as usize * 4096])
            .map_err(|e| e.to_string())?;
        run("sync", &["-f", "/mnt/live"])?;
    }
    let mut stamper = Stamper::with_journal("/mnt/live/stamps", STAMPED, Path::new(journal))?;
    std::thread::spawn(move || {
        (0u32..)
            .map(|step| stamper.write(step % 40 == 39))
            .find(Result::is_err)
    });
    println!("LOADED");
    if stop_after_ms > 0 {
        std::thread::spawn(move || {
            pause(stop_after_ms);
            let stopped = run("pkill", &["-STOP", "blkfilter|varved"]);
            pause(1000);
            // With a mark the kernel writes down how long the list of lasting writes is.
            let marked = ["origin", "lasting"]
                .map(|disk| run("dmsetup", &["message", disk, "0", "mark", "cut"]));
            pause(500);
            println!("STOPPED {stopped:?} {marked:?}");
        });
    }
    let fio = start_fio("/mnt/live", 16, 24, 120)?;
    for index in 0.. {
        std::fs::write(
            format!("/mnt/live/file-{}", index % 50),
            format!("{index}").repeat(5000),
        )
        .map_err(|e| e.to_string())?;
        if index % 25 == 0 {
            run("sync", &["-f", "/mnt/live"])?;
        }
        pause(5);
    }
    finish_fio(fio)?;
    Ok(())
}

/// What the beginning of the device was at the first instant that has a name.
fn base_digest(varve: &Installation) -> Result<String, String> {
    let image = export(varve, "base", false)?;
    let digest = run(
        "sh",
        &[
            "-c",
            &format!("dd if={image} bs=1M count=24 iflag=direct status=none | sha256sum"),
        ],
    )?;
    varve.varve(&["unexport", &image])?;
    Ok(digest)
}

/// The power is back: history and device are made whole, identical, within the bound; what was flushed is there.
pub fn after_cut(varve: &Installation, journal: &str) -> Outcome {
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
    // The past, too: nothing of what was compressed, pruned and struck when the power went is half done.
    let note = varve.root().join("base-digest");
    match std::fs::read_to_string(&note) {
        Ok(base) if base_digest(varve)? == base => println!("the past is what it was"),
        Ok(_) => return Err("an instant before the cut is not what it was".to_owned()),
        Err(_) => {
            varve.varve(&["mark", "base"])?;
            std::fs::write(&note, base_digest(varve)?).map_err(|e| e.to_string())?;
            run("sync", &["-f", &note.display().to_string()])?;
        }
    }
    varve.varve(&["check"])?;
    print!("{}", varve.varve(&["scrub", "--stored"])?);
    std::fs::create_dir_all("/mnt/live").map_err(|e| e.to_string())?;
    run("mount", &[&mapped, "/mnt/live"])?;
    let possible = possible_stamps(Path::new(journal), STAMPED)?;
    let found = read_sector_stamps("/mnt/live/stamps", STAMPED)?;
    for (block, stamps) in found.iter().enumerate() {
        if stamps.iter().any(|stamp| !possible[block].contains(stamp)) {
            return Err(format!(
                "block {block} holds the stamps {stamps:?}; it was acknowledged to hold one of {:?}",
                possible[block]
            ));
        }
    }
    let newest = found.iter().flatten().max().copied().unwrap_or(0);
    println!("stamps up to {newest} are there");
    if newest < 20 {
        return Err("hardly anything was stamped: this tested nothing".to_owned());
    }
    run("umount", &["/mnt/live"])?;
    check_file_system("ext4", &mapped)?;
    varve.compare()?;
    varve.varve(&["down"])?;
    Ok(())
}
