//! A sector that holds what it may not hold, with everything known about it.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::classify::{Class, Content, Expected};
use crate::oracle::Oracle;
use crate::outcome::Outcome;
use crate::plan::OpKind;
use crate::range::SectorRange;
use crate::sector::Generation;

/// A wrong sector of a check, and a count of the others.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mismatch {
    /// Who says so.
    pub oracle: Oracle,
    /// The worker whose region the sector is in, or who read it where all share one.
    pub worker: u32,
    /// The operation that found it, by its index in the worker's plan; `None` for a pass over the whole region.
    pub op: Option<u64>,
    /// The range that was being checked.
    pub range: SectorRange,
    /// The first wrong sector whose class tells more than that something did not arrive, or else the first: a misdirected
    /// write explains the lost sectors beside it.
    pub sector: u64,
    /// What kind of corruption it is.
    pub class: Class,
    /// What the sector might hold.
    pub expected: Expected,
    /// What it held.
    pub got: SectorDump,
    /// How many sectors of the range are wrong, by the name of their class; the first 256 are looked at.
    pub wrong_sectors: BTreeMap<String, u64>,
    /// The last operations on the sector that are remembered, oldest first.
    pub history: Vec<PastOp>,
}

/// One operation on a sector.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PastOp {
    /// The worker.
    pub worker: u32,
    /// Its index in the worker's plan; `None` for a pass over the whole region.
    pub op: Option<u64>,
    /// What it was.
    pub kind: OpKind,
    /// All the sectors it was for.
    pub range: SectorRange,
    /// The generation that it gave to the sector in question, if it was a write.
    pub generation: Option<Generation>,
    /// How it ended; `None` while in flight.
    pub outcome: Option<Outcome>,
}

/// The bytes of a sector, in JSON as hexadecimal text.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SectorDump(Vec<u8>);

impl Oracle {
    /// Who says that a sector of this class is wrong, when power was never cut.
    #[must_use]
    pub fn of(class: &Class, expected: &Expected) -> Self {
        match class {
            Class::ForeignDevice { .. } | Class::ForeignRun { .. } => Self::CrossDevice,
            Class::Zero | Class::Lost { found: Content::Zero } => Self::Zero,
            Class::Lost { .. } | Class::Stale { .. } | Class::Future { .. }
                if expected.allowed == [Content::Zero] =>
            {
                Self::Zero
            }
            Class::Good | Class::Lost { .. } | Class::Stale { .. } | Class::Future { .. } => Self::Linear,
            Class::Misdirected { .. }
            | Class::Torn { .. }
            | Class::Shifted { .. }
            | Class::BitFlip { .. }
            | Class::Partial { .. }
            | Class::Garbage => Self::Tag,
        }
    }
}

impl SectorDump {
    /// A copy of `bytes`.
    #[must_use]
    pub fn new(bytes: &[u8]) -> Self {
        Self(bytes.to_vec())
    }

    /// The bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}
impl fmt::Debug for SectorDump {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SectorDump({} bytes)", self.0.len())
    }
}

impl From<SectorDump> for String {
    fn from(dump: SectorDump) -> Self {
        use fmt::Write;
        dump.0.iter().fold(Self::with_capacity(dump.0.len() * 2), |mut text, byte| {
            let _infallible = write!(text, "{byte:02x}");
            text
        })
    }
}

impl TryFrom<String> for SectorDump {
    type Error = NotHex;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        let digits = text.as_bytes();
        if !digits.len().is_multiple_of(2) {
            return Err(NotHex);
        }
        let digit = |byte: u8| char::from(byte).to_digit(16).map(|value| value as u8);
        digits
            .chunks_exact(2)
            .map(|pair| Some(digit(pair[0])? << 4 | digit(pair[1])?))
            .collect::<Option<_>>()
            .map(Self)
            .ok_or(NotHex)
    }
}

/// Text that is not pairs of hexadecimal digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotHex;

impl fmt::Display for NotHex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("not pairs of hexadecimal digits")
    }
}

impl std::error::Error for NotHex {}

/// A few lines: what is wrong, what was expected, and what was done to the sector.
impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sector {} (worker {}", self.sector, self.worker)?;
        if let Some(op) = self.op {
            write!(f, ", operation {op}")?;
        }
        writeln!(f, ", checking {}): {}", self.range, self.class)?;
        write!(f, "  expected: {}", self.expected)?;
        let wrong = self.wrong_sectors.values().fold(0_u64, |sum, count| sum.saturating_add(*count));
        if wrong > 1 {
            write!(f, "\n  wrong sectors in this range:")?;
            for (class, count) in &self.wrong_sectors {
                write!(f, " {count} {class}")?;
            }
        }
        for past in &self.history {
            write!(f, "\n  {past}")?;
        }
        Ok(())
    }
}

impl fmt::Display for PastOp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.op {
            Some(op) => write!(f, "{}#{op} {} {}", self.worker, self.kind, self.range)?,
            None => write!(f, "pass {} {}", self.kind, self.range)?,
        }
        if let Some(generation) = self.generation {
            write!(f, " generation {generation}")?;
        }
        f.write_str(match self.outcome {
            Some(Outcome::Done) => " done",
            Some(Outcome::Failed) => " failed",
            Some(Outcome::Unknown) => " unknown",
            None => " in flight",
        })
    }
}

impl std::error::Error for Mismatch {}
