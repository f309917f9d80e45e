//! How fast overlapping operations are judged, and in how much memory.
//!
//! `cargo run --release -p ublkit-harness --example linear_speed` makes up a history of a million operations by 16 workers,
//! of up to 8 blocks each, 64 of them in flight over 10,000 blocks, and judges it. It ends with 1 when that takes a second
//! or more of one core, or more memory than four bytes per block and so much per operation in flight.

use std::ops::Range;
use std::process::ExitCode;
use std::time::Instant;

use ublkit_harness::linear::Linear;
use ublkit_harness::{Content, Outcome, Seed, Stamp};

const OPS: usize = 1_000_000;
const BLOCKS: u64 = 10_000;
const WORKERS: usize = 16;
const DEPTH: usize = 4;
const SECONDS: f64 = 1.0;

/// What the quiet blocks take, as segments and their directory are rounded up.
const TABLE_BYTES: usize = 128 << 10;

/// What an operation in flight may take: its blocks, the ones that ended since it began, and doubling vectors.
const FLIGHT_BYTES: usize = 32 << 10;

/// One event; contents lie one after the other in one vector, from `first` on.
enum Event {
    Begin { blocks: Range<u64>, first: usize },
    End { blocks: Range<u64>, first: usize, began: Stamp, outcome: Outcome },
    Read { blocks: Range<u64>, first: usize, began: Stamp },
}

struct Flight {
    blocks: Range<u64>,
    began: Stamp,
    first: usize,
    read: bool,
    done: bool,
}

/// What is judged: events, each with its stamp and the begin of what is then the oldest in flight.
struct History {
    events: Vec<(Event, Stamp, Stamp)>,
    contents: Vec<Content>,
}

fn make() -> History {
    let mut rng = Seed::new(1).rng();
    let mut history = History { events: Vec::with_capacity(2 * OPS), contents: Vec::new() };
    let mut holds = vec![Content::Zero; BLOCKS as usize];
    let mut newest = vec![0; BLOCKS as usize];
    let mut flights: Vec<Flight> = Vec::new();
    let mut begun = 0;
    let mut stamp = 0;
    while begun < OPS || !flights.is_empty() {
        let effect = |flight: &mut Flight, contents: &mut [Content], holds: &mut [Content]| {
            if std::mem::replace(&mut flight.done, true) {
                return;
            }
            let contents = &mut contents[flight.first..];
            let held = &mut holds[flight.blocks.start as usize..flight.blocks.end as usize];
            for (content, held) in contents.iter_mut().zip(held) {
                if flight.read {
                    *content = *held;
                } else {
                    *held = *content;
                }
            }
        };
        let event = if begun < OPS && flights.len() < WORKERS * DEPTH {
            begun += 1;
            let count = rng.within(1..=8);
            let start = rng.below(BLOCKS - count + 1);
            let (blocks, first) = (start..start + count, history.contents.len());
            let kind = rng.below(64);
            for block in blocks.clone() {
                let next = &mut newest[block as usize];
                *next += u32::from((33..).contains(&kind));
                history.contents.push(if kind < 33 { Content::Zero } else { Content::Written(*next) });
            }
            let read = kind < 32;
            flights.push(Flight { blocks: blocks.clone(), began: stamp + 1, first, read, done: false });
            if read {
                stamp += 1;
                continue;
            }
            Event::Begin { blocks, first }
        } else {
            // Any in flight may take effect, and any may be the next to end.
            let early = rng.below(flights.len() as u64) as usize;
            effect(&mut flights[early], &mut history.contents, &mut holds);
            let mut flight = flights.swap_remove(rng.below(flights.len() as u64) as usize);
            effect(&mut flight, &mut history.contents, &mut holds);
            let Flight { blocks, began, first, read, .. } = flight;
            if read {
                Event::Read { blocks, first, began }
            } else {
                Event::End { blocks, first, began, outcome: Outcome::Done }
            }
        };
        stamp += 1;
        let oldest = flights.iter().map(|flight| flight.began).min().unwrap_or(stamp + 1);
        history.events.push((event, stamp, oldest));
    }
    history
}

/// What this thread took of its core so far, in seconds; others on the machine do not count.
fn core_seconds() -> Option<f64> {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").ok()?;
    let nanoseconds: u64 = text.split(' ').next()?.parse().ok()?;
    Some(nanoseconds as f64 / 1e9)
}

fn main() -> ExitCode {
    let history = make();
    let mut linear = Linear::new(BLOCKS, Content::Zero);
    let (mut busy, mut memory) = (0, 0);
    let (core, clock) = (core_seconds(), Instant::now());
    for (number, (event, now, oldest)) in history.events.iter().enumerate() {
        match event {
            Event::Begin { blocks, first } => {
                let contents = &history.contents[*first..];
                let content_of = |block| contents[(block - blocks.start) as usize];
                linear.begin_change(blocks.clone(), content_of, *now);
            }
            Event::End { blocks, first, began, outcome } => {
                let contents = &history.contents[*first..];
                let content_of = |block| contents[(block - blocks.start) as usize];
                linear.end_change(blocks.clone(), content_of, *began, *now, *outcome);
            }
            Event::Read { blocks, first, began } => {
                for (block, seen) in blocks.clone().zip(&history.contents[*first..]) {
                    if let Err(disorder) = linear.read(block, *seen, *began, *now) {
                        println!("what is right was called wrong: {disorder}");
                        return ExitCode::FAILURE;
                    }
                }
            }
        }
        linear.horizon(*oldest);
        if number % 4096 == 0 {
            busy = busy.max(linear.busy_blocks());
            memory = memory.max(linear.memory_bytes());
        }
    }
    let elapsed = clock.elapsed().as_secs_f64();
    let seconds = core.zip(core_seconds()).map_or(elapsed, |(begin, end)| end - begin);
    memory = memory.max(linear.memory_bytes());
    let bound = BLOCKS as usize * 4 + TABLE_BYTES + WORKERS * DEPTH * FLIGHT_BYTES;
    println!(
        "{OPS} operations on {} blocks: {seconds:.3} s of a core, {elapsed:.3} s in all",
        history.contents.len()
    );
    println!("{:.0} operations a second", OPS as f64 / seconds);
    println!("at most {busy} of {BLOCKS} blocks busy, {memory} bytes of at most {bound}");
    if seconds >= SECONDS || memory > bound {
        println!("too slow or too large: less than {SECONDS} s and at most {bound} bytes are wanted");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}
