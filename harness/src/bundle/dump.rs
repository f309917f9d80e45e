//! The words of a wrong sector beside those that should be there.

use crate::classify::Content;
use crate::mismatch::Mismatch;
use crate::sector::{Pattern, SECTOR, TABLE_SECTORS, TABLE_WORDS, WORDS};

/// A word with no more wrong bits than this is right but for these.
const FLIPPED_BITS_MAX: u32 = 7;

/// How many lines there are at most.
const LINES: usize = 10;

/// Words next to each other that say the same of where they come from.
struct Run {
    first: usize,
    last: usize,
    found: u64,
    expected: u64,
    says: String,
}

/// What there is to see, or nothing where nothing was expected in particular.
pub(super) fn lines(mismatch: &Mismatch, pattern: &Pattern, device_sectors: u64) -> Vec<String> {
    let Some((content, runs)) = runs(mismatch, pattern, device_sectors) else { return Vec::new() };
    let hex = |word: u64| format!("{:016x}", word.swap_bytes());
    let head = format!("words    found             which is                         expected: {content}");
    let all = runs.len();
    let rows = runs.into_iter().take(LINES).map(|run| {
        let Run { first, last, found, expected, says } = run;
        let words = if first == last { first.to_string() } else { format!("{first}-{last}") };
        format!("{words:<8} {}  {says:<32} {}", hex(found), hex(expected))
    });
    let mut lines: Vec<String> = [head].into_iter().chain(rows).collect();
    if all > LINES {
        lines.push(format!("… and {} more like these", all - LINES));
    }
    lines
}

fn runs(mismatch: &Mismatch, pattern: &Pattern, device_sectors: u64) -> Option<(Content, Vec<Run>)> {
    let lba = mismatch.sector;
    let found = words(mismatch.got.bytes().first_chunk::<SECTOR>()?);
    let contents = mismatch.expected.allowed.iter().filter(|content| **content != Content::Unknown);
    // Of several that would be right, the nearest.
    let (content, expected) = contents
        .map(|content| (*content, words(&bytes(*content, lba, pattern))))
        .min_by_key(|(_, expected)| expected.iter().zip(&found).filter(|(a, b)| a != b).count())?;
    let mut runs: Vec<Run> = Vec::new();
    for at in (0..WORDS).filter(|at| found[*at] != expected[*at]) {
        let says = origin(found[at], expected[at], at, lba, pattern, device_sectors);
        match runs.last_mut() {
            Some(run) if run.last + 1 == at && run.says == says => run.last = at,
            _ => runs.push(Run { first: at, last: at, found: found[at], expected: expected[at], says }),
        }
    }
    Some((content, runs))
}

fn words(bytes: &[u8; SECTOR]) -> [u64; WORDS] {
    std::array::from_fn(|at| u64::from_le_bytes(bytes.as_chunks().0[at]))
}

fn bytes(content: Content, lba: u64, pattern: &Pattern) -> [u8; SECTOR] {
    let mut bytes = [0; SECTOR];
    if let Content::Written(generation) = content {
        pattern.fill_sector(&mut bytes, lba, generation);
    }
    bytes
}

/// What a word says of where it was written, if it says anything.
fn origin(found: u64, expected: u64, at: usize, lba: u64, pattern: &Pattern, device_sectors: u64) -> String {
    let flipped = (found ^ expected).count_ones();
    if found == 0 {
        return "zero".to_owned();
    }
    if flipped <= FLIPPED_BITS_MAX {
        return format!("right but for {flipped} bits");
    }
    let read = |position: usize| pattern.decode_word(found, position, device_sectors);
    let here = (lba % TABLE_SECTORS as u64) as usize * WORDS + at;
    if let Some(origin) = read(here).filter(|origin| origin.lba == lba) {
        return format!("generation {} of this sector", origin.generation);
    }
    // Whole sectors first, and then anywhere.
    let whole = (0..TABLE_SECTORS).map(|row| row * WORDS + at);
    match whole.chain(0..TABLE_WORDS).find_map(|position| Some((position, read(position)?))) {
        None => "nothing that was written".to_owned(),
        Some((position, origin)) if position % WORDS == at => origin.to_string(),
        Some((position, origin)) => format!("{origin}, its word {}", position % WORDS),
    }
}
