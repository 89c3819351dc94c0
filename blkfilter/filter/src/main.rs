//! `blkfilter`: the data path's daemon. Protects volumes, answers on a Unix socket, never on the network.

use blkfilter::manager::Manager;
use blkfilter::points::PointLabel;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;
use varve_control::{ControlError, FilterOp, FilterReply, Paths, SealedInfo};
use varve_format::{Lsn, PointDetail, SegmentSequence, WallTime};

const HELP: &str = "blkfilter: the data path of Varve: records every write to protected devices.

Usage: blkfilter [--root DIR]
       blkfilter --is-origin DEVICE [LINK...]  (for udev: exit code 0 if DEVICE is a protected volume's)
       blkfilter --mapped-name DEVICE  (for udev: the name of the volume that DEVICE shows)
       blkfilter --copy-name DEVICE  (for udev: the name of the hot copy, or image of the past, that DEVICE shows)
       blkfilter --freeze DIR...  (its own helper: freezes until told to thaw, or for 5 s)

It opens all volumes in DIR/etc/varve/volumes (DIR is / by default, or VARVE_ROOT) and answers `varve` on
DIR/run/varve/blkfilter.sock. SIGTERM closes every volume that is not in use; one that is in use is left
for the next blkfilter, which takes it over without an I/O error (ublk).

Exit codes: 0 ended as asked, 1 failed, 2 wrong usage, 5 another blkfilter runs.";

fn main() -> ExitCode {
    varve_control::keep_memory_secret("blkfilter");
    let mut root = std::env::var("VARVE_ROOT").unwrap_or_else(|_| "/".to_owned());
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match (argument.as_str(), arguments.next()) {
            ("--root", Some(value)) => root = value,
            ("--is-origin", Some(device)) => {
                return is_origin(&Paths::new(root), &device, arguments);
            }
            ("--mapped-name", Some(device)) => return mapped_name(&Paths::new(root), &device),
            ("--copy-name", Some(device)) => {
                return match blkfilter::copies::copy_name(&Paths::new(root), &device) {
                    Some(name) => {
                        println!("{name}");
                        ExitCode::SUCCESS
                    }
                    None => ExitCode::FAILURE,
                };
            }
            ("--freeze", Some(first)) => {
                let directories: Vec<String> = std::iter::once(first).chain(arguments).collect();
                return match blkfilter::freeze::helper(&directories) {
                    Ok(()) => ExitCode::SUCCESS,
                    Err(error) => {
                        eprintln!("blkfilter: {error}");
                        ExitCode::FAILURE
                    }
                };
            }
            ("--help" | "-h", _) => {
                println!("{HELP}");
                return ExitCode::SUCCESS;
            }
            ("--version" | "-V", _) => {
                println!("blkfilter {}", env!("CARGO_PKG_VERSION"));
                return ExitCode::SUCCESS;
            }
            _ => {
                eprintln!("{HELP}");
                return ExitCode::from(2);
            }
        }
    }
    run(Paths::new(root))
}

/// For udev: the name of the volume that a mapped device shows.
fn mapped_name(paths: &Paths, device: &str) -> ExitCode {
    let specs = varve_control::load_specs(&paths.volumes());
    let name = specs
        .into_iter()
        .flatten()
        .map(|spec| spec.name)
        .find(|name| {
            std::fs::canonicalize(paths.devices().join(name))
                .is_ok_and(|mapped| mapped == std::path::Path::new(device))
        });
    match name {
        Some(name) => {
            println!("{name}");
            ExitCode::SUCCESS
        }
        None => ExitCode::FAILURE,
    }
}

/// For udev: whether the device is the origin of a protected volume.
fn is_origin(paths: &Paths, device: &str, links: impl Iterator<Item = String>) -> ExitCode {
    // udev makes the links only after its rules ran: what they will be is told.
    let links: Vec<std::path::PathBuf> = links
        .map(|link| std::path::Path::new("/dev").join(link))
        .collect();
    let boot = blkfilter::origin::boot_id();
    let number = |path: &std::path::Path| {
        std::fs::metadata(path)
            .map(|m| std::os::unix::fs::MetadataExt::rdev(&m))
            .ok()
            .filter(|n| *n != 0)
    };
    let asked = number(std::path::Path::new(device));
    let specs = varve_control::load_specs(&paths.volumes());
    let found = asked.is_some()
        && specs
            .iter()
            .flatten()
            // One that waits for the next boot is used as it is until then.
            .filter(|spec| spec.begins_after_boot != boot)
            .any(|spec| number(&spec.device) == asked || links.contains(&spec.device));
    if found {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn run(paths: Paths) -> ExitCode {
    let lock = match lock_instance(&paths) {
        Ok(lock) => lock,
        Err(message) => {
            eprintln!("blkfilter: {message}");
            return ExitCode::from(5);
        }
    };
    let manager = Arc::new(Manager::new(paths.clone()));
    let ending = Arc::clone(&manager);
    varve_control::at_signal(move |_| {
        ending.shutdown();
        // An upgrade leaves what is in use to the next daemon. At the end of the system there is none: what is still mounted is served until it is
        // unmounted.
        let since = std::time::Instant::now();
        while ending.has_running() && system_is_stopping() && since.elapsed() < LAST_WAIT {
            std::thread::sleep(Duration::from_millis(200));
            ending.shutdown();
        }
        0
    });
    blkfilter::freeze::thaw_left_over(&paths.run());
    let losses = Arc::clone(&manager);
    std::thread::spawn(move || losses.follow_copies());
    manager.open_all();
    let late = Arc::clone(&manager);
    std::thread::spawn(move || {
        loop {
            std::thread::sleep(Duration::from_millis(250));
            late.open_late_ones();
        }
    });
    let socket = paths.filter_socket();
    let result = varve_control::serve(&socket, move |op: FilterOp, attached, _| {
        answer(&manager, op, attached)
    });
    drop(lock);
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("blkfilter: {}: {error}", socket.display());
            ExitCode::FAILURE
        }
    }
}

