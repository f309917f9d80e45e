//! Self-describing sectors: every word on the device names the sector and the generation it was written for.
//!
//! Word `i` (8 bytes, little endian) of sector `lba`, written for the `g`-th time, is
//!
//! ```text
//! mix(lba << 24 | g) ^ table[(lba % 8) * 64 + i]
//! ```
//!
//! where `mix` is an invertible 64-bit mixer and `table` is 4 KiB drawn from the run's seed and the device's id. Filling
//! and checking are one XOR per word. When a check fails, any single word gives back its sector and generation, which
//! is what [`classify`](crate::classify) lives on.
//!
//! `lba` has 40 bits, enough for 512 TiB. `g` has 24: generation 0 stands for "never written" and is skipped, so after
//! 16,777,215 writes of one sector its generations begin again at 1. From then on a write that was lost exactly
//! 16,777,215 writes ago looks as good as a new one; which of two generations is the newer is told by the shorter way
//! round, and is right as long as they are less than 8 million writes apart.
//!
//! Such sectors do not compress. For a device that compresses, [`Pattern::with_compressibility`] repeats one table word
//! over the first part of each row, so that the words of the first part of a sector are all the same. Each still names
//! its sector and generation, but no longer its place within that part.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::seed::Seed;

/// Bytes in a sector.
pub const SECTOR: usize = 512;

/// Words of 8 bytes in a sector.
pub const WORDS: usize = SECTOR / 8;

/// Sectors after which the table repeats.
pub const TABLE_SECTORS: usize = 8;

/// Words of 8 bytes in the table.
pub const TABLE_WORDS: usize = TABLE_SECTORS * WORDS;

/// The share of a sector that can be made compressible, in percent.
pub const COMPRESSIBILITY_MAX: u8 = 90;

/// Words in a quarter of a sector.
const QUARTER: usize = WORDS / 4;

/// Sectors that can be told apart: 2^40, or 512 TiB.
pub const LBA_LIMIT: u64 = 1 << 40;

/// The how-manieth write of its sector a content is; 0 is no write at all.
pub type Generation = u32;

/// The highest generation; the one after it is 1.
pub const GENERATION_MAX: Generation = (1 << 24) - 1;

/// The generation after `generation`.
#[must_use]
pub const fn next_generation(generation: Generation) -> Generation {
    if generation >= GENERATION_MAX { 1 } else { generation + 1 }
}

/// The generation before `generation`, which is not 0.
#[must_use]
pub const fn previous_generation(generation: Generation) -> Generation {
    if generation <= 1 { GENERATION_MAX } else { generation - 1 }
}

/// Whether `a` was written after `b`, by the shorter way round.
#[must_use]
pub const fn is_newer(a: Generation, b: Generation) -> bool {
    // Generation 0 comes before every other one, however far the others have got.
    if a == 0 || b == 0 {
        return a != 0;
    }
    // In more bits than a generation has: also numbers that are none, read from a file, have an answer.
    let ahead = (a as i64 - b as i64).rem_euclid(GENERATION_MAX as i64) as Generation;
    ahead != 0 && ahead < GENERATION_MAX / 2
}

/// What one run writes to one device.
#[derive(Clone)]
pub struct Pattern {
    seed: Seed,
    device: u32,
    cheap_words: usize,
    table: Box<[Row; TABLE_SECTORS]>,
}

/// The table's words for one sector, aligned so that they can be operands of vector instructions.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Row([u64; WORDS]);

/// Where a word says it belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Origin {
    /// The sector.
    pub lba: u64,
    /// The generation.
    pub generation: Generation,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sector {}, generation {}", self.lba, self.generation)
    }
}

impl Pattern {
    /// What the run of `seed` writes to its device number `device`.
    #[must_use]
    pub fn new(seed: impl Into<Seed>, device: u32) -> Self {
        Self::with_compressibility(seed, device, 0)
    }

