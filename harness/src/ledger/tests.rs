//! The ledger against an obedient device: operations take effect block by block, at any moment between their beginning and
//! their end, and the power is cut. Nothing such a device does may be called wrong, and everything else must be.

use super::*;
use crate::oracle::Oracle;
use crate::seed::{Seed, SeededRng};

const BLOCKS: u64 = 12;

/// What one block held since what is durable, oldest first, with the step at which it came.
type Versions = Vec<(Content, u64)>;

struct Running {
    ticket: Option<Ticket>,
    kind: OpKind,
    range: SectorRange,
    payload: Vec<u8>,
    /// Blocks that it has not taken effect on yet.
    left: Vec<u64>,
    began: u64,
}

struct Bench {
    rng: SeededRng,
    ledger: Ledger,
    block_sectors: u64,
    blocks: Vec<Versions>,
    running: Vec<Running>,
    step: u64,
    next_op: u64,
    volatile: bool,
    cuts: u64,
    reads: u64,
}

fn options(block_sectors: u32, volatile_cache: bool) -> LedgerOptions {
    let region = SectorRange::new(u64::from(block_sectors) * 3, BLOCKS * u64::from(block_sectors));
    LedgerOptions {
        region,
        block_sectors,
        pattern: Arc::new(Pattern::new(9, 1)),
        foreign: Arc::new([Pattern::new(9, 2)]),
        device_sectors: 1 << 20,
        initially_zero: true,
        discard: DiscardPromise::Zeroes,
        volatile_cache,
        torn_by_races: false,
        oracles: Oracles::ALL,
    }
}

impl Bench {
    fn new(seed: u64) -> Self {
        let mut rng = Seed::new(seed).rng();
        let block_sectors = if rng.chance(1, 2) { 1 } else { 8 };
        let volatile = rng.chance(2, 3);
        Self {
            rng,
            ledger: Ledger::new(options(block_sectors, volatile)),
            block_sectors: u64::from(block_sectors),
            blocks: vec![vec![(Content::Zero, 0)]; BLOCKS as usize],
            running: Vec::new(),
            step: 0,
            next_op: 0,
            volatile,
            cuts: 0,
            reads: 0,
        }
    }

    fn bytes(&self, block: u64, content: Content) -> Vec<u8> {
        let mut bytes = vec![0; self.block_sectors as usize * SECTOR];
        if let Content::Written(generation) = content {
            let first = self.ledger.first_sector(block);
            self.ledger.options.pattern.fill(&mut bytes, first, |_| generation);
        }
        bytes
    }

    fn begin(&mut self) {
        let kinds = [
            OpKind::Read,
            OpKind::Read,
            OpKind::Write,
            OpKind::Write,
            OpKind::WriteFua,
            OpKind::Flush,
            OpKind::Discard,
            OpKind::WriteZeroes,
        ];
        let Some(&kind) = self.rng.pick(&kinds) else { return };
        let first = self.rng.below(BLOCKS);
        let count = self.rng.within(1..=(BLOCKS - first).min(4));
        let (range, left) = if kind == OpKind::Flush {
            (SectorRange::default(), Vec::new())
        } else {
            let sectors = self.block_sectors;
            let region = self.ledger.options.region.first;
            (SectorRange::new(region + first * sectors, count * sectors), (first..first + count).collect())
        };
        let mut payload = vec![0; range.len_bytes() as usize];
        let op = OpId { worker: self.rng.below(3) as u32, index: self.next_op };
        self.next_op += 1;
        let ticket = self.ledger.begin(op, kind, range, &mut payload);
        self.running.push(Running { ticket: Some(ticket), kind, range, payload, left, began: self.step });
    }

    /// One operation takes effect on one of its blocks.
    fn apply(&mut self) {
        let at = self.rng.below(self.running.len() as u64) as usize;
        let count = self.running[at].left.len() as u64;
        if count == 0 {
            return;
        }
        let which = self.rng.below(count) as usize;
        let block = self.running[at].left.swap_remove(which);
        let Running { kind, range, ref mut payload, .. } = self.running[at];
        let bytes = self.block_sectors as usize * SECTOR;
        let from = (block * self.block_sectors + self.ledger.options.region.first - range.first) as usize * SECTOR;
        if kind == OpKind::Read {
            let (content, _) = *self.blocks[block as usize].last().expect("a block holds something");
            let mut found = vec![0; bytes];
            if let Content::Written(generation) = content {
                self.ledger.options.pattern.fill(&mut found, self.ledger.first_sector(block), |_| generation);
            }
            payload[from..from + bytes].copy_from_slice(&found);
            return;
        }
        let content = if kind.changes() && !matches!(kind, OpKind::Discard | OpKind::WriteZeroes) {
            let word = u64::from_le_bytes(payload[from..].as_chunks::<8>().0[0]);
            let lba = self.ledger.first_sector(block);
            let position = (lba % 8) as usize * 64;
            let origin = self.ledger.options.pattern.decode_word(word, position, 1 << 20).expect("a payload");
            assert_eq!(origin.lba, lba);
            Content::Written(origin.generation)
        } else {
            Content::Zero
        };
        self.blocks[block as usize].push((content, self.step));
        // Without a cache, or with FUA, what is acknowledged is durable; it is acknowledged only later.
    }

