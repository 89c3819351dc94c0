//! What the tests share: the simulated volume with its model, and readers of histories that know nothing of the code under test but the format.

#![allow(
    clippy::unwrap_used,
    reason = "in tests a surprise should end the test"
)]

pub mod crashing;
pub mod guest;
pub mod history;
pub mod leftover;
pub mod replay;
pub mod retained;
pub mod sample;
pub mod scenario;
pub mod simulated;
pub mod simulated_copies;
pub mod slow_disk;
pub mod stamps;
pub mod writers;
