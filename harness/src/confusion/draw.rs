//! Instances of each class, drawn at random.

use super::Alike;
use crate::classify::{Class, Classifier, Content, Expected, Source};
use crate::sector::{GENERATION_MAX, Generation, LBA_LIMIT, Origin, Pattern, SECTOR, WORDS, previous_generation};
use crate::seed::SeededRng;

type Sector = [u8; SECTOR];

/// How far apart two generations may be for it to be clear which is the newer.
const CLEAR: u64 = GENERATION_MAX as u64 / 2 - 10;

/// Sectors on both sides of the one in question that a shift may bring into sight.
const AROUND: u64 = 12;

/// A device and one sector of it.
pub(super) struct World {
    pattern: Pattern,
    foreign: [Pattern; 2],
    pub(super) device_sectors: u64,
    pub(super) lba: u64,
    /// The newest generation; often one just before or after the wrap.
    newest: Generation,
}

/// Bytes of which it is known what happened to them.
pub(super) struct Instance {
    got: Sector,
    pub(super) expected: Expected,
    /// What they must be called.
    pub(super) class: Class,
    /// Why that is not the class that was drawn.
    pub(super) alike: Option<Alike>,
}

/// What a sector may hold, and how many generations before the newest the stale ones begin.
struct State {
    expected: Expected,
    stale_from: u64,
    /// How many generations after the newest the future ones begin.
    future_from: u64,
}

/// One part of a sector.
#[derive(Clone, Copy, PartialEq)]
enum Part {
    Here(Content),
    Elsewhere(Origin),
    Foreign(usize, Origin),
}

impl World {
    pub(super) fn draw(rng: &mut SeededRng, percent: u8) -> Self {
        let (run, other_run) = (rng.next_u64(), rng.next_u64());
        // From 32 KiB to 32 TiB.
        let device_sectors = 64 << rng.below(31);
        let newest = match rng.below(4) {
            0 => rng.within(1..=4),
            1 => u64::from(GENERATION_MAX) - rng.below(4),
            _ => rng.within(1..=u64::from(GENERATION_MAX)),
        };
        let pattern = |seed: u64, device| Pattern::with_compressibility(seed, device, percent);
        Self {
            pattern: pattern(run, 1),
            foreign: [pattern(run, 2), pattern(other_run, 1)],
            device_sectors,
            lba: rng.within(AROUND..=device_sectors - AROUND - 1),
            newest: newest as Generation,
        }
    }

    pub(super) fn name(&self, instance: &Instance) -> Class {
        let Self { pattern, foreign, device_sectors, lba, .. } = self;
        let classifier = Classifier { pattern, foreign, device_sectors: *device_sectors };
        classifier.classify(&instance.got, *lba, &instance.expected)
    }

    /// An instance of the class of that name.
    pub(super) fn instance(&self, class: &str, rng: &mut SeededRng) -> Instance {
        match class {
            "good" => self.good(rng),
            "lost" => self.lost(rng),
            "stale" => self.stale(rng),
            "future" => self.future(rng),
            "misdirected" => self.misdirected(rng),
            "torn" => self.torn(rng),
            "shifted" => self.shifted(rng),
            "bit_flip" => self.bit_flip(rng),
            "zero" => self.zero(rng),
            "foreign_device" => self.foreign(0, rng),
            "foreign_run" => self.foreign(1, rng),
            "partial" => self.partial(rng),
            _ => self.garbage(rng),
        }
    }

    fn good(&self, rng: &mut SeededRng) -> Instance {
        let State { mut expected, .. } = self.state(rng);
        if rng.chance(1, 10) {
            expected.allowed.push(Content::Unknown);
            return as_drawn(noise(rng), expected, Class::Good);
        }
        let content = self.allowed(&expected, rng);
        as_drawn(self.content(content), expected, Class::Good)
    }

    fn lost(&self, rng: &mut SeededRng) -> Instance {
        let previous = Content::Written(self.before(1));
        let mut found = if rng.chance(1, 2) { previous } else { Content::Zero };
        let replaced = (!rng.chance(1, 5)).then_some(found);
        let mut expected = self.only(Content::Written(self.newest), replaced);
        let mut class = match (replaced, found) {
            (Some(found), _) => Class::Lost { found },
            (None, Content::Written(generation)) => Class::Stale { generation },
            (None, _) => Class::Zero,
        };
        // A zeroing can be lost as well as a write.
        if replaced == Some(previous) && rng.chance(1, 2) {
            found = Content::Written(self.newest);
            expected = self.only(Content::Zero, Some(found));
            class = Class::Lost { found };
        }
        let alike = replaced.is_none().then_some(Alike::ReplacedIsUnknown);
        Instance { got: self.content(found), expected, class, alike }
    }

