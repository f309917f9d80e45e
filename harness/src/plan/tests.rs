//! Plans replay, stay where they belong, and reach the edges.

use super::*;
use crate::seed::SeededRng;

fn ops(options: &PlanOptions, seed: u64, worker: u32, count: usize) -> Vec<Op> {
    let plan = Plan::new(options.clone(), Seed::new(seed)).expect("valid options");
    plan.worker(worker).take(count).collect()
}

#[test]
fn one_seed_is_one_stream() {
    let options = PlanOptions::new(64 << 20, 512, 512 << 10, 4);
    let stream = ops(&options, 1, 2, 500);
    assert_eq!(stream, ops(&options, 1, 2, 500));
    assert_ne!(stream, ops(&options, 2, 2, 500));
    let kinds = |ops: &[Op]| ops.iter().map(|op| (op.kind, op.range.sectors)).collect::<Vec<_>>();
    assert_ne!(kinds(&stream), kinds(&ops(&options, 1, 3, 500)));
    assert!(stream.iter().enumerate().all(|(at, op)| op.index == at as u64));
}

/// A plan drawn by another version has to be the same one, or no seed in a report is worth anything.
#[test]
fn streams_are_pinned() {
    let options = PlanOptions::new(64 << 20, 4096, 512 << 10, 2);
    let drawn = ops(&options, 42, 1, 1000).iter().fold(0_u64, |hash, op| {
        let word = op.range.first << 20 ^ op.range.sectors << 3 ^ op.kind as u64;
        (hash ^ word).wrapping_mul(0x0000_0100_0000_01b3)
    });
    assert_eq!(drawn, 11_332_300_895_360_699_036);
}

fn draw_options(rng: &mut SeededRng) -> PlanOptions {
    let block = 512 << rng.below(4);
    let magnitude = rng.within(0..=20);
    let device = block * rng.within(1..=1 << magnitude);
    let mut options = PlanOptions::new(device, block, block * rng.within(1..=512), rng.within(1..=9) as u32);
    options.capabilities = Capabilities {
        flush: rng.chance(1, 2),
        fua: rng.chance(1, 2),
        discard: rng.chance(1, 2),
        write_zeroes: rng.chance(1, 2),
    };
    options
}

#[test]
fn operations_are_aligned_and_stay_in_their_region() {
    let mut rng = Seed::new(3).rng();
    for seed in 0..200 {
        let options = draw_options(&mut rng);
        let worker = rng.below(u64::from(options.workers)) as u32;
        let region = options.regions[worker as usize];
        let unit = options.alignment_bytes / SECTOR as u64;
        for op in ops(&options, seed, worker, 300) {
            if op.kind == OpKind::Flush {
                assert!(op.range.is_empty());
                continue;
            }
            assert!(region.covers(op.range) && !op.range.is_empty(), "{op:?} in {region}");
            assert!(op.range.first.is_multiple_of(unit) && op.range.sectors.is_multiple_of(unit));
            assert!(options.offered_mix().weight(op.kind) > 0);
        }
    }
}

#[test]
fn edges_are_hit() {
    let options = PlanOptions::new(1 << 30, 4096, 512 << 10, 1);
    let drawn = ops(&options, 5, 0, 10_000);
    let hits = |what: &dyn Fn(&Op) -> bool| drawn.iter().filter(|op| op.kind != OpKind::Flush && what(op)).count();
    let (unit, max) = (8, 1024);
    let end = SectorRange::device(1 << 30).end();
    assert!(hits(&|op| op.range.first == 0) > 100);
    assert!(hits(&|op| op.range.end() == end) > 100);
    assert!(hits(&|op| op.range.end() == end && op.range.sectors == unit) > 10);
    assert!(hits(&|op| op.range.sectors == unit) > 1000);
    assert!(hits(&|op| op.range.sectors == max) > 200);
    assert!(hits(&|op| op.range.sectors == max - unit) > 50);
    assert!(hits(&|op| op.range.sectors == max + unit) > 50);
    assert!(hits(&|op| op.range.sectors > 2 * max) > 50);
    assert!(hits(&|op| op.range.first % 8192 == 0) > 200);
    let repeats = drawn.windows(RECENT_OPS).filter(|ops| {
        let last = ops[RECENT_OPS - 1];
        last.kind == OpKind::Read
            && ops[..RECENT_OPS - 1].iter().any(|op| op.kind.changes() && op.range == last.range)
    });
    assert!(repeats.count() > 500);
}

