//! How much of something is done: a number of times, for some time, or both, whichever is over first.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// How much is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Extent {
    /// So often at most.
    number: Option<u64>,
    /// Begun no more after so long. What was begun is ended.
    duration_ms: Option<u64>,
}

impl Extent {
    /// As `asked`, for no longer than `duration`. With neither, `usual`; with a duration alone, until that is over.
    pub(super) fn new(asked: Option<u64>, usual: u64, duration: Option<Duration>) -> Self {
        Self {
            number: asked.or(if duration.is_none() { Some(usual) } else { None }),
            duration_ms: duration.map(|duration| duration.as_millis() as u64),
        }
    }

    /// Whether `done` are enough, of which the first began `elapsed` ago. However short the time, there is one.
    pub(super) fn is_over(&self, done: u64, elapsed: Duration) -> bool {
        let late = self.duration().is_some_and(|duration| elapsed >= duration);
        self.number.is_some_and(|number| done >= number) || (done > 0 && late)
    }

    /// How many there will be, if that does not depend on the time.
    pub(super) fn exactly(&self) -> Option<u64> {
        if self.duration_ms.is_none() { self.number } else { None }
    }

    /// How many there will be at most.
    pub(super) fn at_most(&self) -> Option<u64> {
        self.number
    }

    /// How many there have to be for a run to say something: all of them, unless the time may end it; then `some`, or as
    /// many as were asked for if that is less.
    pub(super) fn least(&self, some: u64) -> u64 {
        self.exactly().unwrap_or_else(|| self.number.map_or(some, |number| number.min(some)))
    }

    /// How long that may take, if one of them may take `each`.
    pub(super) fn limit(&self, each: Duration) -> Duration {
        match (self.duration(), self.number) {
            (Some(duration), _) => duration.saturating_add(each),
            (None, Some(number)) => each.saturating_mul(u32::try_from(number).unwrap_or(u32::MAX)),
            (None, None) => each,
        }
    }

    fn duration(&self) -> Option<Duration> {
        self.duration_ms.map(Duration::from_millis)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: Duration = Duration::from_secs(1);

    #[test]
    fn a_duration_alone_goes_on_until_it_is_over() {
        let extent = Extent::new(None, 5, Some(60 * S));
        assert!(!extent.is_over(1_000_000, 59 * S), "no number bounds it");
        assert!(extent.is_over(1, 60 * S) && !extent.is_over(0, 61 * S), "there is one at least");
        assert_eq!((extent.exactly(), extent.at_most(), extent.least(3)), (None, None, 3));
        assert_eq!(extent.limit(10 * S), 70 * S);
    }

    #[test]
    fn a_number_alone_takes_the_time_that_it_takes() {
        for (asked, number) in [(None, 5), (Some(7), 7)] {
            let extent = Extent::new(asked, 5, None);
            assert!(!extent.is_over(number - 1, 1000 * S) && extent.is_over(number, S));
            assert_eq!((extent.exactly(), extent.at_most(), extent.least(1)), (Some(number), Some(number), number));
            assert_eq!(extent.limit(10 * S), 10 * S * number as u32);
        }
    }

    #[test]
    fn with_both_whichever_is_over_first_counts() {
        let extent = Extent::new(Some(4), 5, Some(60 * S));
        assert!(extent.is_over(4, S) && !extent.is_over(3, S) && extent.is_over(1, 60 * S));
        assert_eq!((extent.exactly(), extent.at_most()), (None, Some(4)));
        assert_eq!((extent.least(20), extent.least(3)), (4, 3));
    }
}
