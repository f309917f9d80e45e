//! Many versions of one block, remembered only by the range of their generations.

use crate::classify::Content;
use crate::sector::{GENERATION_MAX, Generation};
use crate::stamp::Stamp;

/// The most generations of a lump that are listed one by one.
pub(super) const LISTED: usize = 1024;

/// At least the contents that were added to it: between two generations, every generation counts as added.
///
/// As many versions as it may stand for, its size is fixed.
#[derive(Clone, Debug, Default)]
pub(super) struct Lump {
    /// The oldest generation; any, if there are none.
    first: Generation,
    /// How many generations there are from `first` on, past the wrap if need be.
    count: u32,
    zero: bool,
    unknown: bool,
    /// When the last of them ended.
    ended: Stamp,
}

impl Lump {
    pub(super) const fn ended(&self) -> Stamp {
        self.ended
    }

    pub(super) const fn is_empty(&self) -> bool {
        self.count == 0 && !self.zero && !self.unknown
    }

    pub(super) fn add(&mut self, content: Content, ended: Stamp) {
        self.ended = self.ended.max(ended);
        match content {
            Content::Zero => self.zero = true,
            Content::Unknown => self.unknown = true,
            Content::Written(generation) => self.add_range(generation, 1),
        }
    }

    /// Takes in everything that is in `other`, as ended at `ended`.
    pub(super) fn absorb(&mut self, other: &Self, ended: Stamp) {
        self.ended = ended;
        self.zero |= other.zero;
        self.unknown |= other.unknown;
        if other.count != 0 {
            self.add_range(other.first, other.count);
        }
    }

    /// Takes in the `count` generations from `first` on, and what lies between them and the others by the shorter way.
    fn add_range(&mut self, first: Generation, count: u32) {
        if self.count == 0 {
            (self.first, self.count) = (first, count);
            return;
        }
        let onwards = self.count.max(distance(self.first, first) + count);
        let around = count.max(distance(first, self.first) + self.count);
        if around < onwards {
            self.first = first;
        }
        self.count = onwards.min(around).min(GENERATION_MAX);
    }

    /// Whether `content` may be in it. [`Content::Unknown`] allows every content.
    pub(super) const fn allows(&self, content: Content) -> bool {
        self.unknown
            || match content {
                Content::Zero => self.zero,
                Content::Unknown => false,
                Content::Written(generation) => distance(self.first, generation) < self.count,
            }
    }

    /// Its contents; instead of more than [`LISTED`] generations, [`Content::Unknown`].
    pub(super) fn list(&self, contents: &mut Vec<Content>) {
        let mut add = |content| {
            if !contents.contains(&content) {
                contents.push(content);
            }
        };
        if self.unknown || self.count as usize > LISTED {
            add(Content::Unknown);
        }
        if self.zero {
            add(Content::Zero);
        }
        if self.count as usize <= LISTED {
            (0..self.count).for_each(|after| add(Content::Written(at(self.first, after))));
        }
    }
}

/// How many generations after `from` comes `to`.
const fn distance(from: Generation, to: Generation) -> u32 {
    (to + GENERATION_MAX - from) % GENERATION_MAX
}

/// The generation that comes `after` generations after `from`.
const fn at(from: Generation, after: u32) -> Generation {
    (from - 1 + after) % GENERATION_MAX + 1
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seed::Seed;

    #[test]
    fn a_lump_keeps_whatever_was_added() {
        let mut rng = Seed::new(3).rng();
        for round in 0..2000 {
            let around = if round % 2 == 0 { 0 } else { rng.below(u64::from(GENERATION_MAX)) as u32 };
            let reach = *rng.pick(&[4, 100, 5000, u64::from(GENERATION_MAX)]).expect("some");
            let mut draw = || at(around + 1, rng.below(reach) as u32);
            let (mut one, mut other) = (Lump::default(), Lump::default());
            let added: Vec<_> = (0..6).map(|_| draw()).collect();
            added[..3].iter().for_each(|generation| one.add(Content::Written(*generation), 5));
            added[3..].iter().for_each(|generation| other.add(Content::Written(*generation), 6));
            one.absorb(&other, 7);
            assert!(added.iter().all(|generation| one.allows(Content::Written(*generation))), "{one:?}: {added:?}");
            assert!(u64::from(one.count) <= reach, "{one:?}: {added:?}");
            assert!(!one.allows(Content::Zero) && !one.allows(Content::Unknown) && one.ended() == 7);
            let mut listed = Vec::new();
            one.list(&mut listed);
            assert_eq!(listed.contains(&Content::Unknown), one.count as usize > LISTED);
            assert!(listed.iter().all(|content| *content == Content::Unknown || one.allows(*content)));
        }
    }

    #[test]
    fn a_lump_reaches_over_the_wrap() {
        let mut lump = Lump::default();
        for generation in [GENERATION_MAX - 1, 2, GENERATION_MAX] {
            lump.add(Content::Written(generation), 1);
        }
        let mut listed = Vec::new();
        lump.list(&mut listed);
        assert_eq!(listed, [GENERATION_MAX - 1, GENERATION_MAX, 1, 2].map(Content::Written));
        assert!(!lump.allows(Content::Written(3)) && !lump.allows(Content::Written(GENERATION_MAX - 2)));
    }

    #[test]
    fn a_lump_of_anything_allows_anything() {
        let mut lump = Lump::default();
        assert!(lump.is_empty() && !lump.allows(Content::Written(1)));
        lump.add(Content::Zero, 1);
        assert!(lump.allows(Content::Zero) && !lump.allows(Content::Written(1)));
        lump.add(Content::Unknown, 1);
        assert!(lump.allows(Content::Written(1)) && lump.allows(Content::Unknown) && !lump.is_empty());
    }
}
