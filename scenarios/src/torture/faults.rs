//! Which faults a run has.

use std::str::FromStr;

use serde_json::{Value, json};
use ublkit_harness::fault::{Effect, FaultPlan};
use ublkit_harness::{SectorRange, SeededRng};

/// What is asked for on the command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Choice {
    None,
    /// Rare errors and delays, drawn from the seed.
    Draw,
    Plan(FaultPlan),
}

impl FromStr for Choice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "none" => return Ok(Self::None),
            "draw" => return Ok(Self::Draw),
            _ => {}
        }
        let plan: FaultPlan = text.parse().map_err(|error| format!("{error}; or write none, or draw"))?;
        if plan.rules.iter().any(|rule| rule.effect == Effect::Short) {
            return Err("a server of a device serves requests as a whole: short results are for the simulator".into());
        }
        Ok(Self::Plan(plan))
    }
}

impl Choice {
    /// As in the first event of the run.
    pub(super) fn option(&self) -> Value {
        match self {
            Self::None => json!("none"),
            Self::Draw => json!("draw"),
            Self::Plan(plan) => json!(plan.to_string()),
        }
    }

    /// The plan, for a run whose workers share `range`.
    pub(super) fn plan(&self, range: SectorRange, rng: &mut SeededRng) -> FaultPlan {
        match self {
            Self::None => FaultPlan::NONE,
            Self::Draw => mild(range, rng),
            Self::Plan(plan) => plan.clone(),
        }
    }
}

/// A plan of faults that are rare and show themselves: most of the run is spent on what comes after them.
fn mild(range: SectorRange, rng: &mut SeededRng) -> FaultPlan {
    let mut rules = Vec::new();
    let mut error = |ops: &str, most: u64, place: &str| {
        let rate = rng.within(most / 4..=most);
        let errno = rng.pick(&["EIO", "ENOSPC", "ETIMEDOUT"]).copied().unwrap_or("EIO");
        let stage = rng.pick(&["before", "partway", "after"]).copied().unwrap_or("before");
        rules.push(format!("{ops} rate 1/{rate}{place}: error {errno} {stage}"));
    };
    let place = format!(" range {range}");
    error("read", 1000, &place);
    error("write,fua", 1000, &place);
    error("discard,zeroes", 200, &place);
    error("flush", 100, "");
    rules.push(format!("any rate 1/{}: delay {}", rng.within(200..=2000), rng.within(1..=10)));
    // The rules are right: a test reads plans of many seeds.
    rules.join("; ").parse().unwrap_or(FaultPlan::NONE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ublkit_harness::Seed;

    #[test]
    fn drawn_plans_are_loud_and_never_empty() {
        for seed in 0..100 {
            let plan = mild(SectorRange::new(0, 2048), &mut Seed::new(seed).rng());
            assert!(plan.rules.len() == 5 && plan.is_loud(), "{plan}");
        }
    }

    #[test]
    fn what_a_device_cannot_have_is_refused() {
        assert_eq!("none".parse(), Ok(Choice::None));
        assert!(matches!("write every 3: error EIO after".parse(), Ok(Choice::Plan(_))));
        assert!("read every 3: short".parse::<Choice>().is_err());
        assert!("now and then".parse::<Choice>().is_err());
    }
}
