//! What is kept for how long: `varve policy`, `varve pin`, `varve unpin`.

use crate::past::{ask, instant, unexpected};
use crate::{Context, daemons};
use clap::{Args, Subcommand};
use varve_cli::{show_bytes, show_time};
use varve_control::{
    ControlError, PolicyChange, PolicyInfo, SpaceInfo, StoreOp, StorePolicy, StoreReply,
};

#[derive(Subcommand)]
pub enum PolicyCommand {
    /// What is kept now, and how long its space lasts.
    Show,
    /// What another policy would keep; nothing is changed.
    Simulate {
        #[command(flatten)]
        wanted: Wanted,
    },
    /// Change the policy of this store (in etc/varve/store.toml).
    Set {
        #[command(flatten)]
        wanted: Wanted,
        /// Make a recovery point this often: `1h`; `0` for no schedule. (With file systems frozen, or commands around it: `[points]` in the file.)
        #[arg(long, value_name = "SPAN")]
        points: Option<String>,
        /// Let the oldest instants go at once if the history takes more space already than `--space` says.
        #[arg(long)]
        yes: bool,
    },
}

/// What is to be otherwise than it is.
#[derive(Args)]
pub struct Wanted {
    /// Like `all 48h, 1m 7d, 1h 30d, 1d 1y`; `all` keeps everything.
    #[arg(long, value_name = "LADDER")]
    keep: Option<String>,
    /// What is younger is never pruned: `7d`; `0` for no such window.
    #[arg(long, value_name = "SPAN")]
    immutable: Option<String>,
    /// Where all histories together take more, the oldest instants go: `500G`, or `90%` of the store's disk; `0`: no limit but the disk.
    #[arg(long, value_name = "SIZE")]
    space: Option<String>,
}

impl Wanted {
    fn change(self, points: Option<String>) -> PolicyChange {
        PolicyChange {
            keep: self.keep,
            immutable: self.immutable.map(none),
            space: self.space.map(none),
            points: points.map(none),
        }
    }
}

/// `varve policy`.
pub fn run(
    context: &Context,
    volume: Option<String>,
    command: PolicyCommand,
) -> Result<(), ControlError> {
    let volume = daemons::volume(context, volume)?;
    let (change, simulated) = match command {
        PolicyCommand::Show => (PolicyChange::default(), false),
        PolicyCommand::Simulate { wanted } => (wanted.change(None), true),
        PolicyCommand::Set {
            wanted,
            points,
            yes,
        } => return set(context, &volume, wanted.change(points), yes),
    };
    let policy = fetch(context, &volume, change, simulated)?;
    context
        .output
        .result(&policy, || show(&volume, &policy, simulated));
    Ok(())
}

fn none(text: String) -> String {
    match text.as_str() {
        "0" => String::new(),
        _ => text,
    }
}

fn fetch(
    context: &Context,
    volume: &str,
    change: PolicyChange,
    bytes: bool,
) -> Result<PolicyInfo, ControlError> {
    let op = StoreOp::Policy {
        volume: volume.to_owned(),
        change,
        bytes,
    };
    match ask(context, &op, "reading the history")? {
        StoreReply::Policy { policy } => Ok(*policy),
        _ => Err(unexpected()),
    }
}

fn set(
    context: &Context,
    volume: &str,
    change: PolicyChange,
    yes: bool,
) -> Result<(), ControlError> {
    let wrong = |why: String| ControlError::new("X006-policy", why);
    // The daemon knows whether it makes sense.
    let policy = fetch(context, volume, change.clone(), false)?;
    let excess = policy.space.excess_bytes();
    if change.space.is_some() && excess > 0 && !yes {
        return Err(wrong(format!(
            "histories take {} already: {} of the oldest would go at once, for good. If that is meant: --yes. Nothing was changed",
            show_bytes(policy.space.stored_bytes),
            show_bytes(excess)
        )));
    }
    let path = context.paths.store_policy();
    let stored = StorePolicy::load(&path).map_err(wrong)?.with(change);
    stored.save(&path).map_err(wrong)?;
    context.output.result(&policy, || {
        let done = format!("{} says so now; it counts within a minute", path.display());
        context.output.say(done);
        show(volume, &policy, true);
    });
    Ok(())
}

fn show(volume: &str, policy: &PolicyInfo, simulated: bool) {
    println!("{volume}: keeps {}", policy.keep);
    if !policy.immutable.is_empty() {
        println!("  nothing younger than {} is pruned", policy.immutable);
    }
    if !policy.points_every.is_empty() {
        let frozen = match policy.points_freeze {
            true => ", with file systems frozen",
            false => "",
        };
        println!(
            "  a recovery point every {}{frozen}, if anything was written",
            policy.points_every
        );
    }
    if policy.below_lsn == 0 {
        println!("  every instant of the history is kept");
    } else {
        println!(
            "  every instant since {} (lsn:{})",
            show_time(policy.below_ns),
            policy.below_lsn
        );
        for (rung, count) in &policy.rungs {
            println!("  {count} instants before, by `{rung}`");
        }
        if policy.points > 0 {
            println!("  {} recovery points besides", policy.points);
        }
        if policy.pinned > 0 {
            println!("  {} pinned", policy.pinned);
        }
        if let Some((lsn, time)) = policy.first {
            println!("  the first is {} (lsn:{lsn})", show_time(time));
        }
    }
    if let Some((gone, kept)) = policy.gone_and_kept_bytes
        && simulated
    {
        println!(
            "  of the writes before compression that are looked at, {} would go and {} stay",
            show_bytes(gone),
            show_bytes(kept)
        );
    }
    let behind = jiff::Timestamp::now().as_nanosecond() as i64 - policy.now_ns;
    if behind < -3_600_000_000_000 {
        println!(
            "  the store's clock is {} hours ahead of this machine's (that was ahead once): what every write is kept of ends that much earlier",
            -behind / 3_600_000_000_000
        );
    }
    if behind > 3_600_000_000_000 {
        println!(
            "  the store's clock is {} hours behind this machine's: history ages by the store's, which takes no jump",
            behind / 3_600_000_000_000
        );
    }
    println!(
        "  {} stored, {} a day lately",
        show_bytes(policy.stored_bytes),
        show_bytes(policy.bytes_per_day)
    );
    println!("  {}", forecast(&policy.space));
}