    fn stale(&self, rng: &mut SeededRng) -> Instance {
        let State { expected, stale_from, .. } = self.state(rng);
        let (by, alike) = match rng.below(20) {
            0 => (rng.within(CLEAR + 20..=u64::from(GENERATION_MAX) - 20), Some(Alike::OtherWayRound)),
            1 if self.may_be_newest(&expected) => (u64::from(GENERATION_MAX), Some(Alike::AllTheWayRound)),
            _ => (distance(stale_from, rng), None),
        };
        let generation = self.before(by);
        let class = match alike {
            None => Class::Stale { generation },
            Some(Alike::AllTheWayRound) => Class::Good,
            Some(_) => Class::Future { generation },
        };
        Instance { got: self.written(self.lba, generation), expected, class, alike }
    }

    fn future(&self, rng: &mut SeededRng) -> Instance {
        let State { expected, future_from, .. } = self.state(rng);
        let (by, alike) = match rng.below(20) {
            0 => (rng.within(CLEAR + 20..=u64::from(GENERATION_MAX) - 20), Some(Alike::OtherWayRound)),
            1 if self.may_be_newest(&expected) => (u64::from(GENERATION_MAX), Some(Alike::AllTheWayRound)),
            _ => (distance(future_from, rng), None),
        };
        let generation = self.before(u64::from(GENERATION_MAX) - by);
        let class = match alike {
            None => Class::Future { generation },
            Some(Alike::AllTheWayRound) => Class::Good,
            Some(_) => Class::Stale { generation },
        };
        Instance { got: self.written(self.lba, generation), expected, class, alike }
    }

    fn misdirected(&self, rng: &mut SeededRng) -> Instance {
        let State { expected, .. } = self.state(rng);
        let origin = self.elsewhere(rng);
        let class = Class::Misdirected { from: origin.lba, generation: origin.generation };
        as_drawn(self.written(origin.lba, origin.generation), expected, class)
    }

    fn torn(&self, rng: &mut SeededRng) -> Instance {
        let State { expected, .. } = self.state(rng);
        let before = self.part(rng);
        let after = std::iter::repeat_with(|| self.part(rng)).find(|part| *part != before).unwrap_or(before);
        let at = rng.within(1..=WORDS as u64 - 1) as usize;
        let got = splice(&self.bytes(before), &self.bytes(after), at);
        let cheap = self.pattern.cheap_words();
        let sizes = [(before, 0, at), (after, at, WORDS)];
        // Two parts of the same sector and of different generations are at the same distance, and vouch for each other.
        let vouched = before.place(self) == after.place(self);
        let doubtful = |part: Part, from: usize, to: usize| match part {
            Part::Here(_) => None,
            _ if vouched => None,
            _ if to - from == 1 => Some(Alike::OneWord),
            _ if to <= cheap => Some(Alike::OneWordRepeated),
            _ => None,
        };
        let mut unreadable = 0;
        let mut alike = None;
        for (part, from, to) in sizes {
            if let Some(reason) = doubtful(part, from, to) {
                unreadable += to - from;
                alike = Some(reason);
            }
        }
        let class = if alike.is_some() {
            let right = sizes
                .iter()
                .filter(|(part, ..)| matches!(part, Part::Here(content) if expected.allowed.contains(content)));
            let good_words = right.map(|(_, from, to)| (to - from) as u32).sum();
            let named = sizes.iter().any(|(part, from, to)| part.is_named() && doubtful(*part, *from, *to).is_none());
            if good_words > 0 || named {
                Class::Partial { good_words, readable_words: (WORDS - unreadable) as u32 }
            } else {
                Class::Garbage
            }
        } else {
            Class::Torn { at_word: at as u32, before: before.source(), after: after.source() }
        };
        Instance { got, expected, class, alike }
    }

