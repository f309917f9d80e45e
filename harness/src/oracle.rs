//! The oracles by name, and sets of them.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Who says that a promise was broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Oracle {
    /// Bytes that were never written there: garbage, misdirected, torn, shifted, flipped.
    Tag,
    /// Order: a block holds what was overwritten before the read began, or what was not written yet.
    Linear,
    /// What survives a power cut or the death of a server.
    Durable,
    /// Zeroes where data should be, data where zeroes should be.
    Zero,
    /// Errors: each one that is seen was made, each one that is made is seen, and none outlives its cause.
    Errors,
    /// A flush that was acknowledged reached the storage, after the writes that it covers.
    Flush,
    /// Everything ends within its deadline.
    Watchdog,
    /// Bytes of another device, or of another run.
    CrossDevice,
    /// Ids, nodes, descriptors, threads and memory are given back; limits that are declared are kept.
    Resources,
}

/// A set of oracles.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "Vec<Oracle>", into = "Vec<Oracle>")]
pub struct Oracles(u16);

impl Oracle {
    /// Every oracle.
    pub const ALL: [Self; 9] = [
        Self::Tag,
        Self::Linear,
        Self::Durable,
        Self::Zero,
        Self::Errors,
        Self::Flush,
        Self::Watchdog,
        Self::CrossDevice,
        Self::Resources,
    ];

    /// Its name, as in JSON and on the command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tag => "tag",
            Self::Linear => "linear",
            Self::Durable => "durable",
            Self::Zero => "zero",
            Self::Errors => "errors",
            Self::Flush => "flush",
            Self::Watchdog => "watchdog",
            Self::CrossDevice => "cross_device",
            Self::Resources => "resources",
        }
    }
}

impl Oracles {
    /// Every oracle.
    pub const ALL: Self = Self((1 << Oracle::ALL.len()) - 1);
    /// No oracle.
    pub const NONE: Self = Self(0);

    /// This set and `oracle`.
    #[must_use]
    pub const fn with(self, oracle: Oracle) -> Self {
        Self(self.0 | 1 << oracle as u16)
    }

    /// This set without `oracle`.
    #[must_use]
    pub const fn without(self, oracle: Oracle) -> Self {
        Self(self.0 & !(1 << oracle as u16))
    }

    /// Whether `oracle` is in the set.
    #[must_use]
    pub const fn has(self, oracle: Oracle) -> bool {
        self.0 & 1 << oracle as u16 != 0
    }

    /// The oracles in the set.
    pub fn iter(self) -> impl Iterator<Item = Oracle> {
        Oracle::ALL.into_iter().filter(move |oracle| self.has(*oracle))
    }
}

impl Default for Oracles {
    fn default() -> Self {
        Self::ALL
    }
}

impl FromIterator<Oracle> for Oracles {
    fn from_iter<I: IntoIterator<Item = Oracle>>(oracles: I) -> Self {
        oracles.into_iter().fold(Self::NONE, Self::with)
    }
}

impl From<Vec<Oracle>> for Oracles {
    fn from(oracles: Vec<Oracle>) -> Self {
        oracles.into_iter().collect()
    }
}

impl From<Oracles> for Vec<Oracle> {
    fn from(oracles: Oracles) -> Self {
        oracles.iter().collect()
    }
}

impl fmt::Debug for Oracles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

impl fmt::Display for Oracle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A name that is no oracle's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnknownOracle(String);

impl fmt::Display for UnknownOracle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = Oracle::ALL.map(Oracle::name).join(", ");
        write!(f, "no oracle is called {:?}; there are {names}", self.0)
    }
}

impl std::error::Error for UnknownOracle {}

impl FromStr for Oracle {
    type Err = UnknownOracle;

    fn from_str(text: &str) -> Result<Self, UnknownOracle> {
        Self::ALL.into_iter().find(|oracle| oracle.name() == text).ok_or_else(|| UnknownOracle(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_have_what_was_put_in() {
        assert!(Oracle::ALL.into_iter().all(|oracle| Oracles::ALL.has(oracle) && !Oracles::NONE.has(oracle)));
        let set = Oracles::ALL.without(Oracle::Zero);
        assert!(!set.has(Oracle::Zero) && set.has(Oracle::Linear));
        assert_eq!(set.with(Oracle::Zero), Oracles::ALL);
        assert_eq!(Oracles::from(Vec::from(set)), set);
    }

    #[test]
    fn names_round_trip() {
        for oracle in Oracle::ALL {
            assert_eq!(oracle.name().parse(), Ok(oracle));
            assert_eq!(serde_json::to_value(oracle).expect("json"), oracle.name());
        }
        assert!("oracle of delphi".parse::<Oracle>().is_err());
    }
}
