//! tmp
use ublkit_harness::matrix::{Matrix, MatrixOptions};
use ublkit_harness::mutant::Mutant;
fn main() {
    let names: Vec<String> = std::env::args().skip(1).collect();
    let mut options = MatrixOptions::default();
    if !names.is_empty() {
        options.mutants = Mutant::ALL.into_iter().filter(|m| names.iter().any(|n| n == m.name())).collect();
    }
    let matrix = Matrix::run(&options, &|row| eprintln!("{row}"));
    println!("{matrix}");
}
