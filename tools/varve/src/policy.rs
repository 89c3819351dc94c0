//! What is kept for how long: `varve policy`, `varve pin`, `varve unpin`.

use crate::past::{ask, instant, unexpected};
use crate::{Context, daemons};
use clap::Subcommand;
use varve_cli::{show_bytes, show_time};
use varve_control::{ControlError, PolicyInfo, StoreOp, StorePolicy, StoreReply};

#[derive(Subcommand)]
pub enum PolicyCommand {
    /// What is kept now, and how long the store's disk lasts.
    Show,
    /// What another policy would keep; nothing is changed.
    Simulate {
        /// Like `all 48h, 1m 7d, 1h 30d, 1d 1y`; `all` keeps everything.
        #[arg(long, value_name = "LADDER")]
        keep: Option<String>,
        /// What is younger is never pruned: `7d`.
        #[arg(long, value_name = "SPAN")]
        immutable: Option<String>,
    },
    /// Change the policy of this store (in etc/varve/store.toml).
    Set {
        /// Like `all 48h, 1m 7d, 1h 30d, 1d 1y`; `all` keeps everything.
        #[arg(long, value_name = "LADDER")]
        keep: Option<String>,
        /// What is younger is never pruned: `7d`; `0` for no such window.
        #[arg(long, value_name = "SPAN")]
        immutable: Option<String>,
        /// Make a recovery point this often: `1h`; `0` for no schedule. (With file systems frozen, or commands around it: `[points]` in the file.)
        #[arg(long, value_name = "SPAN")]
        points: Option<String>,
    },
}

/// `varve policy`.
pub fn run(
    context: &Context,
    volume: Option<String>,
    command: PolicyCommand,
) -> Result<(), ControlError> {
    let volume = daemons::volume(context, volume)?;
    let (wanted, simulated) = match command {
        PolicyCommand::Show => (Wanted::default(), false),
        PolicyCommand::Simulate { keep, immutable } => {
            let immutable = immutable.map(none);
            let points = None;
            (
                Wanted {
                    keep,
                    immutable,
                    points,
                },
                true,
            )
        }
        PolicyCommand::Set {
            keep,
            immutable,
            points,
        } => {
            let wanted = Wanted {
                keep,
                immutable: immutable.map(none),
                points: points.map(none),
            };
            return set(context, &volume, wanted);
        }
    };
    let policy = fetch(context, &volume, wanted, simulated)?;
    context
        .output
        .result(&policy, || show(&volume, &policy, simulated));
    Ok(())
}

/// What is to be otherwise than it is.
#[derive(Clone, Default)]
struct Wanted {
    keep: Option<String>,
    immutable: Option<String>,
    points: Option<String>,
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
    wanted: Wanted,
    bytes: bool,
) -> Result<PolicyInfo, ControlError> {
    let op = StoreOp::Policy {
        volume: volume.to_owned(),
        keep: wanted.keep,
        immutable: wanted.immutable,
        points: wanted.points,
        bytes,
    };
    match ask(context, &op, "reading the history")? {
        StoreReply::Policy { policy } => Ok(*policy),
        _ => Err(unexpected()),
    }
}

fn set(context: &Context, volume: &str, wanted: Wanted) -> Result<(), ControlError> {
    let wrong = |why: String| ControlError::new("X006-policy", why);
    // The daemon knows whether it makes sense.
    let policy = fetch(context, volume, wanted.clone(), false)?;
    let path = context.paths.store_policy();
    let mut stored = StorePolicy::load(&path).map_err(wrong)?;
    stored.keep = wanted.keep.unwrap_or(stored.keep);
    stored.immutable = wanted.immutable.unwrap_or(stored.immutable);
    stored.points.every = wanted.points.unwrap_or(stored.points.every);
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
    if behind > 3_600_000_000_000 {
        println!(
            "  the store's clock is {} hours behind this machine's: history ages by the store's, which takes no jump",
            behind / 3_600_000_000_000
        );
    }
    println!(
        "  {} stored, {} a day lately, {} free: {}",
        show_bytes(policy.stored_bytes),
        show_bytes(policy.bytes_per_day),
        show_bytes(policy.free_bytes),
        forecast(policy)
    );
}

/// How long the disk lasts if nothing is pruned.
fn forecast(policy: &PolicyInfo) -> String {
    match policy.free_bytes.checked_div(policy.bytes_per_day) {
        None => "nothing was added lately".to_owned(),
        Some(0) => "LESS THAN A DAY of history fits, unless something is pruned".to_owned(),
        Some(days) if days > 3650 => "years of history fit".to_owned(),
        Some(days) => format!("{days} more days of history fit, even if nothing is pruned"),
    }
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