const RECENT_OPS: usize = 30;

#[test]
fn weights_and_capabilities_are_obeyed() {
    let mut options = PlanOptions::new(1 << 30, 512, 128 << 10, 1);
    options.mix = "read=1, write=3".parse().expect("a mix");
    let drawn = ops(&options, 1, 0, 8000);
    let writes = drawn.iter().filter(|op| op.kind == OpKind::Write).count();
    assert!((5700..6300).contains(&writes), "{writes}");
    assert!(drawn.iter().all(|op| matches!(op.kind, OpKind::Read | OpKind::Write)));

    options.mix = "flush=1,discard=1".parse().expect("a mix");
    options.capabilities = Capabilities { flush: false, fua: false, discard: false, write_zeroes: false };
    let error = Plan::new(options, Seed::new(1)).expect_err("nothing is left");
    assert!(error.to_string().contains("nothing that the device offers"), "{error}");
}

#[test]
fn fixed_sizes_lie_at_multiples_of_themselves() {
    let mut options = PlanOptions::new(10 << 20, 512, 128 << 10, 3);
    options.size = IoSize::Fixed(128 << 10);
    for worker in 0..3 {
        let drawn = ops(&options, 1, worker, 500);
        let ranges = drawn.iter().filter(|op| op.kind != OpKind::Flush).map(|op| op.range);
        for range in ranges {
            assert!(range.sectors == 256 && range.first.is_multiple_of(256));
            assert!(options.regions[worker as usize].covers(range));
        }
    }
    options.size = IoSize::Fixed(1000);
    assert!(Plan::new(options.clone(), Seed::new(1)).is_err());
    options.size = IoSize::Fixed(0);
    assert!(Plan::new(options.clone(), Seed::new(1)).is_err());
    options.size = IoSize::Fixed(4 << 20);
    let error = Plan::new(options, Seed::new(1)).expect_err("a region is smaller");
    assert!(error.to_string().contains("no room"), "{error}");
}

#[test]
fn absurd_options_are_refused() {
    let refuse = |change: &dyn Fn(&mut PlanOptions), why: &str| {
        let mut options = PlanOptions::new(1 << 20, 4096, 128 << 10, 2);
        change(&mut options);
        let error = Plan::new(options, Seed::new(1)).expect_err(why).to_string();
        assert!(error.contains(why), "{error}");
    };
    refuse(&|options| options.logical_block_bytes = 1000, "power of two");
    refuse(&|options| options.logical_block_bytes = 0, "power of two");
    refuse(&|options| options.device_bytes = 5000, "does not consist of logical blocks");
    refuse(&|options| options.device_bytes = 1 << 60, "512 TiB");
    refuse(&|options| options.alignment_bytes = 512, "alignment");
    refuse(&|options| options.max_io_bytes = 512, "largest I/O");
    refuse(&|options| options.workers = 0, "worker");
    refuse(&|options| options.depth = 0, "depth");
    refuse(&|options| options.regions.clear(), "region");
    refuse(&|options| options.regions[0].sectors = 1 << 40, "not in the device");
    refuse(&|options| options.regions[0].first = 1, "alignment");
    refuse(&|options| options.mix = Mix::NOTHING, "nothing that the device offers");
    let tiny = PlanOptions::new(4096, 4096, 4096, 8);
    assert_eq!((tiny.workers, tiny.regions.len()), (1, 1));
    assert_eq!(ops(&tiny, 1, 0, 100).len(), 100);
}

#[test]
fn mixes_and_options_round_trip() {
    let mix: Mix = "read=50,write=40,flush=1,fua=3,discard=3,zeroes=3".parse().expect("a mix");
    assert_eq!(mix, Mix::default());
    assert_eq!(mix.to_string().parse(), Ok(mix));
    for wrong in ["", "read", "read=x", "read=-1", "writes=3", "read=0", "read=1,,write=1", "read=99999999999"] {
        assert!(wrong.parse::<Mix>().is_err(), "{wrong}");
    }
    let options = PlanOptions::new(1 << 30, 512, 128 << 10, 3);
    let json = serde_json::to_string(&options).expect("plain data");
    assert!(json.contains("\"mix\":\"read=50,"), "{json}");
    assert_eq!(serde_json::from_str::<PlanOptions>(&json).ok(), Some(options));
    for kind in OpKind::ALL {
        assert!(!kind.to_string().is_empty());
    }
}
