//! The classifier: names any sector and any block, whatever is expected of it.

use ublkit_harness::classify::{Class, Classifier, Content, Expected};
use ublkit_harness::sector::{GENERATION_MAX, LBA_LIMIT};
use ublkit_harness::{Generation, Pattern, SECTOR};

use super::round_trips;
use crate::Input;

const BLOCK_SECTORS: usize = 8;

pub(super) fn run(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let percent = input.byte();
    let [pattern, other_device, other_run] =
        [(1, 1), (1, 2), (2, 1)].map(|(seed, device)| Pattern::with_compressibility(seed, device, percent));
    let foreign = [other_device, other_run];
    let classifier = Classifier { pattern: &pattern, foreign: &foreign, device_sectors: input.u64() };
    let lba = input.u64();
    let expected = Expected {
        allowed: (0..input.byte() % 4).map(|_| content(&mut input)).collect(),
        previous: input.flag().then(|| content(&mut input)),
        newest: input.u64() as Generation,
    };
    for &content in &expected.allowed {
        a_right_one_is_good(&classifier, lba, &expected, content);
    }
    let got = block(&mut input, &classifier, lba);
    let sector = got.first_chunk::<SECTOR>().expect("a block has a sector");
    let class = classifier.classify(sector, lba, &expected);
    assert_eq!(classifier.classify(sector, lba, &expected), class, "the same bytes have the same name");
    assert_eq!(classifier.classify_block(sector, lba, &expected), (0, class.clone()), "a block of one sector");
    round_trips(&class);
    round_trips(&expected);
    assert!(!class.to_string().is_empty() && !expected.to_string().contains('\n'));

    let (at, of_block) = classifier.classify_block(&got, lba, &expected);
    assert!((at as usize) < BLOCK_SECTORS);
    assert!(of_block != Class::Good || class == Class::Good, "a good block of bad sectors");
    if let Class::Torn { at_word, .. } = of_block {
        assert_eq!(u64::from(at_word) / 64, at);
    }
}

fn a_right_one_is_good(classifier: &Classifier, lba: u64, expected: &Expected, content: Content) {
    let mut right = [0; SECTOR * BLOCK_SECTORS];
    if let Content::Written(generation) = content {
        // Beyond what a sector can name, nothing is promised.
        if lba > LBA_LIMIT - BLOCK_SECTORS as u64 || !(1..=GENERATION_MAX).contains(&generation) {
            return;
        }
        classifier.pattern.fill(&mut right, lba, |_| generation);
    }
    let sector = right.first_chunk().expect("a block has a sector");
    assert_eq!(classifier.classify(sector, lba, expected), Class::Good);
    assert_eq!(classifier.classify_block(&right, lba, expected), (0, Class::Good));
}

fn content(input: &mut Input) -> Content {
    match input.byte() % 8 {
        0 => Content::Unknown,
        1 | 2 => Content::Zero,
        _ => Content::Written(input.u64() as Generation),
    }
}

/// Pieces of real sectors and of nothing in particular.
fn block(input: &mut Input, classifier: &Classifier, lba: u64) -> [u8; SECTOR * BLOCK_SECTORS] {
    let mut block = [0; SECTOR * BLOCK_SECTORS];
    let patterns = [classifier.pattern, &classifier.foreign[0], &classifier.foreign[1]];
    for _ in 0..input.byte() % 6 {
        let pattern = patterns[usize::from(input.byte()) % 3];
        let from = if input.flag() { lba } else { input.u64() };
        let generation = input.u64() as Generation & GENERATION_MAX;
        let mut source = [0; SECTOR * BLOCK_SECTORS];
        if from < LBA_LIMIT {
            pattern.fill(&mut source, from, |_| generation);
        }
        let begin = input.u32() as usize % block.len();
        let length = input.u32() as usize % (block.len() - begin) + 1;
        let shift = if input.flag() { 0 } else { usize::from(input.byte()) };
        let length = length.min(source.len() - begin - shift.min(source.len() - begin));
        block[begin..begin + length].copy_from_slice(&source[begin + shift.min(source.len() - begin)..][..length]);
    }
    let begin = input.u32() as usize % block.len();
    let rest = input.rest();
    block[begin..].iter_mut().zip(rest).for_each(|(byte, noise)| *byte ^= noise);
    block
}
