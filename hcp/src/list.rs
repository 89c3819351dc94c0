//! What copies there are, and ending them.

use crate::Context;
use crate::create::created;
use serde::Serialize;
use std::path::Path;
use std::process::Command;
use varve_cli::device::mounted_on;
use varve_cli::{daemons, show_bytes};
use varve_control::{ControlError, CopyInfo, FilterOp, FilterReply, StoreOp, StoreReply};

/// A copy, and where it (or a partition of it) is mounted.
#[derive(Serialize)]
struct Listed {
    #[serde(flatten)]
    copy: CopyInfo,
    mounted: Vec<String>,
}

fn copies(context: &Context) -> Result<Vec<Listed>, ControlError> {
    let reply = daemons::filter(&context.paths)?.call(&FilterOp::Copies)?;
    let FilterReply::Copies { copies } = reply else {
        return Err(daemons::unexpected("blkfilter"));
    };
    let listed = |copy: CopyInfo| Listed {
        mounted: mounts(&copy.copy),
        copy,
    };
    Ok(copies.into_iter().map(listed).collect())
}

/// Where a device and its partitions are mounted.
fn mounts(device: &str) -> Vec<String> {
    if device.is_empty() {
        return Vec::new();
    }
    let nodes = (1..=128).map(|number| format!("{device}p{number}"));
    std::iter::once(device.to_owned())
        .chain(nodes.filter(|node| Path::new(node).exists()))
        .flat_map(|node| {
            // btrfs mounts have no device number of their own; the table names them by path.
            let mut found = mounted_on(Path::new(&node));
            let text = varve_cli::output_of("findmnt", &["-rn", "-o", "TARGET", "--source", &node]);
            found.extend(text.lines().map(str::to_owned));
            found.sort();
            found.dedup();
            found
        })
        .collect()
}

/// `hcp -l`.
pub fn list(context: &Context) -> Result<(), ControlError> {
    let copies = copies(context)?;
    context.output.result(&copies, || {
        for listed in &copies {
            say(listed);
        }
        if copies.is_empty() {
            context.output.say("no hot copies; `hcp DEVICE` makes one");
        }
    });
    Ok(())
}

fn say(listed: &Listed) {
    let copy = &listed.copy;
    println!("{}:", copy.name);
    println!("  real device     {} (volume {})", copy.device, copy.volume);
    let shown = if copy.copy.is_empty() {
        "none yet: it is being made, or taken back after its daemon ended"
    } else {
        &copy.copy
    };
    println!("  virtual device  {shown}");
    println!(
        "  changed blocks  {} ({}, {} free)",
        copy.store,
        show_bytes(copy.store_bytes),
        show_bytes(copy.store_free_bytes)
    );
    let places = if listed.mounted.is_empty() {
        "not mounted".to_owned()
    } else {
        listed.mounted.join(", ")
    };
    println!("  mount point     {places}");
    println!("  created         {}", created(copy));
    println!(
        "  changed since   {:.1} MiB ({} bytes)",
        copy.changed_bytes as f64 / 1048576.0,
        copy.changed_bytes
    );
    let mut kind = vec![if copy.writable {
        "writable"
    } else {
        "read-only"
    }];
    if copy.persist {
        kind.push("survives a power cut");
    }
    println!("  kind            {}", kind.join(", "));
    if !copy.lost.is_empty() {
        println!("  NOT VALID       {}: {}", copy.lost, copy.note);
    }
}

/// `hcp -s`.
pub fn show(context: &Context, which: &str) -> Result<(), ControlError> {
    let all = copies(context)?;
    let listed = pick(&all, which)?;
    context.output.result(listed, || say(listed));
    Ok(())
}

/// One copy, by its name, its device, or where it is mounted.
pub fn find_copy(context: &Context, which: &str) -> Result<CopyInfo, ControlError> {
    let all = copies(context)?;
    Ok(pick(&all, which)?.copy.clone())
}

fn pick<'a>(all: &'a [Listed], which: &str) -> Result<&'a Listed, ControlError> {
    let path = std::fs::canonicalize(which)
        .map_or_else(|_| which.to_owned(), |path| path.display().to_string());
    all.iter()
        .find(|listed| {
            let copy = &listed.copy;
            copy.name == which
                || (!copy.copy.is_empty() && copy.copy == path)
                || listed.mounted.contains(&path)
        })
        .ok_or_else(|| {
            ControlError::new(
                "H001-unknown",
                format!("{which} is no hot copy; `hcp -l` lists them"),
            )
        })
}

/// `hcp -r`: unmounts, then ends it. A copy that somebody uses stays.
pub fn remove(context: &Context, which: &str) -> Result<(), ControlError> {
    let all = copies(context)?;
    let listed = match pick(&all, which) {
        Ok(listed) => listed,
        Err(unknown) => return remove_past(context, which, unknown),
    };
    for place in &listed.mounted {
        unmount(place)?;
        context.output.say(format!("unmounted {place}"));
    }
    let name = listed.copy.name.clone();
    let op = FilterOp::CopyRemove { name: name.clone() };
    daemons::filter(&context.paths)?.call::<_, FilterReply>(&op)?;
    context
        .output
        .result(&name, || context.output.say(format!("{name} is gone")));
    Ok(())
}

/// A copy of the past is the store's.
fn remove_past(context: &Context, which: &str, unknown: ControlError) -> Result<(), ControlError> {
    let Ok(mut store) = daemons::store(&context.paths) else {
        return Err(unknown);
    };
    let StoreReply::Exports { exports } = store.call(&StoreOp::Exports)? else {
        return Err(unknown);
    };
    let path = std::fs::canonicalize(which)
        .map_or_else(|_| which.to_owned(), |path| path.display().to_string());
    for (device, _) in exports {
        let places = mounts(&device);
        if device == path || places.contains(&path) {
            for place in &places {
                unmount(place)?;
            }
            let op = StoreOp::Unexport {
                device: device.clone(),
            };
            store.call::<_, StoreReply>(&op)?;
            context
                .output
                .result(&device, || context.output.say(format!("{device} is gone")));
            return Ok(());
        }
    }
    Err(unknown)
}

fn unmount(place: &str) -> Result<(), ControlError> {
    let outcome = Command::new("umount").arg(place).output()?;
    if outcome.status.success() {
        return Ok(());
    }
    let why = String::from_utf8_lossy(&outcome.stderr).trim().to_owned();
    Err(ControlError::new(
        "V012-busy",
        format!("{why}. Nothing was ended (`fuser -vm {place}` shows who uses it)"),
    ))
}
