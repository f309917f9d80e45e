use clap::Parser;
use ublkit_harness::event::Event;
use ublkit_harness::matrix::{Found, Kills, MatrixOptions};
use ublkit_harness::shrink::Signature;

use super::*;

#[derive(clap::Parser)]
struct Program {
    #[command(flatten)]
    mutants: Args,
}

fn arguments(line: &str) -> Args {
    Program::try_parse_from(format!("mutants {line}").split_whitespace()).expect("right arguments").mutants
}

fn found_by(oracle: Oracle) -> Found {
    let event = Event::Finding(Finding { oracle: oracle.to_string(), what: "wrong".to_owned(), detail: Vec::new() });
    Found { signature: Signature::of(oracle, &event), seed: Seed::new(1), after_ops: 9 }
}

fn row(mutant: Mutant) -> Row {
    Row {
        mutant: mutant.name().to_owned(),
        number: mutant.spec().number.to_owned(),
        stands_for: mutant.doc().to_owned(),
        control: mutant.is_control(),
        found: mutant.spec().oracles.first().map(|oracle| found_by(*oracle)),
        only_killer: false,
        hits: 3,
        ops: 10,
        seeds: 1,
        elapsed_ms: 1,
    }
}

/// A matrix where all is as it should be.
fn good() -> Matrix {
    Matrix {
        rows: Mutant::ALL.map(row).into(),
        oracles: Oracle::ALL.map(|oracle| (oracle, Kills { first: 2, only: 1 })).into(),
        mutants_ms: 900_000,
        controls_ms: 900_000,
        mutants_core_ms: vec![60_000, 60_000],
        controls_core_ms: vec![120_000, 120_000],
    }
}

/// The matrix, but for one row.
fn but_for(mutant: Mutant, change: impl FnOnce(&mut Row)) -> Matrix {
    let mut matrix = good();
    change(matrix.rows.iter_mut().find(|row| row.mutant == mutant.name()).expect("a row"));
    matrix
}

/// What is wrong with a whole matrix.
fn wrong(matrix: &Matrix) -> String {
    let failure = arguments("").judge(matrix, true).expect_err("something is wrong");
    assert_eq!(failure.verdict(), Some(ublkit_harness::Verdict::Fail));
    failure.to_string()
}

#[test]
fn a_good_matrix_passes() {
    arguments("").judge(&good(), true).expect("all is as it should be");
}

#[test]
fn a_bug_that_nobody_finds_is_named() {
    let what = wrong(&but_for(Mutant::LostWrite, |row| row.found = None));
    assert!(what.contains("nobody finds lost-write"), "{what}");
}

#[test]
fn a_control_that_is_called_a_bug_is_named() {
    let what = wrong(&but_for(Mutant::WrittenTwice, |row| row.found = Some(found_by(Oracle::Linear))));
    assert!(what.contains("taken for bugs, and they are none: written-twice"), "{what}");
}

#[test]
fn what_never_struck_is_named_unless_it_is_a_declaration() {
    for mutant in [Mutant::LostWrite, Mutant::WrittenTwice] {
        let what = wrong(&but_for(mutant, |row| row.hits = 0));
        assert!(what.contains(&format!("never struck, so that nothing is known of {mutant}")), "{what}");
    }
    let declares = but_for(Mutant::RoNotEnforced, |row| row.hits = 0);
    arguments("").judge(&declares, true).expect("it shows all the same");
}

#[test]
fn a_bug_is_found_by_an_oracle_that_is_expected_to_find_it() {
    let what = wrong(&but_for(Mutant::BitflipRead, |row| row.found = Some(found_by(Oracle::Flush))));
    assert!(what.contains("an oracle that is not expected to find it: bitflip-read by flush"), "{what}");
    let odd = but_for(Mutant::BitflipRead, |row| row.found = Some(found_by(Oracle::Flush)));
    for other in ["--seed 2", "--without tag"] {
        arguments(other).judge(&odd, true).expect("another one may be the first then");
    }
    for oracle in Mutant::FlushNoop.spec().oracles {
        let matrix = but_for(Mutant::FlushNoop, |row| row.found = Some(found_by(*oracle)));
        arguments("").judge(&matrix, true).expect("it is one of those");
    }
}

#[test]
fn an_oracle_that_finds_nothing_alone_is_needless_where_all_is_there() {
    for oracle in Oracle::ALL {
        let mut matrix = good();
        matrix.oracles.insert(oracle, Kills { first: 9, only: 0 });
        let what = wrong(&matrix);
        assert!(what.contains(&format!("there is no mutant that {oracle} alone finds")), "{what}");
        for part in ["--only lost-write", "--without tag"] {
            arguments(part).judge(&matrix, true).expect("a part of the matrix says nothing of that");
        }
    }
}

#[test]
fn the_whole_matrix_has_its_time() {
    let slow = |cores: &[u64]| Matrix { mutants_core_ms: cores.to_vec(), ..good() };
    for cores in [&[60_001, 10][..], &[10, 60_001], &[120_001]] {
        let what = wrong(&slow(cores));
        assert!(what.contains("the mutants take 60.0 s on two cores, more than 60"), "{what}");
    }
    let what = wrong(&Matrix { controls_core_ms: vec![1, 130_000], ..good() });
    assert!(what.contains("the controls take 130.0 s on two cores, more than 120"), "{what}");
    let many = [100_000; 4];
    for cores in [&many[..], &[120_000], &[]] {
        arguments("").judge(&slow(cores), true).expect("nobody knows how long that takes on two cores");
    }
    let slow = slow(&[70_000, 70_000]);
    arguments("").judge(&slow, false).expect("a build that is not optimised takes its time");
    for more in ["--control-seeds 1001", "--ops 10001", "--only lost-write"] {
        arguments(more).judge(&slow, true).expect("that is another matrix");
    }
    let MatrixOptions { ops, control_seeds, .. } = MatrixOptions::default();
    let same = arguments(&format!("--ops {ops} --control-seeds {control_seeds} --threads 2"));
    same.judge(&slow, true).expect_err("that is the matrix");
}