    fn shifted(&self, rng: &mut SeededRng) -> Instance {
        let State { expected, .. } = self.state(rng);
        let first = self.lba - AROUND;
        let generations: Vec<Generation> = (0..=2 * AROUND).map(|_| generation(rng)).collect();
        let stream: Vec<u8> = (first..).zip(&generations).flat_map(|(lba, g)| self.written(lba, *g)).collect();
        let most = if rng.chance(1, 2) { SECTOR } else { SECTOR * (AROUND as usize - 1) };
        let mut by = rng.within(1..=most as u64) as i64;
        if rng.chance(1, 2) {
            by = (by / 8).max(1) * 8;
        } else if rng.chance(1, 10) {
            by = (by / SECTOR as i64).max(1) * SECTOR as i64;
        }
        if rng.chance(1, 2) {
            by = -by;
        }
        let begin = (AROUND as i64 * SECTOR as i64 - by) as usize;
        let mut got = [0; SECTOR];
        got.copy_from_slice(&stream[begin..begin + SECTOR]);
        if by % SECTOR as i64 == 0 {
            let from = self.lba.wrapping_add_signed(-by / SECTOR as i64);
            let class = Class::Misdirected { from, generation: generations[(from - first) as usize] };
            return Instance { got, expected, class, alike: Some(Alike::WholeSectors) };
        }
        // The first sector of a shifted buffer begins with whatever was there before, and the last one ends with it.
        if by.unsigned_abs() <= 240 && rng.chance(1, 2) {
            let gap = by.unsigned_abs() as usize;
            rng.fill(if by > 0 { &mut got[..gap] } else { &mut got[SECTOR - gap..] });
        }
        as_drawn(got, expected, Class::Shifted { by_bytes: by })
    }

    fn bit_flip(&self, rng: &mut SeededRng) -> Instance {
        let State { expected, .. } = self.state(rng);
        let mut got = self.content(self.allowed(&expected, rng));
        let count = rng.within(1..=7);
        let bits = flip(&mut got, count, rng);
        as_drawn(got, expected, Class::BitFlip { bits })
    }

    fn zero(&self, rng: &mut SeededRng) -> Instance {
        let State { mut expected, .. } = self.state(rng);
        expected.allowed.retain(|content| *content != Content::Zero);
        if expected.allowed.is_empty() {
            expected.allowed.push(Content::Written(self.newest));
        }
        if expected.previous == Some(Content::Zero) {
            let class = Class::Lost { found: Content::Zero };
            return Instance { got: [0; SECTOR], expected, class, alike: Some(Alike::ReplacedZeroes) };
        }
        as_drawn([0; SECTOR], expected, Class::Zero)
    }

    fn foreign(&self, which: usize, rng: &mut SeededRng) -> Instance {
        let State { expected, .. } = self.state(rng);
        let origin = self.abroad(rng);
        let foreign = &self.foreign[which];
        let class = if which == 0 {
            Class::ForeignDevice { device: foreign.device(), origin }
        } else {
            Class::ForeignRun { seed: foreign.seed(), origin }
        };
        as_drawn(self.bytes(Part::Foreign(which, origin)), expected, class)
    }

    fn partial(&self, rng: &mut SeededRng) -> Instance {
        let State { expected, .. } = self.state(rng);
        // Each word is of a content of this sector, or of none.
        let mut words: [Option<Content>; WORDS] = [None; WORDS];
        let mut got = noise(rng);
        match rng.below(4) {
            0 => {
                let (cut, content) = (rng.within(1..=WORDS as u64 - 1) as usize, self.written_before(rng));
                words[..cut].fill(Some(content));
            }
            1 => {
                let content = self.written_before(rng);
                words.fill(Some(content));
                for _ in 0..rng.within(1..=40) {
                    // Not at an end: a cut there is a tear when the noise is a zero or an old word, and it is neither.
                    words[below(rng, WORDS)] = None;
                }
            }
            2 => {
                // Three pieces.
                let first = rng.within(1..=WORDS as u64 - 2) as usize;
                let second = rng.within(first as u64 + 1..=WORDS as u64 - 1) as usize;
                let newest = Content::Written(self.newest);
                let between = if rng.chance(1, 2) { Content::Zero } else { Content::Written(self.before(1)) };
                words[..first].fill(Some(newest));
                words[first..second].fill(Some(between));
                words[second..].fill(Some(if rng.chance(1, 2) { newest } else { Content::Written(self.before(2)) }));
            }
            _ => {
                // More bits than are called flipped.
                let written: Vec<Content> =
                    expected.allowed.iter().copied().filter(|content| *content != Content::Zero).collect();
                let content = rng.pick(&written).copied().unwrap_or(Content::Written(self.newest));
                got = self.content(content);
                words.fill(Some(content));
                // The same bit in two words would make both of them words of one other sector, if the device has it.
                let mut bits: [u64; 64] = std::array::from_fn(|bit| bit as u64);
                for i in 0..rng.within(8..=60) {
                    bits.swap(i as usize, rng.within(i..=63) as usize);
                    let word = below(rng, WORDS);
                    got[word * 8 + bits[i as usize] as usize / 8] ^= 1 << (bits[i as usize] % 8);
                    words[word] = None;
                }
                return Self::partial_of(got, expected, &words);
            }
        }
        for (i, content) in words.iter().enumerate() {
            if let Some(content) = content {
                got[i * 8..][..8].copy_from_slice(&self.content(*content)[i * 8..][..8]);
            }
        }
        Self::partial_of(got, expected, &words)
    }

