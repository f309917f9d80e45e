//! How fast payloads are made and checked, beside what merely reading memory costs.
//!
//! `cargo run --release -p ublkit-harness --example sector_speed` prints GB/s of one thread. Every kind of work goes over
//! the same buffer of 64 MiB, a slice at a time and in turns, each in another part of the buffer, so that whatever else
//! the machine does hits all of them alike, and none finds in a cache what another has just read. What counts are
//! medians over many short slices, in most of which nothing else ran. Ends with 1 when checking is slower than
//!
//! * 0.8 times reading and summing the same bytes,
//! * 1.3 times comparing them with a full copy.
//!
//! A measurement that falls short is repeated twice: what else runs can only make the ratios worse.

use std::hint::black_box;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use ublkit_harness::{Outcome, Pattern, SECTOR, SectorRange, Shadow, ShadowOptions};

/// What checking must reach, beside reading and summing, and beside comparing with a copy.
const AT_LEAST: [f64; 2] = [0.8, 1.3];

const BUFFER_BYTES: usize = 64 << 20;
const SLICE_BYTES: usize = 1 << 20;
const SLICES: usize = BUFFER_BYTES / SLICE_BYTES;
const SLICE_SECTORS: u64 = (SLICE_BYTES / SECTOR) as u64;
const FIRST_LBA: u64 = 4096;

/// A name, and what is done to the slice of that number.
type Work<'a> = (&'static str, Box<dyn FnMut(usize) + 'a>);

/// The speed of each kind of work, in GB/s.
fn take_turns(works: &mut [Work], rounds: usize) -> Vec<f64> {
    let apart = SLICES / works.len();
    let mut seconds: Vec<Vec<f64>> = vec![Vec::with_capacity(rounds * SLICES); works.len()];
    // The first round only brings the memory in.
    for step in 0..SLICES * (rounds + 1) {
        for (turn, ((_, work), seconds)) in works.iter_mut().zip(&mut seconds).enumerate() {
            let slice = (step + turn * apart) % SLICES;
            let start = Instant::now();
            work(slice);
            if step >= SLICES {
                seconds.push(start.elapsed().as_secs_f64());
            }
        }
    }
    let median = |mut seconds: Vec<f64>| {
        seconds.sort_by(f64::total_cmp);
        seconds[seconds.len() / 2]
    };
    seconds.into_iter().map(|seconds| SLICE_BYTES as f64 / median(seconds) / 1e9).collect()
}

fn slice(buf: &[u8], number: usize) -> &[u8] {
    &buf[number * SLICE_BYTES..][..SLICE_BYTES]
}

fn range(number: usize) -> SectorRange {
    SectorRange::new(FIRST_LBA + number as u64 * SLICE_SECTORS, SLICE_SECTORS)
}

fn right(pattern: &Pattern, buf: &[u8], first_lba: u64) -> bool {
    pattern.sectors_match(buf.as_chunks().0, first_lba, |_| 7)
}

fn sum(buf: &[u8]) -> u64 {
    buf.as_chunks::<8>().0.iter().fold(0_u64, |sum, word| sum.wrapping_add(u64::from_le_bytes(*word)))
}

fn print(what: &str, works: &[Work], speeds: &[f64]) {
    print!("{what:>22}:");
    works.iter().zip(speeds).for_each(|((name, _), speed)| print!("  {name} {speed:.1}"));
    println!("  GB/s");
}

/// Checking beside reading and summing, and beside comparing with a copy.
fn checks(what: &str, percent: u8, rounds: usize) -> [f64; 2] {
    let pattern = Pattern::with_compressibility(1, 0, percent);
    let mut buf = vec![0; BUFFER_BYTES];
    pattern.fill(&mut buf, FIRST_LBA, |_| 7);
    let copy = buf.clone();
    let mut works: [Work; 3] = [
        ("verify", Box::new(|n| assert!(right(&pattern, black_box(slice(&buf, n)), range(n).first)))),
        ("read and sum", Box::new(|n| _ = black_box(sum(black_box(slice(&buf, n)))))),
        ("compare with a copy", Box::new(|n| assert!(black_box(slice(&buf, n)) == black_box(slice(&copy, n))))),
    ];
    let speeds = take_turns(&mut works, rounds);
    print(what, &works, &speeds);
    [speeds[0] / speeds[1], speeds[0] / speeds[2]]
}

/// Making payloads, and the whole path of a worker: the shadow's bookkeeping included.
fn payloads() {
    let pattern = Arc::new(Pattern::new(1, 0));
    let options = ShadowOptions {
        region: SectorRange::device(1 << 30),
        worker: 0,
        pattern: Arc::clone(&pattern),
        foreign: Arc::new([]),
        device_sectors: 1 << 21,
        initially_zero: true,
    };
    let (mut filled, mut written, mut buf) = (vec![0; BUFFER_BYTES], vec![0; BUFFER_BYTES], vec![0; BUFFER_BYTES]);
    let mut writes = Shadow::new(options.clone());
    let mut reads = Shadow::new(options);
    let ticket = reads.begin_write(0, SectorRange::new(FIRST_LBA, SLICES as u64 * SLICE_SECTORS), &mut buf);
    reads.finish(ticket, Outcome::Done);
    let mut works: [Work; 3] = [
        (
            "fill",
            Box::new(|n| {
                pattern.fill(black_box(&mut filled[n * SLICE_BYTES..][..SLICE_BYTES]), range(n).first, |_| 7);
            }),
        ),
        (
            "write with the shadow",
            Box::new(|n| {
                let buf = black_box(&mut written[n * SLICE_BYTES..][..SLICE_BYTES]);
                let ticket = writes.begin_write(0, range(n), buf);
                writes.finish(ticket, Outcome::Done);
            }),
        ),
        (
            "read with the shadow",
            Box::new(|n| {
                let ticket = reads.begin_read(0, range(n));
                assert!(reads.finish_read(ticket, black_box(slice(&buf, n))).is_ok());
            }),
        ),
    ];
    let speeds = take_turns(&mut works, 5);
    print("payloads", &works, &speeds);
}

fn main() -> ExitCode {
    payloads();
    checks("compressible by 50 %", 50, 5);
    for _ in 0..3 {
        let ratios = checks("checks", 0, 20);
        println!(
            "{:>22}   verify / read and sum {:.2} (at least {:.2})   verify / compare {:.2} (at least {:.2})",
            "", ratios[0], AT_LEAST[0], ratios[1], AT_LEAST[1]
        );
        if ratios.iter().zip(AT_LEAST).all(|(ratio, least)| *ratio >= least) {
            return ExitCode::SUCCESS;
        }
    }
    ExitCode::FAILURE
}
