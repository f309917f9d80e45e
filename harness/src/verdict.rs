//! How a run ended, and the exit status that says so.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The exit status of a command line that could not be understood; no run took place.
pub const EXIT_USAGE: u8 = 1;

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Work was done and checked, and every promise held.
    Pass,
    /// The device broke a promise.
    Fail,
    /// Something did not end within its deadline.
    Hang,
    /// The environment lacks something the run needs.
    Environment,
    /// Nothing was wrong, but too little was done to say so.
    Vacuous,
    /// The harness itself is at fault.
    Internal,
}

impl Verdict {
    /// The exit status of a process that reached this verdict.
    #[must_use]
    pub const fn exit_code(self) -> u8 {
        match self {
            Self::Pass => 0,
            Self::Fail => 2,
            Self::Hang => 3,
            Self::Environment => 4,
            Self::Vacuous => 5,
            Self::Internal => 70,
        }
    }

    /// The word for it, as in the JSON verdict line.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Pass => "pass",
            Self::Fail => "fail",
            Self::Hang => "hang",
            Self::Environment => "environment",
            Self::Vacuous => "vacuous",
            Self::Internal => "internal",
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}
