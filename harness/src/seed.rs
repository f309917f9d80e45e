//! The seed of a run and the streams drawn from it.
//!
//! A run has one seed, given by the user or drawn from the operating system here and nowhere else. Every part derives
//! its own seed by name and index, so that adding a draw in one part leaves the others as they were.

use std::fmt;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::num::ParseIntError;
use std::ops::RangeInclusive;
use std::str::FromStr;
use std::time::{SystemTime, UNIX_EPOCH};

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use serde::{Deserialize, Serialize};

/// The seed of a run or of one part of it. Prints in decimal, and reads decimal or `0x…`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Seed(u64);

impl Seed {
    /// The seed with this value.
    #[must_use]
    pub const fn new(value: u64) -> Self {
        Self(value)
    }

    /// A fresh seed from the operating system.
    ///
    /// It is below 2^53: readers of JSON that keep numbers as doubles see it exactly.
    #[must_use]
    pub fn from_os() -> Self {
        // A RandomState is keyed by the operating system once per thread; time and pid tell later calls apart.
        let mut hasher = RandomState::new().build_hasher();
        hasher.write_u32(std::process::id());
        if let Ok(elapsed) = SystemTime::now().duration_since(UNIX_EPOCH) {
            hasher.write_u128(elapsed.as_nanos());
        }
        Self(hasher.finish() >> 11)
    }

    /// The value.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The seed of the part called `name`, number `index`: `seed.derive("worker", 3)`.
    #[must_use]
    pub fn derive(self, name: &str, index: u64) -> Self {
        // FNV-1a tells the names apart; the ChaCha key schedule does the mixing.
        let mut hash = 0xcbf2_9ce4_8422_2325_u64;
        for &byte in name.as_bytes() {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
        let mut key = [0_u8; 32];
        key[..8].copy_from_slice(&self.0.to_le_bytes());
        key[8..16].copy_from_slice(&hash.to_le_bytes());
        key[16..24].copy_from_slice(&index.to_le_bytes());
        key[24..].copy_from_slice(b"derived\0");
        Self(ChaCha8Rng::from_seed(key).next_u64())
    }

    /// The random stream of this seed.
    #[must_use]
    pub fn rng(self) -> SeededRng {
        let mut key = [0_u8; 32];
        key[..8].copy_from_slice(&self.0.to_le_bytes());
        key[24..].copy_from_slice(b"stream\0\0");
        SeededRng(ChaCha8Rng::from_seed(key))
    }
}

impl fmt::Display for Seed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for Seed {
    type Err = ParseIntError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.strip_prefix("0x") {
            Some(hex) => u64::from_str_radix(hex, 16).map(Self),
            None => text.parse().map(Self),
        }
    }
}

impl From<u64> for Seed {
    fn from(value: u64) -> Self {
        Self(value)
    }
}

/// A `ChaCha8` stream with draws whose algorithms are fixed here.
///
/// A library that draws numbers may change how between versions. A seed has to replay for ever, so the few draws that
/// plans need are written out.
#[derive(Clone, Debug)]
pub struct SeededRng(ChaCha8Rng);

impl SeededRng {
    /// 64 random bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0.next_u64()
    }

    /// A number in `0..bound`; 0 when `bound` is 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        // Multiply and shift: the bias is bound / 2^64, which no run is long enough to see.
        ((u128::from(self.0.next_u64()) * u128::from(bound)) >> 64) as u64
    }

    /// A number in `range`, both ends included; the lower end when the range is empty.
    pub fn within(&mut self, range: RangeInclusive<u64>) -> u64 {
        let (low, high) = range.into_inner();
        match high.saturating_sub(low).checked_add(1) {
            Some(width) => low + self.below(width),
            None => self.next_u64(),
        }
    }

    /// True in `hits` of `out_of` draws.
    pub fn chance(&mut self, hits: u64, out_of: u64) -> bool {
        self.below(out_of) < hits
    }

    /// One of `items`; `None` when there are none.
    pub fn pick<'a, T>(&mut self, items: &'a [T]) -> Option<&'a T> {
        items.get(self.below(items.len() as u64) as usize)
    }

    /// Puts `items` into an order that is drawn: each is as likely as any other.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last as u64 + 1) as usize);
        }
    }

    /// Fills `bytes` with random ones.
    pub fn fill(&mut self, bytes: &mut [u8]) {
        self.0.fill_bytes(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_replay_and_differ() {
        let seed = Seed::new(7);
        let draw = |seed: Seed| {
            let mut rng = seed.rng();
            [rng.next_u64(), rng.below(1000), rng.within(5..=9)]
        };
        assert_eq!(draw(seed), draw(seed));
        assert_ne!(draw(seed), draw(Seed::new(8)));
        assert_ne!(seed.derive("worker", 0), seed.derive("worker", 1));
        assert_ne!(seed.derive("worker", 0), seed.derive("plan", 0));
        assert_ne!(Seed::new(1).derive("a", 0), Seed::new(2).derive("a", 0));
    }

    /// The streams are part of what a printed seed means: a change here breaks every seed in every bug report.
    #[test]
    fn streams_are_pinned() {
        assert_eq!(Seed::new(42).derive("worker", 3).get(), 15_873_259_531_436_007_792);
        assert_eq!(Seed::new(42).rng().next_u64(), 2_324_431_127_679_641_473);
    }

    #[test]
    fn draws_stay_in_their_range() {
        let mut rng = Seed::new(1).rng();
        let mut seen = [false; 5];
        for _ in 0..1000 {
            let drawn = rng.within(10..=14);
            assert!((10..=14).contains(&drawn));
            seen[(drawn - 10) as usize] = true;
        }
        assert_eq!(seen, [true; 5]);
        assert_eq!(rng.below(0), 0);
        assert_eq!(rng.pick::<u8>(&[]), None);
        let _any = rng.within(0..=u64::MAX);
    }

    #[test]
    fn text_round_trips() {
        assert_eq!("123".parse(), Ok(Seed::new(123)));
        assert_eq!("0x7b".parse(), Ok(Seed::new(123)));
        assert_eq!(Seed::new(u64::MAX).to_string(), "18446744073709551615");
        assert!("twelve".parse::<Seed>().is_err());
        assert!(Seed::from_os().get() < 1 << 53);
        assert_ne!(Seed::from_os(), Seed::from_os());
    }
}
