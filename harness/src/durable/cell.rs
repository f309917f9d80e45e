//! What the table says of one block, in 32 bits.
//!
//! ```text
//! bit 31     30                            0
//!     |  1  |           slot               |    several contents: see the slot
//!     |  0  |  kind (7)  | generation (24) |    one content
//! ```
//!
//! All zeroes is a block that was never touched, so that a fresh table costs no memory.

use crate::classify::Content;
use crate::sector::GENERATION_MAX;

const SLOT: u32 = 1 << 31;
const WRITTEN: u32 = 1 << 24;
const ZERO: u32 = 2 << 24;
const UNKNOWN: u32 = 3 << 24;

/// One content, or where there are several. By default whatever was there before the first operation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Cell(u32);

impl Cell {
    #[inline]
    pub(super) const fn new(content: Content) -> Self {
        Self(match content {
            Content::Written(generation) => WRITTEN | generation & GENERATION_MAX,
            Content::Zero => ZERO,
            Content::Unknown => UNKNOWN,
        })
    }

    #[inline]
    pub(super) const fn in_slot(slot: u32) -> Self {
        Self(SLOT | slot)
    }

    #[inline]
    pub(super) const fn slot(self) -> Option<u32> {
        if self.0 & SLOT == 0 { None } else { Some(self.0 & !SLOT) }
    }

    /// The content, unless it was never touched or is in a slot.
    #[inline]
    pub(super) const fn content(self) -> Option<Content> {
        match self.0 & !GENERATION_MAX {
            WRITTEN => Some(Content::Written(self.0 & GENERATION_MAX)),
            ZERO => Some(Content::Zero),
            UNKNOWN => Some(Content::Unknown),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_say_what_was_put_in() {
        let contents = [Content::Zero, Content::Unknown, Content::Written(1), Content::Written(GENERATION_MAX)];
        for content in contents {
            let cell = Cell::new(content);
            assert_eq!((cell.content(), cell.slot()), (Some(content), None));
        }
        for slot in [0, 1, WRITTEN, SLOT - 1] {
            assert_eq!((Cell::in_slot(slot).content(), Cell::in_slot(slot).slot()), (None, Some(slot)));
        }
        assert_eq!((Cell::default().content(), Cell::default().slot()), (None, None));
    }
}
