//! A history is forgotten: all of its files go.
//!
//! Order: its directory gets another name, under which nobody looks for a history; then its file of the former volume goes; then what is in it, which may be
//! tens of thousands of files, without the lock of the stores. Killed before the first step: it is there as it was. Behind it: the next daemon deletes the rest.

use crate::service::{Service, error};
use std::io::ErrorKind;
use std::path::Path;
use std::sync::Arc;
use varve_control::{ControlError, StoreReply};
use varve_format::VolumeId;
use varve_store::volume_directory;

/// Ends the names of directories that are being deleted.
const FORGOTTEN: &str = "forgotten";

impl Service {
    /// Deletes the history of a volume that is protected no more.
    pub(crate) fn forget(&self, id: &str) -> Result<StoreReply, ControlError> {
        let volume = VolumeId::parse(id)
            .ok_or_else(|| error("V029-id", "the volume's id is not 32 hex digits"))?;
        if self.specs().iter().any(|spec| spec.id == id) {
            let message =
                "that volume is protected: its history is being recorded. Nothing was deleted";
            return Err(error("V012-busy", message));
        }
        let path = volume_directory(&self.paths().store(), volume);
        let aside = path.with_extension(FORGOTTEN);
        let io = |path: &Path| {
            let path = path.display().to_string();
            move |failed: std::io::Error| error("S001-io", format!("{path}: {failed}"))
        };
        // What an earlier one has left.
        delete(&aside).map_err(io(&aside))?;
        // An image opens its segments when they are read from: it must have ended. Nobody opens the history meanwhile.
        let stores = self.stores_without(id)?;
        match std::fs::rename(&path, &aside) {
            Err(failed) if failed.kind() != ErrorKind::NotFound => return Err(io(&path)(failed)),
            _ => {}
        }
        let former = self.paths().former_volumes().join(format!("{id}.toml"));
        let _ = std::fs::remove_file(former);
        drop(stores);
        delete(&aside).map_err(io(&aside))?;
        Ok(StoreReply::Done)
    }

    /// Deletes what a daemon that was killed meanwhile has left.
    pub fn forget_the_rest(self: &Arc<Self>) {
        let service = Arc::clone(self);
        std::thread::spawn(move || {
            let volumes = service.paths().store().join("volumes");
            for entry in std::fs::read_dir(volumes).into_iter().flatten().flatten() {
                let path = entry.path();
                if path.extension().is_some_and(|end| end == FORGOTTEN)
                    && let Err(failed) = delete(&path)
                {
                    eprintln!("varved: {}: {failed}", path.display());
                }
            }
        });
    }
}

fn delete(path: &Path) -> std::io::Result<()> {
    match std::fs::remove_dir_all(path) {
        Err(failed) if failed.kind() == ErrorKind::NotFound => Ok(()),
        done => done,
    }
}
