//! Plans, faults and every oracle on the thin disk, with no kernel and no root.

use std::time::{Duration, Instant};

use thin_disk::Thin;
use ublkit::backends::Memory;
use ublkit_harness::check;

const BYTES: u64 = 4 << 20;

#[test]
fn keeps_its_promises() {
    check(|| Thin::new(Memory::new(BYTES))).seeds(50).run();
}

/// Here the bug is known, and what matters is how it is told: soon, and in few operations.
#[test]
fn one_that_forgets_to_clear_is_found_out() {
    let begun = Instant::now();
    let found = check(|| Thin::forgetful(Memory::new(BYTES))).seeds(50).try_run().expect_err("it shows old data");
    println!("{found}");
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    assert!(found.operations() <= 5, "{found}");
}
