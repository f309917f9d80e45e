//! The confusion matrix is in [`crate::confusion`]; here is what it does not draw.

use super::*;
use crate::sector::{GENERATION_MAX, SECTOR, WORDS, next_generation, previous_generation};

const DEVICE_SECTORS: u64 = 1 << 20;
const LBA: u64 = 4096;
const BLOCK_SECTORS: usize = 8;

fn pattern() -> Pattern {
    Pattern::new(3, 1)
}

fn sector(lba: u64, generation: Generation) -> [u8; SECTOR] {
    let mut sector = [0; SECTOR];
    pattern().fill_sector(&mut sector, lba, generation);
    sector
}

fn noise(index: u64) -> [u8; SECTOR] {
    let mut sector = [0; SECTOR];
    Seed::new(9).derive("noise", index).rng().fill(&mut sector);
    sector
}

fn expect(allowed: &[Content], previous: Option<Content>, newest: Generation) -> Expected {
    Expected { allowed: allowed.to_vec(), previous, newest }
}

fn name(got: &[u8; SECTOR], expected: &Expected) -> Class {
    let pattern = pattern();
    Classifier { pattern: &pattern, foreign: &[], device_sectors: DEVICE_SECTORS }.classify(got, LBA, expected)
}

fn name_block(got: &[u8], expected: &Expected) -> (u64, Class) {
    let pattern = pattern();
    Classifier { pattern: &pattern, foreign: &[], device_sectors: DEVICE_SECTORS }.classify_block(got, LBA, expected)
}

/// A block of generation 9.
fn block() -> Vec<u8> {
    block_of(|_| Content::Written(9))
}

fn block_of(content_of: impl Fn(usize) -> Content) -> Vec<u8> {
    let sector_of = |at: usize| match content_of(at) {
        Content::Zero => [0; SECTOR],
        Content::Written(generation) => sector(LBA + at as u64, generation),
        Content::Unknown => noise(at as u64),
    };
    (0..BLOCK_SECTORS).flat_map(sector_of).collect()
}

fn settled() -> Expected {
    expect(&[Content::Written(9)], Some(Content::Written(8)), 9)
}

#[test]
fn any_allowed_content_is_good() {
    let expected = expect(&[Content::Zero, Content::Written(7), Content::Written(8)], None, 8);
    for got in [[0; SECTOR], sector(LBA, 7), sector(LBA, 8)] {
        assert_eq!(name(&got, &expected), Class::Good);
    }
    assert_eq!(name(&sector(LBA, 9), &expected), Class::Future { generation: 9 });
    let unknown = expect(&[Content::Unknown], None, 8);
    assert_eq!(name(&noise(0), &unknown), Class::Good);
    assert_eq!(name_block(&block_of(|_| Content::Unknown), &unknown), (0, Class::Good));
}

/// A discarded sector that comes back, and a sector that was never written but holds something of its own.
#[test]
fn a_zeroed_sector_may_not_come_back() {
    let zeroed = expect(&[Content::Zero], Some(Content::Written(5)), 5);
    assert_eq!(name(&sector(LBA, 5), &zeroed), Class::Lost { found: Content::Written(5) });
    assert_eq!(name(&sector(LBA, 4), &zeroed), Class::Stale { generation: 4 });
    assert_eq!(name(&sector(LBA, 6), &zeroed), Class::Future { generation: 6 });
    let untouched = expect(&[Content::Zero], None, 0);
    for generation in [1, GENERATION_MAX] {
        assert_eq!(name(&sector(LBA, generation), &untouched), Class::Future { generation });
    }
}

#[test]
fn the_wrap_is_no_border() {
    for newest in [1, 2, GENERATION_MAX - 1, GENERATION_MAX] {
        let previous = previous_generation(newest);
        let expected = expect(&[Content::Written(newest)], Some(Content::Written(previous)), newest);
        let doubtful = expect(&[Content::Written(previous), Content::Written(newest)], None, newest);
        let (older, newer) = (previous_generation(previous), next_generation(newest));
        assert_eq!(name(&sector(LBA, previous), &expected), Class::Lost { found: Content::Written(previous) });
        assert_eq!(name(&sector(LBA, previous), &doubtful), Class::Good);
        for expected in [&expected, &doubtful] {
            assert_eq!(name(&sector(LBA, older), expected), Class::Stale { generation: older });
            assert_eq!(name(&sector(LBA, newer), expected), Class::Future { generation: newer });
        }
    }
}

/// Seven eighths of each sector are one word, which fits at 57 distances.
#[test]
fn a_compressible_sector_is_told_from_a_shifted_one() {
    let pattern = Pattern::with_compressibility(3, 1, 90);
    let mut stream = vec![0; SECTOR * 3];
    pattern.fill(&mut stream, LBA - 1, |_| 9);
    let classifier = Classifier { pattern: &pattern, foreign: &[], device_sectors: DEVICE_SECTORS };
    for by_bytes in (-511_i64..=511).filter(|by| *by != 0) {
        let got = stream[(SECTOR as i64 - by_bytes) as usize..].first_chunk().expect("a sector");
        assert_eq!(classifier.classify(got, LBA, &settled()), Class::Shifted { by_bytes });
    }
    let mut got: [u8; SECTOR] = *stream[SECTOR..].first_chunk().expect("a sector");
    got[300..308].fill(7);
    let partial = Class::Partial { good_words: 62, readable_words: 62 };
    assert_eq!(classifier.classify(&got, LBA, &settled()), partial);
}

