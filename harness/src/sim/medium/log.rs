//! The changes of a medium that are not durable yet.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::image::Image;
use crate::seed::SeededRng;

/// How many changes, and how many bytes of them, one half of the log holds. Whatever is older than two halves is written
/// back, as caches do: a disk that is never flushed has neither endless memory nor endless patience.
const HALF_CHANGES: usize = 1024;
const HALF_BYTES: usize = 4 << 20;

/// What a power cut did to the changes that were not durable.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cut {
    /// How it was drawn what survives.
    pub mode: CutMode,
    /// Changes that survived.
    pub kept: u64,
    /// Changes that were lost.
    pub lost: u64,
    /// Changes of which a part survived.
    pub torn: u64,
}

/// What survives a power cut.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CutMode {
    /// Nothing that was not durable.
    #[default]
    Nothing,
    /// Everything.
    All,
    /// Each change, or not.
    Changes,
    /// Each atomic unit of each change, or not.
    Units,
    /// Everything up to a moment, and nothing after it.
    Prefix,
}

/// A change that a power cut took away, or a part of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Loss {
    /// Its place among the changes that were not durable, the oldest being 0.
    pub number: u64,
    /// Where it begins, in bytes.
    pub offset: u64,
    /// Its length, in bytes.
    pub bytes: u64,
    /// How many of its bytes survived.
    pub kept_bytes: u64,
    /// It made zeroes, and was no write.
    pub zeroes: bool,
}

/// A change of a range.
#[derive(Clone, Copy, Debug)]
pub(super) struct Change {
    offset: u64,
    len: u64,
    /// Where its bytes begin in the half's data; `None` for zeroes.
    data: Option<usize>,
    /// It is durable.
    through: bool,
}

impl Change {
    /// Puts `range` of the change, which has the bytes `data`, into an image.
    pub(super) fn put(&self, image: &mut Image, range: &Range<u64>, data: &[u8]) {
        let place = range.start as usize..range.end as usize;
        match self.data {
            Some(start) => {
                let start = start + (range.start - self.offset) as usize;
                image.write(&data[start..start + place.len()], place.start);
            }
            None => image.zero(place),
        }
    }

    fn range(&self) -> Range<u64> {
        self.offset..self.offset + self.len
    }

    /// The part of the change in `range`, which is not empty.
    fn part(&self, range: Range<u64>) -> Self {
        let data = self.data.map(|start| start + (range.start - self.offset) as usize);
        Self { offset: range.start, len: range.end - range.start, data, through: self.through }
    }
}

#[derive(Clone, Default)]
struct Half {
    changes: Vec<Change>,
    data: Vec<u8>,
}

impl Half {
    fn apply(&mut self, image: &mut Image) {
        for change in &self.changes {
            change.put(image, &change.range(), &self.data);
        }
        self.clear();
    }

    fn clear(&mut self) {
        self.changes.clear();
        self.data.clear();
    }

    fn pin(&mut self, range: &Range<u64>) {
        let partly = |change: &Change| {
            let overlaps = change.offset < range.end && range.start < change.range().end;
            overlaps && (change.offset < range.start || change.range().end > range.end)
        };
        if self.changes.iter().any(|change| !change.through && partly(change)) {
            self.split_at_edges(range);
        }
        for change in &mut self.changes {
            change.through |= change.offset >= range.start && change.range().end <= range.end;
        }
    }

    fn split_at_edges(&mut self, range: &Range<u64>) {
        let mut split = Vec::with_capacity(self.changes.len() + 2);
        for change in &self.changes {
            let mut start = change.offset;
            let end = change.range().end;
            for edge in [range.start, range.end, end] {
                let stop = edge.clamp(start, end);
                if stop > start {
                    split.push(change.part(start..stop));
                    start = stop;
                }
            }
        }
        self.changes = split;
    }
}

/// The changes, oldest first.
#[derive(Clone, Default)]
pub(super) struct Log {
    older: Half,
    newer: Half,
}

impl Log {
    pub(super) fn len(&self) -> usize {
        self.older.changes.len() + self.newer.changes.len()
    }

