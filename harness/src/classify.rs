//! Naming a corruption: what a wrong sector holds instead of what it should.
//!
//! The names are about bytes. Where two histories leave the same bytes behind, they share a name:
//!
//! * *Lost* is exactly what the last acknowledged operation replaced; *stale* is any older generation. A write that
//!   went elsewhere leaves *lost* at the place it was meant for, and *misdirected* where it went.
//! * *Lost* takes precedence over *zero*: when the last operation replaced zeroes and zeroes are found, it cannot be told
//!   whether it was dropped or wrote zeroes.
//! * Where a failed or unknown operation came just before, what the last one replaced is not known; the generation
//!   just before it then counts as *stale*.
//! * A write that was lost 8 million generations ago or more is *future*, and one lost exactly as many generations ago as
//!   there are is *good*: generations begin again. Likewise what comes from that far in the future is *stale*, or *good*.
//! * *Misdirected* is the same for a write that went to the wrong sector and a read that came from it; a second read
//!   tells them apart. A shift by whole sectors is *misdirected* too.
//! * A tear before the first word or after the last is none.
//! * More than seven flipped bits are *partial*, and so are flipped bits in a content that may not be there.
//!
//! A word is believed to be of this sector when it decodes to it, 40 bits that agree. Any other origin has to be named by
//! two words at the same distance from where they belong, so that random bytes name nothing:
//!
//! * One word from elsewhere beside 63 others is *partial*, not *torn*, and beside 63 zeroes *garbage*.
//! * A shift has to explain half of the sector, with more than one value, and more of it than any content in its place
//!   does.
//! * The same bits flipped in several words make them words of another sector, if the device is so large that it has it.
//!
//! With [compressible](Pattern::with_compressibility) payloads the first words of a sector are one and the same. They
//! count as one where two are asked for: a part of a tear that comes from elsewhere, and of which only such words are
//! seen, is not named.
//!
//! [`confusion`](crate::confusion) draws instances of each class and counts what they are called.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::sector::{Generation, Origin, Pattern};
use crate::seed::Seed;

/// What one sector can hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Content {
    /// Nothing but zeroes.
    Zero,
    /// What was written in this generation.
    Written(Generation),
    /// Anything: nothing is promised of it.
    Unknown,
}

/// What one sector may hold, and what it may have held before.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Expected {
    /// Any of these is right. One, unless the fate of an operation is not known.
    pub allowed: Vec<Content>,
    /// What the last acknowledged operation replaced, if that is known.
    pub previous: Option<Content>,
    /// The newest generation ever given to the sector; 0 if none.
    pub newest: Generation,
}

/// Where one part of a torn sector comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// Zeroes.
    Zero,
    /// A generation of this sector.
    Written(Generation),
    /// Another sector.
    Elsewhere(Origin),
    /// Another device or another run.
    Foreign(Origin),
}

/// What kind of corruption a sector shows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "class", rename_all = "snake_case")]
pub enum Class {
    /// The sector holds what it may hold.
    Good,
    /// The last acknowledged operation left no trace: the sector holds exactly what that operation replaced.
    Lost {
        /// What it replaced.
        found: Content,
    },
    /// An older generation of the sector, from before the one that the last operation replaced.
    Stale {
        /// The generation.
        generation: Generation,
    },
    /// A generation of the sector newer than it may hold.
    Future {
        /// The generation.
        generation: Generation,
    },
    /// What was written for another sector of this device.
    Misdirected {
        /// The sector it was written for.
        from: u64,
        /// Its generation there.
        generation: Generation,
    },
    /// One cut, with another content on each side.
    Torn {
        /// The first word (of 8 bytes) of the second part, counted from the beginning of what was classified: a sector or
        /// a block.
        at_word: u32,
        /// The part before.
        before: Source,
        /// The part after.
        after: Source,
    },
    /// What belongs on the device, but not at this distance from the beginning of the sector.
    Shifted {
        /// By how many bytes it lies too far back; negative when too far ahead.
        by_bytes: i64,
    },
    /// A content that may be there, but for a few bits.
    BitFlip {
        /// The bits that differ, at most seven, counted from the first bit of the first byte, least significant first.
        bits: Vec<u32>,
    },
    /// Nothing but zeroes.
    Zero,
    /// What this run wrote to another device.
    ForeignDevice {
        /// The number of that device.
        device: u32,
        /// Where it was written there.
        origin: Origin,
    },
    /// What another run wrote.
    ForeignRun {
        /// The seed of that run.
        seed: Seed,
        /// Where it was written then.
        origin: Origin,
    },
    /// Some words can be read and others cannot, or they come from more than two places.
    Partial {
        /// How many of the 64 words are as they should be.
        good_words: u32,
        /// How many name an origin, or are zero.
        readable_words: u32,
    },
    /// Nothing in it is anything this harness wrote.
    Garbage,
}