    #[expect(clippy::large_types_passed_by_value, reason = "it is kept")]
    fn partial_of(got: Sector, expected: Expected, words: &[Option<Content>; WORDS]) -> Instance {
        let readable = words.iter().flatten();
        let good_words = readable.clone().filter(|content| expected.allowed.contains(content)).count() as u32;
        let class = Class::Partial { good_words, readable_words: readable.count() as u32 };
        as_drawn(got, expected, class)
    }

    fn garbage(&self, rng: &mut SeededRng) -> Instance {
        let State { expected, .. } = self.state(rng);
        let mut got = noise(rng);
        match rng.below(4) {
            0 => {
                // Poison, as allocators and drivers write it.
                let values =
                    [0x5a5a_5a5a_5a5a_5a5a, 0xdead_beef_dead_beef, u64::MAX, 0x6b6b_6b6b_6b6b_6ba5, rng.next_u64()];
                let value = values[below(rng, 5)];
                got.as_chunks_mut().0.fill(value.to_le_bytes());
            }
            1 => got.iter_mut().for_each(|byte| *byte = b' ' + *byte % 95),
            2 if !expected.allowed.contains(&Content::Zero) => {
                // A table of somebody's, mostly empty.
                let kept = below(rng, WORDS);
                got.as_chunks_mut::<8>()
                    .0
                    .iter_mut()
                    .enumerate()
                    .filter(|(i, _)| *i != kept && i % 5 != 0)
                    .for_each(|(_, word)| word.fill(0));
            }
            _ => {}
        }
        as_drawn(got, expected, Class::Garbage)
    }

    fn state(&self, rng: &mut SeededRng) -> State {
        let [newest, one, two] = [0, 1, 2].map(|by| Content::Written(self.before(by)));
        let of = |allowed: &[Content], previous: Option<Content>, stale_from: u64| State {
            expected: Expected { allowed: allowed.to_vec(), previous, newest: self.newest },
            stale_from,
            future_from: 1,
        };
        match rng.below(11) {
            0 | 1 => of(&[newest], Some(one), 2),
            2 => of(&[newest], Some(Content::Zero), 1),
            3 => of(&[newest], None, 1),
            4 => of(&[one, newest], None, 2),
            5 => of(&[Content::Zero, newest], None, 1),
            6 => of(&[two, one, newest], None, 3),
            7 => of(&[Content::Zero], Some(newest), 1),
            8 => of(&[Content::Zero], None, 0),
            9 => of(&[newest, Content::Zero, one], Some(two), 3),
            // The newest was written by an operation that failed, and is known not to have taken effect.
            _ => State { future_from: 0, ..of(&[one], None, 2) },
        }
    }

    fn only(&self, allowed: Content, previous: Option<Content>) -> Expected {
        Expected { allowed: vec![allowed], previous, newest: self.newest }
    }

    fn may_be_newest(&self, expected: &Expected) -> bool {
        expected.allowed.contains(&Content::Written(self.newest))
    }

    fn allowed(&self, expected: &Expected, rng: &mut SeededRng) -> Content {
        rng.pick(&expected.allowed).copied().unwrap_or(Content::Written(self.newest))
    }

    /// The newest or one of the few before it.
    fn written_before(&self, rng: &mut SeededRng) -> Content {
        Content::Written(self.before(rng.below(4)))
    }

    /// The generation `by` before the newest.
    fn before(&self, by: u64) -> Generation {
        let most = u64::from(GENERATION_MAX);
        let generation = ((u64::from(self.newest) - 1 + most - by % most) % most + 1) as Generation;
        debug_assert!(by != 1 || generation == previous_generation(self.newest), "the long way is the short way");
        generation
    }

