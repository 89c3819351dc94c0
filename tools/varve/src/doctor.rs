//! `varve doctor`: can this machine do it, how well, and what to do about what is missing.

use crate::Context;
use serde::Serialize;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

#[derive(Serialize)]
struct Finding {
    what: &'static str,
    /// ok, warn, bad.
    verdict: &'static str,
    found: String,
    todo: String,
}

/// Kernels whose ublk stops the machine at ADD_DEV (oops), by the beginning of their release.
const BAD_KERNELS: [&str; 7] = [
    "6.17.0-35",
    "6.17.0-38",
    "6.17.0-40",
    "6.17.0-1017",
    "6.17.0-1019",
    "6.18.4",
    "6.18.5",
];
/// Surviving memory of one volume, about: 24 slots of 264 KiB and the bitmap.
const LOCKED_BYTES: u64 = 8 << 20;

/// Runs all checks. Exit code 0 if nothing is bad.
pub fn run(context: &Context) -> ExitCode {
    let findings = vec![
        kernel(),
        ublk(),
        known_bad(),
        fallback(),
        io_uring(),
        root(),
        memory(),
        flush_cost(&context.paths.log(), "log disk"),
        flush_cost(&context.paths.state(), "state disk"),
        second_place(context),
    ];
    context.output.result(&findings, || {
        for finding in &findings {
            println!(
                "{:5} {:14} {}",
                finding.verdict, finding.what, finding.found
            );
            if !finding.todo.is_empty() {
                println!("      {:14} -> {}", "", finding.todo);
            }
        }
    });
    if findings.iter().any(|finding| finding.verdict == "bad") {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    }
}

fn finding(
    what: &'static str,
    verdict: &'static str,
    found: impl Into<String>,
    todo: impl Into<String>,
) -> Finding {
    Finding {
        what,
        verdict,
        found: found.into(),
        todo: todo.into(),
    }
}

fn release() -> String {
    std::fs::read_to_string("/proc/sys/kernel/osrelease")
        .unwrap_or_default()
        .trim()
        .to_owned()
}

fn version() -> (u32, u32) {
    let release = release();
    let mut parts = release
        .split(['.', '-'])
        .map(|part| part.parse().unwrap_or(0));
    (parts.next().unwrap_or(0), parts.next().unwrap_or(0))
}

fn kernel() -> Finding {
    let (verdict, todo) = if version() >= (6, 1) {
        ("ok", "")
    } else {
        (
            "warn",
            "Linux 6.1 or newer is what Varve is tested with; below 5.15 io_uring lacks what it needs",
        )
    };
    finding("kernel", verdict, format!("Linux {}", release()), todo)
}

fn ublk() -> Finding {
    if Path::new("/dev/ublk-control").exists() {
        let notice = if version() >= (6, 15) {
            "a dead daemon is noticed at once"
        } else {
            "a dead daemon is noticed through a cancelled command"
        };
        return finding("ublk", "ok", format!("there ({notice})"), "");
    }
    finding(
        "ublk",
        "warn",
        "missing",
        "modprobe ublk_drv (6.0 and newer; Debian 12: the 6.12 kernel from backports). Until then the FUSE + loop fallback is used",
    )
}

fn known_bad() -> Finding {
    let release = release();
    match BAD_KERNELS.iter().find(|bad| {
        release
            .strip_prefix(*bad)
            .is_some_and(|rest| !rest.starts_with(|c: char| c.is_ascii_digit()))
    }) {
        Some(bad) => finding(
            "known faults",
            "bad",
            format!("Linux {bad} can oops when a ublk device is added"),
            "boot another kernel, or protect with --front fuse",
        ),
        None => finding("known faults", "ok", "none of this kernel", ""),
    }
}

fn fallback() -> Finding {
    let fuse = Path::new("/dev/fuse").exists();
    let looped = Path::new("/dev/loop-control").exists();
    match (fuse, looped) {
        (true, true) => finding(
            "fallback",
            "ok",
            "FUSE and loop are there (a dead daemon means I/O errors here, until it is set up again)",
            "",
        ),
        _ => finding(
            "fallback",
            if Path::new("/dev/ublk-control").exists() {
                "ok"
            } else {
                "bad"
            },
            "FUSE or loop is missing",
            "modprobe fuse loop",
        ),
    }
}