    /// As [`new`](Self::new), with payloads of which about `percent` of a hundred can be compressed away; 90 at most.
    ///
    /// The first `64 * percent / 100` words of each sector, rounded down, are one and the same word. Which word differs from sector to
    /// sector and from generation to generation. It costs the same to make and to check for every percentage.
    #[must_use]
    pub fn with_compressibility(seed: impl Into<Seed>, device: u32, percent: u8) -> Self {
        let seed = seed.into();
        let cheap_words = WORDS * usize::from(percent.min(COMPRESSIBILITY_MAX)) / 100;
        let mut rng = seed.derive("pattern", u64::from(device)).rng();
        let mut table = Box::new([Row([0; WORDS]); TABLE_SECTORS]);
        for word in table.iter_mut().flat_map(|row| &mut row.0) {
            *word = rng.next_u64();
        }
        for row in table.iter_mut() {
            let repeated = row.0[0];
            row.0[..cheap_words].fill(repeated);
        }
        Self { seed, device, cheap_words, table }
    }

    /// The seed of the run.
    #[must_use]
    pub const fn seed(&self) -> Seed {
        self.seed
    }

    /// The number of the device.
    #[must_use]
    pub const fn device(&self) -> u32 {
        self.device
    }

    /// How many words at the beginning of a sector are one and the same; 0 or 1 when all differ.
    #[must_use]
    pub const fn cheap_words(&self) -> usize {
        self.cheap_words
    }

    /// Writes into `sector` what sector `lba` holds in `generation`.
    #[inline]
    pub fn fill_sector(&self, sector: &mut [u8; SECTOR], lba: u64, generation: Generation) {
        let key = mix(lba << 24 | u64::from(generation));
        let (words, _none) = sector.as_chunks_mut::<8>();
        for (word, mask) in words.iter_mut().zip(&self.row(lba).0) {
            *word = (key ^ mask).to_le_bytes();
        }
    }

    /// Fills `buf`, which begins at sector `first_lba`; `generation_of` is asked for each sector in order.
    ///
    /// A last part of `buf` that is no whole sector is left as it is.
    #[inline]
    pub fn fill(&self, buf: &mut [u8], first_lba: u64, mut generation_of: impl FnMut(u64) -> Generation) {
        let (sectors, _rest) = buf.as_chunks_mut::<SECTOR>();
        for (lba, sector) in (first_lba..).zip(sectors) {
            self.fill_sector(sector, lba, generation_of(lba));
        }
    }

    /// Whether `sector` is what sector `lba` holds in `generation`.
    #[inline]
    #[must_use]
    pub fn sector_matches(&self, sector: &[u8; SECTOR], lba: u64, generation: Generation) -> bool {
        let key = mix(lba << 24 | u64::from(generation));
        // A quarter at a time: over a whole sector the compiler keeps more in flight than it has registers, and spills.
        let quarters = sector.as_chunks::<{ QUARTER * 8 }>().0.iter();
        let mut differences = 0;
        for (quarter, masks) in quarters.zip(self.row(lba).0.as_chunks::<QUARTER>().0) {
            let mut lanes = [0; 4];
            for (words, masks) in quarter.as_chunks::<32>().0.iter().zip(masks.as_chunks::<4>().0) {
                for ((lane, word), mask) in lanes.iter_mut().zip(words.as_chunks().0).zip(masks) {
                    *lane |= u64::from_le_bytes(*word) ^ mask ^ key;
                }
            }
            differences |= lanes[0] | lanes[1] | lanes[2] | lanes[3];
        }
        differences == 0
    }

    /// Whether `sectors`, of which the first is `first_lba`, are what those sectors hold in the generations that
    /// `generation_of` says.
    ///
    /// Looks at four places in turns: memory answers several streams of loads faster than one, by about a third.
    #[inline]
    #[must_use]
    pub fn sectors_match(
        &self,
        sectors: &[[u8; SECTOR]],
        first_lba: u64,
        generation_of: impl Fn(u64) -> Generation,
    ) -> bool {
        let matches = |lba: u64, sector| self.sector_matches(sector, lba, generation_of(lba));
        let apart = sectors.len() / 4;
        let (first, others) = sectors.split_at(apart);
        let (second, others) = others.split_at(apart);
        let (third, others) = others.split_at(apart);
        let (fourth, rest) = others.split_at(apart);
        let step = apart as u64;
        let fours = first.iter().zip(second).zip(third.iter().zip(fourth));
        (first_lba..).zip(fours).all(|(lba, ((first, second), (third, fourth)))| {
            matches(lba, first)
                & matches(lba + step, second)
                & matches(lba + 2 * step, third)
                & matches(lba + 3 * step, fourth)
        }) && (first_lba + 4 * step..).zip(rest).all(|(lba, sector)| matches(lba, sector))
    }

