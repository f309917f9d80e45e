//! The cold path: naming what is wrong, and who says so.

use std::collections::BTreeMap;

use super::Ledger;
use crate::classify::{Class, Classifier, Content, Expected};
use crate::mismatch::{Mismatch, SectorDump};
use crate::oracle::Oracle;
use crate::range::SectorRange;
use crate::sector::SECTOR;
use crate::stamp::Stamp;

/// How many wrong sectors of one read are named.
const NAMED_BLOCKS: usize = 64;

impl Ledger {
    pub(super) fn expected_of(&self, block: u64, began: Stamp) -> Expected {
        let newest = self.newest.get(block);
        let sector = self.first_sector(block);
        let mut allowed = self.linear.candidates(block, began);
        allowed.sort_unstable();
        allowed.dedup();
        let previous = match allowed[..] {
            // What was there before a power cut says nothing about what is there after it.
            [Content::Written(_) | Content::Zero] if !self.after_cut.contains(&block) => {
                let zero = self.options.initially_zero.then_some(Content::Zero);
                let first = newest <= 1 && allowed != [Content::Zero];
                self.recent.replaced(sector, newest).or(if first { zero } else { None })
            }
            _ => None,
        };
        Expected { allowed, previous, newest }
    }

    fn classifier(&self) -> Classifier<'_> {
        Classifier {
            pattern: &self.options.pattern,
            foreign: &self.options.foreign,
            device_sectors: self.options.device_sectors,
        }
    }

    /// What is wrong with a block that a read which began at `began` found to hold `bytes`.
    pub(super) fn mismatch(&self, block: u64, bytes: &[u8], began: Stamp) -> Box<Mismatch> {
        let expected = self.expected_of(block, began);
        let first = self.first_sector(block);
        let (within, class) = self.classifier().classify_block(bytes, first, &expected);
        let sector = first + within;
        let at = within as usize * SECTOR;
        Box::new(Mismatch {
            oracle: self.who_says(block, &class, &expected),
            worker: 0,
            op: None,
            range: SectorRange::new(first, u64::from(self.options.block_sectors)),
            sector,
            class,
            got: SectorDump::new(&bytes[at..at + SECTOR]),
            wrong_sectors: BTreeMap::new(),
            history: self.recent.of_sector(sector, expected.newest),
            expected,
        })
    }

    fn who_says(&self, block: u64, class: &Class, expected: &Expected) -> Oracle {
        let unseen_since_cut =
            self.after_cut.contains(&block) || self.recent.is_unseen_since_cut(self.first_sector(block));
        let order = matches!(
            class,
            Class::Lost { .. } | Class::Stale { .. } | Class::Future { .. } | Class::Zero | Class::Torn { .. }
        );
        if unseen_since_cut && order { Oracle::Durable } else { Oracle::of(class, expected) }
    }

    /// Counts the wrong blocks of the whole read, and prefers the one that tells most: a misdirected write explains the lost
    /// blocks beside it.
    pub(super) fn count_wrong(&self, mismatch: &mut Box<Mismatch>, data: &[u8], began: Stamp) {
        let block_bytes = self.options.block_sectors as usize * SECTOR;
        let range = mismatch.range;
        let mut counts: BTreeMap<String, u64> = BTreeMap::new();
        let mut looked = 0;
        for (block, bytes) in (self.blocks(range).start..).zip(data.chunks_exact(block_bytes)) {
            let candidates = self.linear.candidates(block, began);
            let reported = self.blocks(SectorRange::new(mismatch.sector, 1)).start == block;
            if !reported && candidates.iter().any(|&content| self.holds(block, bytes, content)) {
                continue;
            }
            let mut found = self.mismatch(block, bytes, began);
            if found.class == Class::Good && !reported {
                continue;
            }
            *counts.entry(found.class.name().to_owned()).or_default() += 1;
            if found.class.is_telling() && !mismatch.class.is_telling() && self.options.oracles.has(found.oracle) {
                (found.worker, found.op, found.range) = (mismatch.worker, mismatch.op, range);
                *mismatch = found;
            }
            looked += 1;
            if looked == NAMED_BLOCKS {
                break;
            }
        }
        mismatch.wrong_sectors = counts;
    }
}
