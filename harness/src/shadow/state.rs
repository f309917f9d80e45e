//! What one sector may hold, in 32 bits.
//!
//! ```text
//! bit 31      27 26       24 23                     0
//!     | previous |   kind   | newest generation     |
//! ```
//!
//! All zeroes is the state of a sector that was never touched, so that a fresh table costs no memory.

use crate::classify::Content;
use crate::sector::{GENERATION_MAX, Generation, next_generation, previous_generation};

/// The state of one sector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct State(u32);

/// What is known of a sector's content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Whatever was there before the first operation.
    Untouched,
    /// The newest generation.
    Written,
    /// Zeroes.
    Zeroed,
    /// Anything.
    Unknown,
    /// One of several contents; which ones stands in a table beside.
    Unsettled,
}

/// What the last acknowledged operation replaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Previous {
    /// Not known, or nothing yet.
    Unknown,
    /// Zeroes.
    Zero,
    /// A written generation: the one before the newest if a write replaced it, otherwise the newest.
    Written,
}

impl State {
    pub(super) const UNTOUCHED: Self = Self(0);

    pub(super) const fn new(kind: Kind, newest: Generation, previous: Previous) -> Self {
        Self((previous as u32) << 27 | (kind as u32) << 24 | newest & GENERATION_MAX)
    }

    #[inline]
    pub(super) const fn from_bits(bits: u32) -> Self {
        Self(bits)
    }

    #[inline]
    pub(super) const fn bits(self) -> u32 {
        self.0
    }

    #[inline]
    pub(super) const fn newest(self) -> Generation {
        self.0 & GENERATION_MAX
    }

    #[inline]
    pub(super) const fn kind(self) -> Kind {
        match self.0 >> 24 & 7 {
            0 => Kind::Untouched,
            1 => Kind::Written,
            2 => Kind::Zeroed,
            3 => Kind::Unknown,
            _ => Kind::Unsettled,
        }
    }

    /// The generation that the next write gives.
    #[inline]
    pub(super) const fn next(self) -> Generation {
        next_generation(self.newest())
    }

    /// What the last acknowledged operation replaced.
    pub(super) const fn previous(self) -> Option<Content> {
        match (self.0 >> 27, self.kind()) {
            (1, _) => Some(Content::Zero),
            (2, Kind::Written) => Some(Content::Written(previous_generation(self.newest()))),
            (2, _) => Some(Content::Written(self.newest())),
            _ => None,
        }
    }

    /// The state after an acknowledged write.
    #[inline]
    pub(super) const fn written(self, initially_zero: bool) -> Self {
        Self::new(Kind::Written, self.next(), self.to_previous(initially_zero))
    }

    /// The state after zeroing was acknowledged.
    #[inline]
    pub(super) const fn zeroed(self, initially_zero: bool) -> Self {
        Self::new(Kind::Zeroed, self.newest(), self.to_previous(initially_zero))
    }

    /// The state when nothing is promised any more.
    #[inline]
    pub(super) const fn forgotten(self) -> Self {
        Self::new(Kind::Unknown, self.newest(), Previous::Unknown)
    }

    const fn to_previous(self, initially_zero: bool) -> Previous {
        match self.kind() {
            Kind::Written => Previous::Written,
            Kind::Zeroed => Previous::Zero,
            Kind::Untouched if initially_zero => Previous::Zero,
            Kind::Untouched | Kind::Unknown | Kind::Unsettled => Previous::Unknown,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_do_not_touch_each_other() {
        let kinds = [Kind::Untouched, Kind::Written, Kind::Zeroed, Kind::Unknown, Kind::Unsettled];
        for kind in kinds {
            for newest in [0, 1, 77, GENERATION_MAX] {
                for previous in [Previous::Unknown, Previous::Zero, Previous::Written] {
                    let state = State::new(kind, newest, previous);
                    assert_eq!((state.kind(), state.newest()), (kind, newest));
                    assert_eq!(state.previous().is_none(), previous == Previous::Unknown);
                }
            }
        }
        assert_eq!(State::UNTOUCHED, State::new(Kind::Untouched, 0, Previous::Unknown));
    }

    #[test]
    fn states_remember_what_was_replaced() {
        let first = State::UNTOUCHED.written(true);
        assert_eq!(first.previous(), Some(Content::Zero));
        assert_eq!(State::UNTOUCHED.written(false).previous(), None);
        let second = first.written(true);
        assert_eq!((second.newest(), second.previous()), (2, Some(Content::Written(1))));
        let zeroed = second.zeroed(true);
        assert_eq!((zeroed.newest(), zeroed.previous()), (2, Some(Content::Written(2))));
        let third = zeroed.written(true);
        assert_eq!((third.newest(), third.previous()), (3, Some(Content::Zero)));
        assert_eq!(third.forgotten().written(true).previous(), None);
        let wrapped = State::new(Kind::Written, GENERATION_MAX, Previous::Unknown).written(true);
        assert_eq!((wrapped.newest(), wrapped.previous()), (1, Some(Content::Written(GENERATION_MAX))));
    }
}
