//! Plans say what they mean, and read and print as the same.

use super::*;
use crate::seed::{Seed, SeededRng};

fn plan(text: &str) -> FaultPlan {
    text.parse().unwrap_or_else(|error| panic!("{error}"))
}

fn why(text: &str) -> String {
    text.parse::<FaultPlan>().expect_err(text).to_string()
}

fn draw_any_rule(rng: &mut SeededRng) -> Rule {
    let number = |rng: &mut SeededRng| {
        let top = [1, 2, 100, u64::MAX - 1];
        1 + rng.within(0..=*rng.clone().pick(&top).expect("some")).min(u64::MAX - 1)
    };
    let errnos: Vec<Errno> = Errno::named().chain(Errno::new(4000)).collect();
    let stage = [Stage::Before, Stage::Partway, Stage::After][rng.below(3) as usize];
    let effects = [
        Effect::Error { errno: *rng.pick(&errnos).expect("some"), stage },
        Effect::Short,
        Effect::Delay(rng.next_u64()),
        Effect::Hold,
        Effect::Lost,
        Effect::Torn,
        Effect::Misdirected,
        Effect::Stale,
        Effect::Flipped,
        Effect::Panic,
    ];
    let ops = OpKind::ALL.into_iter().filter(|_| rng.chance(1, 2)).fold(Ops::NONE, Ops::with);
    let (a, b) = (number(rng), number(rng));
    let (hits, out_of) = (a.min(b), a.max(b));
    let maybe = |rng: &mut SeededRng| rng.chance(1, 2);
    Rule {
        ops,
        range: maybe(rng).then(|| SectorRange::new(rng.below(1 << 40), rng.within(1..=1 << 40))),
        state: maybe(rng).then(|| rng.next_u64() as u32),
        trigger: match rng.below(5) {
            0 => Trigger::Always,
            1 => Trigger::Nth(a),
            2 => Trigger::Every(a),
            3 => Trigger::Rate { hits, out_of },
            _ => Trigger::Burst { hits, out_of },
        },
        calls: maybe(rng).then_some((hits, out_of)),
        times: maybe(rng).then_some(b),
        effect: *rng.pick(&effects).expect("some"),
        then: maybe(rng).then(|| rng.next_u64() as u32),
    }
}

#[test]
fn text_and_json_round_trip() {
    let mut rng = Seed::new(1).rng();
    let mut valid = 0;
    for _ in 0..5000 {
        let count = rng.below(4);
        let rules: Vec<_> = (0..count).map(|_| draw_any_rule(&mut rng)).collect();
        let plan = FaultPlan { rules };
        if let Err(error) = plan.validate() {
            assert!(plan.to_string().parse::<FaultPlan>().is_err(), "{plan}: {error}");
            continue;
        }
        valid += 1;
        let text = plan.to_string();
        assert_eq!(text.parse(), Ok(plan.clone()), "{text}");
        assert_eq!(text.replace('\n', ";").parse(), Ok(plan.clone()), "{text}");
        let json = serde_json::to_string(&plan).expect("json");
        assert_eq!(serde_json::from_str::<FaultPlan>(&json).expect("json"), plan, "{json}");
    }
    assert!(valid > 2000, "{valid}");
}

#[test]
fn json_is_a_list_of_lines() {
    let two = plan("write rate 1/1000 range 0+2048: error EIO after\nflush nth 3 state 1: lost then 2");
    let json =
        serde_json::json!(["write rate 1/1000 range 0+2048: error EIO after", "flush nth 3 state 1: lost then 2"]);
    assert_eq!(serde_json::to_value(&two).expect("json"), json);
    assert_eq!(serde_json::to_string(&FaultPlan::NONE).expect("json"), "[]");
    assert!(serde_json::from_str::<FaultPlan>("[\"write: sunk\"]").is_err());
    for none in ["", "none", " \n# nothing\n;;"] {
        assert_eq!(plan(none), FaultPlan::NONE);
    }
    assert_eq!(FaultPlan::NONE.to_string(), "none");
}

#[test]
fn messages_say_where_and_what_would_be_right() {
    for (text, parts) in [
        ("read: hold\nwirte: lost", &["line 2", "\"wirte: lost\"", "\"wirte\" is no operation", "zeroes"][..]),
        ("write lost", &["no colon", "OPERATIONS [CLAUSE…]: EFFECT"]),
        ("write: sunk", &["\"sunk\" is no effect", "misdirected"]),
        ("write: error EWRONG after", &["\"EWRONG\" is no errno", "ENOSPC"]),
        ("write: error EIO", &["before, partway or after"]),
        ("write: error EIO after all", &["\"all\" after the effect", "then STATE"]),
        ("write sometimes 3: lost", &["\"sometimes\" is no clause", "rate N/M"]),
        ("write nth x: lost", &["nth 3", "\"x\""]),
        ("write nth: lost", &["nth 3", "not \"\""]),
        ("write rate 3: lost", &["rate 1/1000"]),
        ("write rate 3/2: lost", &["3 of 2"]),
        ("write nth 0: lost", &["counted from 1"]),
        ("write calls 5-4: lost", &["5 to 4 are none"]),
        ("write times 0: lost", &["0 times"]),
        ("write nth 1 every 2: lost", &["exclude each other"]),
        ("write state 1 state 1: lost", &["\"state\" twice"]),
        ("write range 0+0: lost", &["at least one sector"]),
        ("flush range 0+8: error EIO before", &["a flush has no range"]),
        ("read: lost", &["\"lost\" can only happen to write, fua, flush"]),
        ("write: stale", &["\"stale\" can only happen to read"]),
        ("any: delay 5 then 2 3", &["\"3\" after the state"]),
    ] {
        let message = why(text);
        for part in parts {
            assert!(message.contains(part), "{text:?} gives {message:?}, without {part:?}");
        }
    }
}

#[test]
fn drawn_plans_are_loud_valid_and_varied() {
    let mut rng = Seed::new(2).rng();
    let (mut empty, mut kinds, mut texts) = (0, [0; 4], std::collections::HashSet::new());
    for _ in 0..1000 {
        let plan = FaultPlan::draw(&mut rng, 4096);
        assert!(plan.is_loud() && plan.validate().is_ok(), "{plan}");
        assert!(plan.rules.iter().all(|rule| rule.range.is_none_or(|range| range.end() <= 4096)));
        empty += u64::from(plan.is_empty());
        for rule in &plan.rules {
            assert_ne!(rule.effect, Effect::Panic);
            kinds[match rule.effect {
                Effect::Delay(_) => 0,
                Effect::Hold => 1,
                Effect::Short => 2,
                _ => 3,
            }] += 1;
        }
        assert_eq!(plan.to_string().parse(), Ok(plan.clone()), "{plan}");
        texts.insert(plan.to_string());
        let silent = FaultPlan::draw_silent(&mut rng, 4096);
        assert!(!silent.is_empty() && !silent.is_loud() && silent.validate().is_ok(), "{silent}");
    }
    assert!((150..400).contains(&empty), "{empty}");
    assert!(kinds.iter().all(|count| *count > 100), "{kinds:?}");
    assert!(texts.len() > 500);
    assert_eq!(FaultPlan::draw(&mut Seed::new(9).rng(), 8), FaultPlan::draw(&mut Seed::new(9).rng(), 8));
}
