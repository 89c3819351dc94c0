//! What every command shares: exit codes, JSON envelope, progress, confirmation, instants and sizes as people write them, the way to the daemons.

pub mod copy_out;
pub mod daemons;
pub mod device;
mod instant;
mod mounting;
mod output;

pub use instant::{parse_instant, show_ago, show_time, with_clock_times};
pub use mounting::{MountMode, file_system, keep_mounts_private, mount_copy, node_of, output_of};
pub use output::{Output, confirm, end_quietly_without_reader, exit_code, show_bytes};