#[test]
fn a_block_of_one_content_is_named_as_its_sectors_are() {
    assert_eq!(name_block(&block(), &settled()), (0, Class::Good));
    let doubtful = expect(&[Content::Written(8), Content::Written(9)], None, 9);
    for (content, class) in [
        (Content::Written(8), Class::Lost { found: Content::Written(8) }),
        (Content::Written(7), Class::Stale { generation: 7 }),
        (Content::Written(10), Class::Future { generation: 10 }),
        (Content::Zero, Class::Zero),
    ] {
        assert_eq!(name_block(&block_of(|_| content), &settled()), (0, class));
    }
    assert_eq!(name_block(&block_of(|_| Content::Written(8)), &doubtful), (0, Class::Good));
    assert_eq!(name_block(&[], &settled()), (0, Class::Good));
    // A block of one sector is a sector.
    assert_eq!(name_block(&sector(LBA, 8), &settled()), (0, name(&sector(LBA, 8), &settled())));
}

/// Each sector may be as it is, but not beside the others.
#[test]
fn a_block_of_two_contents_is_torn() {
    let allowed = [Content::Zero, Content::Written(8), Content::Written(9)];
    let doubtful = expect(&allowed, None, 9);
    let source = |content| match content {
        Content::Written(generation) => Source::Written(generation),
        _ => Source::Zero,
    };
    for cut in 1..BLOCK_SECTORS {
        for before in [Content::Zero, Content::Written(5), Content::Written(8), Content::Written(10)] {
            let after = Content::Written(9);
            for (before, after) in [(before, after), (after, before)] {
                let got = block_of(|at| if at < cut { before } else { after });
                let at_word = (cut * WORDS) as u32;
                let torn = Class::Torn { at_word, before: source(before), after: source(after) };
                assert_eq!(name_block(&got, &doubtful), (cut as u64, torn.clone()));
                assert_eq!(name_block(&got, &settled()), (cut as u64, torn));
            }
        }
    }
}

#[test]
fn a_block_is_torn_within_a_sector_or_more_than_once() {
    let (before, after) = (Source::Written(9), Source::Written(8));
    let old = block_of(|_| Content::Written(8));
    for cut in 1..BLOCK_SECTORS * WORDS {
        let mut got = block();
        got[cut * 8..].copy_from_slice(&old[cut * 8..]);
        let torn = Class::Torn { at_word: cut as u32, before, after };
        assert_eq!(name_block(&got, &settled()), ((cut / WORDS) as u64, torn));
    }
    // One sector in the middle was left out.
    let got = block_of(|at| Content::Written(if at == 3 { 8 } else { 9 }));
    assert_eq!(name_block(&got, &settled()), (3, Class::Torn { at_word: 192, before, after }));
    // Torn within sector 3, and again where sector 5 begins.
    let mut got = block();
    got[200 * 8..320 * 8].copy_from_slice(&old[200 * 8..320 * 8]);
    assert_eq!(name_block(&got, &settled()), (3, Class::Torn { at_word: 200, before, after }));
    // Two cuts in one sector are no tear.
    let mut got = block();
    got[200 * 8..210 * 8].copy_from_slice(&old[200 * 8..210 * 8]);
    assert_eq!(name_block(&got, &settled()), (3, Class::Partial { good_words: 54, readable_words: 64 }));
}

#[test]
fn the_most_telling_sector_speaks_for_its_block() {
    let mut got = block_of(|at| Content::Written(if at == 1 { 8 } else { 9 }));
    got[5 * SECTOR..6 * SECTOR].copy_from_slice(&sector(77, 2));
    assert_eq!(name_block(&got, &settled()), (5, Class::Misdirected { from: 77, generation: 2 }));
    let mut got = block();
    got[6 * SECTOR] ^= 4;
    got[7 * SECTOR..].copy_from_slice(&noise(1));
    assert_eq!(name_block(&got, &settled()), (6, Class::BitFlip { bits: vec![2] }));
    let mut got = block_of(|_| Content::Written(8));
    got[2 * SECTOR..3 * SECTOR].copy_from_slice(&noise(1));
    assert_eq!(name_block(&got, &settled()), (2, Class::Garbage));
}

#[test]
fn every_class_has_a_line_and_survives_json() {
    let origin = Origin { lba: 3, generation: 4 };
    let source = Source::Written(4);
    for class in [
        Class::Good,
        Class::Lost { found: Content::Zero },
        Class::Stale { generation: 4 },
        Class::Future { generation: 4 },
        Class::Misdirected { from: 3, generation: 4 },
        Class::Torn { at_word: 5, before: source, after: Source::Elsewhere(origin) },
        Class::Shifted { by_bytes: -12 },
        Class::BitFlip { bits: vec![9, 4095] },
        Class::Zero,
        Class::ForeignDevice { device: 2, origin },
        Class::ForeignRun { seed: Seed::new(7), origin },
        Class::Partial { good_words: 5, readable_words: 6 },
        Class::Garbage,
    ] {
        let line = class.to_string();
        assert!(line.starts_with(&class.name().replace('_', " ")) && !line.contains('\n'), "{line}");
        let json = serde_json::to_string(&class).expect("a class is plain data");
        assert!(json.starts_with(&format!("{{\"class\":\"{}\"", class.name())), "{json}");
        assert_eq!(serde_json::from_str::<Class>(&json).ok(), Some(class));
    }
}
