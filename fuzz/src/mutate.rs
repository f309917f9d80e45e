//! Inputs, made from others.

use ublkit_harness::{Seed, SeededRng};

/// What parsers of numbers, texts and JSON trip over.
const TOKENS: [&str; 36] = [
    "0",
    "-1",
    "1",
    "255",
    "65535",
    "65536",
    "4294967295",
    "4294967296",
    "9223372036854775807",
    "9223372036854775808",
    "18446744073709551615",
    "18446744073709551616",
    "1e400",
    "1e-400",
    "-0",
    "0x",
    "0xffffffffffffffff",
    "null",
    "true",
    "[]",
    "{}",
    "\"\"",
    "[[[[[[[[",
    "\\u0000",
    "\\ud800",
    "\u{e9}",
    "\u{1f980}",
    ",",
    ":",
    "=",
    "iB",
    "T",
    "ms",
    "h",
    " ",
    "\n",
];

/// No input is longer, in bytes.
const LONGEST: usize = 8192;

/// Makes inputs from a corpus: the same ones for the same seed.
#[derive(Debug)]
pub struct Mutator {
    corpus: Vec<Vec<u8>>,
    rng: SeededRng,
}

impl Mutator {
    /// Inputs made from `corpus`; from nothing where it is empty.
    #[must_use]
    pub fn new(corpus: Vec<Vec<u8>>, seed: Seed) -> Self {
        Self { corpus, rng: seed.rng() }
    }

    /// The next input.
    pub fn input(&mut self) -> Vec<u8> {
        let mut bytes = if self.rng.chance(1, 50) { self.noise() } else { self.old() };
        // Mostly little is changed: what is changed much is refused at the first byte.
        let changes = 1 << self.rng.below(6);
        for _ in 0..self.rng.within(0..=changes) {
            self.change(&mut bytes);
        }
        bytes.truncate(LONGEST);
        bytes
    }

    fn noise(&mut self) -> Vec<u8> {
        let mut bytes = vec![0; self.below(700)];
        self.rng.fill(&mut bytes);
        bytes
    }

    fn old(&mut self) -> Vec<u8> {
        self.rng.pick(&self.corpus).cloned().unwrap_or_default()
    }

    fn change(&mut self, bytes: &mut Vec<u8>) {
        let at = self.below(bytes.len() + 1);
        let length = self.below(bytes.len() - at + 1).min(1 << self.rng.below(10));
        let put_in = match self.rng.below(12) {
            // A number of a text for another.
            0..=2 => {
                let digits = |bytes: &[u8]| bytes.iter().take_while(|byte| byte.is_ascii_digit()).count();
                let begin = at + bytes[at..].iter().take_while(|byte| !byte.is_ascii_digit()).count();
                let end = begin + digits(&bytes[begin..]);
                let token = TOKENS[self.below(TOKENS.len())];
                bytes.splice(begin..end, token.bytes());
                return;
            }
            3 => {
                if let Some(byte) = bytes.get_mut(at) {
                    *byte ^= 1 << self.rng.below(8);
                }
                return;
            }
            4 => {
                self.rng.fill(&mut bytes[at..at + length]);
                return;
            }
            // Left out.
            5 => Vec::new(),
            // Twice.
            6 => bytes[at..at + length].repeat(2),
            7 => self.noise(),
            8 => {
                let other = self.old();
                let from = self.below(other.len() + 1);
                other[from..from + self.below(other.len() - from + 1)].to_vec()
            }
            9 => vec![[0, 1, 0x7f, 0x80, 0xff][self.below(5)]; length],
            _ => TOKENS[self.below(TOKENS.len())].as_bytes().to_vec(),
        };
        let replaced = if self.rng.chance(1, 4) { 0 } else { length };
        bytes.splice(at..at + replaced, put_in);
        bytes.truncate(LONGEST);
    }

    fn below(&mut self, bound: usize) -> usize {
        self.rng.below(bound as u64) as usize
    }
}
