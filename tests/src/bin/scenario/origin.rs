//! The protected device itself changes.

use crate::{Outcome, export, protect};
use std::fs::File;
use std::path::Path;
use varve_tests::scenario::{Installation, run};
use varve_tests::stamps::{Stamper, read_stamps};

/// The device is written without Varve: noticed, unverified, healed.
pub fn behind_our_back(varve: &Installation, device: &str) -> Outcome {
    let mapped = protect(varve, device)?;
    let mut writer = Stamper::new(&mapped, 256)?;
    for _ in 0..200 {
        writer.write(false)?;
    }
    drop(writer);
    varve.compare()?;
    varve.varve(&["down"])?;
    let mut stranger = Stamper::from(device, 256, 1_000_000)?;
    for _ in 0..3 {
        stranger.write(true)?;
    }
    drop(stranger);
    varve.varve(&["up"])?;
    let messages = varve.messages();
    if !messages.contains("written without Varve") {
        return Err(format!("not noticed:\n{messages}"));
    }
    varve.wait_protected()?;
    varve.compare()?;
    // What equals the history is not copied into the log again.
    let status = varve.varve(&["--json", "status"])?;
    let (copied, verified) = (
        figure(&status, "copied_bytes")?,
        figure(&status, "verified_bytes")?,
    );
    println!("compared with the history: {verified} bytes are equal, {copied} were copied");
    if copied == 0 || copied > 1 << 20 || verified == 0 {
        return Err(format!(
            "three blocks were written: {copied} bytes were copied, {verified} found equal\n{}",
            varve.messages()
        ));
    }
    varve.varve(&["unprotect", "disk"])?;
    let found = read_stamps(device, 256)?;
    if found[1..] == vec![0; 255] {
        return Err("the device is empty without Varve".to_owned());
    }
    varve.varve(&["down"])?;
    Ok(())
}

fn figure(status: &str, name: &str) -> Result<u64, String> {
    status
        .split(&format!("\"{name}\": "))
        .nth(1)
        .and_then(|rest| rest.split([',', '\n']).next())
        .and_then(|number| number.trim().parse().ok())
        .ok_or(format!("no {name} in {status}"))
}

/// Writes stamps all over the device's first `blocks` blocks; gives what they hold.
fn stamp(mapped: &str, blocks: u64, writes: u64) -> Result<Vec<u64>, String> {
    run(
        "dd",
        &[
            "if=/dev/zero",
            &format!("of={mapped}"),
            "bs=4k",
            &format!("count={blocks}"),
            "oflag=direct",
            "status=none",
        ],
    )?;
    let mut writer = Stamper::new(mapped, blocks)?;
    for step in 0..writes {
        writer.write(step % 20 == 19)?;
    }
    Ok(writer.model.clone())
}

/// The device grows while it is away, shrinks while Varve runs: its history goes on, instants have the size of their time.
pub fn resize(varve: &Installation, directory: &Path) -> Outcome {
    const MIB: u64 = 1 << 20;
    let file = directory.join("resized");
    let path = file.display().to_string();
    let set = |bytes: u64| {
        File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&file)
            .and_then(|file| file.set_len(bytes))
            .map_err(|e| e.to_string())
    };
    let at = |name: &str, model: &[u64], bytes: u64| {
        let image = export(varve, name, false)?;
        let found = run("blockdev", &["--getsize64", &image])?;
        let stamps = read_stamps(&image, model.len() as u64)?;
        varve.varve(&["unexport", &image])?;
        if found.trim() != bytes.to_string() {
            return Err(format!("{name} has {found} bytes instead of {bytes}"));
        }
        if stamps != model {
            return Err(format!("{name} is not what was written"));
        }
        Ok(())
    };
    set(8 * MIB)?;
    let mapped = protect(varve, &path)?;
    let small = stamp(&mapped, 2048, 500)?;
    varve.varve(&["mark", "small"])?;
    varve.varve(&["down"])?;
    // Grown while Varve was away: offered with its new size at once, whole again after a comparison.
    set(20 * MIB)?;
    varve.varve(&["up"])?;
    varve.wait_protected()?;
    let messages = varve.messages();
    if !messages.contains("the device has grown from 8388608 to 20971520 bytes") {
        return Err(format!("the growth was not noticed:\n{messages}"));
    }
    let mapped = varve.device("disk")?;
    if read_stamps(&mapped, 2048)? != small {
        return Err("growing changed the device".to_owned());
    }
    let large = stamp(&mapped, 5120, 900)?;
    varve.compare()?;
    varve.varve(&["mark", "large"])?;
    at("small", &small, 8 * MIB)?;
    at("large", &large, 20 * MIB)?;
    let refused = varve.varve(&["rewind", "small", "--yes"]).err();
    if !refused.is_some_and(|text| text.contains("R002-size")) {
        return Err("a rewind to another size was not refused by name".to_owned());
    }
    // Shrunk while Varve runs, and followed on request.
    set(12 * MIB)?;
    varve.varve(&["resize", "disk"])?;
    varve.wait_protected()?;
    varve.compare()?;
    at("small", &small, 8 * MIB)?;
    at("large", &large, 20 * MIB)?;
    at("now", &large[..3072], 12 * MIB)?;
    // A device that is gone but for a rest is not taken for one.
    varve.varve(&["down"])?;
    set(4096)?;
    let _ = varve.varve(&["up"]);
    let status = varve.varve(&["status"]).unwrap_or_else(|text| text);
    if !status.contains("V028-size") {
        return Err(format!("a rest of a device is taken for one: {status}"));
    }
    varve.varve(&["down"]).map(|_| ())
}