    /// Writes the older half back when the newer is full.
    pub(super) fn make_room(&mut self, durable: &mut Image) {
        if self.newer.changes.len() >= HALF_CHANGES || self.newer.data.len() >= HALF_BYTES {
            self.older.apply(durable);
            std::mem::swap(&mut self.older, &mut self.newer);
        }
    }

    pub(super) fn push(&mut self, offset: u64, len: u64, bytes: Option<&[u8]>, through: bool) {
        if len == 0 {
            return;
        }
        let data = bytes.map(|bytes| {
            let start = self.newer.data.len();
            self.newer.data.extend_from_slice(bytes);
            start
        });
        self.newer.changes.push(Change { offset, len, data, through });
    }

    /// Makes everything durable.
    pub(super) fn apply(&mut self, durable: &mut Image) {
        self.older.apply(durable);
        self.newer.apply(durable);
    }

    /// Makes durable what is in `range`.
    pub(super) fn pin(&mut self, range: &Range<u64>) {
        self.older.pin(range);
        self.newer.pin(range);
    }

    pub(super) fn each_range(&self, mut each: impl FnMut(Range<usize>)) {
        for change in self.older.changes.iter().chain(&self.newer.changes) {
            each(change.offset as usize..(change.offset + change.len) as usize);
        }
    }

    /// Draws what survives, hands it to `land` in order, tells what does not, and forgets everything.
    pub(super) fn survive(
        &mut self,
        unit: u64,
        rng: &mut SeededRng,
        mut land: impl FnMut(&Change, Range<u64>, &[u8]),
        mut tell: impl FnMut(Loss),
    ) -> Cut {
        let mode = [CutMode::Nothing, CutMode::All, CutMode::Changes, CutMode::Units, CutMode::Prefix]
            [rng.below(5) as usize];
        // How many of 16 survive; seldom ones and seldom losses are found by different oracles.
        let odds = rng.within(1..=15);
        let prefix = rng.below(self.len() as u64 + 1);
        let mut cut = Cut { mode, ..Cut::default() };
        let mut number = 0;
        let loss = |change: &Change, number, kept_bytes| Loss {
            number,
            offset: change.offset,
            bytes: change.len,
            kept_bytes,
            zeroes: change.data.is_none(),
        };
        for half in [&mut self.older, &mut self.newer] {
            for change in &half.changes {
                let whole = change.through
                    || match mode {
                        CutMode::Nothing => false,
                        CutMode::All => true,
                        CutMode::Changes => rng.chance(odds, 16),
                        CutMode::Prefix => number < prefix,
                        CutMode::Units => {
                            let mut kept_bytes = 0;
                            let (kept, units) = units(change.range(), unit, |_| rng.chance(odds, 16), &mut |range| {
                                kept_bytes += range.end - range.start;
                                land(change, range, &half.data);
                            });
                            cut.torn += u64::from(kept != 0 && kept != units);
                            cut.kept += u64::from(kept == units);
                            cut.lost += u64::from(kept == 0);
                            if kept != units {
                                tell(loss(change, number, kept_bytes));
                            }
                            number += 1;
                            continue;
                        }
                    };
                if whole {
                    land(change, change.range(), &half.data);
                } else {
                    tell(loss(change, number, 0));
                }
                cut.kept += u64::from(whole && !change.through);
                cut.lost += u64::from(!whole);
                number += 1;
            }
            half.clear();
        }
        cut
    }
}

/// Hands those aligned units of `range` to `land` for which `keep` says so. Returns how many, and how many there are.
fn units(
    range: Range<u64>,
    unit: u64,
    mut keep: impl FnMut(u64) -> bool,
    land: &mut dyn FnMut(Range<u64>),
) -> (u64, u64) {
    let (mut at, mut kept, mut count) = (range.start, 0, 0);
    while at < range.end {
        let stop = ((at / unit + 1) * unit).min(range.end);
        count += 1;
        if keep(at) {
            kept += 1;
            land(at..stop);
        }
        at = stop;
    }
    (kept, count)
}
