//! Work done, counted.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::context::SharedEvidence;

macro_rules! tally {
    ($($name:ident),*) => {
        /// Work done, counted.
        #[derive(Debug, Default)]
        pub(crate) struct Tally { $(pub(crate) $name: AtomicU64),* }

        impl Tally {
            /// Adds the counts of `other`.
            pub(crate) fn merge(&self, other: &Self) {
                $(self.$name.fetch_add(other.$name.load(Ordering::Relaxed), Ordering::Relaxed);)*
            }

            /// Adds the counts to the evidence of the run.
            pub(crate) fn add_to(&self, evidence: &SharedEvidence) {
                evidence.add("ops", self.ops());
                evidence.add("verified_bytes", self.verified_bytes());
                $(evidence.add(stringify!($name), self.$name.load(Ordering::Relaxed));)*
            }
        }
    };
}
tally!(
    reads,
    writes,
    fua_writes,
    flushes,
    discards,
    zeroes,
    read_bytes,
    written_bytes,
    compared_in_reads,
    compared_in_passes,
    passes,
    longer_than_max_io,
    held_back,
    overlaps,
    failed,
    cut_short,
    draw_us
);

impl Tally {
    pub(crate) fn count(counter: &AtomicU64, by: u64) {
        // One writer: a plain add, that the thread which tells of progress may read at any time.
        counter.store(counter.load(Ordering::Relaxed) + by, Ordering::Relaxed);
    }

    fn get(counter: &AtomicU64) -> u64 {
        counter.load(Ordering::Relaxed)
    }

    /// Operations completed.
    pub(crate) fn ops(&self) -> u64 {
        [&self.reads, &self.writes, &self.fua_writes, &self.flushes, &self.discards, &self.zeroes]
            .into_iter()
            .map(Self::get)
            .sum()
    }

    /// Bytes moved.
    pub(crate) fn bytes(&self) -> u64 {
        Self::get(&self.read_bytes) + Self::get(&self.written_bytes)
    }

    /// Bytes compared.
    pub(crate) fn verified_bytes(&self) -> u64 {
        Self::get(&self.compared_in_reads) + Self::get(&self.compared_in_passes)
    }
}
