//! `varve status`: am I safe? One screen, and an exit code for monitoring.

use crate::{Context, daemons};
use serde::Serialize;
use std::io::IsTerminal;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};
use varve_cli::{show_ago, show_bytes, show_time};
use varve_control::{
    CheckInfo, ControlError, DrillInfo, SpaceInfo, StoreOp, StoreReply, VolumeHistory, VolumeInfo,
};

#[derive(Serialize)]
struct VolumeStatus {
    #[serde(flatten)]
    volume: VolumeInfo,
    /// Seconds of acknowledged writes that a loss of this machine's origin would lose now.
    exposure_seconds: f64,
    /// Bytes not in the history.
    exposure_bytes: u64,
    /// Oldest and newest instant, ns.
    restorable_from_ns: i64,
    restorable_to_ns: i64,
    /// The last comparison of device and history.
    last_check: Option<CheckInfo>,
    /// The last drill, and the last that proved its instant.
    last_drill: Option<DrillInfo>,
    last_proven: Option<DrillInfo>,
    next_risk: String,
    next_command: String,
    /// Why nothing is known of its history; empty: it is.
    history_unknown: String,
}

const DAY_NS: i64 = 86_400_000_000_000;

fn now_ns() -> i64 {
    jiff::Timestamp::now().as_nanosecond() as i64
}

/// Shows all volumes; waits for protection if asked.
pub fn run(context: &Context, wait: Option<u64>) -> Result<ExitCode, ControlError> {
    let start = Instant::now();
    let limit = Duration::from_secs(wait.unwrap_or(0));
    // A daemon that is being restarted is waited for, too.
    let settled = |volumes: &Result<Vec<VolumeInfo>, ControlError>| {
        volumes
            .as_ref()
            .is_ok_and(|all| all.iter().all(|volume| volume.state == "protected"))
    };
    let mut volumes = daemons::volumes(context);
    while !settled(&volumes) && start.elapsed() < limit {
        std::thread::sleep(Duration::from_millis(100));
        volumes = daemons::volumes(context);
    }
    let volumes = volumes?;
    let all_safe = !volumes.is_empty() && volumes.iter().all(|volume| volume.state == "protected");
    let shown: Vec<VolumeStatus> = volumes
        .into_iter()
        .map(|volume| judge(context, volume))
        .collect();
    context
        .output
        .result(&shown, || shown.iter().for_each(print));
    if shown.is_empty() {
        context
            .output
            .say("Nothing is protected. Next: varve protect DEVICE");
    }
    Ok(if all_safe {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(3)
    })
}

fn judge(context: &Context, volume: VolumeInfo) -> VolumeStatus {
    // A store that hangs on a broken disk must not keep us from saying so.
    let history = daemons::store(context)
        .and_then(|store| Ok(store.answer_within(Duration::from_secs(3))?))
        .and_then(|mut store| {
            store.call(&StoreOp::History {
                volume: volume.name.clone(),
            })
        })
        .map(|reply| match reply {
            StoreReply::History { history } => *history,
            _ => VolumeHistory::default(),
        });
    let (next_risk, next_command) = advise(&volume, &history);
    let unknown = history.as_ref().err();
    let unknown = unknown.filter(|_| volume.state != "waiting");
    let history_unknown = unknown.map_or_else(String::new, ToString::to_string);
    let history = history.unwrap_or_default();
    let (exposure_seconds, exposure_bytes) = match volume.state.as_str() {
        "protected" => (0.0, 0),
        "bypass" => (
            (now_ns() - volume.bypass_since_ns).max(0) as f64 / 1e9,
            volume.marked_bytes,
        ),
        _ => (
            if history.last_ns > 0 {
                (now_ns() - history.last_ns).max(0) as f64 / 1e9
            } else {
                0.0
            },
            volume.marked_bytes,
        ),
    };
    VolumeStatus {
        exposure_seconds,
        exposure_bytes,
        restorable_from_ns: history.first_ns,
        restorable_to_ns: history.last_ns,
        last_check: history.last_check,
        last_drill: history.last_drill,
        last_proven: history.last_proven,
        next_risk,
        next_command,
        history_unknown,
        volume,
    }
}

