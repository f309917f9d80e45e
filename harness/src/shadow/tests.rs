//! The shadow against a model that remembers the full bytes of everything a sector may hold.

use super::*;
use crate::seed::{Seed, SeededRng};

const SECTORS: u64 = 48;
const FIRST: u64 = 1000;

/// What each sector may hold, byte for byte; `None` is anything.
struct Model {
    allowed: Vec<Option<Vec<[u8; SECTOR]>>>,
}

impl Model {
    fn new(initially_zero: bool) -> Self {
        let initial = initially_zero.then(|| vec![[0; SECTOR]]);
        Self { allowed: vec![initial; SECTORS as usize] }
    }

    /// Whether `buf` is right; what was seen before the first wrong sector is what must stay.
    fn check(&mut self, range: SectorRange, buf: &[u8]) -> bool {
        let allowed = &mut self.allowed[(range.first - FIRST) as usize..];
        for (allowed, got) in allowed.iter_mut().zip(buf.as_chunks::<SECTOR>().0) {
            match allowed {
                Some(all) if all.contains(got) => *all = vec![*got],
                Some(_) => return false,
                None => {}
            }
        }
        true
    }

    fn set(&mut self, sector: u64, new: Option<&[u8; SECTOR]>, outcome: Outcome) {
        let allowed = &mut self.allowed[(sector - FIRST) as usize];
        *allowed = match (allowed.take(), new, outcome) {
            (_, Some(new), Outcome::Done) => Some(vec![*new]),
            (Some(mut all), Some(new), Outcome::Failed | Outcome::Unknown) => {
                all.push(*new);
                Some(all)
            }
            (_, None, _) | (None, Some(_), Outcome::Failed | Outcome::Unknown) => None,
        };
    }
}

/// One region under test: the bytes of an obedient device, the model and the shadow.
struct Bench {
    rng: SeededRng,
    device: Vec<[u8; SECTOR]>,
    /// Everything that ever was on the device, to be dug out again.
    attic: Vec<[u8; SECTOR]>,
    model: Model,
    shadow: Shadow,
    in_flight: Vec<(Ticket, SectorRange, Planned)>,
}

/// What an operation in flight does when it lands.
enum Planned {
    Read,
    Set(Vec<Option<[u8; SECTOR]>>),
}

fn shadow(initially_zero: bool) -> Shadow {
    Shadow::new(ShadowOptions {
        region: SectorRange::new(FIRST, SECTORS),
        worker: 3,
        pattern: Arc::new(Pattern::new(9, 0)),
        foreign: Arc::new([]),
        device_sectors: 1 << 20,
        initially_zero,
    })
}

impl Bench {
    fn new(seed: u64) -> Self {
        let mut rng = Seed::new(seed).rng();
        let initially_zero = rng.chance(1, 2);
        let mut device = vec![[0; SECTOR]; SECTORS as usize];
        if !initially_zero {
            for sector in &mut device {
                rng.fill(sector);
            }
        }
        let model = Model::new(initially_zero);
        Self { rng, device, attic: vec![[0; SECTOR]], model, shadow: shadow(initially_zero), in_flight: Vec::new() }
    }

    fn range(&mut self) -> SectorRange {
        let sectors = self.rng.within(1..=8);
        SectorRange::new(FIRST + self.rng.below(SECTORS - sectors + 1), sectors)
    }

    fn begin(&mut self, op: u64) {
        let range = self.range();
        let kind = self.rng.below(7);
        let access = if kind < 3 { Access::Read } else { Access::Change };
        let flying = |(_, other, planned): &(Ticket, SectorRange, Planned)| {
            other.overlaps(range) && (access == Access::Change || !matches!(planned, Planned::Read))
        };
        let taken = self.in_flight.iter().any(flying);
        assert_eq!(self.shadow.overlaps_in_flight(range, access), taken);
        if taken || self.in_flight.len() >= 6 {
            return;
        }
        let all = |content| Planned::Set(vec![content; range.sectors as usize]);
        let (ticket, planned) = match kind {
            0..3 => (self.shadow.begin_read(op, range), Planned::Read),
            3 | 4 => {
                let mut buf = vec![0; range.len_bytes() as usize];
                let ticket = self.shadow.begin_write(op, range, &mut buf);
                let payload = buf.as_chunks().0.to_vec();
                self.attic.extend(&payload);
                (ticket, Planned::Set(payload.into_iter().map(Some).collect()))
            }
            5 => (self.shadow.begin_write_zeroes(op, range), all(Some([0; SECTOR]))),
            _ => {
                let zeroes = self.rng.chance(3, 4);
                let promise = if zeroes { DiscardPromise::Zeroes } else { DiscardPromise::Nothing };
                (self.shadow.begin_discard(op, range, promise), all(zeroes.then_some([0; SECTOR])))
            }
        };
        self.in_flight.push((ticket, range, planned));
    }

