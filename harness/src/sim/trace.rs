//! What happened in a simulated run: a hash over every event, and the events in words where they are asked for.

use crate::sim::driver::arrives_as;

/// The events of a run.
#[derive(Debug, Default)]
pub(crate) struct Trace {
    digest: u64,
    lines: Option<Vec<String>>,
}

/// What an event is. The numbers go into digests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum What {
    Begin = 1,
    Dispatch,
    Merge,
    Hold,
    Commit,
    Refused,
    End,
    Open,
    Close,
    Kill,
    Cut,
    Faults,
    Checked,
}

impl Trace {
    pub(crate) fn new(record: bool) -> Self {
        Self { digest: 0, lines: record.then(Vec::new) }
    }

    /// Notes an event. The numbers go into the digest, the words to whoever asked for them.
    #[inline]
    pub(crate) fn note(&mut self, what: What, numbers: [u64; 3], words: impl FnOnce() -> String) {
        let mut hash = self.digest;
        for number in [what as u64, numbers[0], numbers[1], numbers[2]] {
            hash = (hash.rotate_left(5) ^ number).wrapping_mul(0x517c_c1b7_2722_0a95);
        }
        self.digest = hash;
        if let Some(lines) = &mut self.lines {
            lines.push(words());
        }
    }

    /// A hash over every event so far, in order.
    pub(crate) fn digest(&self) -> u64 {
        // The last multiplication leaves the low bits weak.
        self.digest ^ self.digest >> 32
    }

    pub(crate) fn into_lines(self) -> Vec<String> {
        self.lines.unwrap_or_default()
    }
}

/// A result in words.
pub(crate) fn result_words(result: i32) -> String {
    if result < 0 {
        format!("errno {} (arrives as {})", -i64::from(result), arrives_as(result))
    } else {
        result.to_string()
    }
}