    /// Ends an operation that has taken effect everywhere, or fails one.
    fn end(&mut self) -> Result<(), Box<Mismatch>> {
        let at = self.rng.below(self.running.len() as u64) as usize;
        let fails = self.rng.chance(1, 25);
        if !self.running[at].left.is_empty() && !fails {
            return Ok(());
        }
        let mut running = self.running.swap_remove(at);
        let ticket = running.ticket.take().expect("it is in flight");
        if fails {
            self.ledger.end(ticket, Outcome::Failed);
            return Ok(());
        }
        if running.kind == OpKind::Read {
            self.reads += 1;
            return self.ledger.end_read(ticket, &running.payload).map(|_| ());
        }
        let durable = !self.volatile && running.kind.changes() || running.kind == OpKind::WriteFua;
        let first = (running.range.first.saturating_sub(self.ledger.options.region.first)) / self.block_sectors;
        for (block, versions) in (0_u64..).zip(&mut self.blocks) {
            let touched = block >= first && block < first + running.range.sectors / self.block_sectors;
            let floor = if running.kind == OpKind::Flush {
                versions.iter().rposition(|&(_, step)| step <= running.began)
            } else if durable && touched {
                // Its own version, or a later one: an older one cannot come back.
                versions.iter().position(|&(content, step)| {
                    let lba = self.ledger.options.region.first + block * self.block_sectors;
                    step > running.began && self.ledger.options.pattern.is_of(content, &running, lba)
                })
            } else {
                None
            };
            if let Some(floor) = floor {
                versions.drain(..floor);
            }
        }
        self.ledger.end(ticket, Outcome::Done);
        Ok(())
    }

    fn cut(&mut self) {
        self.cuts += 1;
        for running in std::mem::take(&mut self.running) {
            if let Some(ticket) = running.ticket {
                self.ledger.end(ticket, Outcome::Unknown);
            }
        }
        self.ledger.power_cut();
        for versions in &mut self.blocks {
            let survivor = self.rng.pick(versions).copied().expect("a block holds something");
            *versions = vec![(survivor.0, self.step)];
        }
    }

    fn run(&mut self, steps: u64) -> Result<(), Box<Mismatch>> {
        for _ in 0..steps {
            self.step += 1;
            match self.rng.below(40) {
                0..10 if self.running.len() < 6 => self.begin(),
                10..30 if !self.running.is_empty() => self.apply(),
                30..39 if !self.running.is_empty() => self.end()?,
                39 if self.rng.chance(1, 8) => self.cut(),
                _ => {}
            }
        }
        Ok(())
    }

    /// Reads one block at once.
    fn read(&mut self, block: u64, bytes: &[u8]) -> Result<Verified, Box<Mismatch>> {
        let range = SectorRange::new(self.ledger.first_sector(block), self.block_sectors);
        let ticket = self.ledger.begin(OpId::default(), OpKind::Read, range, &mut []);
        self.ledger.end_read(ticket, bytes)
    }

    /// Ends all that runs, as it should.
    fn drain(&mut self) {
        while !self.running.is_empty() {
            self.step += 1;
            self.apply();
            self.end().expect("an obedient device");
        }
    }
}

/// Helps [`Bench::end`]; not of the pattern itself.
trait IsOf {
    fn is_of(&self, content: Content, running: &Running, lba: u64) -> bool;
}

impl IsOf for Pattern {
    /// Whether an operation gave sector `lba` this content.
    fn is_of(&self, content: Content, running: &Running, lba: u64) -> bool {
        match (running.kind, content) {
            (OpKind::Write | OpKind::WriteFua, Content::Written(generation)) => {
                let (sectors, _) = running.payload.as_chunks::<SECTOR>();
                self.sector_matches(&sectors[(lba - running.range.first) as usize], lba, generation)
            }
            (OpKind::Discard | OpKind::WriteZeroes, Content::Zero) => true,
            _ => false,
        }
    }
}

#[test]
fn an_obedient_device_is_never_called_wrong() {
    let (mut cuts, mut reads) = (0, 0);
    for seed in 0..600 {
        let mut bench = Bench::new(seed);
        if let Err(mismatch) = bench.run(1500) {
            panic!("seed {seed}: {mismatch}\n{:?}", mismatch.oracle);
        }
        (cuts, reads) = (cuts + bench.cuts, reads + bench.reads);
    }
    assert!(cuts > 1000 && reads > 20_000, "{cuts} cuts, {reads} reads");
}

