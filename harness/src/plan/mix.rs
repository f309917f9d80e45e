//! How often each kind of operation is drawn.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{OpKind, PlanError};

/// How often each kind of operation is drawn, as weights. Reads and prints as `read=50,write=40,flush=1`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mix {
    /// The weight of [`OpKind::Read`].
    pub read: u32,
    /// The weight of [`OpKind::Write`].
    pub write: u32,
    /// The weight of [`OpKind::WriteFua`].
    pub fua: u32,
    /// The weight of [`OpKind::Flush`].
    pub flush: u32,
    /// The weight of [`OpKind::Discard`].
    pub discard: u32,
    /// The weight of [`OpKind::WriteZeroes`].
    pub zeroes: u32,
}

impl Mix {
    /// No weight at all.
    pub const NOTHING: Self = Self { read: 0, write: 0, fua: 0, flush: 0, discard: 0, zeroes: 0 };

    /// The weight of `kind`.
    #[must_use]
    pub const fn weight(&self, kind: OpKind) -> u32 {
        match kind {
            OpKind::Read => self.read,
            OpKind::Write => self.write,
            OpKind::WriteFua => self.fua,
            OpKind::Flush => self.flush,
            OpKind::Discard => self.discard,
            OpKind::WriteZeroes => self.zeroes,
        }
    }

    /// The sum of the weights.
    #[must_use]
    pub fn total(&self) -> u64 {
        OpKind::ALL.iter().map(|kind| u64::from(self.weight(*kind))).sum()
    }

    /// The kind that `at`, which is below [`total`](Self::total), falls on.
    #[must_use]
    pub(super) fn kind_at(&self, mut at: u64) -> OpKind {
        for kind in OpKind::ALL {
            let weight = u64::from(self.weight(kind));
            if at < weight {
                return kind;
            }
            at -= weight;
        }
        OpKind::Read
    }

    fn weight_mut(&mut self, name: &str) -> Option<&mut u32> {
        Some(match name {
            "read" => &mut self.read,
            "write" => &mut self.write,
            "fua" => &mut self.fua,
            "flush" => &mut self.flush,
            "discard" => &mut self.discard,
            "zeroes" => &mut self.zeroes,
            _ => return None,
        })
    }
}

impl Default for Mix {
    fn default() -> Self {
        Self { read: 50, write: 40, fua: 3, flush: 1, discard: 3, zeroes: 3 }
    }
}

/// All six weights, so that the text says the same whatever the default.
impl fmt::Display for Mix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { read, write, fua, flush, discard, zeroes } = self;
        write!(f, "read={read},write={write},fua={fua},flush={flush},discard={discard},zeroes={zeroes}")
    }
}

/// What is not named has weight 0.
impl FromStr for Mix {
    type Err = PlanError;

    fn from_str(text: &str) -> Result<Self, PlanError> {
        let mut mix = Self::NOTHING;
        for part in text.split(',').map(str::trim) {
            let (name, weight) = part
                .split_once('=')
                .ok_or_else(|| PlanError(format!("{part:?} in the mix is not of the form name=weight")))?;
            let slot = mix.weight_mut(name.trim()).ok_or_else(|| {
                PlanError(format!(
                    "{name:?} is not in {{read, write, fua, flush, discard, zeroes}}, which a mix is made of"
                ))
            })?;
            *slot = weight.trim().parse().map_err(|error| {
                PlanError(format!("the weight {weight:?} of {name} in the mix is not a number: {error}"))
            })?;
        }
        if mix.total() == 0 {
            return Err(PlanError(format!("the mix {text:?} has no weight")));
        }
        Ok(mix)
    }
}

impl From<Mix> for String {
    fn from(mix: Mix) -> Self {
        mix.to_string()
    }
}

impl TryFrom<String> for Mix {
    type Error = PlanError;

    fn try_from(text: String) -> Result<Self, PlanError> {
        text.parse()
    }
}
