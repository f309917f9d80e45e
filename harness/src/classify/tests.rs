//! The confusion matrix: instances of each class, drawn at random, and the name each is given.

use std::collections::BTreeMap;

use super::*;
use crate::sector::{GENERATION_MAX, SECTOR, WORDS, next_generation, previous_generation};
use crate::seed::SeededRng;

const INSTANCES: u64 = 250;

struct World {
    pattern: Pattern,
    foreign: Vec<Pattern>,
    device_sectors: u64,
    lba: u64,
    /// The right generation; some of the time one that has wrapped.
    generation: Generation,
}

impl World {
    fn draw(rng: &mut SeededRng) -> Self {
        let seed = rng.next_u64();
        // From 32 KiB to 32 TiB, and the sector far enough from both ends for neighbours.
        let device_sectors = 64 << rng.below(31);
        let wrapped = rng.chance(1, 4);
        let generation = if wrapped { rng.within(1..=4) } else { rng.within(5..=100_000) };
        Self {
            pattern: Pattern::new(seed, 1),
            foreign: vec![Pattern::new(seed, 2), Pattern::new(rng.next_u64(), 1)],
            device_sectors,
            lba: rng.within(16..=device_sectors - 17),
            generation: generation as Generation,
        }
    }

    fn sector(&self, lba: u64, generation: Generation) -> [u8; SECTOR] {
        let mut sector = [0; SECTOR];
        self.pattern.fill_sector(&mut sector, lba, generation);
        sector
    }

    fn right(&self) -> [u8; SECTOR] {
        self.sector(self.lba, self.generation)
    }

    fn older(&self, by: u64) -> Generation {
        (0..by).fold(self.generation, |generation, _| previous_generation(generation))
    }

    fn expected(&self) -> Expected {
        Expected {
            allowed: vec![Content::Written(self.generation)],
            previous: Some(Content::Written(self.older(1))),
            newest: self.generation,
        }
    }

    fn name(&self, got: &[u8; SECTOR], expected: &Expected) -> Class {
        let Self { pattern, foreign, device_sectors, .. } = self;
        Classifier { pattern, foreign, device_sectors: *device_sectors }.classify(got, self.lba, expected)
    }
}

fn noise(rng: &mut SeededRng) -> [u8; SECTOR] {
    let mut sector = [0; SECTOR];
    rng.fill(&mut sector);
    sector
}

fn splice(before: &[u8; SECTOR], after: &[u8; SECTOR], at_word: usize) -> [u8; SECTOR] {
    let mut sector = *before;
    sector[at_word * 8..].copy_from_slice(&after[at_word * 8..]);
    sector
}

/// An instance of the class of that name, what was expected there, and what it must be called.
fn instance(name: &str, world: &World, rng: &mut SeededRng) -> ([u8; SECTOR], Expected, Class) {
    let mut expected = world.expected();
    let other_sector = world.lba ^ (1 << rng.below(u64::from(world.device_sectors.ilog2())));
    let other_generation = rng.within(1..=u64::from(GENERATION_MAX)) as Generation;
    let (got, class) = match name {
        "good" => (world.right(), Class::Good),
        "lost" if rng.chance(1, 2) => {
            expected.previous = Some(Content::Zero);
            ([0; SECTOR], Class::Lost { found: Content::Zero })
        }
        "lost" => {
            let generation = world.older(1);
            (world.sector(world.lba, generation), Class::Lost { found: Content::Written(generation) })
        }
        "stale" => {
            let generation = world.older(rng.within(2..=1000));
            (world.sector(world.lba, generation), Class::Stale { generation })
        }
        "future" => {
            let generation = (0..rng.within(1..=1000)).fold(world.generation, |g, _| next_generation(g));
            (world.sector(world.lba, generation), Class::Future { generation })
        }
        "misdirected" => (
            world.sector(other_sector, other_generation),
            Class::Misdirected { from: other_sector, generation: other_generation },
        ),
        "torn" => {
            let at = rng.within(1..=63) as usize;
            let old = world.older(rng.within(1..=50));
            let sources = [(world.sector(world.lba, old), Source::Written(old)), ([0; SECTOR], Source::Zero)];
            let (old, old_source) = sources[usize::from(rng.chance(1, 3))];
            let new = Source::Written(world.generation);
            let at_word = at as u32;
            if rng.chance(1, 2) {
                (splice(&world.right(), &old, at), Class::Torn { at_word, before: new, after: old_source })
            } else {
                (splice(&old, &world.right(), at), Class::Torn { at_word, before: old_source, after: new })
            }
        }
        "shifted" => {
            // Three sectors in a row, seen from a window that is not at a sector.
            let by = rng.within(1..=31) as usize;
            let stream: Vec<u8> =
                (0..3).flat_map(|i| world.sector(world.lba - 1 + i, rng.within(1..=9) as Generation)).collect();
            let back = rng.chance(1, 2);
            let first = if back { SECTOR - by * 8 } else { SECTOR + by * 8 };
            let mut got = [0; SECTOR];
            got.copy_from_slice(&stream[first..first + SECTOR]);
            if back && rng.chance(1, 2) {
                // The first sector of a shifted buffer begins with whatever was there before.
                rng.fill(&mut got[..by * 8]);
            }
            (got, Class::Shifted { by_words: if back { by as i64 } else { -(by as i64) } })
        }
        "bit_flip" => {
            let mut bits: Vec<u32> = (0..rng.within(1..=7)).map(|_| rng.below(4096) as u32).collect();
            bits.sort_unstable();
            bits.dedup();
            let mut got = if rng.chance(1, 4) {
                expected.allowed = vec![Content::Zero];
                [0; SECTOR]
            } else {
                world.right()
            };
            for &bit in &bits {
                got[bit as usize / 8] ^= 1 << (bit % 8);
            }
            (got, Class::BitFlip { bits })
        }
        "zero" => ([0; SECTOR], Class::Zero),
        "foreign_device" | "foreign_run" => {
            let foreign = &world.foreign[usize::from(name == "foreign_run")];
            // It may come from any sector, of a device of any size.
            let lba = if rng.chance(1, 2) { world.lba } else { rng.below(crate::sector::LBA_LIMIT) };
            let origin = Origin { lba, generation: other_generation };
            let mut got = [0; SECTOR];
            foreign.fill_sector(&mut got, origin.lba, origin.generation);
            let class = if name == "foreign_run" {
                Class::ForeignRun { seed: foreign.seed(), origin }
            } else {
                Class::ForeignDevice { device: 2, origin }
            };
            (got, class)
        }
        "partial" => {
            let cut = rng.within(1..=63) as usize;
            let got = splice(&world.right(), &noise(rng), cut);
            (got, Class::Partial { good_words: cut as u32, readable_words: cut as u32 })
        }
        _ => (noise(rng), Class::Garbage),
    };
    (got, expected, class)
}