    fn land(&mut self) {
        if self.in_flight.is_empty() {
            return;
        }
        let which = self.rng.below(self.in_flight.len() as u64) as usize;
        let (ticket, range, planned) = self.in_flight.swap_remove(which);
        let outcome = if self.rng.chance(1, 6) { Outcome::Failed } else { Outcome::Done };
        let Planned::Set(contents) = planned else {
            if outcome == Outcome::Failed {
                self.shadow.finish(ticket, outcome);
                return;
            }
            let buf = self.bytes(range);
            let result = self.shadow.finish_read(ticket, &buf);
            assert!(self.model.check(range, &buf) && result.is_ok(), "{result:?}");
            return;
        };
        for (sector, content) in (range.first..).zip(contents) {
            // An operation that fails reaches any part of its sectors.
            if outcome == Outcome::Done || self.rng.chance(1, 2) {
                let mut noise = [0; SECTOR];
                self.rng.fill(&mut noise);
                self.device[(sector - FIRST) as usize] = content.unwrap_or(noise);
            }
            self.model.set(sector, content.as_ref(), outcome);
        }
        self.shadow.finish(ticket, outcome);
    }

    fn bytes(&self, range: SectorRange) -> Vec<u8> {
        self.device[(range.first - FIRST) as usize..][..range.sectors as usize].concat()
    }

    /// Reads a range in which one sector lies, in any of the ways a sector can.
    fn lie(&mut self) -> bool {
        let range = self.range();
        if self.in_flight.iter().any(|(_, other, _)| other.overlaps(range)) {
            return false;
        }
        let mut buf = self.bytes(range);
        let victim = self.rng.below(range.sectors) as usize * SECTOR;
        let other = self.rng.below(SECTORS) as usize;
        let old = self.rng.below(self.attic.len() as u64) as usize;
        let bit = self.rng.below(4096) as usize;
        match self.rng.below(4) {
            0 => buf[victim + bit / 8] ^= 1 << (bit % 8),
            1 => buf[victim..victim + SECTOR].copy_from_slice(&self.device[other]),
            2 => buf[victim..victim + SECTOR].copy_from_slice(&self.attic[old]),
            _ => buf[victim..victim + SECTOR].fill(0),
        }
        let right = self.model.check(range, &buf);
        let result = self.shadow.verify(range, &buf);
        assert_eq!(result.is_ok(), right, "{result:?}");
        if right {
            // The lie was a truth: it is what the device holds from now on.
            let sectors = buf.as_chunks::<SECTOR>().0;
            self.device[(range.first - FIRST) as usize..][..sectors.len()].copy_from_slice(sectors);
        }
        if let Err(mismatch) = result {
            assert!(range.contains(mismatch.sector) && mismatch.class != Class::Good);
        }
        !right
    }
}

#[test]
fn agrees_with_full_contents() {
    let mut caught = 0;
    for seed in 0..60 {
        let mut bench = Bench::new(seed);
        for op in 0..400 {
            match bench.rng.below(5) {
                0..2 => bench.begin(op),
                2..4 => bench.land(),
                _ => caught += u64::from(bench.lie()),
            }
        }
        while !bench.in_flight.is_empty() {
            bench.land();
        }
        let whole = SectorRange::new(FIRST, SECTORS);
        let buf = bench.bytes(whole);
        let result = bench.shadow.verify(whole, &buf);
        assert!(bench.model.check(whole, &buf) && result.is_ok(), "seed {seed}: {result:?}");
        assert_eq!(bench.shadow.in_flight(), 0);
    }
    assert!(caught > 1000, "{caught} lies were told");
}

#[test]
fn takes_less_than_one_percent() {
    for mib in [1, 64, 1024] {
        let region = SectorRange::device(mib << 20);
        let shadow = Shadow::new(ShadowOptions { region, ..shadow(true).options().clone() });
        let share = shadow.memory_bytes() as f64 / region.len_bytes() as f64;
        assert!(share < 0.01 || mib == 1 && share < 0.02, "{mib} MiB: {share}");
    }
}

/// A sparse device may be larger than the machine has memory for its table.
#[test]
fn memory_is_taken_as_sectors_are_touched() {
    let resident_pages = || -> u64 {
        let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
        statm.split(' ').nth(1).and_then(|pages| pages.parse().ok()).unwrap_or(0)
    };
    let before = resident_pages();
    let region = SectorRange::device(16 << 40);
    let mut large = Shadow::new(ShadowOptions { region, ..shadow(true).options().clone() });
    let far = SectorRange::new(1 << 34, 1);
    assert!(large.verify(far, &[0; SECTOR]).is_ok());
    let mut buf = [0; SECTOR];
    let ticket = large.begin_write(0, far, &mut buf);
    large.finish(ticket, Outcome::Done);
    assert!(large.verify(far, &buf).is_ok());
    // The whole table would be 128 GiB; its list of segments is 24 MiB, and other tests take some memory meanwhile.
    assert!(resident_pages() < before + (128 << 20) / 4096);
}

