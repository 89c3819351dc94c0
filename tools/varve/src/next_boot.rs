//! Protection of a mounted device, from the next boot on: everything is made ready now, and /etc/fstab leads to the mapped device then.
//!
//! Order: the daemon's files first, then /etc/fstab. A crash in between leaves a volume that waits and mounts that know nothing of it: the device is
//! mounted as before, the volume says that it is in use, `varve unprotect` takes it away.

use crate::{Context, daemons, fstab};
use serde::Serialize;
use std::path::{Path, PathBuf};
use varve_cli::device::{mounted_on, refuse_used_parts};
use varve_cli::show_bytes;
use varve_control::{ControlError, FilterOp, FilterReply, VolumeSpec};

/// What the table says; nothing if there is none. One that cannot be read is not empty.
pub fn table_text(context: &Context) -> Result<String, ControlError> {
    match std::fs::read_to_string(table(context)) {
        Ok(text) => Ok(text),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(String::new()),
        Err(error) => Err(ControlError::new(
            "X018-fstab",
            format!(
                "{}: {error}. Nothing was changed; mend that (it must be UTF-8) and say it again",
                table(context).display()
            ),
        )),
    }
}

fn table(context: &Context) -> PathBuf {
    context.paths.root().join("etc/fstab")
}

#[derive(Serialize)]
struct Prepared {
    volume: String,
    device: String,
    mapped: String,
    /// Where fstab mounts it.
    mounts: Vec<String>,
    /// Mounted now, but not by fstab.
    others: Vec<String>,
    back_out: String,
    dry_run: bool,
}

/// `varve protect --at-next-boot`.
pub fn protect(
    context: &Context,
    spec: VolumeSpec,
    device: &Path,
    dry_run: bool,
) -> Result<(), ControlError> {
    refuse_used_parts(device)?;
    let text = table_text(context)?;
    let entries = fstab::entries(&text, |source| fstab::means(source, device));
    let mounted = mounted_on(device);
    // Where it is mounted now, and where it would be.
    let places = || {
        mounted
            .iter()
            .chain(entries.iter().map(|entry| &entry.place))
    };
    let system = [
        "/",
        "/usr",
        "/boot",
        "/boot/efi",
        "/etc",
        "/var",
        "/var/lib",
    ];
    if let Some(place) = places().find(|place| system.contains(&place.as_str())) {
        return Err(ControlError::new(
            "V035-system",
            format!(
                "{} holds {place}, which Varve itself needs to start: that cannot be protected yet. Nothing was changed",
                device.display()
            ),
        ));
    }
    let store = context.paths.store();
    let refuse_own = [&spec.log, &spec.state, &store]
        .into_iter()
        .find(|path| places().any(|place| path.starts_with(place)));
    if let Some(path) = refuse_own {
        return Err(ControlError::new(
            "V034-loop",
            format!(
                "{} lies on {}: it would record its own writes. Choose another place, or another device. Nothing was changed",
                path.display(),
                device.display()
            ),
        ));
    }
    let mapped = context.paths.devices().join(&spec.name);
    let answer = Prepared {
        volume: spec.name.clone(),
        device: device.display().to_string(),
        mapped: mapped.display().to_string(),
        mounts: entries.iter().map(|entry| entry.place.clone()).collect(),
        others: mounted
            .into_iter()
            .filter(|place| !entries.iter().any(|entry| entry.place == *place))
            .collect(),
        back_out: format!("varve unprotect {}", spec.name),
        dry_run,
    };
    let bytes = spec.bytes;
    if !dry_run {
        let name = spec.name.clone();
        daemons::filter(context)?.call::<_, FilterReply>(&FilterOp::Prepare { spec })?;
        if !entries.is_empty() {
            // Read again: making the log may have taken a while.
            let text = table_text(context)?;
            let entries = fstab::entries(&text, |source| fstab::means(source, device));
            let new = fstab::rewritten(&text, &entries, &name, &mapped);
            fstab::replace(&table(context), &new)?;
        }
    }
    context.output.result(&answer, || say(&answer, bytes));
    Ok(())
}

fn say(answer: &Prepared, bytes: u64) {
    let tense = if answer.dry_run { "would be" } else { "is" };
    println!(
        "{} ({}) {tense} protected as `{}` from the next boot on.",
        answer.device,
        show_bytes(bytes),
        answer.volume
    );
    for place in &answer.mounts {
        println!(
            "  /etc/fstab: {place} {tense} mounted from {}",
            answer.mapped
        );
    }
    for place in &answer.others {
        println!(
            "  NOTE: {place} is not mounted by /etc/fstab: whatever mounts it must use {} from then on",
            answer.mapped
        );
    }
    println!(
        "  downtime:  the reboot itself and a second or two. The device is offered at once; its first full copy of {} runs meanwhile",
        show_bytes(bytes)
    );
    println!("  units:     systemctl enable blkfilter varved");
    println!(
        "  back out:  {} (if the machine does not come up: {} --offline)",
        answer.back_out, answer.back_out
    );
    if answer.dry_run {
        println!("Nothing was changed.");
    }
}

/// Makes /etc/fstab what it was before; whether there was anything to undo.
pub fn restore_mounts(context: &Context, name: &str) -> Result<bool, ControlError> {
    let text = table_text(context)?;
    match fstab::restored(&text, name) {
        Some(old) => {
            fstab::replace(&table(context), &old)?;
            Ok(true)
        }
        None => Ok(false),
    }
}

/// Without the daemons: puts the volume's file aside, so that the next boot does not know the volume. Gives its device.
pub fn take_away(context: &Context, name: &str) -> Result<String, ControlError> {
    if daemons::filter(context).is_ok() {
        return Err(ControlError::new(
            "V036-online",
            format!(
                "blkfilter runs: use `varve unprotect {name}` without --offline; or, if that cannot be done: systemctl stop varved blkfilter (where systemd does not run them: varve down), then varve unprotect {name} --offline"
            ),
        ));
    }
    let path = context.paths.volumes().join(format!("{name}.toml"));
    if !path.exists() {
        return Err(ControlError::new(
            "V019-unknown",
            format!("{} does not exist", path.display()),
        ));
    }
    let specs = varve_control::load_specs(&context.paths.volumes()).into_iter();
    let spec = specs.flatten().find(|spec| spec.name == name);
    // One that waits for the next boot has no history.
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let has_begun = |spec: &&VolumeSpec| spec.begins_after_boot != boot.trim();
    if let Some(spec) = spec.as_ref().filter(has_begun) {
        // It is found by that.
        varve_control::save_former(&context.paths.former_volumes(), spec)
            .map_err(|error| ControlError::new("V011-config", error.to_string()))?;
    }
    std::fs::rename(&path, path.with_extension("toml.offline"))?;
    // A file that cannot be read does not say which device.
    Ok(spec.map_or_else(|| name.to_owned(), |spec| spec.device.display().to_string()))
}
