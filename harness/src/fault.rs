//! Plans of faults, and a backend that has them.

use serde::{Deserialize, Serialize};

/// Which faults happen when.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FaultPlan {
    rules: Vec<()>,
}
