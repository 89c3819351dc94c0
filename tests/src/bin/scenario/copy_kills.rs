//! `hcp` is killed at its system calls, one after the other: the file system thaws, what copies are left are whole and can be removed, the next works.

use crate::copies::{copy, end, fields, hcp};
use crate::{Outcome, protect};
use std::time::{Duration, Instant};
use varve_tests::scenario::{Installation, make_file_system, pause, run, say};

/// What `hcp` does to the outside: talks with the daemon, reads and writes files, starts programs.
const CALLS: [&str; 9] = [
    "connect", "sendto", "write", "recvfrom", "read", "openat", "mkdir", "execve", "wait4",
];
const LIVE: &str = "/mnt/live";
/// How long a file system may stay frozen whose `hcp` died, and what a write takes besides.
const FROZEN_MAX: Duration = Duration::from_secs(15);

/// Runs `hcp` on the live file system under strace; gives what strace wrote.
fn traced(varve: &Installation, options: &[&str]) -> Result<(bool, String), String> {
    let trace = varve.root().join("trace");
    let output = std::process::Command::new("strace")
        .args(["-qq", "-o"])
        .arg(&trace)
        .args(options)
        .arg(varve.program("hcp"))
        .arg("--root")
        .arg(varve.root())
        .args(["--store-size", "64", LIVE])
        .output()
        .map_err(|e| format!("strace: {e}"))?;
    let text = std::fs::read_to_string(&trace).map_err(|e| e.to_string())?;
    Ok((output.status.success(), text))
}

/// Removes the copies that there are, each of which must be whole; gives how many.
fn remove_all(varve: &Installation) -> Result<usize, String> {
    let since = Instant::now();
    let listed = loop {
        let listed = hcp(varve, &["--json", "-l"])?;
        // The daemon may still be at it.
        if since.elapsed() > FROZEN_MAX
            || fields(&listed, "copy").iter().all(|path| !path.is_empty())
        {
            break listed;
        }
        pause(50);
    };
    let names = fields(&listed, "name");
    for (name, path) in names.iter().zip(fields(&listed, "copy")) {
        run(
            "dd",
            &[
                &format!("if={path}"),
                "of=/dev/null",
                "bs=1M",
                "count=40",
                "status=none",
            ],
        )
        .map_err(|e| format!("{name} is listed, but: {e}"))?;
        hcp(varve, &["-r", name])?;
    }
    Ok(names.len())
}

/// At most `kills` kills, spread over all that `hcp` does.
pub fn hcp_killed(varve: &Installation, device: &str, kills: usize) -> Outcome {
    let start = Instant::now();
    let mapped = protect(varve, device)?;
    varve.wait_protected()?;
    make_file_system("ext4", &mapped)?;
    std::fs::create_dir_all(LIVE).map_err(|e| e.to_string())?;
    run("mount", &[&mapped, LIVE])?;
    let (went_well, trace) = traced(varve, &["-e", &format!("trace={}", CALLS.join(","))])?;
    if !went_well {
        return Err(format!("hcp does not work under strace: {trace}"));
    }
    remove_all(varve)?;
    let count = |call: &str| {
        trace
            .lines()
            .filter(|line| line.starts_with(&format!("{call}(")))
            .count()
    };
    let steps: Vec<(&str, usize)> = CALLS
        .iter()
        .flat_map(|call| (1..=count(call)).map(move |number| (*call, number)))
        .collect();
    let stride = steps.len().div_ceil(kills).max(1);
    let (mut killed, mut left, mut slowest) = (0, 0, Duration::ZERO);
    for (call, number) in steps.iter().step_by(stride) {
        let inject = format!("inject={call}:signal=KILL:when={number}");
        let (went_well, _) = traced(varve, &["-e", &inject])?;
        killed += usize::from(!went_well);
        let since = Instant::now();
        std::fs::write(format!("{LIVE}/{call}-{number}"), call).map_err(|e| e.to_string())?;
        run("sync", &["-f", LIVE])?;
        slowest = slowest.max(since.elapsed());
        if since.elapsed() > FROZEN_MAX {
            return Err(format!(
                "killed at {call} {number}: frozen for {:?}",
                since.elapsed()
            ));
        }
        left += remove_all(varve).map_err(|e| format!("killed at {call} {number}: {e}"))?;
    }
    let mounts = std::fs::read_to_string("/proc/self/mounts").map_err(|e| e.to_string())?;
    if mounts.contains("var/hotcopy") {
        return Err(format!("a mount is left: {mounts}"));
    }
    if killed < steps.len().div_ceil(stride) * 3 / 4 || left == 0 {
        return Err(format!(
            "{killed} were killed, {left} left a copy: that shows nothing"
        ));
    }
    // What was asked last may still be made.
    pause(6000);
    remove_all(varve)?;
    copy(varve, &["--store-size", "64", LIVE])?;
    if remove_all(varve)? != 1 {
        return Err("the next copy is not there".to_owned());
    }
    run("umount", &[LIVE])?;
    say(
        start,
        &format!(
            "{killed} kills of hcp at {} system calls, {left} left a whole copy, the longest write took {slowest:?}",
            steps.len()
        ),
    );
    end(varve)
}
