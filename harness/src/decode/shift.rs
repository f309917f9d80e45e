//! Shifts: what belongs on the device, but not at this distance from the beginning of the sector.

use std::collections::{BTreeMap, BTreeSet};

use super::Word;
use crate::classify::{Class, Classifier};
use crate::sector::{SECTOR, TABLE_SECTORS, TABLE_WORDS, WORDS};

/// Of the words that are looked at for a first idea of the distance, one in so many is.
///
/// A shift explains half of the sector, in one piece, so that enough of them are in it.
const SAMPLE: usize = 4;

impl Classifier<'_> {
    /// At least half of the sector at one distance, not of whole sectors, from where it belongs.
    pub(super) fn shifted(&self, got: &[u8; SECTOR], lba: u64, words: &[Word; WORDS]) -> Option<Class> {
        // Words are read at each of the eight places where they can begin. Where they repeat, they fit at more than one
        // distance, but the true one is the only one that explains them all.
        let in_place = most_in_place(words);
        let distances = (0..8).flat_map(|begin| self.likely_distances(got, lba, begin));
        let explained = distances.filter_map(|distance| Some((self.explains(got, lba, distance)?, distance)));
        let (count, distance) =
            explained.max_by_key(|&(count, distance)| (count, std::cmp::Reverse(distance.unsigned_abs())))?;
        (count * 2 >= WORDS && count > in_place).then_some(Class::Shifted { by_bytes: -distance })
    }

    /// The distances, in bytes, that two words which begin at byte `begin` of eight agree on.
    fn likely_distances(&self, got: &[u8; SECTOR], lba: u64, begin: usize) -> BTreeSet<i64> {
        let mut votes: BTreeMap<i64, u32> = BTreeMap::new();
        for at in (begin..=SECTOR - 8).step_by(8 * SAMPLE) {
            let value = value_at(got, at);
            for position in 0..TABLE_WORDS {
                if let Some(origin) = self.pattern.decode_word(value, position, self.device_sectors) {
                    let from = byte_address(origin.lba, position % WORDS * 8);
                    *votes.entry(from.wrapping_sub(byte_address(lba, at))).or_default() += 1;
                }
            }
        }
        let agreed = votes.into_iter().filter(|&(distance, votes)| votes >= 2 && distance % SECTOR as i64 != 0);
        agreed.map(|(distance, _)| distance).collect()
    }

    /// How many words come from `distance` bytes away; `None` when all of them are one and the same.
    fn explains(&self, got: &[u8; SECTOR], lba: u64, distance: i64) -> Option<usize> {
        let begin = distance.wrapping_neg().rem_euclid(8) as usize;
        let mut count = 0;
        let (mut first, mut differ) = (None, false);
        for at in (begin..=SECTOR - 8).step_by(8) {
            let from = byte_address(lba, at).wrapping_add(distance);
            let (sector, word) = (from.div_euclid(SECTOR as i64) as u64, from.rem_euclid(SECTOR as i64) as usize / 8);
            let position = (sector % TABLE_SECTORS as u64) as usize * WORDS + word;
            let value = value_at(got, at);
            let origin = self.pattern.decode_word(value, position, self.device_sectors);
            if origin.is_some_and(|origin| origin.lba == sector) {
                count += 1;
                differ |= *first.get_or_insert(value) != value;
            }
        }
        differ.then_some(count)
    }
}

/// How many words at most agree on one sector that they come from, each in its place there.
fn most_in_place(words: &[Word; WORDS]) -> usize {
    let mut sectors: BTreeMap<i64, usize> = BTreeMap::new();
    for word in words {
        match word {
            Word::Here(_) => *sectors.entry(0).or_default() += 1,
            Word::There { book: 0, distance, .. } if distance % WORDS as i64 == 0 => {
                *sectors.entry(*distance).or_default() += 1;
            }
            _ => {}
        }
    }
    sectors.into_values().max().unwrap_or(0)
}

fn value_at(got: &[u8; SECTOR], at: usize) -> u64 {
    got[at..].first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes))
}

/// The place of a byte on the device: 40 bits of sector and 9 of byte.
fn byte_address(lba: u64, byte: usize) -> i64 {
    lba.wrapping_mul(SECTOR as u64).wrapping_add(byte as u64) as i64
}
