//! The data path: one [`Volume`] per protected device.
//!
//!   front end ──▶ admission ─┬─▶ batch buffer ─▶ log        (ring of segments)
//!                            └─▶ origin                     (from the same bytes)
//!
//! A volume is a state machine: requests, completions and the clock go in; operations and answers come out. It never blocks while it runs
//! (starting and closing do), and all I/O goes through a [`varve_log::Medium`], so that a simulated machine can crash it anywhere.
//! Absent on purpose: the store, the network, any file system, any thread.

mod bitmap;
mod close;
mod config;
pub mod copies;
mod copy;
pub mod driver;
mod flush;
pub mod freeze;
mod heal;
pub mod hot_copy;
mod locks;
pub mod manager;
pub mod origin;
mod places;
mod plan;
pub mod points;
mod regions;
mod rewind;
mod running;
mod start;
mod state_file;
mod status;
mod surviving;
mod verify;
mod volume;
mod write;

pub use config::{AckPolicy, Law, Rules, VolumeConfig};
pub use start::{RewindRequest, StartError, StartReport};
pub use status::VolumeStatus;
pub use surviving::{SurvivingIdentity, SurvivingMemory};
pub use volume::{Answer, Volume};
