//! Which seeds are run.

use std::env;

use crate::seed::Seed;

const ONE: &str = "UBLKIT_CHECK_SEED";
const TIMES: &str = "UBLKIT_CHECK_SEEDS";

/// So many seeds from the first on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Seeds {
    pub(super) first: u64,
    pub(super) count: u64,
}

impl Seeds {
    pub(super) fn new(count: u64) -> Self {
        Self { first: 1, count }
    }

    pub(super) fn first(self) -> Seed {
        Seed::new(self.first)
    }

    pub(super) fn iter(self) -> impl Iterator<Item = Seed> {
        (0..self.count).map(move |index| Seed::new(self.first.wrapping_add(index)))
    }

    /// As the environment says.
    ///
    /// # Panics
    /// When it says what is no number: a test that passes with other seeds than were meant would mislead.
    pub(super) fn as_environment_says(self) -> Self {
        let get = |name: &str| env::var(name).ok();
        self.overridden(get(ONE).as_deref(), get(TIMES).as_deref())
    }

    fn overridden(self, one: Option<&str>, times: Option<&str>) -> Self {
        let number = |name: &str, text: &str| {
            let seed: Result<Seed, _> = text.trim().parse();
            seed.unwrap_or_else(|error| panic!("{name} is {text:?}, which is no number: {error}")).get()
        };
        match (one, times) {
            (Some(one), _) => Self { first: number(ONE, one), count: 1 },
            (None, Some(times)) => Self { count: self.count.saturating_mul(number(TIMES, times)), ..self },
            (None, None) => self,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_overrides_what_the_test_says() {
        let seeds = Seeds { first: 5, count: 20 };
        assert_eq!(seeds.overridden(None, None), seeds);
        assert_eq!(seeds.overridden(Some("7"), Some("10")), Seeds { first: 7, count: 1 });
        assert_eq!(seeds.overridden(None, Some("10")), Seeds { first: 5, count: 200 });
        assert_eq!(seeds.iter().last(), Some(Seed::new(24)));
    }

    #[test]
    #[should_panic(expected = "UBLKIT_CHECK_SEED is \"x\"")]
    fn what_is_no_number_is_refused() {
        let _ = Seeds::new(1).overridden(Some("x"), None);
    }
}