/// Shorter than `TimeoutStopSec` of the unit.
const LAST_WAIT: Duration = Duration::from_secs(80);

fn system_is_stopping() -> bool {
    let asked = std::process::Command::new("systemctl")
        .arg("is-system-running")
        .output();
    asked.is_ok_and(|output| output.stdout.starts_with(b"stopping"))
}

/// One daemon per root: a second one would fight over volumes. A dead one's lock ends with it.
fn lock_instance(paths: &Paths) -> Result<nix::fcntl::Flock<std::fs::File>, String> {
    let path = paths.run().join("blkfilter.lock");
    std::fs::create_dir_all(paths.run()).map_err(|e| format!("{}: {e}", paths.run().display()))?;
    let file = std::fs::File::create(&path).map_err(|e| format!("{}: {e}", path.display()))?;
    nix::fcntl::Flock::lock(file, nix::fcntl::FlockArg::LockExclusiveNonblock)
        .map_err(|_| format!("another blkfilter holds {}; stop it first", path.display()))
}

fn answer(manager: &Manager, op: FilterOp, attached: Vec<u8>) -> Result<FilterReply, ControlError> {
    Ok(match op {
        FilterOp::Ping => FilterReply::Done,
        FilterOp::Status => FilterReply::Status {
            volumes: manager.infos(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        },
        FilterOp::Protect { spec } => FilterReply::Volume {
            volume: Box::new(manager.protect(spec)?),
        },
        FilterOp::Prepare { spec } => FilterReply::Volume {
            volume: Box::new(manager.prepare(spec)?),
        },
        FilterOp::Unprotect { name } => {
            manager.unprotect(&name)?;
            FilterReply::Done
        }
        FilterOp::Resize { name } => FilterReply::Volume {
            volume: Box::new(manager.resize(&name)?),
        },
        FilterOp::Mark {
            name,
            label,
            freeze,
            application,
            automatic,
        } => {
            let bit = |is: bool, bit: u8| if is { bit } else { 0 };
            let label = PointLabel {
                name: label,
                detail: bit(application, PointDetail::APPLICATION)
                    | bit(automatic, PointDetail::AUTOMATIC),
                frozen_until: None,
            };
            let marked = manager.mark(label, &name, freeze)?;
            FilterReply::Marked {
                lsn: marked.lsn.0,
                clean: marked.clean,
                frozen_us: marked.frozen.map(|frozen| frozen.as_micros() as u64),
                note: marked.note,
            }
        }
        FilterOp::Seal { name } => {
            let (below, lsn_end) = manager.seal(&name)?;
            FilterReply::Sealed {
                sealed: SealedInfo {
                    below: below.0,
                    lsn_end: lsn_end.0,
                },
            }
        }
        FilterOp::Release { name, below } => {
            manager.release(&name, SegmentSequence(below))?;
            FilterReply::Done
        }
        FilterOp::Doubt { name } => FilterReply::Wanted {
            wanted: manager.doubt(&name)?,
        },
        FilterOp::GoOnAbove {
            name,
            sequence,
            lsn,
            since_ns,
        } => FilterReply::Wanted {
            wanted: manager.go_on_above(
                &name,
                (SegmentSequence(sequence), Lsn(lsn)),
                WallTime(since_ns),
            )?,
        },
        FilterOp::Verified {
            name,
            number,
            below,
            equal,
        } => FilterReply::Wanted {
            wanted: manager.verified(&name, number, below, equal)?,
        },
        FilterOp::RewindBegin { name, target } => {
            manager.rewind_begin(&name, Lsn(target))?;
            FilterReply::Done
        }
        FilterOp::RewindWrite { name, offset } => {
            manager.rewind_write(&name, offset, attached)?;
            FilterReply::Done
        }
        FilterOp::RewindEnd { name } => {
            manager.rewind_end(&name)?;
            FilterReply::Done
        }
        FilterOp::CopyCreate {
            copies,
            persist,
            writable,
            freeze,
        } => FilterReply::Copies {
            copies: manager.copy_create(&copies, persist, writable, freeze)?,
        },
        FilterOp::CopyRemove { name } => {
            manager.copy_remove(&name)?;
            FilterReply::Done
        }
        FilterOp::CopyChanged { name } => FilterReply::Ranges {
            ranges: manager.copy_changed(&name)?,
        },
        FilterOp::Copies => FilterReply::Copies {
            copies: manager.copy_infos(),
        },
        FilterOp::Shutdown => {
            manager.shutdown();
            std::process::exit(0);
        }
    })
}