/// Any content that the obedient device could not have is found, and the oracle that finds it is named.
#[test]
fn what_an_obedient_device_cannot_hold_is_wrong() {
    let mut found = std::collections::BTreeMap::new();
    for seed in 0..3000 {
        let mut bench = Bench::new(seed);
        bench.run(300).expect("an obedient device");
        let after_cut = bench.rng.chance(1, 2);
        if after_cut {
            bench.cut();
        } else {
            bench.drain();
        }
        let block = bench.rng.below(BLOCKS);
        let sector = bench.ledger.first_sector(block);
        let newest = bench.ledger.newest.get(block);
        let allowed = bench.ledger.expected(sector).allowed;
        for content in (1..=newest + 1).map(Content::Written).chain([Content::Zero]) {
            let mut copy = Bench::new(seed);
            copy.run(300).expect("an obedient device");
            if copy.rng.chance(1, 2) {
                copy.cut();
            } else {
                copy.drain();
            }
            let bytes = copy.bytes(block, content);
            match copy.read(block, &bytes) {
                Ok(_) => assert!(allowed.contains(&content), "seed {seed}: {content}"),
                Err(mismatch) => {
                    assert!(!allowed.contains(&content), "seed {seed}: {mismatch}");
                    *found.entry((mismatch.oracle, mismatch.class.name())).or_insert(0) += 1;
                }
            }
        }
    }
    for oracle in [Oracle::Linear, Oracle::Durable, Oracle::Zero] {
        assert!(found.keys().any(|(by, _)| *by == oracle), "{oracle} found nothing: {found:?}");
    }
}

#[test]
fn an_oracle_that_does_not_judge_finds_nothing() {
    let mut bench = Bench::new(1);
    let mut payload = vec![0; bench.block_sectors as usize * SECTOR];
    let range = SectorRange::new(bench.ledger.first_sector(0), bench.block_sectors);
    for _ in 0..2 {
        let ticket = bench.ledger.begin(OpId::default(), OpKind::Write, range, &mut payload);
        bench.ledger.end(ticket, Outcome::Done);
    }
    let old = bench.bytes(0, Content::Written(1));
    let mismatch = bench.read(0, &old).expect_err("stale");
    assert_eq!((mismatch.oracle, mismatch.class), (Oracle::Linear, Class::Lost { found: Content::Written(1) }));
    bench.ledger.options.oracles = Oracles::ALL.without(Oracle::Linear);
    assert!(bench.read(0, &old).is_ok());
}

#[test]
fn a_read_beside_a_write_sees_the_old_or_the_new_and_stays_with_it() {
    let mut ledger = Ledger::new(options(1, true));
    let range = SectorRange::new(3, 1);
    let mut old = vec![0; SECTOR];
    let ticket = ledger.begin(OpId::default(), OpKind::Write, range, &mut old);
    ledger.end(ticket, Outcome::Done);
    let mut new = vec![0; SECTOR];
    let write = ledger.begin(OpId::default(), OpKind::Write, range, &mut new);
    let read = |ledger: &mut Ledger, bytes: &[u8]| {
        let ticket = ledger.begin(OpId { worker: 1, index: 0 }, OpKind::Read, range, &mut []);
        ledger.end_read(ticket, bytes)
    };
    assert!(read(&mut ledger, &old).is_ok());
    assert!(read(&mut ledger, &new).is_ok());
    let mismatch = read(&mut ledger, &old).expect_err("it was new before");
    assert_eq!(mismatch.oracle, Oracle::Linear);
    assert!(mismatch.history.iter().any(|past| past.outcome.is_none() && past.generation == Some(2)));
    ledger.end(write, Outcome::Done);
    assert!(read(&mut ledger, &new).is_ok());
}

