//! Planted bugs: backends that are wrong in a known way, for finding out whether they are found out.
//!
//! A harness that has never failed a device proves nothing. Each mutant stands for a bug that real storage had, and a run
//! over it has to end in a failure that names it.

use std::fmt;
use std::io;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};
use ublkit::{Backend, Geometry, WriteFlags, ZeroFlags};

use crate::seed::{Seed, SeededRng};

/// A known way to be wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Mutant {
    /// Every so many writes, one is acknowledged and dropped.
    LostWrite,
    /// Every so many writes, one lands a few logical blocks away.
    MisdirectedWrite,
    /// Every so many reads, one returns a flipped bit; what is stored stays right.
    BitflipRead,
}

/// How often a mutant errs unless told otherwise: once in so many operations of the kind.
pub const EVERY: u64 = 500;

/// How many logical blocks a misdirected write is off, at most.
const BLOCKS_OFF: u64 = 8;

/// A backend with a planted bug.
#[derive(Debug)]
pub struct MutantBackend<B> {
    inner: B,
    mutant: Mutant,
    every: u64,
    /// Which of the operations the first error falls on.
    phase: u64,
    seed: Seed,
    /// Operations of the kind so far.
    count: AtomicU64,
    hits: Hits,
    geometry: Geometry,
}

/// A bug to plant: `lost-write`, or `lost-write:30` for one in 30 operations of its kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Planted {
    /// Which.
    pub mutant: Mutant,
    /// It errs once in so many operations of its kind.
    pub every: u64,
}

impl fmt::Display for Planted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.mutant, self.every)
    }
}

impl FromStr for Planted {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, every) = match text.split_once(':') {
            None => (text, EVERY),
            Some((name, every)) => match every.parse() {
                Ok(every @ 1..) => (name, every),
                _ => return Err(format!("'{every}' in '{text}' is not a whole number from 1")),
            },
        };
        let mutant = name.parse::<Mutant>().map_err(|error| error.to_string())?;
        Ok(Self { mutant, every })
    }
}

impl From<Planted> for String {
    fn from(planted: Planted) -> Self {
        planted.to_string()
    }
}

impl TryFrom<String> for Planted {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

/// How often a [`MutantBackend`] has been wrong.
#[derive(Clone, Debug, Default)]
pub struct Hits(Arc<AtomicU64>);

impl Hits {
    /// How often, until now.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl Mutant {
    /// Every mutant.
    pub const ALL: [Self; 3] = [Self::LostWrite, Self::MisdirectedWrite, Self::BitflipRead];

    /// Its name, as given on the command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::LostWrite => "lost-write",
            Self::MisdirectedWrite => "misdirected-write",
            Self::BitflipRead => "bitflip-read",
        }
    }

    /// The real bug that it stands for.
    #[must_use]
    pub const fn doc(self) -> &'static str {
        match self {
            Self::LostWrite => "a write is acknowledged and never stored, as by a drive that drops its cache",
            Self::MisdirectedWrite => {
                "a write lands on the wrong blocks, as by a firmware that miscounts: two victims"
            }
            Self::BitflipRead => {
                "a read returns one flipped bit and the next one does not, as by a bad cable or memory"
            }
        }
    }
}

impl<B: Backend> MutantBackend<B> {
    /// Plants `mutant` in `inner`, to err once in `every` operations of its kind. Which ones follows from `seed` and the
    /// order of the operations.
    pub fn new(inner: B, mutant: Mutant, every: u64, seed: Seed) -> Self {
        let seed = seed.derive(mutant.name(), 0);
        let every = every.max(1);
        let phase = seed.rng().below(every);
        let geometry = inner.geometry();
        Self { inner, mutant, every, phase, seed, count: AtomicU64::new(0), hits: Hits::default(), geometry }
    }

    /// How often it has been wrong; can be read while it serves.
    pub fn hits(&self) -> Hits {
        self.hits.clone()
    }

    /// Whether the next operation that `mutant` errs in is to go wrong, and what to draw the error from.
    fn errs(&self, mutant: Mutant) -> Option<SeededRng> {
        if self.mutant != mutant {
            return None;
        }
        let number = self.count.fetch_add(1, Ordering::Relaxed);
        (number % self.every == self.phase).then(|| self.seed.derive("error", number).rng())
    }

    fn hit(&self) {
        self.hits.0.fetch_add(1, Ordering::Relaxed);
    }

    /// Where a write of `len` bytes that belongs at `offset` lands, if there is another place for it.
    fn elsewhere(&self, rng: &mut SeededRng, offset: u64, len: u64) -> Option<u64> {
        let block = u64::from(self.geometry.logical_block);
        let ahead = offset / block;
        let behind = self.geometry.size.checked_sub(offset + len)? / block;
        // Towards the front where there is room: then the blocks that were overwritten come before those that were missed.
        if ahead > 0 {
            Some(offset - rng.within(1..=ahead.min(BLOCKS_OFF)) * block)
        } else if behind > 0 {
            Some(offset + rng.within(1..=behind.min(BLOCKS_OFF)) * block)
        } else {
            None
        }
    }
}

impl<B: Backend> Backend for MutantBackend<B> {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.inner.read_at(buf, offset)?;
        if let Some(mut rng) = self.errs(Mutant::BitflipRead) {
            let bit = rng.below(buf.len() as u64 * 8);
            if let Some(byte) = buf.get_mut(bit as usize / 8) {
                *byte ^= 1 << (bit % 8);
                self.hit();
            }
        }
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64, flags: WriteFlags) -> io::Result<()> {
        if self.errs(Mutant::LostWrite).is_some() {
            self.hit();
            return Ok(());
        }
        if let Some(mut rng) = self.errs(Mutant::MisdirectedWrite)
            && let Some(elsewhere) = self.elsewhere(&mut rng, offset, buf.len() as u64)
        {
            self.hit();
            return self.inner.write_at(buf, elsewhere, flags);
        }
        self.inner.write_at(buf, offset, flags)
    }

    fn flush(&self) -> io::Result<()> {
        self.inner.flush()
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.inner.discard(offset, len)
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> io::Result<()> {
        self.inner.write_zeroes(offset, len, flags)
    }
}

impl fmt::Display for Mutant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A name that is no mutant's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnknownMutant(String);

impl fmt::Display for UnknownMutant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = Mutant::ALL.map(Mutant::name).join(", ");
        write!(f, "no mutant is called {:?}; there are {names}", self.0)
    }
}

impl std::error::Error for UnknownMutant {}

impl FromStr for Mutant {
    type Err = UnknownMutant;

    fn from_str(text: &str) -> Result<Self, UnknownMutant> {
        Self::ALL.into_iter().find(|mutant| mutant.name() == text).ok_or_else(|| UnknownMutant(text.to_owned()))
    }
}

#[cfg(test)]
pub(crate) mod tests;
