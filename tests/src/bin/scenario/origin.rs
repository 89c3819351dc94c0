//! The protected device itself changes.

use crate::{Outcome, protect};
use varve_tests::scenario::Installation;
use varve_tests::stamps::Stamper;

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
    let mut stranger = Stamper::new(device, 256)?;
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
    varve.varve(&["down"])?;
    Ok(())
}