    /// Another sector of the device: any, or one whose number differs by a bit.
    fn elsewhere(&self, rng: &mut SeededRng) -> Origin {
        let lba = match rng.below(self.device_sectors) {
            lba if lba != self.lba && rng.chance(1, 2) => lba,
            _ => self.lba ^ 1 << rng.below(u64::from(self.device_sectors.ilog2())),
        };
        Origin { lba, generation: generation(rng) }
    }

    /// A sector of a device of any size.
    fn abroad(&self, rng: &mut SeededRng) -> Origin {
        let lba = if rng.chance(1, 2) { self.lba } else { rng.below(LBA_LIMIT) };
        Origin { lba, generation: generation(rng) }
    }

    fn part(&self, rng: &mut SeededRng) -> Part {
        match rng.below(8) {
            0 => Part::Here(Content::Zero),
            1..=4 => Part::Here(Content::Written(self.before(distance(0, rng)))),
            5 => Part::Elsewhere(Origin { lba: self.lba ^ 1, generation: generation(rng) }),
            6 => Part::Elsewhere(self.elsewhere(rng)),
            _ => Part::Foreign(below(rng, 2), self.abroad(rng)),
        }
    }

    fn bytes(&self, part: Part) -> Sector {
        match part {
            Part::Here(content) => self.content(content),
            Part::Elsewhere(origin) => self.written(origin.lba, origin.generation),
            Part::Foreign(which, origin) => {
                let mut sector = [0; SECTOR];
                self.foreign[which].fill_sector(&mut sector, origin.lba, origin.generation);
                sector
            }
        }
    }

    fn content(&self, content: Content) -> Sector {
        match content {
            Content::Written(generation) => self.written(self.lba, generation),
            Content::Zero | Content::Unknown => [0; SECTOR],
        }
    }

    fn written(&self, lba: u64, generation: Generation) -> Sector {
        let mut sector = [0; SECTOR];
        self.pattern.fill_sector(&mut sector, lba, generation);
        sector
    }
}

impl Part {
    fn source(self) -> Source {
        match self {
            Self::Here(Content::Written(generation)) => Source::Written(generation),
            Self::Here(_) => Source::Zero,
            Self::Elsewhere(origin) => Source::Elsewhere(origin),
            Self::Foreign(_, origin) => Source::Foreign(origin),
        }
    }

    fn is_named(self) -> bool {
        self.source() != Source::Zero
    }

    /// Which pattern's, and which sector.
    fn place(self, world: &World) -> (usize, u64) {
        match self {
            Self::Here(_) => (0, world.lba),
            Self::Elsewhere(origin) => (0, origin.lba),
            Self::Foreign(which, origin) => (1 + which, origin.lba),
        }
    }
}

#[expect(clippy::large_types_passed_by_value, reason = "it is kept")]
fn as_drawn(got: Sector, expected: Expected, class: Class) -> Instance {
    Instance { got, expected, class, alike: None }
}

fn below(rng: &mut SeededRng, bound: usize) -> usize {
    rng.below(bound as u64) as usize
}

fn generation(rng: &mut SeededRng) -> Generation {
    rng.within(1..=u64::from(GENERATION_MAX)) as Generation
}

/// From `least` on, small ones as often as large ones, and clear which way.
fn distance(least: u64, rng: &mut SeededRng) -> u64 {
    let most = 1 << rng.below(23);
    rng.within(least..=least + most).min(CLEAR)
}

fn noise(rng: &mut SeededRng) -> Sector {
    let mut sector = [0; SECTOR];
    rng.fill(&mut sector);
    sector
}

fn splice(before: &Sector, after: &Sector, at_word: usize) -> Sector {
    let mut sector = *before;
    sector[at_word * 8..].copy_from_slice(&after[at_word * 8..]);
    sector
}

/// Flips `count` bits, or a few less; returns which, in order.
fn flip(sector: &mut Sector, count: u64, rng: &mut SeededRng) -> Vec<u32> {
    let mut bits: Vec<u32> = (0..count).map(|_| rng.below(SECTOR as u64 * 8) as u32).collect();
    bits.sort_unstable();
    bits.dedup();
    for &bit in &bits {
        sector[bit as usize / 8] ^= 1 << (bit % 8);
    }
    bits
}
