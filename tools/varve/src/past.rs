//! Everything that looks at the past or brings it back.

use crate::{Context, daemons};
use serde::Serialize;
use std::process::ExitCode;
use varve_cli::{confirm, parse_instant, show_bytes, show_time, with_clock_times};
use varve_control::{
    ControlError, FilterOp, FilterReply, Instant, StoreOp, StoreReply, VolumeHistory,
};

pub(crate) fn instant(text: &str) -> Result<Instant, ControlError> {
    parse_instant(text, &jiff::Zoned::now()).map_err(|why| ControlError::new("I005-instant", why))
}

pub(crate) fn unexpected() -> ControlError {
    ControlError::new("C005-answer", "varved gave an unexpected answer")
}

pub(crate) fn ask(context: &Context, op: &StoreOp, what: &str) -> Result<StoreReply, ControlError> {
    let bar = context.output.bar(what);
    daemons::store(context)?
        .call_with(op, &[], bar)
        .map_err(|mut error: ControlError| {
            error.message = with_clock_times(&error.message);
            error
        })
}

/// `varve mark`.
pub fn mark(
    context: &Context,
    volume: Option<String>,
    label: &str,
    freeze: bool,
) -> Result<(), ControlError> {
    let means = parse_instant(label, &jiff::Zoned::now());
    if !means.is_ok_and(|means| matches!(&means, Instant::Point(name) if name == label)) {
        return Err(ControlError::new(
            "V021-label",
            format!(
                "`{label}` would be read as a time, or as another instant, where an instant is asked for. Choose a name like `at-{label}`"
            ),
        ));
    }
    let name = daemons::volume(context, volume)?;
    let op = FilterOp::Mark {
        name: name.clone(),
        label: label.to_owned(),
        freeze,
        application: false,
        automatic: false,
    };
    let FilterReply::Marked {
        lsn,
        clean,
        frozen_us,
        note,
    } = daemons::filter(context)?.call(&op)?
    else {
        return Err(unexpected());
    };
    #[derive(Serialize)]
    struct Marked<'a> {
        volume: &'a str,
        name: &'a str,
        lsn: u64,
        file_system_consistent: bool,
        /// For how long file systems were frozen, in seconds.
        frozen_seconds: Option<f64>,
        note: &'a str,
    }
    let frozen_seconds = frozen_us.map(|micros| micros as f64 / 1e6);
    context.output.result(
        &Marked {
            volume: &name,
            name: label,
            lsn,
            file_system_consistent: clean,
            frozen_seconds,
            note: &note,
        },
        || {
            let how = match frozen_seconds {
                Some(pause) => format!(", its file systems were frozen for {pause:.3} s"),
                None if clean => ", its file systems are not mounted".to_owned(),
                None => String::new(),
            };
            let say = |text: String| context.output.say(text);
            say(format!("{name}: point {label:?} at lsn:{lsn}{how}"));
            if !note.is_empty() {
                say(format!("  {note}"));
            }
        },
    );
    Ok(())
}

/// The instant in the middle of two, by records; none if there is none between them.
pub(crate) fn middle(
    context: &Context,
    volume: &str,
    after: u64,
    before: u64,
) -> Result<Option<u64>, ControlError> {
    let op = StoreOp::Middle {
        volume: volume.to_owned(),
        after,
        before,
    };
    match ask(context, &op, "")? {
        StoreReply::Resolved { lsn, .. } => Ok(Some(lsn)),
        StoreReply::Nothing => Ok(None),
        _ => Err(unexpected()),
    }
}

pub(crate) fn fetch_history(context: &Context, name: &str) -> Result<VolumeHistory, ControlError> {
    match ask(
        context,
        &StoreOp::History {
            volume: name.to_owned(),
        },
        "reading the history",
    )? {
        StoreReply::History { history } => {
            if let Some(behind) = &history.behind {
                eprintln!(
                    "varve: what came after {} is not in the store. {}",
                    show_time(history.last_ns),
                    with_clock_times(&behind.to_string())
                );
            }
            Ok(*history)
        }
        _ => Err(unexpected()),
    }
}

/// `varve points`.
pub fn points(context: &Context, volume: Option<String>) -> Result<(), ControlError> {
    let name = daemons::volume(context, volume)?;
    let history = fetch_history(context, &name)?;
    context.output.result(&history.points, || {
        for point in &history.points {
            let kind = match (point.application_consistent, point.file_system_consistent) {
                (true, _) => "application",
                (false, true) => "file system",
                (false, false) => "crash",
            };
            println!(
                "{}  lsn:{:<10}  {kind:<11}  {}",
                show_time(point.time_ns),
                point.lsn,
                point.name
            );
        }
        if history.points.is_empty() {
            context
                .output
                .say("no recovery points; `varve mark NAME` makes one");
        }
    });
    Ok(())
}

