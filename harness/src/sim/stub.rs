//! Stands in for the ledger until that is there.

use std::sync::Arc;

use crate::mismatch::Mismatch;
use crate::oracle::{Oracle, Oracles};
use crate::outcome::Outcome;
use crate::plan::OpKind;
use crate::range::SectorRange;
use crate::sector::Pattern;
use crate::shadow::{DiscardPromise, Verified};

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OpId {
    pub worker: u32,
    pub index: u64,
}

#[derive(Debug)]
pub(crate) struct LedgerOptions {
    pub(crate) region: SectorRange,
    pub(crate) block_sectors: u32,
    pub(crate) pattern: Arc<Pattern>,
    pub(crate) foreign: Arc<[Pattern]>,
    pub(crate) device_sectors: u64,
    pub(crate) initially_zero: bool,
    pub(crate) discard: DiscardPromise,
    pub(crate) volatile_cache: bool,
    pub(crate) torn_by_races: bool,
    pub(crate) oracles: Oracles,
}

#[derive(Debug)]
pub(crate) struct Ticket(OpKind, SectorRange, u32, bool);

#[derive(Debug)]
pub(crate) struct Ledger(LedgerOptions, Vec<u32>, u32, usize);

impl Ledger {
    pub(crate) fn new(options: LedgerOptions) -> Self {
        let _ = (options.block_sectors, &options.foreign, options.device_sectors, options.initially_zero);
        let _ = (options.discard, options.volatile_cache, options.torn_by_races, options.oracles);
        let sectors = options.region.sectors as usize;
        Self(options, vec![0; sectors], 0, 0)
    }
    pub(crate) fn begin(&mut self, _: OpId, kind: OpKind, range: SectorRange, payload: &mut [u8]) -> Ticket {
        self.3 += 1;
        self.2 += 1;
        let number = self.2;
        if matches!(kind, OpKind::Write | OpKind::WriteFua) {
            self.0.pattern.fill(payload, range.first, |_| number);
        }
        if kind.changes() {
            self.1[range.first as usize..range.end() as usize].fill(0);
        }
        Ticket(kind, range, number, self.3 == 1)
    }
    pub(crate) fn end(&mut self, ticket: Ticket, outcome: Outcome) {
        self.3 -= 1;
        if matches!(ticket.0, OpKind::Write | OpKind::WriteFua)
            && ticket.3
            && self.2 == ticket.2
            && outcome == Outcome::Done
        {
            self.1[ticket.1.first as usize..ticket.1.end() as usize].fill(ticket.2);
        }
    }
    pub(crate) fn end_read(&mut self, ticket: Ticket, data: &[u8]) -> Result<Verified, Box<Mismatch>> {
        self.3 -= 1;
        let (sectors, _) = data.as_chunks();
        if ticket.3 && self.2 == ticket.2 {
            for (sector, data) in (ticket.1.first..).zip(sectors) {
                let generation = self.1[sector as usize];
                assert!(generation == 0 || self.0.pattern.sector_matches(data, sector, generation), "{sector}");
            }
        }
        Ok(Verified { bytes: data.len() as u64, unknown_bytes: 0, settled_sectors: 0 })
    }
    pub(crate) fn power_cut(&mut self) {
        self.1.fill(0);
        assert_eq!(self.3, 0);
    }
}

impl Mismatch {
    pub(crate) fn oracle(&self) -> Oracle {
        Oracle::Tag
    }
}
