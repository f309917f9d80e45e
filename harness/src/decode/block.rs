//! Blocks: several sectors that are written and read as one.

use super::Word;
use crate::classify::{Class, Classifier, Content, Expected, Source};
use crate::sector::{SECTOR, WORDS};

/// A piece of a block that is of one content, and the word it begins at.
type Piece = (usize, Source);

impl Classifier<'_> {
    /// Names what `got`, the sectors of one block from `first_lba` on, is; a last part that is no whole sector is not
    /// looked at.
    ///
    /// `expected` holds for each of the sectors, but a block is right only when all of them hold the same content: where
    /// one is of one generation and the next of another, or zeroes, the block is torn, although each by itself
    /// might be as it is. Of a torn block the first cut is told, in words from the beginning of the block, and the number
    /// is that of the sector in which the second part begins. Of other blocks, it is the first sector whose class is
    /// [telling](Class::is_telling), or else the first that is wrong; flipped bits are counted within that sector.
    #[must_use]
    pub fn classify_block(&self, got: &[u8], first_lba: u64, expected: &Expected) -> (u64, Class) {
        let sectors = got.as_chunks::<SECTOR>().0;
        if sectors.is_empty() || expected.allowed.iter().any(|&content| self.all_hold(sectors, first_lba, content)) {
            return (0, Class::Good);
        }
        if let Some(pieces) = self.pieces(sectors, first_lba) {
            let between_sectors = pieces.iter().all(|&(at, _)| at % WORDS == 0);
            match pieces[..] {
                [_] => return (0, self.classify(&sectors[0], first_lba, expected)),
                [(_, before), (at, after), ref rest @ ..] if rest.is_empty() || between_sectors => {
                    return ((at / WORDS) as u64, Class::Torn { at_word: at as u32, before, after });
                }
                _ => {}
            }
        }
        let mut first_wrong = None;
        for (at, sector) in (0..).zip(sectors) {
            let class = match self.classify(sector, first_lba.wrapping_add(at), expected) {
                Class::Torn { at_word, before, after } => {
                    Class::Torn { at_word: at_word + at as u32 * WORDS as u32, before, after }
                }
                class => class,
            };
            if class.is_telling() {
                return (at, class);
            }
            if class != Class::Good && first_wrong.is_none() {
                first_wrong = Some((at, class));
            }
        }
        first_wrong.unwrap_or((0, Class::Good))
    }

    fn all_hold(&self, sectors: &[[u8; SECTOR]], first_lba: u64, content: Content) -> bool {
        (0..).zip(sectors).all(|(at, sector)| self.holds(sector, first_lba.wrapping_add(at), content))
    }

    /// The contents in the order in which they follow, if every word of the block is a zero or of a generation of its sector.
    fn pieces(&self, sectors: &[[u8; SECTOR]], first_lba: u64) -> Option<Vec<Piece>> {
        let mut pieces: Vec<Piece> = Vec::new();
        for (at, sector) in sectors.iter().enumerate() {
            let lba = first_lba.wrapping_add(at as u64);
            let values = super::values_of(sector);
            for (i, value) in values.into_iter().enumerate() {
                let source = match self.read_in_place(value, i, lba) {
                    word @ (Word::Zero | Word::Here(_)) => word.source()?,
                    Word::Unreadable | Word::There { .. } => return None,
                };
                if pieces.last().is_none_or(|&(_, last)| last != source) {
                    pieces.push((at * WORDS + i, source));
                }
            }
        }
        Some(pieces)
    }
}
