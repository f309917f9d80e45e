//! Logical time.

/// A point in logical time: one for each begin and each end of an operation, strictly rising, never used twice.
///
/// Two operations are *ordered* when one ended before the other began, and concurrent otherwise. Nothing here looks at a
/// clock.
pub type Stamp = u64;