#[test]
fn a_torn_block_is_torn_unless_races_may_tear() {
    let mut options = options(8, false);
    let range = SectorRange::new(24, 8);
    for torn_by_races in [false, true] {
        options.torn_by_races = torn_by_races;
        let mut ledger = Ledger::new(options.clone());
        let mut old = vec![0; 8 * SECTOR];
        let ticket = ledger.begin(OpId::default(), OpKind::Write, range, &mut old);
        ledger.end(ticket, Outcome::Done);
        let mut new = vec![0; 8 * SECTOR];
        let write = ledger.begin(OpId::default(), OpKind::Write, range, &mut new);
        let mut torn = old.clone();
        torn[3 * SECTOR..].copy_from_slice(&new[3 * SECTOR..]);
        let mut within_a_word = torn.clone();
        within_a_word[3 * SECTOR..3 * SECTOR + 3].copy_from_slice(&old[3 * SECTOR..3 * SECTOR + 3]);
        for torn in [&torn, &within_a_word] {
            let ticket = ledger.begin(OpId::default(), OpKind::Read, range, &mut []);
            assert_eq!(ledger.end_read(ticket, torn).is_ok(), torn_by_races);
        }
        let mut foreign = within_a_word;
        foreign[5 * SECTOR] ^= 1;
        let ticket = ledger.begin(OpId::default(), OpKind::Read, range, &mut []);
        assert!(ledger.end_read(ticket, &foreign).is_err(), "a byte that is from neither");
        ledger.end(write, Outcome::Done);
        let ticket = ledger.begin(OpId::default(), OpKind::Read, range, &mut []);
        let mismatch = ledger.end_read(ticket, &torn).expect_err("torn for good");
        assert!(
            matches!(mismatch.class, Class::Torn { .. } | Class::Lost { .. } | Class::Partial { .. }),
            "{mismatch}"
        );
    }
}

/// A write that is in flight and one that was acknowledged may be there or not, a flushed one is there; and the ledger itself
/// goes on as if nothing had happened.
#[test]
fn a_crashed_copy_allows_what_a_cut_now_could_leave() {
    let mut ledger = Ledger::new(options(1, true));
    let place = |block: u64| SectorRange::new(3 + block, 1);
    let write = |ledger: &mut Ledger, index, block| {
        let mut payload = vec![0; SECTOR];
        let id = OpId { worker: 0, index };
        (ledger.begin(id, OpKind::Write, place(block), &mut payload), payload)
    };
    let (flushed, kept) = write(&mut ledger, 0, 0);
    ledger.end(flushed, Outcome::Done);
    let flush = ledger.begin(OpId { worker: 0, index: 1 }, OpKind::Flush, SectorRange::default(), &mut []);
    ledger.end(flush, Outcome::Done);
    let (acknowledged, second) = write(&mut ledger, 2, 1);
    ledger.end(acknowledged, Outcome::Done);
    let (in_flight, third) = write(&mut ledger, 3, 2);

    let found = |ledger: &Ledger, block: u64, data: &[u8]| {
        let mut crashed = ledger.crashed();
        let read = crashed.begin(OpId { worker: 1, index: 0 }, OpKind::Read, place(block), &mut []);
        crashed.end_read(read, data).is_ok()
    };
    let zeroes = vec![0; SECTOR];
    assert!(found(&ledger, 0, &kept) && !found(&ledger, 0, &zeroes));
    assert!(found(&ledger, 1, &second) && found(&ledger, 1, &zeroes) && !found(&ledger, 1, &third));
    assert!(found(&ledger, 2, &third) && found(&ledger, 2, &zeroes));

    assert_eq!(ledger.in_flight(), 1);
    ledger.end(in_flight, Outcome::Done);
    let read = ledger.begin(OpId { worker: 1, index: 0 }, OpKind::Read, place(2), &mut []);
    ledger.end_read(read, &zeroes).expect_err("the write was acknowledged");
}

/// By how many bytes the ledger of a region grows once every block of it was written and flushed.
fn grows_by(mib: u64, block_sectors: u32) -> usize {
    let region = SectorRange::device(mib << 20);
    let mut ledger =
        Ledger::new(LedgerOptions { region, device_sectors: region.sectors, ..options(block_sectors, true) });
    let fresh = ledger.memory_bytes();
    assert!(fresh < 1 << 20, "{fresh} bytes before anything was touched");
    let mut buf = vec![0; 256 * SECTOR];
    for first in (0..region.sectors).step_by(256) {
        let write = SectorRange::new(first, 256);
        let flush = SectorRange::default();
        for (kind, range, payload) in [(OpKind::Write, write, &mut buf[..]), (OpKind::Flush, flush, &mut [])] {
            let ticket = ledger.begin(OpId::default(), kind, range, payload);
            ledger.end(ticket, Outcome::Done);
        }
    }
    ledger.memory_bytes() - fresh
}

/// Of each block that was touched, two oracles and the newest generation keep four bytes each. What is not flushed yet comes
/// on top, and goes: that does not depend on how large the region is.
#[test]
fn takes_twelve_bytes_for_each_block() {
    for block_sectors in [1, 8] {
        let (one, two) = (grows_by(32, block_sectors), grows_by(64, block_sectors));
        let blocks = SectorRange::device(32 << 20).sectors / u64::from(block_sectors);
        let each = (two - one) as f64 / blocks as f64;
        assert!((12.0..12.1).contains(&each), "{each} bytes for each block of {block_sectors} sectors");
        assert!(one < blocks as usize * 12 + (256 << 10), "{one} bytes for {blocks} blocks");
    }
}
