//! The clock that both processes of a run read.

use nix::time::{ClockId, clock_gettime};

/// Nanoseconds of `CLOCK_MONOTONIC`: the same clock in every process, so that what one does can be ordered with what another
/// does.
pub(crate) fn nanoseconds() -> u64 {
    // It fails for clocks that do not exist only.
    clock_gettime(ClockId::CLOCK_MONOTONIC)
        .map_or(0, |now| now.tv_sec().unsigned_abs() * 1_000_000_000 + now.tv_nsec().unsigned_abs())
}
