//! Linearizability of overlapping, concurrent operations, per block, streaming.
