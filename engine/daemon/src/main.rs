//! `varved`: the store's daemon. Takes sealed segments out of the logs, shows images of the past, rewinds. A Unix socket, never the network.

mod another_log;
mod background;
mod compare;
mod describe;
mod export;
mod forget;
mod hook;
mod image_device;
mod keys;
mod overlay;
mod points;
mod redirection;
mod resolve;
mod retention;
mod rewind;
mod scheduled_point;
mod scrub;
mod service;
mod space;
mod store_clock;
mod verify;

use service::Service;
use std::process::ExitCode;
use std::sync::Arc;
use varve_control::Paths;

const HELP: &str =
    "varved: the store of Varve: keeps the history of protected volumes and gives back any instant.

Usage: varved [--root DIR]

It takes history out of the logs of blkfilter and answers `varve` on DIR/run/varve/varved.sock.

Exit codes: 0 ended as asked, 1 failed, 2 wrong usage, 5 another varved runs.";

fn main() -> ExitCode {
    let mut root = std::env::var("VARVE_ROOT").unwrap_or_else(|_| "/".to_owned());
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match (argument.as_str(), arguments.next()) {
            ("--root", Some(value)) => root = value,
            ("--help" | "-h", _) => {
                println!("{HELP}");
                return ExitCode::SUCCESS;
            }
            ("--version" | "-V", _) => {
                println!("varved {}", env!("CARGO_PKG_VERSION"));
                return ExitCode::SUCCESS;
            }
            _ => {
                eprintln!("{HELP}");
                return ExitCode::from(2);
            }
        }
    }
    varve_control::keep_memory_secret("varved");
    let paths = Paths::new(root);
    let socket = paths.store_socket();
    export::clear_dead(&paths);
    let service = Arc::new(Service::new(paths));
    let ending = Arc::clone(&service);
    varve_control::at_signal(move |_| {
        ending.end_all();
        0
    });
    service.forget_the_rest();
    let follower = Arc::clone(&service);
    std::thread::spawn(move || follower.follow());
    let worker = Arc::clone(&service);
    std::thread::spawn(move || background::run(worker));
    let marker = Arc::clone(&service);
    std::thread::spawn(move || points::run(marker));
    match varve_control::serve(&socket, move |op, attached, reporter| {
        service.answer(op, attached, reporter)
    }) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("varved: {}: {error}", socket.display());
            match error.kind() {
                std::io::ErrorKind::AddrInUse => ExitCode::from(5),
                _ => ExitCode::FAILURE,
            }
        }
    }
}