/// How long the space lasts.
fn forecast(space: &SpaceInfo) -> String {
    let limit = match space.limit_bytes {
        0 => format!(
            "{} free, no limit but the disk",
            show_bytes(space.free_bytes)
        ),
        limit => format!("{} (space = \"{}\")", show_bytes(limit), space.policy),
    };
    let used = format!(
        "all histories: {} of {limit}, {} a day lately",
        show_bytes(space.stored_bytes),
        show_bytes(space.bytes_per_day)
    );
    let then = match space.ends_with_disk() {
        true => format!(
            "then the disk is full ({} are free) and NOTHING MORE IS RECORDED",
            show_bytes(space.free_bytes)
        ),
        false => "then the oldest instants go first".to_owned(),
    };
    let left = match space.room_bytes().checked_div(space.bytes_per_day) {
        _ if !space.held_up_by.is_empty() => format!(
            "IT IS TOO MUCH, and nothing may go while a part of the history of {} is not known (`varve check` says which)",
            space.held_up_by
        ),
        _ if space.stuck => {
            "IT IS TOO MUCH, and nothing of it may go: pins, what is too young, or one image alone takes that much".to_owned()
        }
        _ if space.excess_bytes() > 0 => "that is too much: the oldest instants go".to_owned(),
        None => "nothing was added lately".to_owned(),
        Some(0) => format!("history left: LESS THAN A DAY, unless something is pruned; {then}"),
        Some(days) if days > 3650 => "history left: years".to_owned(),
        Some(days) => format!("history left: {days} days, even if nothing is pruned; {then}"),
    };
    format!("{used}: {left}")
}

/// `varve pin` and `varve unpin`.
pub fn pin(
    context: &Context,
    volume: Option<String>,
    text: &str,
    pinned: bool,
) -> Result<(), ControlError> {
    let volume = daemons::volume(context, volume)?;
    let op = StoreOp::Pin {
        volume: volume.clone(),
        instant: instant(text)?,
        pinned,
    };
    let reply = ask(context, &op, "looking it up")?;
    let StoreReply::Resolved { lsn, time_ns } = reply else {
        return Err(unexpected());
    };
    context.output.result(&reply, || {
        let time = show_time(time_ns);
        context.output.say(match pinned {
            true => format!("{volume}: {time} (lsn:{lsn}) is kept until `varve unpin lsn:{lsn}`"),
            false => format!("{volume}: the policy decides about {time} (lsn:{lsn}) again"),
        });
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::forecast;
    use varve_control::SpaceInfo;

    const GIB: u64 = 1 << 30;

    #[test]
    fn it_is_said_how_long_the_space_lasts_and_what_comes_then() {
        let space = SpaceInfo {
            policy: "100G".to_owned(),
            limit_bytes: 100 * GIB,
            stored_bytes: 18 * GIB,
            free_bytes: 500 * GIB,
            bytes_per_day: 2 * GIB,
            ..SpaceInfo::default()
        };
        let says = |space: &SpaceInfo, what: &[&str]| {
            let said = forecast(space);
            for what in what {
                assert!(said.contains(what), "{said}");
            }
        };
        says(
            &space,
            &["history left: 41 days", "then the oldest instants go first"],
        );
        // The disk is smaller than the policy thinks.
        let little = SpaceInfo {
            free_bytes: 10 * GIB,
            ..space.clone()
        };
        says(
            &little,
            &["history left: 5 days", "NOTHING MORE IS RECORDED"],
        );
        let unlimited = SpaceInfo {
            limit_bytes: 0,
            ..space.clone()
        };
        says(
            &unlimited,
            &[
                "no limit but the disk",
                "history left: 250 days",
                "RECORDED",
            ],
        );
        let fast = SpaceInfo {
            bytes_per_day: 83 * GIB,
            ..space.clone()
        };
        says(&fast, &["LESS THAN A DAY"]);
        let idle = SpaceInfo {
            bytes_per_day: 0,
            ..space.clone()
        };
        says(&idle, &["nothing was added lately"]);
        let too_much = SpaceInfo {
            stored_bytes: 101 * GIB,
            ..space
        };
        says(&too_much, &["that is too much: the oldest instants go"]);
        let stuck = SpaceInfo {
            stuck: true,
            ..too_much
        };
        says(&stuck, &["IT IS TOO MUCH", "pins"]);
        let held_up = SpaceInfo {
            held_up_by: "mail".to_owned(),
            ..stuck
        };
        says(&held_up, &["IT IS TOO MUCH", "the history of mail"]);
    }
}
