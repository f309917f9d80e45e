//! The cold path of a check: decode every word of a wrong sector and see what they agree on.

mod block;
mod shift;

use std::cmp::Reverse;
use std::collections::BTreeMap;

use crate::classify::{Class, Classifier, Content, Expected, Source};
use crate::sector::{
    Generation, LBA_LIMIT, Origin, Pattern, SECTOR, TABLE_SECTORS, TABLE_WORDS, WORDS, is_newer, is_zero,
};

/// The most bits that may differ for a sector to be called right but for flipped bits.
const FLIPPED_BITS_MAX: u32 = 7;

/// What one word turned out to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Word {
    Unreadable,
    Zero,
    Here(Generation),
    There { book: usize, distance: i64, origin: Origin },
}

/// Where an unreadable word may come from: which pattern (0 is the device's own), and how many words away.
type Place = (usize, i64);

/// The words that name one place.
struct Votes {
    count: u32,
    /// One of them, and whether there is another value among them.
    value: u64,
    differ: bool,
}

impl Classifier<'_> {
    /// Names what `got`, read from sector `lba`, is.
    #[must_use]
    pub fn classify(&self, got: &[u8; SECTOR], lba: u64, expected: &Expected) -> Class {
        if expected.allowed.iter().any(|&content| self.holds(got, lba, content)) {
            return Class::Good;
        }
        if let Some(bits) = expected.allowed.iter().find_map(|&content| self.flipped_bits(got, lba, content)) {
            return Class::BitFlip { bits };
        }
        if is_zero(got) {
            return match expected.previous {
                Some(Content::Zero) => Class::Lost { found: Content::Zero },
                _ => Class::Zero,
            };
        }
        let words = self.read_words(got, lba);
        one_source(&words, expected)
            .or_else(|| self.foreign(&words))
            .or_else(|| self.shifted(got, lba, &words))
            .or_else(|| torn(&words))
            .unwrap_or_else(|| mixed(&words, expected))
    }

    fn holds(&self, got: &[u8; SECTOR], lba: u64, content: Content) -> bool {
        match content {
            Content::Unknown => true,
            Content::Zero => is_zero(got),
            Content::Written(generation) => self.pattern.sector_matches(got, lba, generation),
        }
    }

    fn flipped_bits(&self, got: &[u8; SECTOR], lba: u64, content: Content) -> Option<Vec<u32>> {
        let mut right = [0; SECTOR];
        if let Content::Written(generation) = content {
            self.pattern.fill_sector(&mut right, lba, generation);
        }
        let differing = || got.iter().zip(&right).map(|(got, right)| got ^ right);
        if differing().map(u8::count_ones).sum::<u32>() > FLIPPED_BITS_MAX {
            return None;
        }
        let bits_of =
            |(at, byte): (u32, u8)| (0..8).filter(move |bit| byte >> bit & 1 == 1).map(move |bit| at * 8 + bit);
        Some((0..).zip(differing()).flat_map(bits_of).collect())
    }

    fn book(&self, book: usize) -> Option<&Pattern> {
        if book == 0 { Some(self.pattern) } else { self.foreign.get(book - 1) }
    }

    fn read_words(&self, got: &[u8; SECTOR], lba: u64) -> [Word; WORDS] {
        let values = values_of(got);
        let mut words: [Word; WORDS] = std::array::from_fn(|i| self.read_in_place(values[i], i, lba));
        // Whole sectors first: 8 places to look at for a word instead of 512.
        for whole_sectors in [true, false] {
            if !words.contains(&Word::Unreadable) {
                break;
            }
            self.read_elsewhere(&values, &mut words, lba, whole_sectors);
        }
        words
    }

    fn read_in_place(&self, value: u64, i: usize, lba: u64) -> Word {
        if value == 0 {
            return Word::Zero;
        }
        let position = (lba % TABLE_SECTORS as u64) as usize * WORDS + i;
        match self.pattern.decode_word(value, position, self.device_sectors) {
            Some(origin) if origin.lba == lba => Word::Here(origin.generation),
            _ => Word::Unreadable,
        }
    }

    fn read_elsewhere(&self, values: &[u64; WORDS], words: &mut [Word; WORDS], lba: u64, whole_sectors: bool) {
        // A shift is told for this device only: what is foreign is wrong enough.
        let books = if whole_sectors { 1 + self.foreign.len() } else { 1 };
        let mut candidates: Vec<(usize, Place, Origin)> = Vec::new();
        let mut votes: BTreeMap<Place, Votes> = BTreeMap::new();
        for i in (0..WORDS).filter(|&i| words[i] == Word::Unreadable) {
            let (first, step) = if whole_sectors { (i, WORDS) } else { (0, 1) };
            for book in 0..books {
                let Some(pattern) = self.book(book) else {
                    continue;
                };
                // The size of another device is not known.
                let limit = if book == 0 { self.device_sectors } else { LBA_LIMIT };
                for position in (first..TABLE_WORDS).step_by(step) {
                    let Some(origin) = pattern.decode_word(values[i], position, limit) else {
                        continue;
                    };
                    let distance = word_address(origin.lba, position % WORDS).wrapping_sub(word_address(lba, i));
                    candidates.push((i, (book, distance), origin));
                    let first = Votes { count: 0, value: values[i], differ: false };
                    let votes = votes.entry((book, distance)).or_insert(first);
                    votes.count += 1;
                    votes.differ |= votes.value != values[i];
                }
            }
        }
        // Where words repeat, one value says no more than one word.
        votes.retain(|_, votes| votes.differ);
        let rank = |place: Place| {
            votes.get(&place).map(|votes| (votes.count, Reverse(place.1.unsigned_abs()), Reverse(place)))
        };
        let mut best: [Option<Place>; WORDS] = [None; WORDS];
        for (i, place, origin) in candidates {
            let rank_here = rank(place);
            if rank_here.is_some() && best[i].is_none_or(|other| rank_here > rank(other)) {
                best[i] = Some(place);
                words[i] = Word::There { book: place.0, distance: place.1, origin };
            }
        }
    }

    fn foreign(&self, words: &[Word; WORDS]) -> Option<Class> {
        let Word::There { book: book @ 1.., origin, .. } = words[0] else {
            return None;
        };
        if words.iter().any(|word| *word != words[0]) {
            return None;
        }
        let pattern = self.book(book)?;
        Some(if pattern.seed() == self.pattern.seed() {
            Class::ForeignDevice { device: pattern.device(), origin }
        } else {
            Class::ForeignRun { seed: pattern.seed(), origin }
        })
    }
}