fn advise(volume: &VolumeInfo, history: &Result<VolumeHistory, ControlError>) -> (String, String) {
    let store = match history {
        Ok(history) => history.behind.as_ref(),
        Err(error) => Some(error),
    };
    let says = |what: fn(&VolumeHistory) -> bool| history.as_ref().is_ok_and(what);
    let to = |risk: &str, command: String| (risk.to_owned(), command);
    let unfinished =
        store.filter(|error| matches!(error.code.as_str(), "R003-unfinished" | "R005-end"));
    match volume.state.as_str() {
        state if unfinished.is_some() && state != "bypass" => to(
            unfinished.map_or("", |error| error.message.as_str()),
            "varve status --wait 600, or what is said above; varve scrub".to_owned(),
        ),
        "starting" => to(
            "it is being opened",
            format!("varve status --wait 60 (then: varve history --volume {})", volume.name),
        ),
        "failed" => to(
            "the volume does not run",
            "correct what the note says, then: varve down; varve up".to_owned(),
        ),
        "bypass" if volume.bypass_unmarked => to(
            "a power cut now would leave no trace of the bypass: check the log's and the state file's disks",
            "varve doctor".to_owned(),
        ),
        "bypass" => to(
            "writes are not recorded; it heals by itself once the log answers",
            "varve doctor".to_owned(),
        ),
        "waiting" => to(
            "nothing is recorded before the next boot",
            "reboot".to_owned(),
        ),
        "rewinding" => to(
            "a rewind is running; the device is not offered until it is done",
            "varve status --wait 600".to_owned(),
        ),
        _ if store.is_some_and(|error| error.code.starts_with('S')) => to(
            &format!(
                "the log will fill up: {}",
                store.map_or("", |error| error.message.as_str())
            ),
            "df -h (where the store lies); varve doctor".to_owned(),
        ),
        _ if store.is_some() => to(
            "the store's daemon does not answer: the log will fill up",
            "varve up".to_owned(),
        ),
        "synchronising" | "healing" | "unverified" => to(
            "instants resolve again once the copy is done",
            "varve status --wait 600".to_owned(),
        ),
        _ if varve_cli::device::size(Path::new(&volume.device))
            .is_some_and(|now| now != volume.bytes) =>
        {
            to(
                "the device was resized; what is behind the end of its old size is not protected",
                format!("umount {}; varve resize {}", volume.mapped, volume.name),
            )
        }
        _ if volume.segments_held * 4 > volume.segment_count * 3 => to(
            "the log is more than three quarters full: the store is behind",
            "varve doctor".to_owned(),
        ),
        _ if says(|history| history.locked) => to(
            "the store is locked: writes are recorded, but nothing can be restored, and history grows uncompressed",
            "varve key unlock (if its key files are lost: varve key init, then varve key import FILE)"
                .to_owned(),
        ),
        _ if says(|history| !history.space.held_up_by.is_empty()) => {
            let by = history.as_ref().map_or("", |history| history.space.held_up_by.as_str());
            to(
                "histories take more space than they may, and nothing may go while a part of the oldest one is not known: soon nothing more is recorded",
                format!("varve check --volume {by} (it says what cannot be read, and what to do)"),
            )
        }
        _ if says(|history| history.space.stuck) => to(
            "histories take more space than they may, and nothing of them may go: soon nothing more is recorded",
            "varve policy (then unpin, shorten `immutable`, or allow more: varve policy set --space SIZE)"
                .to_owned(),
        ),
        _ if says(|history| fills_soon(&history.space)) => to(
            "the disk that histories lie on is full in less than a day: then nothing more is recorded",
            "varve policy (then make room there, or keep less: varve policy set --keep LADDER, or --space SIZE)".to_owned(),
        ),
        _ if says(|history| history.keys_not_exported > 0) => to(
            "its key lies in this store only: if that is lost, nothing of its history can be read",
            "varve key export FILE, and keep FILE somewhere else".to_owned(),
        ),
        _ if says(|history| history.last_check.is_some_and(|check| check.differing_bytes > 0)) => to(
            "the device was not what its history says when they were compared last",
            format!("varve compare --volume {}", volume.name),
        ),
        _ if says(|history| history.last_drill.as_ref().is_some_and(|drill| !drill.proven)) => to(
            "the last drill did not prove its instant",
            format!("varve drill --volume {} (varve bisect finds the last good instant)", volume.name),
        ),
        _ if volume.copies_lost > 0 => to(
            "hot copies of it are valid no more (the device itself is as safe as before)",
            "hcp -l".to_owned(),
        ),
        _ if !volume.memory_locked => to(
            "memory is not locked: slow under memory pressure",
            "varve doctor".to_owned(),
        ),
        _ => to(
            "none known",
            "varve mark NAME (before your next change)".to_owned(),
        ),
    }
}

