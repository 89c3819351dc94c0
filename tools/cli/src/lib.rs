//! What every command shares: exit codes, JSON envelope, progress, confirmation, instants and sizes as people write them.

mod instant;
mod output;

pub use instant::{parse_instant, show_ago, show_time};
pub use output::{Output, confirm, end_quietly_without_reader, exit_code, show_bytes};
