//! The confusion matrix of the classifier, as a table.
//!
//! `cargo run --release -p ublkit-harness --example confusion -- [SEED] [INSTANCES]` corrupts sectors at random, 1000 for
//! each class unless told otherwise, and prints what they are called. Ends with 1 when anything is called what
//! it is not.

use std::process::ExitCode;

use ublkit_harness::Seed;
use ublkit_harness::confusion::Matrix;

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let seed = arguments.next().map_or(Ok(Seed::new(1)), |text| text.parse::<Seed>());
    let instances = arguments.next().map_or(Ok(1000), |text| text.parse::<u64>());
    let (Ok(seed), Ok(instances)) = (seed, instances) else {
        eprintln!("usage: confusion [SEED] [INSTANCES]");
        return ExitCode::from(2);
    };
    let mut surprises = 0;
    for percent in [0, 50] {
        let matrix = Matrix::measure(seed, percent, instances);
        println!("{matrix}\n");
        surprises += matrix.surprises().len();
    }
    if surprises == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