/// What a sector is judged by.
#[derive(Clone, Copy, Debug)]
pub struct Classifier<'a> {
    /// What this run writes to this device.
    pub pattern: &'a Pattern,
    /// What other runs wrote, or what this run writes to other devices, as far as it should be recognised.
    pub foreign: &'a [Pattern],
    /// The size of the device, in sectors.
    pub device_sectors: u64,
}

impl Class {
    /// Whether it says what happened, and not only that something did not arrive.
    #[must_use]
    pub const fn is_telling(&self) -> bool {
        !matches!(self, Self::Good | Self::Lost { .. } | Self::Stale { .. } | Self::Zero)
    }

    /// The name alone, as it stands in JSON.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Good => "good",
            Self::Lost { .. } => "lost",
            Self::Stale { .. } => "stale",
            Self::Future { .. } => "future",
            Self::Misdirected { .. } => "misdirected",
            Self::Torn { .. } => "torn",
            Self::Shifted { .. } => "shifted",
            Self::BitFlip { .. } => "bit_flip",
            Self::Zero => "zero",
            Self::ForeignDevice { .. } => "foreign_device",
            Self::ForeignRun { .. } => "foreign_run",
            Self::Partial { .. } => "partial",
            Self::Garbage => "garbage",
        }
    }
}

/// One line for a human.
impl fmt::Display for Class {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Good => f.write_str("good"),
            Self::Lost { found } => {
                write!(f, "lost: the last acknowledged operation left no trace; found {found}")
            }
            Self::Stale { generation } => {
                write!(f, "stale: found generation {generation}, long overwritten")
            }
            Self::Future { generation } => {
                write!(f, "future: found generation {generation}, not to be seen yet")
            }
            Self::Misdirected { from, generation } => {
                write!(f, "misdirected: found sector {from}, generation {generation}")
            }
            Self::Torn { at_word, before, after } => {
                write!(f, "torn at word {at_word} (byte {}): {before}, then {after}", u64::from(*at_word) * 8)
            }
            Self::Shifted { by_bytes } => {
                let way = if *by_bytes < 0 { "ahead" } else { "back" };
                write!(f, "shifted: {} bytes too far {way}", by_bytes.unsigned_abs())
            }
            Self::BitFlip { bits } => {
                write!(f, "bit flip: {} of 4096 bits differ, at", bits.len())?;
                bits.iter().try_for_each(|bit| write!(f, " {}.{}", bit / 8, bit % 8))
            }
            Self::Zero => f.write_str("zero: nothing but zeroes"),
            Self::ForeignDevice { device, origin } => {
                write!(f, "foreign device: found device {device}, {origin}")
            }
            Self::ForeignRun { seed, origin } => {
                write!(f, "foreign run: found what seed {seed} wrote, {origin}")
            }
            Self::Partial { good_words, readable_words } => {
                write!(f, "partial: {good_words} of 64 words are right, {readable_words} name an origin")
            }
            Self::Garbage => f.write_str("garbage: nothing that was ever written"),
        }
    }
}

impl fmt::Display for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Zero => f.write_str("zeroes"),
            Self::Written(generation) => write!(f, "generation {generation}"),
            Self::Unknown => f.write_str("anything"),
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Zero => f.write_str("zeroes"),
            Self::Written(generation) => write!(f, "generation {generation}"),
            Self::Elsewhere(origin) => origin.fmt(f),
            Self::Foreign(origin) => write!(f, "foreign {origin}"),
        }
    }
}

/// The alternatives, then what they replaced.
impl fmt::Display for Expected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, content) in self.allowed.iter().enumerate() {
            let or = if at == 0 { "" } else { " or " };
            write!(f, "{or}{content}")?;
        }
        match self.previous {
            Some(previous) => write!(f, ", in place of {previous}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests;
