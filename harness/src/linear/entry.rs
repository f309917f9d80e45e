//! What is known of a block, in 32 bits.
//!
//! ```text
//! bit  31   30       29  28   27    24 23                     0
//!     | 0 | zeroed | content | behind | newest generation      |   a quiet block
//!     | 1 | where its state is kept                            |   a busy one
//! ```
//!
//! `behind` is how many generations the content is older than the newest: a failed write uses a generation up. All
//! zeroes is a block that was never touched, so that a fresh table costs no memory.

use crate::classify::Content;
use crate::sector::{GENERATION_MAX, Generation};

const BUSY: u32 = 1 << 31;
const ZEROED: u32 = 1 << 30;
const CONTENT: u32 = 28;
const BEHIND: u32 = 24;
const BEHIND_MAX: u32 = 15;

/// What is known of one block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Entry(u32);

impl Entry {
    pub(super) const UNTOUCHED: Self = Self(0);

    /// A block that can hold nothing but `content`; `None` when that does not fit.
    #[inline]
    pub(super) fn quiet(content: Content, newest: Generation, zeroed: bool) -> Option<Self> {
        let (kind, behind) = match content {
            Content::Written(0) => return None,
            Content::Written(generation) => (1, (newest + GENERATION_MAX - generation) % GENERATION_MAX),
            Content::Zero => (2, 0),
            Content::Unknown => (3, 0),
        };
        let zeroed = if zeroed { ZEROED } else { 0 };
        (behind <= BEHIND_MAX).then_some(Self(zeroed | kind << CONTENT | behind << BEHIND | newest & GENERATION_MAX))
    }

    #[inline]
    pub(super) fn busy(slot: usize) -> Self {
        Self(BUSY | slot as u32)
    }

    /// Where the state of a busy block is kept.
    #[inline]
    pub(super) const fn slot(self) -> Option<usize> {
        if self.0 & BUSY == 0 { None } else { Some((self.0 & !BUSY) as usize) }
    }

    /// What a quiet block holds.
    #[inline]
    pub(super) const fn content(self, initial: Content) -> Content {
        match self.0 >> CONTENT & 3 {
            0 => initial,
            1 => {
                let (newest, behind) = (self.newest(), self.0 >> BEHIND & BEHIND_MAX);
                let wrapped = if newest > behind { newest } else { newest + GENERATION_MAX };
                Content::Written(wrapped - behind)
            }
            2 => Content::Zero,
            _ => Content::Unknown,
        }
    }

    /// The newest generation that a write to a quiet block began with.
    #[inline]
    pub(super) const fn newest(self) -> Generation {
        self.0 & GENERATION_MAX
    }

    /// Whether zeroes were ever to be there, the initial ones apart.
    #[inline]
    pub(super) const fn zeroed(self) -> bool {
        self.0 & ZEROED != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_say_what_was_put_in() {
        for newest in [1, 2, 15, 16, 17, 1000, GENERATION_MAX] {
            for zeroed in [false, true] {
                for behind in 0..=BEHIND_MAX {
                    let generation = (newest + GENERATION_MAX - behind - 1) % GENERATION_MAX + 1;
                    for content in [Content::Written(generation), Content::Zero, Content::Unknown] {
                        let entry = Entry::quiet(content, newest, zeroed).expect("not far behind");
                        let said = (entry.content(Content::Zero), entry.newest(), entry.zeroed(), entry.slot());
                        assert_eq!(said, (content, newest, zeroed, None));
                    }
                }
            }
        }
        assert_eq!(Entry::quiet(Content::Written(1), 17, false), None);
        assert_eq!(Entry::busy(77).slot(), Some(77));
        assert_eq!(Entry::UNTOUCHED.content(Content::Unknown), Content::Unknown);
        assert_eq!((Entry::UNTOUCHED.newest(), Entry::UNTOUCHED.slot()), (0, None));
    }
}
