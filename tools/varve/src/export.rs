//! `varve export INSTANT --to TARGET`: an instant copied out of the store, to a file, a device, qcow2, NBD or standard output.

use crate::image::HeldImage;
use crate::past::instant;
use crate::{Context, daemons};
use clap::Args;
use serde::Serialize;
use std::path::Path;
use varve_cli::copy_out::{Allowed, Copied, Identity, Options, Resume, Source, Target, copy_out};
use varve_cli::device::size;
use varve_control::ControlError;

#[derive(Args)]
pub struct CopyArgs {
    /// Copy it: to FILE or a device (sparse, resumable), to FILE.qcow2, to `-` (standard output), or to nbd://HOST/EXPORT.
    #[arg(long, value_name = "TARGET", conflicts_with_all = ["nbd", "writable"])]
    pub to: Option<String>,
    /// With --to: what FILE or the device holds may be overwritten.
    #[arg(long, requires = "to")]
    overwrite: bool,
    /// With --to: read the target again and compare (the default).
    #[arg(long, requires = "to", overrides_with = "no_verify")]
    verify: bool,
    /// With --to: do not read the target again.
    #[arg(long, requires = "to")]
    no_verify: bool,
}

#[derive(Serialize)]
struct Done {
    volume: String,
    lsn: u64,
    time_ns: i64,
    #[serde(flatten)]
    copied: Copied,
}

/// Copies an instant out.
pub fn copy(
    context: &Context,
    volume: Option<String>,
    text: &str,
    to: &str,
    args: &CopyArgs,
) -> Result<(), ControlError> {
    let volume = daemons::volume(context, volume)?;
    let target = Target::parse(to)?;
    let part = target.file().and_then(Resume::load);
    let allowed = Allowed {
        anything: args.overwrite,
        a_part: part.is_some(),
        an_older_copy: false,
    };
    target.check(&context.paths, allowed)?;
    let image = HeldImage::open(context, &volume, &instant(text)?, false)?;
    let bytes = size(Path::new(&image.device))
        .ok_or_else(|| ControlError::new("H016-read", format!("{} has no size", image.device)))?;
    let identity = Identity {
        name: format!("{volume}/lsn:{}", image.lsn),
        time_ns: image.time_ns,
        bytes,
    };
    if let Some(part) = part.filter(|part| part.source != identity && !args.overwrite) {
        return Err(of_another(&volume, to, &part));
    }
    let source = Source {
        path: Path::new(&image.device),
        bytes,
        identity: Some(&identity),
    };
    let options = Options {
        only: None,
        overwrite: args.overwrite,
        verify: args.verify || !args.no_verify,
    };
    let mut copied = copy_out(&context.output, source, &target, options)?;
    copied.source = format!("{volume} at {}", image.instant());
    let done = Done {
        volume,
        lsn: image.lsn,
        time_ns: image.time_ns,
        copied,
    };
    image.close()?;
    context.output.result(&done, || {
        let text = format!("{}: {}", done.copied.source, done.copied.words());
        if to == "-" {
            eprintln!("{text}");
        } else {
            context.output.say(text);
        }
    });
    Ok(())
}

/// The target holds an unfinished copy of something else than was asked for: `5 minutes ago` was another instant five minutes ago.
fn of_another(volume: &str, to: &str, part: &Resume) -> ControlError {
    let name = &part.source.name;
    let next = match name.split_once("/lsn:") {
        Some((of, lsn)) if of == volume => {
            format!("To go on with it: varve export --volume {volume} lsn:{lsn} --to {to}. To")
        }
        _ => "Choose another name. To".to_owned(),
    };
    ControlError::new(
        "H018-target",
        format!(
            "{to} holds an unfinished copy of {name}, not of this instant. Nothing was written. {next} begin anew: --overwrite"
        ),
    )
}
