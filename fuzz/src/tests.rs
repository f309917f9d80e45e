use super::*;
use ublkit_harness::Seed;
use ublkit_harness::fault::{Errno, FaultPlan};

#[test]
fn every_target_takes_its_corpus_and_what_is_made_of_it() {
    for target in TARGETS {
        let corpus = target.corpus().expect("a target has a corpus");
        assert!(!corpus.is_empty(), "{}", target.name);
        for input in &corpus {
            assert_eq!(try_input(target, input), Ok(()), "{} {:?}", target.name, String::from_utf8_lossy(input));
        }
        let mut mutator = Mutator::new(corpus, Seed::new(1));
        for _ in 0..target.in_tests {
            let input = mutator.input();
            let outcome = try_input(target, &input);
            assert_eq!(outcome, Ok(()), "{} {input:?} {:?}", target.name, String::from_utf8_lossy(&input));
        }
    }
}

#[test]
fn a_planted_panic_is_caught() {
    fn run(bytes: &[u8]) {
        assert!(!bytes.windows(3).any(|window| window == b"T18"), "a planted panic");
    }
    let target = Target { name: "parsers", run, in_tests: 0 };
    let mut mutator = Mutator::new(target.corpus().expect("a corpus"), Seed::new(1));
    let failure = (0..100_000).find_map(|_| try_input(target, &mutator.input()).err());
    assert_eq!(failure.map(|failure| failure.what), Some("a planted panic".to_owned()));
}

#[test]
fn inputs_replay() {
    let inputs = |seed| {
        let mut mutator = Mutator::new(vec![b"{}".to_vec()], Seed::new(seed));
        (0..100).map(|_| mutator.input()).collect::<Vec<_>>()
    };
    assert_eq!(inputs(1), inputs(1));
    assert_ne!(inputs(1), inputs(2));
    assert!(Target::named("classifier").is_some() && Target::named("none").is_none());
}

/// An input that is refused at once tries nothing, and a format that has moved on refuses a whole corpus.
#[test]
fn the_corpus_is_taken_not_refused() {
    let taken = |name: &str, takes: fn(&[u8]) -> bool| {
        let corpus = Target::named(name).expect("a target").corpus().expect("a corpus");
        (corpus.iter().filter(|input| takes(input)).count(), corpus.len())
    };
    let (scripts, all) =
        taken("script", |input| serde_json::from_slice::<ublkit_harness::script::Script>(input).is_ok());
    assert_eq!(scripts, all);
    let (events, _) = taken("events", |input| serde_json::from_slice::<ublkit_harness::Event>(input).is_ok());
    let (mismatches, _) = taken("events", |input| serde_json::from_slice::<ublkit_harness::Mismatch>(input).is_ok());
    assert!(events >= 6 && mismatches >= 1, "{events} events, {mismatches} mismatches");
    let (plans, _) = taken("plan", |input| {
        let options = serde_json::from_slice::<ublkit_harness::PlanOptions>(input);
        options.is_ok_and(|options| ublkit_harness::Plan::new(options, Seed::new(1)).is_ok())
    });
    assert!(plans >= 3, "{plans} plans");
    let (bundles, all) = taken("bundle", crate::targets::loads_bundle);
    assert!(bundles == all && all > 0, "{bundles} of {all} bundles");
    let texts = |is: fn(&str) -> bool| {
        let corpus = Target::named("parsers").expect("a target").corpus().expect("a corpus");
        corpus.iter().filter(|input| std::str::from_utf8(input).is_ok_and(is)).count()
    };
    let faults = texts(|text| text.parse::<FaultPlan>().is_ok_and(|plan| !plan.is_empty()));
    let errnos = texts(|text| text.parse::<Errno>().is_ok());
    assert!(faults >= 2 && errnos >= 2, "{faults} plans of faults, {errnos} errnos");
}
