//! Reaching the daemons.

use std::path::Path;
use varve_control::{Client, ControlError, FilterOp, FilterReply, Paths, VolumeInfo};

/// Connects to the data path.
pub fn filter(paths: &Paths) -> Result<Client, ControlError> {
    connect(&paths.filter_socket(), "blkfilter")
}

/// Connects to the store.
pub fn store(paths: &Paths) -> Result<Client, ControlError> {
    connect(&paths.store_socket(), "varved")
}

fn connect(socket: &Path, name: &str) -> Result<Client, ControlError> {
    Client::connect(socket).map_err(|error| match error.kind() {
        std::io::ErrorKind::PermissionDenied => ControlError::new(
            "C006-permission",
            format!("{}: only root may ask {name}", socket.display()),
        ),
        _ => ControlError::new(
            "C007-daemon",
            format!(
                "{name} does not answer on {} ({error}). Start it: `varve up`, or systemctl start {name}",
                socket.display()
            ),
        ),
    })
}

/// What a daemon answers that does not know the question.
#[must_use]
pub fn unexpected(name: &str) -> ControlError {
    ControlError::new(
        "C005-answer",
        format!("{name} gave an unexpected answer; use the programs of one release"),
    )
}

/// All volumes.
pub fn volumes(paths: &Paths) -> Result<Vec<VolumeInfo>, ControlError> {
    match filter(paths)?.call(&FilterOp::Status)? {
        FilterReply::Status { volumes, .. } => Ok(volumes),
        _ => Err(unexpected("blkfilter")),
    }
}
