//! What the tests share: the simulated volume with its model, and readers of histories that know nothing of the code under test but the format.

pub mod history;
pub mod simulated;
