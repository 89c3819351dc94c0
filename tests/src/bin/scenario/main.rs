//! `scenario NAME ROOT DEVICE [ARGUMENT]`: one story on a real device; exit code 0 if every promise held.

mod bad_input;
mod copies;
mod copy_faults;
mod copy_kills;
mod death;
mod encrypted;
mod ends;
mod files;
mod holes;
mod instants;
mod log_fault;
mod origin;
mod points;
mod retention;
mod rewinds;
mod shapes;
mod space;
mod store_life;

use log_fault::Fault;
use std::path::Path;
use std::process::ExitCode;
use varve_tests::scenario::{Installation, run};
use varve_tests::slow_disk;
use varve_tests::stamps::Stamper;

type Outcome = Result<(), String>;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [name, root, device, rest @ ..] = arguments.as_slice() else {
        eprintln!("scenario NAME ROOT DEVICE [ARGUMENT...]");
        return ExitCode::from(2);
    };
    let argument = rest.first().map_or("", String::as_str);
    if name == "slow-disk" {
        let served = slow_disk::serve(device, Path::new(root), argument.parse().unwrap_or(40));
        println!("slow-disk: {served:?}");
        return ExitCode::FAILURE;
    }
    if name == "fuse-disk" {
        let served = slow_disk::serve_fuse(device, Path::new(root));
        println!("fuse-disk: {served:?}");
        return ExitCode::FAILURE;
    }
    let number = rest.get(1).and_then(|text| text.parse().ok()).unwrap_or(0);
    let outcome = Installation::new(Path::new(root)).and_then(|installation| match name.as_str() {
        "instants" => instants::instants(&installation, device, argument, number),
        "stamps" => instants::stamps(&installation, device, argument.parse().unwrap_or(20)),
        "sqlite" => instants::sqlite(&installation, device),
        "kill" => death::kill(&installation, device, argument.parse().unwrap_or(5)),
        "load" => death::load(&installation, device, argument, number as u64),
        "after-cut" => death::after_cut(&installation, argument),
        "log-fault" => Fault::parse(argument)
            .and_then(|fault| log_fault::log_fault(&installation, device, fault)),
        "log-fault-load" => Fault::parse(argument)
            .and_then(|fault| log_fault::log_fault_load(&installation, device, fault)),
        "after-bypass-cut" => Fault::parse(argument)
            .and_then(|fault| log_fault::after_bypass_cut(&installation, fault)),
        "behind-our-back" => origin::behind_our_back(&installation, device),
        "bad-input" => bad_input::bad_input(&installation, Path::new(root)),
        "shapes" => shapes::shapes(&installation, Path::new(root)),
        "rewind-killed" => rewinds::killed(&installation, device),
        "rewind-unreadable" => rewinds::unreadable(&installation, device),
        "rewind-load" => rewinds::load(&installation, device),
        "after-rewind-cut" => rewinds::after_cut(&installation),
        "holes" => holes::holes(&installation, device),
        "store-life" => store_life::store_life(&installation, device),
        "retention" => retention::retention(&installation, device),
        "ends" => ends::ends(&installation, Path::new(root)),
        "space" => space::space(&installation, Path::new(root)),
        "points" => points::points(&installation, device),
        "points-stacked" => points::stacked(&installation, device),
        "encrypted" => encrypted::encrypted(&installation, device),
        "files" => files::files(&installation, device, argument),
        "export-to" => files::export_to(&installation, device),
        "copies" => copies::stamps(&installation, device, argument.parse().unwrap_or(20)),
        "copies-fs" => copies::file_system(&installation, device, argument, number),
        "copies-killed" => copies::killed(&installation, device, argument.parse().unwrap_or(6)),
        "copies-out" => copies::out(&installation, device),
        "copies-group" => copies::group(&installation, argument.parse().unwrap_or(5)),
        "copies-limits" => copies::limits(&installation, device),
        "copies-faults" => copy_faults::disks_break(&installation, device),
        "copies-hcp-killed" => {
            copy_kills::hcp_killed(&installation, device, argument.parse().unwrap_or(20))
        }
        "copies-load" => copy_faults::persist_load(&installation, device),
        "copies-after-cut" => copy_faults::persist_after_cut(&installation, rest),
        "resize" => origin::resize(&installation, Path::new(root)),
        other => Err(format!("no scenario is named {other}")),
    });
    match outcome {
        Ok(()) => {
            println!("scenario {name}: every promise held");
            ExitCode::SUCCESS
        }
        Err(broken) => {
            println!("scenario {name}: BROKEN: {broken}");
            ExitCode::FAILURE
        }
    }
}

/// Starts the daemons and protects the device; gives the mapped one.
pub fn protect(varve: &Installation, device: &str) -> Result<String, String> {
    varve.varve(&["up"])?;
    varve.varve(&["protect", device, "--name", "disk", "--log-size", "128"])?;
    varve.device("disk")
}

/// Exports an image; gives its device.
pub fn export(varve: &Installation, instant: &str, writable: bool) -> Result<String, String> {
    let mut arguments = vec!["--json", "export", instant];
    if writable {
        arguments.push("--writable");
    }
    let text = varve
        .varve(&arguments)
        .map_err(|e| format!("{e}\n{}", varve.messages()))?;
    let device = text
        .split("\"device\": \"")
        .nth(1)
        .and_then(|rest| rest.split('"').next());
    device
        .map(str::to_owned)
        .ok_or_else(|| format!("no device in {text}"))
}

/// Makes the first blocks zero (WRITE ZEROES), and stamps them from then on.
pub fn stamper_on_zeroes(mapped: &str, blocks: u64) -> Result<Stamper, String> {
    let bytes = (blocks * 4096).to_string();
    run("blkdiscard", &["-z", "-f", "-o", "0", "-l", &bytes, mapped])?;
    Stamper::new(mapped, blocks)
}
