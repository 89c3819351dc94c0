//! Where everything is. One root moves all of it (tests, demos, containers): `--root DIR` or `VARVE_ROOT`.

use std::path::{Path, PathBuf};

/// Begins the names of images of the past that are shown as devices.
pub const IMAGE: &str = "image-";
/// Ends the names of files in the run directory that say which ublk device shows an image: for udev.
pub const IMAGE_RECORD: &str = ".image-ublk";

/// The places of one installation.
#[derive(Clone, Debug)]
pub struct Paths {
    root: PathBuf,
}

impl Paths {
    /// Everything under `root`; `/` for the system's own.
    #[must_use]
    pub fn new(root: impl Into<PathBuf>) -> Paths {
        Paths { root: root.into() }
    }

    /// The root itself.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    fn at(&self, path: &str) -> PathBuf {
        self.root.join(path)
    }

    /// One file per protected volume.
    #[must_use]
    pub fn volumes(&self) -> PathBuf {
        self.at("etc/varve/volumes")
    }

    /// The files of volumes that are protected no more and whose history is there, by ID.
    #[must_use]
    pub fn former_volumes(&self) -> PathBuf {
        self.volumes().join("former")
    }

    /// What the store does by itself.
    #[must_use]
    pub fn store_policy(&self) -> PathBuf {
        self.at("etc/varve/store.toml")
    }

    /// What lasts of hot copies: one file per volume that has some.
    #[must_use]
    pub fn copy_sets(&self) -> PathBuf {
        self.at("etc/varve/copies")
    }

    /// Where what hot copies need goes, by default.
    #[must_use]
    pub fn spools(&self) -> PathBuf {
        self.at("var/lib/varve/copies")
    }

    /// Links to hot copies.
    #[must_use]
    pub fn copies(&self) -> PathBuf {
        if self.root == Path::new("/") {
            PathBuf::from("/dev/hcp")
        } else {
            self.run().join("hcp")
        }
    }

    /// State files, by default: on another device than the logs, where the machine has one.
    #[must_use]
    pub fn state(&self) -> PathBuf {
        self.at("etc/varve/state")
    }

    /// Log rings, by default.
    #[must_use]
    pub fn log(&self) -> PathBuf {
        self.at("var/lib/varve/log")
    }

    /// The store.
    #[must_use]
    pub fn store(&self) -> PathBuf {
        self.at("var/lib/varve/store")
    }

    /// Sockets, surviving memory, mounts: gone after a reboot.
    #[must_use]
    pub fn run(&self) -> PathBuf {
        self.at("run/varve")
    }

    /// The data path's socket.
    #[must_use]
    pub fn filter_socket(&self) -> PathBuf {
        self.run().join("blkfilter.sock")
    }

    /// The store daemon's socket.
    #[must_use]
    pub fn store_socket(&self) -> PathBuf {
        self.run().join("varved.sock")
    }

    /// Links to the mapped devices.
    #[must_use]
    pub fn devices(&self) -> PathBuf {
        if self.root == Path::new("/") {
            PathBuf::from("/dev/varve")
        } else {
            self.run().join("dev")
        }
    }
}