/// At a limit the oldest instants go, as was wanted; a full disk ends recording. A first day, with its full copy, says nothing of the next.
fn fills_soon(space: &SpaceInfo) -> bool {
    space.ends_with_disk() && space.room_bytes() < space.bytes_per_day && space.history_ns > DAY_NS
}

fn print(status: &VolumeStatus) {
    let volume = &status.volume;
    let safe = if volume.state == "protected" {
        "SAFE"
    } else {
        "NOT SAFE"
    };
    println!(
        "{}: {safe} ({})  {} -> {} [{}]",
        volume.name,
        volume.state,
        volume.device,
        if volume.mapped.is_empty() {
            "not offered"
        } else {
            &volume.mapped
        },
        volume.front
    );
    if !volume.note.is_empty() {
        println!("  last start  {}", volume.note);
    }
    println!(
        "  exposure    {:.1} s, {} not in the history",
        status.exposure_seconds,
        show_bytes(status.exposure_bytes)
    );
    if status.restorable_to_ns > 0 {
        let span = show_ago(status.restorable_from_ns, status.restorable_to_ns);
        println!(
            "  restorable  {}  to  {}  ({span})",
            show_time(status.restorable_from_ns),
            show_time(status.restorable_to_ns)
        );
    } else if status.history_unknown.is_empty() {
        println!("  restorable  nothing yet");
    } else {
        println!("  restorable  NOT KNOWN: {}", status.history_unknown);
    }
    if volume.bypass_since_ns > 0 {
        println!(
            "  bypass      since {}: {}",
            show_time(volume.bypass_since_ns),
            volume.bypass_reason
        );
    }
    match status.last_check {
        Some(check) if check.differing_bytes == 0 => println!(
            "  last check  {} ({} ago): device and history are equal",
            show_time(check.time_ns),
            show_ago(check.time_ns, now_ns())
        ),
        Some(check) => println!(
            "  last check  {}: {} DIFFER",
            show_time(check.time_ns),
            show_bytes(check.differing_bytes)
        ),
        None if !status.history_unknown.is_empty() => {}
        None => println!(
            "  last check  none; `varve compare --volume {}` makes one",
            volume.name
        ),
    }
    print_proof(status);
    println!("  next risk   {}", status.next_risk);
    println!("  next        {}", status.next_command);
}

/// Whether an instant was proven to be of use; amber, on a terminal, if none was.
fn print_proof(status: &VolumeStatus) {
    let amber = |text: String| match std::io::stdout().is_terminal() {
        true => println!("\x1b[33m{text}\x1b[0m"),
        false => println!("{text}"),
    };
    match &status.last_proven {
        Some(drill) => println!(
            "  last proven {} ({} ago): {}",
            show_time(drill.time_ns),
            show_ago(drill.time_ns, now_ns()),
            drill.found
        ),
        None if !status.history_unknown.is_empty() => {}
        None => amber(format!(
            "  last proven NONE; `varve drill --volume {}` mounts and checks an instant",
            status.volume.name
        )),
    }
    if let Some(drill) = status.last_drill.as_ref().filter(|drill| !drill.proven) {
        amber(format!(
            "  last drill  {} NOT PROVEN: {}",
            show_time(drill.time_ns),
            drill.found
        ));
    }
}
