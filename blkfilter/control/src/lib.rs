//! The daemons' control protocol: one JSON object a line over a Unix socket, answered by progress lines and one result.
//!
//!   {"v":1,"op":{…},"attach":N}\n  N raw bytes
//!   {"progress":{"done":1,"total":2}}\n …   {"ok":{…}}\n   or   {"error":{"code":"…","message":"…"}}\n
//!
//! Only root can reach the sockets (mode 0600); all lengths are bounded before anything is allocated. Never the network.

mod block;
mod copies;
mod filter;
mod memory;
mod mounts;
mod notify;
mod paths;
mod policy;
pub mod signals;
mod spec;
mod stack;
mod store;
mod wire;

pub use block::{is_busy, is_same_storage, lasting_path, sysfs};
pub use copies::{CopyInfo, CopySet, CopySpec, NewCopy};
pub use filter::{FilterOp, FilterReply, SealedInfo, VolumeInfo};
pub use memory::keep_memory_secret;
pub use mounts::{Mount, file_system_of, mounts, swaps};
pub use paths::{IMAGE, IMAGE_RECORD, Paths};
pub use policy::{KEY_FILE_BYTES_MAX, PointPolicy, PolicyChange, StorePolicy, space_bytes};
pub use signals::at_signal;
pub use spec::{
    Ack, FrontKind, SpecError, VolumeSpec, find_former, load_specs, save_former, save_spec,
};
pub use stack::{is_used_beside, mapped_volume_under, mounts_of};
pub use store::{
    CheckInfo, DamageInfo, DrillInfo, Instant, KeptInfo, KeysAsk, KeysStatus, PointInfo,
    PolicyInfo, Scrubbing, SpaceInfo, StoreOp, StoreReply, VolumeHistory,
};
pub use wire::{ATTACH_BYTES_MAX, Client, ControlError, Progress, Reporter, serve};
