//! The bytes of a disk, in pieces that copies share until one of them changes.

use std::ops::Range;
use std::sync::Arc;

use crate::sector::SECTOR;

/// What is copied when one of two images that share it changes.
const PIECE: usize = 32 << 10;

/// `None` for zeroes.
type Piece = Option<Arc<Vec<u8>>>;

/// The bytes of a disk. A copy costs a pointer for each piece, and zeroes cost nothing.
#[derive(Clone)]
pub(super) struct Image {
    pieces: Vec<Piece>,
}

/// A part of a range that is in one piece.
struct Part {
    piece: usize,
    within: Range<usize>,
    /// Where it is in the whole range.
    at: Range<usize>,
}

fn parts(range: Range<usize>) -> impl Iterator<Item = Part> {
    let mut next = range.start;
    std::iter::from_fn(move || {
        let piece = next / PIECE;
        let end = range.end.min((piece + 1) * PIECE);
        (next < end).then(|| {
            let part = Part {
                piece,
                within: next - piece * PIECE..end - piece * PIECE,
                at: next - range.start..end - range.start,
            };
            next = end;
            part
        })
    })
}

impl Image {
    /// Zeroes.
    pub(super) fn new(bytes: usize) -> Self {
        Self { pieces: vec![None; bytes.div_ceil(PIECE)] }
    }

    pub(super) fn read(&self, buf: &mut [u8], offset: usize) {
        for Part { piece, within, at } in parts(offset..offset + buf.len()) {
            match &self.pieces[piece] {
                Some(bytes) => buf[at].copy_from_slice(&bytes[within]),
                None => buf[at].fill(0),
            }
        }
    }

    pub(super) fn write(&mut self, buf: &[u8], offset: usize) {
        for Part { piece, within, at } in parts(offset..offset + buf.len()) {
            self.piece(piece)[within].copy_from_slice(&buf[at]);
        }
    }

    pub(super) fn zero(&mut self, range: Range<usize>) {
        for Part { piece, within, .. } in parts(range) {
            if within.len() == PIECE {
                self.pieces[piece] = None;
            } else if self.pieces[piece].is_some() {
                self.piece(piece)[within].fill(0);
            }
        }
    }

    /// Makes a range what it is in another image of the same size.
    pub(super) fn copy_from(&mut self, other: &Self, range: Range<usize>) {
        for Part { piece, within, .. } in parts(range) {
            match &other.pieces[piece] {
                bytes if within.len() == PIECE => self.pieces[piece].clone_from(bytes),
                Some(bytes) => self.piece(piece)[within.clone()].copy_from_slice(&bytes[within]),
                None if self.pieces[piece].is_some() => self.piece(piece)[within].fill(0),
                None => {}
            }
        }
    }

    /// How many sectors are not the same in another image of the same size.
    pub(super) fn differing_sectors(&self, other: &Self) -> u64 {
        let zeroes = [0; SECTOR];
        let pairs = self.pieces.iter().zip(&other.pieces);
        let count = |(one, two): (&Piece, &Piece)| match (one, two) {
            (None, None) => 0,
            (Some(one), Some(two)) if Arc::ptr_eq(one, two) => 0,
            (Some(one), Some(two)) => {
                one.chunks(SECTOR).zip(two.chunks(SECTOR)).filter(|(one, two)| one != two).count()
            }
            (Some(one), None) | (None, Some(one)) => {
                one.chunks(SECTOR).filter(|sector| **sector != zeroes[..sector.len()]).count()
            }
        };
        pairs.map(count).sum::<usize>() as u64
    }

    fn piece(&mut self, piece: usize) -> &mut [u8] {
        let bytes: &mut Vec<u8> = Arc::make_mut(self.pieces[piece].get_or_insert_with(|| Arc::new(vec![0; PIECE])));
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seed::Seed;

    /// Two images against two vectors, copied from each other now and then.
    #[test]
    fn images_are_as_vectors_of_bytes() {
        const BYTES: usize = 5 * PIECE / 2;
        let mut rng = Seed::new(1).rng();
        let mut images = [Image::new(BYTES), Image::new(BYTES)];
        let mut vectors = [vec![0; BYTES], vec![0; BYTES]];
        for step in 0..2000 {
            let which = rng.below(2) as usize;
            let start = rng.below(BYTES as u64) as usize;
            let end = rng.within(start as u64..=BYTES as u64) as usize;
            match rng.below(8) {
                0..3 => {
                    let bytes = vec![step as u8; end - start];
                    images[which].write(&bytes, start);
                    vectors[which][start..end].copy_from_slice(&bytes);
                }
                3..5 => {
                    images[which].zero(start..end);
                    vectors[which][start..end].fill(0);
                }
                5..7 => {
                    let other = images[1 - which].clone();
                    images[which].copy_from(&other, start..end);
                    let other = vectors[1 - which][start..end].to_vec();
                    vectors[which][start..end].copy_from_slice(&other);
                }
                _ => {
                    images[which] = images[1 - which].clone();
                    vectors[which] = vectors[1 - which].clone();
                }
            }
            let mut found = vec![1; end - start];
            images[which].read(&mut found, start);
            assert!(found == vectors[which][start..end], "step {step}");
            let differing =
                vectors[0].chunks(SECTOR).zip(vectors[1].chunks(SECTOR)).filter(|(one, two)| one != two).count();
            assert_eq!(images[0].differing_sectors(&images[1]), differing as u64, "step {step}");
        }
    }
}