    /// Where `word` belongs if it was written at `table_position`, which is `(lba % 8) * 64 + i`.
    ///
    /// `None` when no sector below `device_sectors` has such a word there. By chance that lets through one random word
    /// in 2^43 / `device_sectors`.
    #[must_use]
    pub fn decode_word(&self, word: u64, table_position: usize, device_sectors: u64) -> Option<Origin> {
        let value = unmix(word ^ self.table.get(table_position / WORDS)?.0[table_position % WORDS]);
        let origin = Origin { lba: value >> 24, generation: value as u32 & GENERATION_MAX };
        let fits = origin.lba < device_sectors
            && origin.generation != 0
            && (origin.lba % TABLE_SECTORS as u64) as usize == table_position / WORDS;
        fits.then_some(origin)
    }

    #[inline]
    fn row(&self, lba: u64) -> &Row {
        &self.table[(lba % TABLE_SECTORS as u64) as usize]
    }
}

impl fmt::Debug for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pattern").field("seed", &self.seed).field("device", &self.device).finish_non_exhaustive()
    }
}

/// Whether `sector` is nothing but zeroes.
#[inline]
#[must_use]
pub fn is_zero(sector: &[u8; SECTOR]) -> bool {
    let (words, _none) = sector.as_chunks::<8>();
    words.iter().fold(0, |bits, word| bits | u64::from_le_bytes(*word)) == 0
}