const NAMES: [&str; 13] = [
    "good",
    "lost",
    "stale",
    "future",
    "misdirected",
    "torn",
    "shifted",
    "bit_flip",
    "zero",
    "foreign_device",
    "foreign_run",
    "partial",
    "garbage",
];

#[test]
fn nothing_lies_off_the_diagonal() {
    let mut confused: BTreeMap<(&str, &str), u64> = BTreeMap::new();
    for name in NAMES {
        let mut rng = Seed::new(1).derive(name, 0).rng();
        for _ in 0..INSTANCES {
            let world = World::draw(&mut rng);
            let (got, expected, class) = instance(name, &world, &mut rng);
            let named = world.name(&got, &expected);
            if named != class {
                *confused.entry((name, named.name())).or_default() += 1;
                eprintln!("{name}: expected {class:?}, got {named:?} in {} sectors", world.device_sectors);
            }
        }
    }
    assert!(confused.is_empty(), "{confused:?}");
}

#[test]
fn any_allowed_content_is_good() {
    let mut rng = Seed::new(2).rng();
    let world = World::draw(&mut rng);
    let allowed = vec![Content::Zero, Content::Written(7), Content::Written(8)];
    let expected = Expected { allowed, previous: None, newest: 8 };
    for got in [[0; SECTOR], world.sector(world.lba, 7), world.sector(world.lba, 8)] {
        assert_eq!(world.name(&got, &expected), Class::Good);
    }
    let late = world.name(&world.sector(world.lba, 9), &expected);
    assert_eq!(late, Class::Future { generation: 9 });
    let unknown = Expected { allowed: vec![Content::Unknown], previous: None, newest: 8 };
    assert_eq!(world.name(&noise(&mut rng), &unknown), Class::Good);
}

/// A discarded sector that comes back, and a sector that was never written but holds something of its own.
#[test]
fn a_zeroed_sector_may_not_come_back() {
    let world = World::draw(&mut Seed::new(3).rng());
    let zeroed = Expected { allowed: vec![Content::Zero], previous: Some(Content::Written(5)), newest: 5 };
    let name = |generation| world.name(&world.sector(world.lba, generation), &zeroed);
    assert_eq!(name(5), Class::Lost { found: Content::Written(5) });
    assert_eq!(name(4), Class::Stale { generation: 4 });
    assert_eq!(name(6), Class::Future { generation: 6 });
}

#[test]
fn every_class_has_a_line_and_survives_json() {
    let mut rng = Seed::new(4).rng();
    for name in NAMES {
        let world = World::draw(&mut rng);
        let (_, _, class) = instance(name, &world, &mut rng);
        assert_eq!(class.name(), name);
        let line = class.to_string();
        assert!(line.starts_with(&name.replace('_', " ")) && !line.contains('\n'), "{line}");
        let json = serde_json::to_string(&class).expect("a class is plain data");
        assert!(json.starts_with(&format!("{{\"class\":\"{name}\"")), "{json}");
        assert_eq!(serde_json::from_str::<Class>(&json).ok(), Some(class));
    }
    assert_eq!(WORDS * 8, SECTOR);
}
