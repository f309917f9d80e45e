//! How fast payloads are made and checked, beside what merely reading memory costs.
//!
//! `cargo run --release -p ublkit-harness --example sector_speed` prints GB/s of one thread, the median of several
//! rounds, for a buffer in the first-level cache, one in the second, and one in memory. The last line of each block
//! is the whole path of a worker: the shadow's bookkeeping included.

use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

use ublkit_harness::{Outcome, Pattern, SECTOR, SectorRange, Shadow, ShadowOptions};

const ROUNDS: usize = 15;

/// The median speed of `work` over `bytes` bytes, in GB/s.
fn speed(bytes: usize, mut work: impl FnMut()) -> f64 {
    let repeat = (64 << 20) / bytes;
    let mut seconds: Vec<f64> = (0..ROUNDS)
        .map(|_| {
            let start = Instant::now();
            (0..repeat).for_each(|_| work());
            start.elapsed().as_secs_f64()
        })
        .collect();
    seconds.sort_by(f64::total_cmp);
    (bytes * repeat) as f64 / seconds[ROUNDS / 2] / 1e9
}

fn measure(name: &str, bytes: usize) {
    let pattern = Pattern::new(1, 0);
    let range = SectorRange::new(4096, (bytes / SECTOR) as u64);
    let mut buf = vec![0_u8; bytes];
    println!("{name} ({} KiB)", bytes >> 10);

    let fill = speed(bytes, || pattern.fill(black_box(&mut buf), range.first, |_| 7));
    let copy = buf.clone();
    let verify = speed(bytes, || {
        let sectors = black_box(&buf).as_chunks::<SECTOR>().0;
        let right = (range.first..).zip(sectors).all(|(lba, sector)| pattern.sector_matches(sector, lba, 7));
        assert!(black_box(right));
    });
    let sum = speed(bytes, || {
        let words = black_box(&buf).as_chunks::<8>().0;
        black_box(words.iter().fold(0_u64, |sum, word| sum.wrapping_add(u64::from_le_bytes(*word))));
    });
    let compare = speed(bytes, || assert!(black_box(black_box(&buf) == black_box(&copy))));
    println!("  fill {fill:6.1}   verify {verify:6.1}   read and sum {sum:6.1}   compare with a copy {compare:6.1}");

    let mut shadow = Shadow::new(ShadowOptions {
        region: SectorRange::device(1 << 30),
        worker: 0,
        pattern: Arc::new(pattern),
        foreign: Arc::new([]),
        device_sectors: 1 << 21,
        initially_zero: true,
    });
    let write = speed(bytes, || {
        let ticket = shadow.begin_write(0, range, black_box(&mut buf));
        shadow.finish(ticket, Outcome::Done);
    });
    let read = speed(bytes, || {
        let ticket = shadow.begin_read(0, range);
        assert!(shadow.finish_read(ticket, black_box(&buf)).is_ok());
    });
    println!("  with the shadow: write {write:6.1}   read {read:6.1}");
}

fn main() {
    measure("first-level cache", 4 << 10);
    measure("second-level cache", 128 << 10);
    measure("memory", 64 << 20);
}