/// The finaliser of splitmix64: every bit of the input moves about half of the bits of the output.
const fn mix(value: u64) -> u64 {
    let value = (value ^ value >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ value >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ value >> 31
}

/// The inverse of [`mix`].
const fn unmix(value: u64) -> u64 {
    let value = (value ^ value >> 31 ^ value >> 62).wrapping_mul(0x3196_42b2_d24d_8ec3);
    let value = (value ^ value >> 27 ^ value >> 54).wrapping_mul(0x96de_1b17_3f11_9089);
    value ^ value >> 30 ^ value >> 60
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unmix_inverts_mix() {
        let mut rng = Seed::new(1).rng();
        for value in [0, 1, u64::MAX].into_iter().chain((0..10_000).map(|_| rng.next_u64())) {
            assert_eq!(unmix(mix(value)), value);
            assert_eq!(mix(unmix(value)), value);
        }
    }

    #[test]
    fn every_word_names_its_origin() {
        let pattern = Pattern::new(5, 1);
        let mut rng = Seed::new(2).rng();
        for _ in 0..100 {
            let origin =
                Origin { lba: rng.below(LBA_LIMIT), generation: rng.within(1..=u64::from(GENERATION_MAX)) as u32 };
            let mut sector = [0; SECTOR];
            pattern.fill_sector(&mut sector, origin.lba, origin.generation);
            assert!(pattern.sector_matches(&sector, origin.lba, origin.generation));
            for (i, word) in sector.as_chunks::<8>().0.iter().enumerate() {
                let position = (origin.lba % 8) as usize * WORDS + i;
                let word = u64::from_le_bytes(*word);
                assert_eq!(pattern.decode_word(word, position, LBA_LIMIT), Some(origin));
                assert_eq!(pattern.decode_word(word, position, origin.lba), None);
            }
        }
        assert_eq!(pattern.decode_word(0, TABLE_WORDS, LBA_LIMIT), None);
    }

    #[test]
    fn any_flipped_bit_is_seen() {
        let pattern = Pattern::new(5, 1);
        let mut sector = [0; SECTOR];
        pattern.fill_sector(&mut sector, 77, 3);
        for bit in 0..SECTOR * 8 {
            sector[bit / 8] ^= 1 << (bit % 8);
            assert!(!pattern.sector_matches(&sector, 77, 3), "bit {bit}");
            sector[bit / 8] ^= 1 << (bit % 8);
        }
        let mut zeroes = [0; SECTOR];
        for bit in 0..SECTOR * 8 {
            zeroes[bit / 8] ^= 1 << (bit % 8);
            assert!(!is_zero(&zeroes), "bit {bit}");
            zeroes[bit / 8] ^= 1 << (bit % 8);
        }
        assert!(is_zero(&zeroes));
    }

    #[test]
    fn neighbours_generations_devices_and_runs_differ() {
        let pattern = Pattern::new(5, 1);
        let mut sector = [0; SECTOR];
        pattern.fill_sector(&mut sector, 77, 3);
        assert!(!pattern.sector_matches(&sector, 78, 3));
        assert!(!pattern.sector_matches(&sector, 85, 3));
        assert!(!pattern.sector_matches(&sector, 77, 4));
        assert!(!Pattern::new(5, 2).sector_matches(&sector, 77, 3));
        assert!(!Pattern::new(6, 1).sector_matches(&sector, 77, 3));
        assert!(Pattern::new(5, 1).sector_matches(&sector, 77, 3));
    }

    #[test]
    fn fill_asks_for_each_sector() {
        let pattern = Pattern::new(5, 1);
        let mut buf = vec![0xff; SECTOR * 20 + 3];
        pattern.fill(&mut buf, 1000, |lba| (lba - 999) as u32);
        for (i, sector) in buf.as_chunks::<SECTOR>().0.iter().enumerate() {
            assert!(pattern.sector_matches(sector, 1000 + i as u64, 1 + i as u32));
        }
        assert_eq!(buf[SECTOR * 20..], [0xff; 3]);
    }

    #[test]
    fn one_wrong_sector_among_any_number_is_seen() {
        let pattern = Pattern::new(5, 1);
        for length in 0..=19 {
            let mut sectors = vec![[0; SECTOR]; length];
            pattern.fill(sectors.as_flattened_mut(), 1000, |lba| (lba - 999) as u32);
            assert!(pattern.sectors_match(&sectors, 1000, |lba| (lba - 999) as u32));
            for wrong in 0..length {
                sectors[wrong][9] ^= 1;
                assert!(!pattern.sectors_match(&sectors, 1000, |lba| (lba - 999) as u32), "{wrong} of {length}");
                sectors[wrong][9] ^= 1;
            }
        }
    }

    #[test]
    fn generations_wrap_past_zero() {
        assert_eq!(next_generation(0), 1);
        assert_eq!(next_generation(GENERATION_MAX), 1);
        assert_eq!(previous_generation(1), GENERATION_MAX);
        assert!(is_newer(2, 1) && !is_newer(1, 2) && !is_newer(1, 1));
        assert!(is_newer(1, GENERATION_MAX) && !is_newer(GENERATION_MAX, 1));
        assert!(is_newer(1, u32::MAX) != is_newer(u32::MAX, 1));
        assert!(is_newer(GENERATION_MAX, 0) && !is_newer(0, GENERATION_MAX) && !is_newer(0, 0));
    }

    #[test]
    fn a_compressible_sector_repeats_its_first_words_and_no_others() {
        for (percent, cheap) in [(0, 0), (1, 0), (10, 6), (50, 32), (90, 57), (100, 57)] {
            let pattern = Pattern::with_compressibility(5, 1, percent);
            assert_eq!(pattern.cheap_words(), cheap);
            let mut sector = [0; SECTOR];
            for lba in 0..16 {
                pattern.fill_sector(&mut sector, lba, 3);
                assert!(pattern.sector_matches(&sector, lba, 3));
                let words = sector.as_chunks::<8>().0;
                let repeated = words.iter().filter(|word| **word == words[0]).count();
                assert_eq!(repeated, cheap.max(1), "{percent} %");
                let different: std::collections::BTreeSet<_> = words.iter().collect();
                assert_eq!(different.len(), WORDS + 1 - cheap.max(1), "{percent} %");
                for (i, word) in words.iter().enumerate() {
                    let position = (lba % 8) as usize * WORDS + i;
                    let origin = pattern.decode_word(u64::from_le_bytes(*word), position, 16);
                    assert_eq!(origin, Some(Origin { lba, generation: 3 }));
                }
            }
        }
    }

    /// What is on a device must be readable by a later version, or a bundle of a failure could not be replayed.
    #[test]
    fn the_pattern_is_pinned() {
        let mut sector = [0; SECTOR];
        Pattern::new(42, 0).fill_sector(&mut sector, 12345, 6);
        assert_eq!(sector[..8], [174, 136, 77, 26, 15, 35, 226, 217]);
        let whole = sector;
        Pattern::with_compressibility(42, 0, 50).fill_sector(&mut sector, 12345, 6);
        assert_eq!(sector[256..], whole[256..]);
    }
}
