use super::*;

const INSTANCES: u64 = 1000;

/// Which reasons there must be at this percentage, and that there is no other.
fn nothing_lies_off_the_diagonal(percent: u8, reasons: &[Alike]) {
    let matrix = Matrix::measure(Seed::new(1), percent, INSTANCES);
    println!("{matrix}");
    assert!(matrix.surprises().is_empty(), "{matrix}");
    for alike in Alike::ALL {
        assert_eq!(matrix.alike(alike) > 0, reasons.contains(&alike), "{alike:?}: {}", alike.reason());
    }
    for drawn in CLASSES {
        let total: u64 = CLASSES.iter().map(|called| matrix.count(drawn, called)).sum();
        assert_eq!(total, INSTANCES, "{drawn}");
        assert!(matrix.count(drawn, drawn) >= INSTANCES / 2, "{drawn} is mostly called so");
        for called in CLASSES.into_iter().filter(|called| *called != drawn) {
            let alike = reasons.iter().any(|reason| reason.pairs().contains(&(drawn, called)));
            assert!(alike || matrix.count(drawn, called) == 0, "{drawn}, called {called}");
        }
    }
}

const ALWAYS: [Alike; 6] = [
    Alike::ReplacedIsUnknown,
    Alike::ReplacedZeroes,
    Alike::OtherWayRound,
    Alike::AllTheWayRound,
    Alike::WholeSectors,
    Alike::OneWord,
];

#[test]
fn nothing_lies_off_the_diagonal_of_incompressible_payloads() {
    nothing_lies_off_the_diagonal(0, &ALWAYS);
}

#[test]
fn nothing_lies_off_the_diagonal_of_compressible_payloads() {
    nothing_lies_off_the_diagonal(50, &Alike::ALL);
}
