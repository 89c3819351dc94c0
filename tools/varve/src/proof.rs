//! Is the history still what was recorded? `varve scrub` reads all of it, `varve check` its structure; `varve rebuild` makes the indexes anew.

use crate::past::{ask, unexpected};
use crate::{Context, daemons};
use std::path::Path;
use std::process::ExitCode;
use varve_cli::{show_bytes, show_time};
use varve_control::{ControlError, DamageInfo, Scrubbing, StoreOp, StoreReply};

/// `varve scrub`.
pub fn scrub(
    context: &Context,
    volume: Option<String>,
    mib_per_second: Option<u64>,
    stored: bool,
) -> Result<ExitCode, ControlError> {
    let volume = daemons::volume(context, volume)?;
    let op = StoreOp::Scrub {
        volume: volume.clone(),
        bytes_per_second: mib_per_second.map(|rate| rate << 20),
        how: match stored {
            true => Scrubbing::Stored,
            false => Scrubbing::Everything,
        },
    };
    answer(context, &volume, &ask(context, &op, "reading the history")?)
}

/// `varve rebuild`.
pub fn rebuild(
    context: &Context,
    volume: Option<String>,
    give_up_kept: bool,
) -> Result<ExitCode, ControlError> {
    let volume = daemons::volume(context, volume)?;
    if give_up_kept {
        let op = StoreOp::GiveUpKept {
            volume: volume.clone(),
        };
        daemons::store(context)?.call::<_, StoreReply>(&op)?;
    }
    let op = StoreOp::Scrub {
        volume: volume.clone(),
        bytes_per_second: None,
        how: Scrubbing::ForIndexes,
    };
    let code = answer(context, &volume, &ask(context, &op, "reading the history")?)?;
    context.output.say(
        "  Runs are what their segments say; maps are made again in the background, until then instants take longer to open",
    );
    Ok(code)
}

/// `varve check`.
pub fn check(context: &Context, volume: Option<String>) -> Result<ExitCode, ControlError> {
    let volume = daemons::volume(context, volume)?;
    let op = StoreOp::Check {
        volume: volume.clone(),
    };
    answer(context, &volume, &ask(context, &op, "checking")?)
}

/// `varve salvage`.
pub fn salvage(context: &Context, to: &Path) -> Result<ExitCode, ControlError> {
    let to = std::path::absolute(to)?;
    let op = StoreOp::Salvage {
        to: to.display().to_string(),
    };
    let reply = ask(context, &op, "copying what can be read")?;
    let StoreReply::Salvaged {
        files,
        bytes,
        unreadable,
        damage,
    } = &reply
    else {
        return Err(unexpected());
    };
    context.output.result(&reply, || {
        for (file, offset, length) in unreadable {
            match length {
                0 => println!("UNREADABLE  {file}"),
                _ => println!("UNREADABLE  {file}: bytes {offset} to {}", offset + length),
            }
        }
        for found in damage {
            show(found);
        }
        context.output.say(format!(
            "{files} files, {} are in {}. To use them: varve down; put that directory in the place of {} (move, or mount); varve up; varve scrub",
            show_bytes(*bytes),
            to.display(),
            context.paths.store().display()
        ));
    });
    Ok(match unreadable.is_empty() && damage.is_empty() {
        true => ExitCode::SUCCESS,
        false => ExitCode::from(7),
    })
}

fn answer(context: &Context, volume: &str, reply: &StoreReply) -> Result<ExitCode, ControlError> {
    let StoreReply::Scrubbed {
        segments,
        bytes,
        history_bytes,
        from_segment,
        damage,
    } = reply
    else {
        return Err(unexpected());
    };
    context.output.result(reply, || {
        if *from_segment > 0 {
            println!("{volume}: went on at segment {from_segment}, where the last scrub was broken off");
        }
        for found in damage {
            show(found);
        }
        let read = match bytes {
            0 => String::new(),
            bytes => format!(", {} read, {} of history", show_bytes(*bytes), show_bytes(*history_bytes)),
        };
        if damage.is_empty() {
            context
                .output
                .say(format!("{volume}: {segments} segments are whole{read}"));
        } else {
            println!("{volume}: {} damaged places in {segments} segments{read}", damage.len());
            println!(
                "  Everything else stays readable. If the device itself is well, `varve mark` now and look at the store's disk (`dmesg`); instants that \
                 are named above lack the blocks that are named with them."
            );
        }
    });
    Ok(match damage.is_empty() {
        true => ExitCode::SUCCESS,
        false => ExitCode::from(7),
    })
}

fn show(damage: &DamageInfo) {
    println!("DAMAGED  {}", damage.what);
    let Some((lsn, time)) = damage.from else {
        if !damage.unplaced {
            println!("         nothing that was recorded is lost by it");
        }
        return;
    };
    let until = damage.until.map_or_else(
        || "to the newest".to_owned(),
        |(lsn, time)| {
            format!(
                "to {} (lsn:{lsn}), when all of it had been written anew",
                show_time(time)
            )
        },
    );
    println!(
        "         instants from {} (lsn:{lsn}) {until}",
        show_time(time)
    );
    for (offset, length) in damage.blocks.iter().take(20) {
        println!("         lack bytes {offset} to {}", offset + length);
    }
    if damage.blocks.len() > 20 {
        println!(
            "         and {} further ranges (--json has all)",
            damage.blocks.len() - 20
        );
    }
}