impl Word {
    /// Where it comes from, if it lies where it belongs within its sector.
    fn source(self) -> Option<Source> {
        match self {
            Self::Unreadable => None,
            Self::There { distance, .. } if distance % WORDS as i64 != 0 => None,
            Self::Zero => Some(Source::Zero),
            Self::Here(generation) => Some(Source::Written(generation)),
            Self::There { book: 0, origin, .. } => Some(Source::Elsewhere(origin)),
            Self::There { origin, .. } => Some(Source::Foreign(origin)),
        }
    }

    fn is_right(self, expected: &Expected) -> bool {
        expected.allowed.iter().any(|&content| match content {
            Content::Zero => self == Self::Zero,
            Content::Written(generation) => self == Self::Here(generation),
            Content::Unknown => true,
        })
    }
}

/// The place of a word on the device, counted in words.
fn word_address(lba: u64, word: usize) -> i64 {
    // 40 bits of sector and 6 of word. A sector that no device has, from a file, does no harm.
    lba.wrapping_mul(WORDS as u64).wrapping_add(word as u64) as i64
}

fn values_of(got: &[u8; SECTOR]) -> [u64; WORDS] {
    std::array::from_fn(|i| u64::from_le_bytes(got.as_chunks().0[i]))
}

/// Every word from one generation of this sector, or from one of another.
fn one_source(words: &[Word; WORDS], expected: &Expected) -> Option<Class> {
    if words.iter().any(|word| *word != words[0]) {
        return None;
    }
    match words[0] {
        Word::Here(generation) if expected.previous == Some(Content::Written(generation)) => {
            Some(Class::Lost { found: Content::Written(generation) })
        }
        Word::Here(generation) if is_newer(generation, newest_allowed(expected)) => {
            Some(Class::Future { generation })
        }
        Word::Here(generation) => Some(Class::Stale { generation }),
        Word::There { book: 0, distance, origin } if distance % WORDS as i64 == 0 => {
            Some(Class::Misdirected { from: origin.lba, generation: origin.generation })
        }
        _ => None,
    }
}

/// The newest generation that may be found; for a sector that may only be zero, the newest there ever was.
fn newest_allowed(expected: &Expected) -> Generation {
    let written = expected.allowed.iter().filter_map(|content| match content {
        Content::Written(generation) => Some(*generation),
        _ => None,
    });
    written.reduce(|a, b| if is_newer(a, b) { a } else { b }).unwrap_or(expected.newest)
}

/// Two parts, each from one readable source.
fn torn(words: &[Word; WORDS]) -> Option<Class> {
    let cut = words.iter().position(|word| *word != words[0])?;
    let (before, after) = (words[0].source()?, words[cut].source()?);
    let clean = words[cut..].iter().all(|word| *word == words[cut]);
    clean.then_some(Class::Torn { at_word: cut as u32, before, after })
}

fn mixed(words: &[Word; WORDS], expected: &Expected) -> Class {
    let good_words = words.iter().filter(|word| word.is_right(expected)).count() as u32;
    let readable_words = words.iter().filter(|word| **word != Word::Unreadable).count() as u32;
    let named = words.iter().any(|word| !matches!(word, Word::Unreadable | Word::Zero));
    if named || good_words > 0 { Class::Partial { good_words, readable_words } } else { Class::Garbage }
}
