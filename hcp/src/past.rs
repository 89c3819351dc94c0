//! `hcp --at INSTANT`: a copy of the past, which the store's daemon shows.

use crate::create::{finish, mount};
use crate::source::find;
use crate::{Cli, Context};
use serde::Serialize;
use std::path::PathBuf;
use varve_cli::{MountMode, daemons, parse_instant, show_time};
use varve_control::{ControlError, StoreOp, StoreReply};

#[derive(Serialize)]
struct Shown {
    copy: String,
    lsn: u64,
    time_ns: i64,
    mounted: Option<PathBuf>,
    mount_note: String,
}

/// Shows an instant of a volume, and mounts it.
pub fn copy(context: &Context, cli: &Cli, device: &str, text: &str) -> Result<(), ControlError> {
    let source = find(context, device)?;
    let instant = parse_instant(text, &jiff::Zoned::now())
        .map_err(|why| ControlError::new("I005-instant", why))?;
    let op = StoreOp::Export {
        volume: source.volume.name.clone(),
        instant,
        // A file system that was mounted then wants its journal replayed: into an overlay, never into the past.
        // Without a mount nothing has to be replayed.
        writable: !(cli.read_only && cli.skip_mount),
        nbd: None,
        since: None,
        // Until it is mounted: a command that is broken off leaves nothing behind.
        held: true,
    };
    let mut client = daemons::store(&context.paths)?;
    let StoreReply::Shown {
        device: copy,
        lsn,
        time_ns,
    } = client.call(&op)?
    else {
        return Err(daemons::unexpected("varved"));
    };
    let say = |text: String| context.output.say(text);
    say(format!(
        "Copy of {} as it was {} (lsn:{lsn}): {copy}",
        source.name,
        show_time(time_ns)
    ));
    let mode = if cli.read_only {
        MountMode::ReadOnly
    } else {
        MountMode::Writable
    };
    let (mounted, mount_note) = if cli.skip_mount {
        (None, None)
    } else {
        mount(context, cli, &source, &copy, mode)
    };
    let keep = StoreOp::KeepShown {
        device: copy.clone(),
    };
    client.call::<_, StoreReply>(&keep)?;
    if let Some(place) = &mounted {
        say(format!("  mounted on {}", place.display()));
    }
    let unmounted = mount_note
        .as_ref()
        .is_some_and(|note| cli.is_unmounted(note));
    let mount_note = mount_note.map_or_else(String::new, |note| note.text);
    if !mount_note.is_empty() {
        say(format!("  {mount_note}"));
    }
    say(format!("  end it with: hcp -r {copy}"));
    let shown = Shown {
        copy,
        lsn,
        time_ns,
        mounted,
        mount_note,
    };
    finish(context, &shown, unmounted)
}
