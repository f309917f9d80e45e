//! How an operation ended.

use serde::{Deserialize, Serialize};

/// How an operation ended, as its caller saw it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// It was acknowledged.
    Done,
    /// It ended with an error: each of its blocks holds the old content or the new, and which is decided by then.
    Failed,
    /// It was not heard of again: it may still take effect at any later time, block by block, or never.
    Unknown,
}