fn io_uring() -> Finding {
    let disabled =
        std::fs::read_to_string("/proc/sys/kernel/io_uring_disabled").unwrap_or_default();
    match disabled.trim() {
        "2" => finding(
            "io_uring",
            "bad",
            "disabled (kernel.io_uring_disabled = 2)",
            "sysctl kernel.io_uring_disabled=0",
        ),
        _ => finding("io_uring", "ok", "allowed", ""),
    }
}

/// Bits of CapEff: CAP_IPC_LOCK 14, CAP_SYS_ADMIN 21, CAP_SYS_RESOURCE 24.
fn capability(bit: u32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok());
    effective.is_some_and(|bits| bits >> bit & 1 == 1)
}

fn root() -> Finding {
    if !capability(21) {
        return finding("rights", "bad", "CAP_SYS_ADMIN is missing", "run as root");
    }
    if !capability(24) {
        return finding(
            "rights",
            "warn",
            "CAP_SYS_RESOURCE is missing: PR_SET_IO_FLUSHER is refused",
            "under memory pressure writes may be slow; run the daemon with CAP_SYS_RESOURCE",
        );
    }
    finding("rights", "ok", "all that the daemons need", "")
}

fn memory() -> Finding {
    if capability(14) {
        return finding("locked memory", "ok", "CAP_IPC_LOCK: no limit", "");
    }
    let limits = std::fs::read_to_string("/proc/self/limits").unwrap_or_default();
    let soft = limits
        .lines()
        .find(|line| line.starts_with("Max locked memory"))
        .and_then(|line| line.split_whitespace().nth(3))
        .unwrap_or("?")
        .to_owned();
    match soft.parse::<u64>() {
        Ok(bytes) if bytes < LOCKED_BYTES => finding(
            "locked memory",
            "warn",
            format!("limit {bytes} bytes; a volume wants about {LOCKED_BYTES}"),
            "LimitMEMLOCK=infinity in the unit, or CAP_IPC_LOCK",
        ),
        _ => finding("locked memory", "ok", format!("limit {soft} bytes"), ""),
    }
}

/// Measures write + fdatasync of 4 KiB in a directory.
fn flush_cost(directory: &Path, what: &'static str) -> Finding {
    const ROUNDS: u32 = 20;
    let measure = || -> std::io::Result<f64> {
        std::fs::create_dir_all(directory)?;
        let path = directory.join(".doctor");
        let mut file = std::fs::File::create(&path)?;
        file.write_all(&[0u8; 4096])?;
        file.sync_all()?;
        let start = Instant::now();
        for _ in 0..ROUNDS {
            std::os::unix::fs::FileExt::write_all_at(&file, &[1u8; 4096], 0)?;
            file.sync_data()?;
        }
        let cost = start.elapsed().as_secs_f64() / f64::from(ROUNDS);
        std::fs::remove_file(&path)?;
        Ok(cost)
    };
    match measure() {
        Ok(cost) if cost > 0.1 => finding(
            what,
            "warn",
            format!(
                "{}: a flush takes {:.1} ms",
                directory.display(),
                cost * 1e3
            ),
            "near log_wait_max (250 ms): put it on a faster disk",
        ),
        Ok(cost) => finding(
            what,
            "ok",
            format!(
                "{}: a flush takes {:.2} ms",
                directory.display(),
                cost * 1e3
            ),
            "",
        ),
        Err(error) => finding(
            what,
            "bad",
            format!("{}: {error}", directory.display()),
            "make it writable, or choose another place with --log and --state",
        ),
    }
}

fn second_place(context: &Context) -> Finding {
    let device = |path: &Path| {
        path.ancestors()
            .find_map(|p| std::fs::metadata(p).ok())
            .map(|m| m.dev())
    };
    if device(&context.paths.log()) == device(&context.paths.state()) {
        return finding(
            "second place",
            "warn",
            "log and state file are on one file system",
            "give --state a place on another disk: then a power cut while the log's disk is dead costs no full read",
        );
    }
    finding(
        "second place",
        "ok",
        "log and state file are on two file systems",
        "",
    )
}
