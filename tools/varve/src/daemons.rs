//! Reaching the daemons, and starting them where systemd does not.

use crate::Context;
use serde::Serialize;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use varve_cli::daemons;
use varve_control::{Client, ControlError, FilterOp, FilterReply, StoreOp, StoreReply, VolumeInfo};

/// Connects to the data path.
pub fn filter(context: &Context) -> Result<Client, ControlError> {
    daemons::filter(&context.paths)
}

/// Connects to the store.
pub fn store(context: &Context) -> Result<Client, ControlError> {
    daemons::store(&context.paths)
}

/// All volumes.
pub fn volumes(context: &Context) -> Result<Vec<VolumeInfo>, ControlError> {
    daemons::volumes(&context.paths)
}

/// The volume that is meant: the one named, or the only one.
pub fn volume(context: &Context, name: Option<String>) -> Result<String, ControlError> {
    if let Some(name) = name {
        // By its ID, too; one that is protected no more the store's daemon knows.
        let is_id = name.len() == 32 && name.bytes().all(|digit| digit.is_ascii_hexdigit());
        let known = match is_id {
            true => volumes(context).unwrap_or_default(),
            false => Vec::new(),
        };
        let known = known.into_iter();
        let mut known = known.filter(|volume| volume.id == name);
        return Ok(known.next().map_or(name, |volume| volume.name));
    }
    let mut volumes = volumes(context)?;
    volumes.retain(|volume| !volume.id.is_empty()); // One whose file cannot be read is not meant.
    match volumes.as_slice() {
        [only] => Ok(only.name.clone()),
        [] => Err(ControlError::new(
            "V019-unknown",
            "no volume is protected; `varve protect DEVICE` begins",
        )),
        several => {
            let names: Vec<&str> = several.iter().map(|volume| volume.name.as_str()).collect();
            Err(ControlError::new(
                "V031-which",
                format!("which volume? Say --volume: {}", names.join(", ")),
            ))
        }
    }
}

/// Starts what does not run.
pub fn up(context: &Context) -> Result<(), ControlError> {
    std::fs::create_dir_all(context.paths.run())?;
    for name in ["blkfilter", "varved"] {
        let alive = |context: &Context| match name {
            "blkfilter" => filter(context)
                .and_then(|mut c| c.call::<_, FilterReply>(&FilterOp::Ping))
                .is_ok(),
            _ => store(context)
                .and_then(|mut c| c.call::<_, StoreReply>(&StoreOp::Ping))
                .is_ok(),
        };
        if alive(context) {
            context.output.say(format!("{name}: runs already"));
            continue;
        }
        let log_path = context.paths.run().join(format!("{name}.log"));
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(&log_path)?;
        let program = std::env::current_exe()?.with_file_name(name);
        Command::new(&program)
            .arg("--root")
            .arg(context.paths.root())
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .process_group(0)
            .spawn()
            .map_err(|e| ControlError::new("D002-start", format!("{}: {e}", program.display())))?;
        let start = Instant::now();
        while !alive(context) {
            if start.elapsed() > Duration::from_secs(60) {
                return Err(ControlError::new(
                    "D002-start",
                    format!("{name} did not come up; see {}", log_path.display()),
                ));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        context.output.say(format!(
            "{name}: started (its messages: {})",
            log_path.display()
        ));
    }
    context.output.result(&Daemons { running: true }, || {});
    Ok(())
}

#[derive(Serialize)]
struct Daemons {
    running: bool,
}

/// A connection, unless nobody is there.
fn running(client: Result<Client, ControlError>) -> Result<Option<Client>, ControlError> {
    match client {
        Ok(client) => Ok(Some(client)),
        Err(error) if error.code.starts_with("C007") => Ok(None),
        Err(error) => Err(error),
    }
}

/// A daemon that ends closes the connection instead of answering.
fn ended(answer: Result<(), ControlError>) -> Result<(), ControlError> {
    match answer {
        Err(error) if !error.code.starts_with("C00") => Err(error),
        _ => Ok(()),
    }
}

/// Stops both.
pub fn down(context: &Context) -> Result<(), ControlError> {
    if let Some(mut client) = running(store(context))? {
        ended(client.call::<_, StoreReply>(&StoreOp::Shutdown).map(|_| ()))?;
    }
    if let Some(mut client) = running(filter(context))? {
        ended(
            client
                .call::<_, FilterReply>(&FilterOp::Shutdown)
                .map(|_| ()),
        )?;
    }
    context.output.result(&Daemons { running: false }, || {
        context.output.say("stopped")
    });
    Ok(())
}