/// `varve history`.
pub fn history(context: &Context, volume: Option<String>) -> Result<(), ControlError> {
    let name = daemons::volume(context, volume)?;
    let history = fetch_history(context, &name)?;
    context.output.result(&history, || {
        if history.last_lsn == 0 {
            println!("{name}: no instant yet; the first full copy is running (`varve status`)");
            return;
        }
        let (since_ns, since) = match history.pruned_below_lsn {
            0 => (history.first_ns, history.first_lsn),
            below => (history.pruned_below_ns, below),
        };
        println!(
            "{name}: any instant from {} (lsn:{since})",
            show_time(since_ns)
        );
        println!(
            "{:width$}                to {} (lsn:{})",
            "",
            show_time(history.last_ns),
            history.last_lsn,
            width = name.len()
        );
        let seconds = ((history.last_ns - history.first_ns) as f64 / 1e9).max(1.0);
        println!(
            "  {} records, {} written, {} stored{}; {:.1} records/s, {}/s",
            history.records,
            show_bytes(history.payload_bytes),
            show_bytes(history.stored_bytes),
            match history.unsettled_bytes {
                0 => String::new(),
                bytes => format!(" ({} of it still to be compressed)", show_bytes(bytes)),
            },
            history.records as f64 / seconds,
            show_bytes((history.payload_bytes as f64 / seconds) as u64)
        );
        let before = history.kept.iter().filter(|kept| kept.lsn < since);
        if let Some(first) = before.clone().next() {
            println!(
                "  and {} instants before that, the first {} (lsn:{}); --json lists them",
                before.count(),
                show_time(first.time_ns),
                first.lsn
            );
        }
        for kept in history.kept.iter().filter(|kept| kept.pinned) {
            println!("  pinned  {}  lsn:{}", show_time(kept.time_ns), kept.lsn);
        }
        for (from, to, from_ns, to_ns, why) in &history.closed {
            println!(
                "  closed  {} to {}  lsn:{from} to lsn:{to}  {why}",
                show_time(*from_ns),
                show_time(*to_ns)
            );
        }
        for (from_ns, to_ns) in &history.gaps {
            println!(
                "  gap     {} to {}  no single writes",
                show_time(*from_ns),
                show_time(*to_ns)
            );
        }
    });
    Ok(())
}

/// `varve rewind`.
pub fn rewind(
    context: &Context,
    volume: Option<String>,
    text: &str,
    dry_run: bool,
    yes: bool,
) -> Result<(), ControlError> {
    let volume = daemons::volume(context, volume)?;
    let wanted = instant(text)?;
    if !dry_run && !yes {
        let plan = ask(
            context,
            &StoreOp::Rewind {
                volume: volume.clone(),
                instant: wanted.clone(),
                dry_run: true,
            },
            "comparing",
        )?;
        let StoreReply::Rewound {
            lsn,
            time_ns,
            written_bytes,
            ..
        } = plan
        else {
            return Err(unexpected());
        };
        let question = format!(
            "Write {} (lsn:{lsn}) back over {volume}? {} differ. It can be undone.",
            show_time(time_ns),
            show_bytes(written_bytes)
        );
        if !confirm(&question) {
            return Err(ControlError::new(
                "R002-unconfirmed",
                "not confirmed; nothing was written (--yes does not ask)",
            ));
        }
    }
    let reply = ask(
        context,
        &StoreOp::Rewind {
            volume: volume.clone(),
            instant: wanted,
            dry_run,
        },
        if dry_run { "comparing" } else { "rewinding" },
    )?;
    let StoreReply::Rewound {
        lsn,
        time_ns,
        written_bytes,
        undo_lsn,
    } = reply.clone()
    else {
        return Err(unexpected());
    };
    context.output.result(&reply, || {
        let when = show_time(time_ns);
        if dry_run {
            println!(
                "{volume} at {when} (lsn:{lsn}): {} would be written",
                show_bytes(written_bytes)
            );
        } else {
            context.output.say(format!(
                "{volume} is again what it was at {when} (lsn:{lsn}); {} were written",
                show_bytes(written_bytes)
            ));
            context.output.say(format!(
                "  undo it with: varve rewind --volume {volume} lsn:{undo_lsn}"
            ));
        }
    });
    Ok(())
}

/// `varve diff`.
pub fn diff(
    context: &Context,
    volume: Option<String>,
    from: &str,
    to: &str,
) -> Result<(), ControlError> {
    let volume = daemons::volume(context, volume)?;
    let reply = ask(
        context,
        &StoreOp::Diff {
            volume,
            from: instant(from)?,
            to: instant(to)?,
        },
        "",
    )?;
    let StoreReply::Ranges { ranges, bytes } = &reply else {
        return Err(unexpected());
    };
    context.output.result(&reply, || {
        for (offset, length) in ranges {
            println!("{offset} {length}");
        }
        context
            .output
            .say(format!("{} ranges, {}", ranges.len(), show_bytes(*bytes)));
    });
    Ok(())
}

/// `varve compare`.
pub fn compare(context: &Context, volume: Option<String>) -> Result<ExitCode, ControlError> {
    let volume = daemons::volume(context, volume)?;
    let reply = ask(
        context,
        &StoreOp::Compare {
            volume: volume.clone(),
        },
        "comparing",
    )?;
    let StoreReply::Ranges { ranges, bytes } = &reply else {
        return Err(unexpected());
    };
    context.output.result(&reply, || {
        if ranges.is_empty() {
            context
                .output
                .say(format!("{volume}: the device is what its history says"));
        } else {
            for (offset, length) in ranges {
                println!("{offset} {length}");
            }
            println!(
                "{volume}: {} differ from the history in {} ranges",
                show_bytes(*bytes),
                ranges.len()
            );
        }
    });
    Ok(if ranges.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(7)
    })
}
