//! Plans: any options make a plan whose operations keep to them, or an error.

use ublkit_harness::{Capabilities, IoSize, Mix, OpKind, Plan, PlanOptions, SectorRange, Seed};

use crate::Input;

pub(super) fn run(bytes: &[u8]) {
    if let Ok(options) = serde_json::from_slice::<PlanOptions>(bytes) {
        draw(options);
    }
    let mut input = Input::new(bytes);
    let mix = std::array::from_fn(|_| input.u64() as u32);
    let [read, write, fua, flush, discard, zeroes] = mix;
    draw(PlanOptions {
        device_bytes: input.u64(),
        logical_block_bytes: input.u64(),
        max_io_bytes: input.u64(),
        alignment_bytes: input.u64(),
        regions: (0..input.byte() % 4).map(|_| SectorRange::new(input.u64(), input.u64())).collect(),
        workers: input.u64() as u32,
        depth: input.u64() as u32,
        mix: Mix { read, write, fua, flush, discard, zeroes },
        size: if input.flag() { IoSize::Any } else { IoSize::Fixed(input.u64()) },
        capabilities: Capabilities {
            flush: input.flag(),
            fua: input.flag(),
            discard: input.flag(),
            write_zeroes: input.flag(),
        },
    });
}

fn draw(options: PlanOptions) {
    let plan = match Plan::new(options, Seed::new(1)) {
        Ok(plan) => plan,
        Err(error) => return assert!(!error.to_string().is_empty()),
    };
    let options = plan.options();
    let device = SectorRange::device(options.device_bytes);
    for worker in [0, options.workers - 1] {
        for op in plan.worker(worker).take(20) {
            assert_eq!(op.range.is_empty(), op.kind == OpKind::Flush);
            assert!(op.kind == OpKind::Flush || device.covers(op.range), "{op:?}");
            assert!(op.range.offset_bytes().is_multiple_of(options.alignment_bytes), "{op:?}");
            assert!(op.range.len_bytes() <= options.longest_bytes(), "{op:?}");
        }
    }
}
