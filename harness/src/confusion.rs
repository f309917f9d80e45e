//! The confusion matrix: what the classifier calls sectors of which it is known what happened to them.
//!
//! Each instance is a device, a sector of it, what that sector may hold and bytes made by corrupting what it would hold,
//! all drawn at random. The class that the classifier gives must be the one that was drawn, with the same
//! parameters: from which sector, at which word, by how much, which bits. Where two classes are the same bytes, an instance
//! says so with an [`Alike`], and must be called what the other class is.

mod draw;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fmt;

use self::draw::{Instance, World};
use crate::seed::Seed;

/// The classes, in the order of the matrix.
pub const CLASSES: [&str; 13] = [
    "good",
    "lost",
    "stale",
    "future",
    "misdirected",
    "torn",
    "shifted",
    "bit_flip",
    "zero",
    "foreign_device",
    "foreign_run",
    "partial",
    "garbage",
];

/// Why an instance of one class must be called another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Alike {
    /// *Lost*, called *stale* or *zero*: what the last operation replaced is not known.
    ReplacedIsUnknown,
    /// *Zero*, called *lost*: the last operation replaced zeroes.
    ReplacedZeroes,
    /// *Stale* and *future*, called each other: it is shorter the other way round.
    OtherWayRound,
    /// *Stale* and *future*, called *good*: all the way round.
    AllTheWayRound,
    /// *Shifted*, called *misdirected*: by whole sectors.
    WholeSectors,
    /// *Torn*, called *partial*, or beside zeroes *garbage*: a part from elsewhere is one word, which could be anything.
    OneWord,
    /// *Torn*, called *partial*, or beside zeroes *garbage*: all that is seen of a part from elsewhere is one word,
    /// repeated.
    OneWordRepeated,
}

impl Alike {
    /// All there are.
    pub const ALL: [Self; 7] = [
        Self::ReplacedIsUnknown,
        Self::ReplacedZeroes,
        Self::OtherWayRound,
        Self::AllTheWayRound,
        Self::WholeSectors,
        Self::OneWord,
        Self::OneWordRepeated,
    ];

    /// The classes that were drawn and the classes that they are called.
    #[must_use]
    pub const fn pairs(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Self::ReplacedIsUnknown => &[("lost", "stale"), ("lost", "zero")],
            Self::ReplacedZeroes => &[("zero", "lost")],
            Self::OtherWayRound => &[("stale", "future"), ("future", "stale")],
            Self::AllTheWayRound => &[("stale", "good"), ("future", "good")],
            Self::WholeSectors => &[("shifted", "misdirected")],
            Self::OneWord | Self::OneWordRepeated => &[("torn", "partial"), ("torn", "garbage")],
        }
    }

    /// Why they are the same bytes.
    #[must_use]
    pub const fn reason(self) -> &'static str {
        match self {
            Self::ReplacedIsUnknown => "what the last operation replaced is not known",
            Self::ReplacedZeroes => "the last operation replaced zeroes: dropped, or zeroed?",
            Self::OtherWayRound => "more than 8 million generations away: the other way is shorter",
            Self::AllTheWayRound => "as many generations away as there are",
            Self::WholeSectors => "a shift by whole sectors",
            Self::OneWord => "a part of one word from elsewhere: any word could be",
            Self::OneWordRepeated => "compressible: a part from elsewhere that is one word, repeated",
        }
    }
}

/// How many instances of each class were called what.
#[derive(Clone, Debug)]
pub struct Matrix {
    percent: u8,
    counts: BTreeMap<(&'static str, &'static str), u64>,
    alike: BTreeMap<Alike, u64>,
    surprises: Vec<String>,
}

impl Matrix {
    /// Draws `instances` of each class from `seed`, with payloads that are compressible by `percent`.
    #[must_use]
    pub fn measure(seed: Seed, percent: u8, instances: u64) -> Self {
        let mut matrix = Self { percent, counts: BTreeMap::new(), alike: BTreeMap::new(), surprises: Vec::new() };
        for drawn in CLASSES {
            let mut rng = seed.derive(drawn, u64::from(percent)).rng();
            for number in 0..instances {
                let world = World::draw(&mut rng, percent);
                let instance = world.instance(drawn, &mut rng);
                matrix.enter(drawn, number, &world, &instance);
            }
        }
        matrix
    }

    fn enter(&mut self, drawn: &'static str, number: u64, world: &World, instance: &Instance) {
        let called = world.name(instance);
        *self.counts.entry((drawn, called.name())).or_default() += 1;
        if let Some(alike) = instance.alike {
            *self.alike.entry(alike).or_default() += 1;
        }
        let pair = (drawn, called.name());
        let as_drawn = pair.0 == pair.1 || instance.alike.is_some_and(|alike| alike.pairs().contains(&pair));
        if called != instance.class || !as_drawn {
            self.surprises.push(format!(
                "{drawn} {number}: {:?}, called {called:?}; sector {} of {}, expected {}",
                instance.class, world.lba, world.device_sectors, instance.expected
            ));
        }
    }

    /// The instances that were not called what they are, one line each. There should be none.
    #[must_use]
    pub fn surprises(&self) -> &[String] {
        &self.surprises
    }

    /// How many instances of class `drawn` were called `called`.
    #[must_use]
    pub fn count(&self, drawn: &str, called: &str) -> u64 {
        self.counts.iter().filter(|((a, b), _)| *a == drawn && *b == called).map(|(_, count)| count).sum()
    }

    /// How many instances must be called another class for this reason.
    #[must_use]
    pub fn alike(&self, alike: Alike) -> u64 {
        self.alike.get(&alike).copied().unwrap_or(0)
    }
}

/// A table, a row for each class that was drawn and a column for each it was called; then why numbers are off the
/// diagonal, and the surprises.
impl fmt::Display for Matrix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let short = |name: &str| name.split('_').map(|part| &part[..part.len().min(4)]).collect::<Vec<_>>().join("");
        write!(f, "compressible by {:2} %", self.percent)?;
        for called in CLASSES {
            write!(f, " {:>8}", short(called))?;
        }
        for drawn in CLASSES {
            write!(f, "\n{drawn:>20}")?;
            for called in CLASSES {
                match self.count(drawn, called) {
                    0 => write!(f, " {:>8}", ".")?,
                    count => write!(f, " {count:>8}")?,
                }
            }
        }
        for (alike, count) in &self.alike {
            let pairs: Vec<String> =
                alike.pairs().iter().map(|(drawn, called)| format!("{drawn}, {called}")).collect();
            write!(f, "\n{count:>8} the same bytes ({}): {}", pairs.join("; "), alike.reason())?;
        }
        write!(f, "\n{:>8} surprises", self.surprises.len())?;
        self.surprises.iter().take(20).try_for_each(|line| write!(f, "\n         {line}"))
    }
}
