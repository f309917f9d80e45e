//! What each block may hold now, under overlapping and concurrent operations.

use serde::{Deserialize, Serialize};

/// Whose operation, and which.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct OpId {
    /// The worker.
    pub worker: u32,
    /// Its place among the worker's operations, from 0.
    pub index: u64,
}