#[test]
fn a_mismatch_tells_the_history_of_its_sector() {
    let mut shadow = shadow(true);
    let range = SectorRange::new(FIRST + 8, 4);
    let mut buf = vec![0; range.len_bytes() as usize];
    let mut write = |shadow: &mut Shadow, op, outcome| {
        let ticket = shadow.begin_write(op, range, &mut buf);
        shadow.finish(ticket, outcome);
        buf.clone()
    };
    let first = write(&mut shadow, 10, Outcome::Done);
    let _second = write(&mut shadow, 11, Outcome::Failed);
    let elsewhere = shadow.begin_write_zeroes(12, SectorRange::new(FIRST, 4));
    let third = write(&mut shadow, 13, Outcome::Done);
    assert_eq!(shadow.verify(range, &third).expect("just written").bytes, 2048);

    let ticket = shadow.begin_read(14, range);
    let mismatch = *shadow.finish_read(ticket, &first).expect_err("overwritten twice");
    assert_eq!(mismatch.sector, FIRST + 8);
    assert_eq!((mismatch.worker, mismatch.op), (3, Some(14)));
    assert_eq!(mismatch.class, Class::Stale { generation: 1 });
    assert_eq!(mismatch.wrong_sectors["stale"], 4);
    let told: Vec<_> = mismatch.history.iter().map(|past| (past.op, past.generation, past.outcome)).collect();
    let (done, failed) = (Some(Outcome::Done), Some(Outcome::Failed));
    let pass = (None, None, done);
    let expected = [(Some(10), Some(1), done), (Some(11), Some(2), failed), (Some(13), Some(3), done), pass];
    assert_eq!(told[..4], expected);
    assert_eq!(told[4], (Some(14), None, done));
    let text = mismatch.to_string();
    assert!(text.contains("stale") && text.contains("#11 write 1008+4 generation 2 failed"), "{text}");
    let json = serde_json::to_string(&mismatch).expect("plain data");
    assert_eq!(serde_json::from_str::<Mismatch>(&json).ok(), Some(mismatch));
    shadow.finish(elsewhere, Outcome::Done);
}

/// A lost write is told from one that was never acknowledged, and a settled one may not change again.
#[test]
fn what_was_seen_stays() {
    let mut shadow = shadow(true);
    let range = SectorRange::new(FIRST, 1);
    let mut old = [0; SECTOR];
    let mut new = [0; SECTOR];
    let ticket = shadow.begin_write(0, range, &mut old);
    shadow.finish(ticket, Outcome::Done);
    let lost = shadow.verify(range, &[0; SECTOR]).expect_err("acknowledged");
    assert_eq!(lost.class, Class::Lost { found: Content::Zero });
    let ticket = shadow.begin_write(1, range, &mut new);
    shadow.finish(ticket, Outcome::Failed);
    assert_eq!(shadow.expected(FIRST).allowed, [Content::Written(1), Content::Written(2)]);
    assert_eq!(shadow.verify(range, &old).expect("it failed").settled_sectors, 1);
    assert_eq!(shadow.verify(range, &old).expect("it was seen").settled_sectors, 0);
    let late = shadow.verify(range, &new).expect_err("the old one was seen");
    assert_eq!(late.class, Class::Future { generation: 2 });
    // The failed generation is used up: the next write has another, so that it cannot pass for it.
    let mut newer = [0; SECTOR];
    let ticket = shadow.begin_write(2, range, &mut newer);
    assert_ne!(new, newer);
    shadow.finish(ticket, Outcome::Done);
    assert_eq!(shadow.expected(FIRST).allowed, [Content::Written(3)]);
}

#[test]
fn unknown_contents_are_counted_apart() {
    let mut shadow = shadow(false);
    let verified = shadow.verify(SectorRange::new(FIRST, 2), &[7; 1024]).expect("anything goes");
    assert_eq!((verified.bytes, verified.unknown_bytes), (0, 1024));
    let ticket = shadow.begin_discard(0, SectorRange::new(FIRST, 1), DiscardPromise::Zeroes);
    shadow.finish(ticket, Outcome::Done);
    assert!(shadow.verify(SectorRange::new(FIRST, 2), &[7; 1024]).is_err());
}

#[test]
#[should_panic(expected = "free of operations in flight")]
fn overlapping_changes_are_refused() {
    let mut shadow = shadow(true);
    let _first = shadow.begin_write_zeroes(0, SectorRange::new(FIRST, 4));
    let _second = shadow.begin_read(1, SectorRange::new(FIRST + 3, 1));
}
