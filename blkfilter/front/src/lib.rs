//! Front ends: how a block device of ours reaches the kernel.
//!
//! Each front end turns the kernel's requests into [`Request`]s and answers them in any order. What stands behind it (a protected volume,
//! an image of the past) does not know which one it is.

mod request;

pub use request::{Geometry, Request, RequestKind};
