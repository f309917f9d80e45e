//! Each effect does what it says, on the calls that its rule is for, and again the same with the same seed.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::*;
use crate::fault::{Errno, HoldId, Injection, Timing};
use crate::mutant::tests::Memory;
use crate::range::SectorRange;

const BYTES: usize = 64 << 10;
const SEED: Seed = Seed::new(7);

type Faulty = FaultBackend<Arc<Memory>>;

fn faulty(plan: &str) -> (Faulty, Faults, Arc<Memory>) {
    let memory = Arc::new(Memory::new(BYTES));
    let plan = plan.parse().unwrap_or_else(|error| panic!("{error}"));
    let (backend, faults) = FaultBackend::new(Arc::clone(&memory), plan, SEED);
    (backend, faults, memory)
}

fn write(backend: &impl Backend, block: u64, blocks: usize, byte: u8) -> io::Result<()> {
    backend.write_at(&vec![byte; blocks * 512], block * 512, WriteFlags::NONE)
}

/// The first byte of each of these blocks; a block is all of one byte.
fn look(backend: &impl Backend, block: u64, blocks: usize) -> Vec<u8> {
    let mut buf = vec![0; blocks * 512];
    assert!(backend.read_at(&mut buf, block * 512).is_ok());
    buf.chunks_exact(512)
        .map(|block| {
            assert!(block.iter().all(|byte| *byte == block[0]));
            block[0]
        })
        .collect()
}

fn count(bytes: &[u8], what: u8) -> usize {
    bytes.split(|byte| *byte == what).count() - 1
}

fn errno(result: io::Result<()>) -> Option<Errno> {
    result.err().map(|error| Errno::new(error.raw_os_error().expect("an errno")).expect("an errno"))
}

/// Which of `count` writes of one block fail.
fn failing(plan: &str, count: u64) -> Vec<u64> {
    let (backend, ..) = faulty(plan);
    (1..=count).filter(|n| write(&backend, n % 100, 1, 1).is_err()).collect()
}

#[test]
fn triggers_fire_when_they_say() {
    let fails = |when: &str, count| failing(&format!("write {when}: error EIO before"), count);
    assert_eq!(failing("write: error EIO before", 3), [1, 2, 3]);
    assert_eq!(fails("nth 3", 10), [3]);
    assert_eq!(fails("every 3", 10), [3, 6, 9]);
    assert_eq!(fails("burst 2/5", 12), [1, 2, 6, 7, 11, 12]);
    assert_eq!(fails("calls 4-6", 10), [4, 5, 6]);
    assert_eq!(fails("every 2 calls 4-7", 10), [4, 6]);
    assert_eq!(fails("every 2 times 3", 100), [2, 4, 6]);
    assert_eq!(fails("range 5+2", 10), [5, 6]);
    assert_eq!(fails("nth 2 range 5+2", 10), [6]);
    assert!(failing("read: error EIO before", 10).is_empty());
    assert_eq!(failing("fua,flush: error EIO before; write nth 2: error EIO after", 3), [2]);
    let rate = fails("rate 1/10", 10_000);
    assert!((800..1200).contains(&rate.len()), "{}", rate.len());
    assert_eq!(rate, fails("rate 1/10", 10_000));
}

#[test]
fn rules_count_on_their_own_and_the_first_to_fire_does() {
    let (backend, faults, _) = faulty("write every 2: error EIO before; write every 3: error ENOSPC before");
    let seen: Vec<_> = (0..6).map(|_| errno(write(&backend, 0, 1, 1))).collect();
    let (eio, enospc) = (Some(Errno::EIO), Some(Errno::ENOSPC));
    assert_eq!(seen, [None, eio, enospc, eio, None, eio]);
    let counts: Vec<_> = faults.counts().iter().map(|rule| (rule.calls, rule.fired)).collect();
    assert_eq!(counts, [(6, 3), (6, 1)]);
    // What another rule does leaves the draws of a rate as they are.
    let alone = failing("write rate 1/5: error EIO before", 200);
    let beside = failing("write rate 1/5: error EIO before; write rate 1/7: lost", 200);
    assert_eq!(alone, beside);
}

#[test]
fn states_lead_from_rule_to_rule() {
    let plan = "write nth 2 state 0: error EIO before then 1; write nth 3 state 1: error EBUSY before then 0; \
                read state 1: error ENOSPC before";
    let (backend, faults, _) = faulty(plan);
    let mut buf = [0; 512];
    let mut seen = String::new();
    for _ in 0..8 {
        seen.push(if write(&backend, 0, 1, 1).is_ok() { '.' } else { 'w' });
        seen.push(if backend.read_at(&mut buf, 0).is_ok() { '.' } else { 'r' });
    }
    assert_eq!(seen, "..wr.r.rw.......");
    assert_eq!(faults.state(), 0);
}

#[test]
fn errors_come_before_after_and_partway() {
    let (backend, faults, memory) = faulty(
        "write nth 1: error EIO before; write nth 2: error EROFS after; write calls 3-200: error ENOSPC partway",
    );
    assert_eq!(errno(write(&backend, 0, 8, 1)), Some(Errno::EIO));
    assert_eq!(look(&*memory, 0, 8), [0; 8]);
    assert_eq!(errno(write(&backend, 0, 8, 1)), "EROFS".parse().ok());
    assert_eq!(look(&*memory, 0, 8), [1; 8]);
    let mut seen = [0; 9];
    for _ in 3..=200 {
        assert!(write(&*memory, 0, 8, 1).is_ok());
        assert_eq!(errno(write(&backend, 0, 8, 2)), Some(Errno::ENOSPC));
        let now = look(&*memory, 0, 8);
        let part = count(&now, 2);
        assert!(now[..part].iter().all(|byte| *byte == 2));
        seen[part] += 1;
    }
    assert!(seen[..8].iter().all(|count| *count > 5) && seen[8] == 0, "{seen:?}");
    let injections = faults.take_injections();
    assert_eq!(injections.len(), 200);
    assert_eq!(faults.take_injections(), []);
    assert_eq!(injections[1].to_string(), "fault #1 on write 0+8: error EROFS after");
    let Injection { number, rule, errno, range, .. } = injections[199];
    assert_eq!((number, rule, errno, range), (199, 2, Some(28), SectorRange::new(0, 8)));
}

#[test]
fn every_operation_can_fail() {
    let (backend, faults, memory) = faulty("any nth 6: lost; any: error EIO before");
    let mut buf = [9; 512];
    assert!(write(&*memory, 0, 4, 3).is_ok());
    assert!(backend.read_at(&mut buf, 0).is_err());
    assert!(write(&backend, 0, 1, 1).is_err());
    assert!(backend.write_at(&buf, 0, WriteFlags::FUA).is_err());
    assert!(backend.flush().is_err());
    assert!(backend.discard(0, 512).is_err());
    assert!(backend.write_zeroes(0, 512, ZeroFlags::NONE).is_err());
    assert!(backend.write_zeroes(0, 512, ZeroFlags::NONE).is_ok());
    assert_eq!((look(&*memory, 0, 4), buf), (vec![3; 4], [9; 512]));
    let kinds: Vec<_> = faults.take_injections().iter().map(|injection| injection.kind).collect();
    assert_eq!(kinds[..6], OpKind::ALL);
    assert_eq!(backend.geometry(), backend.inner().geometry());
}

#[test]
fn silent_effects_do_what_they_are_called() {
    let (backend, faults, memory) = faulty("write nth 1: lost; write nth 2: torn; write nth 3: misdirected");
    assert!(write(&backend, 64, 8, 1).is_ok());
    assert_eq!(look(&*memory, 0, 128), [0; 128]);
    assert!(write(&backend, 64, 8, 2).is_ok());
    let torn = count(&look(&*memory, 64, 8), 2);
    assert!(torn < 8);
    assert!(write(&backend, 20, 4, 3).is_ok());
    let all = look(&*memory, 0, 128);
    assert_ne!(all[20..24], [3; 4]);
    assert_eq!(count(&all, 3), 4);
    assert!(write(&backend, 20, 4, 4).is_ok());
    assert_eq!(look(&backend, 20, 4), [4; 4]);
    assert_eq!(faults.take_injections().len(), 3);
    assert!(faults.take_injections().iter().all(|injection| injection.errno.is_none()));

    let (backend, _, memory) = faulty("read nth 1: misdirected; read nth 2: flipped; write nth 2: flipped");
    assert!((0..128).all(|block| write(&*memory, block, 1, block as u8).is_ok()));
    assert_ne!(look(&backend, 50, 1), [50]);
    let mut buf = [0; 1024];
    let ones = |buf: &[u8], byte: u8| buf.iter().map(|seen| (seen ^ byte).count_ones()).sum::<u32>();
    assert!(write(&backend, 50, 2, 7).is_ok() && backend.read_at(&mut buf, 50 * 512).is_ok());
    assert_eq!(ones(&buf, 7), 1);
    assert_eq!(look(&backend, 50, 2), [7, 7]);
    assert!(write(&backend, 50, 2, 8).is_ok() && memory.read_at(&mut buf, 50 * 512).is_ok());
    assert_eq!(ones(&buf, 8), 1);
}

#[test]
fn stale_reads_return_what_was_overwritten() {
    let (backend, faults, memory) = faulty("read nth 2: stale");
    assert_eq!(look(&backend, 100, 1), [0]);
    assert_eq!(faults.counts()[0].calls, 0, "nothing was overwritten that it could return");
    assert!(write(&backend, 8, 8, 1).is_ok() && write(&backend, 8, 4, 2).is_ok());
    assert_eq!(look(&backend, 8, 8), [2, 2, 2, 2, 1, 1, 1, 1]);
    assert_eq!(look(&backend, 6, 8), [0, 0, 1, 1, 1, 1, 1, 1]);
    assert_eq!(look(&*memory, 6, 8), [0, 0, 2, 2, 2, 2, 1, 1]);
    assert_eq!(faults.take_injections().len(), 1);
}

#[test]
fn misdirected_calls_stay_on_the_device() {
    let (backend, ..) = faulty("any: misdirected");
    for block in 0..128 {
        for blocks in [1, 2, 100, 128] {
            if block + blocks <= 128 {
                assert!(write(&backend, block, blocks as usize, 1).is_ok(), "{block}+{blocks}");
                assert!(backend.discard(block * 512, blocks * 512).is_ok(), "{block}+{blocks}");
            }
        }
    }
}

#[test]
fn a_panic_is_recorded_before_it_happens() {
    let (backend, faults, _) = faulty("write nth 1: panic");
    assert!(catch_unwind(AssertUnwindSafe(|| write(&backend, 0, 1, 1))).is_err());
    assert_eq!(faults.take_injections()[0].errno, Some(Errno::EIO.number()));
    assert!(write(&backend, 0, 1, 1).is_ok());
}

#[test]
fn timing_is_for_whoever_asks() {
    let (backend, faults, _) =
        faulty("write nth 1: delay 5; write nth 1: hold; read: short; flush every 2: hold; any: lost");
    let range = SectorRange::new(8, 4);
    assert_eq!(faults.timing(OpKind::Write, range), Some(Timing::Delay(5)));
    // The second rule counted that call too.
    assert_eq!(faults.timing(OpKind::Write, range), None);
    for _ in 0..100 {
        let Some(Timing::Short { blocks: 1..=3 }) = faults.timing(OpKind::Read, range) else { panic!("short") };
    }
    assert_eq!(faults.timing(OpKind::Read, SectorRange::new(8, 1)), None);
    faults.release_oldest();
    assert_eq!(faults.held(), 0);
    let flush = || faults.timing(OpKind::Flush, SectorRange::default());
    let holds: Vec<_> = (0..8).filter_map(|_| flush()).collect();
    assert_eq!(holds, [0, 1, 2, 3].map(|hold| Timing::Hold(HoldId(hold))));
    faults.release_oldest();
    let released = || [0, 1, 2, 3].map(|hold| faults.released(HoldId(hold)));
    assert_eq!((faults.held(), released()), (3, [true, false, false, false]));
    assert!(!faults.wait_released(HoldId(1), Duration::from_millis(1)));
    assert!(faults.wait_released(HoldId(0), Duration::from_secs(60)));
    faults.switch(false);
    assert_eq!((faults.held(), released(), flush()), (0, [true; 4], None));
    assert_eq!(faults.take_injections().len(), 1 + 100 + 4);
    drop(backend);
}

#[test]
fn off_means_off_and_another_server_goes_on() {
    let (backend, faults, memory) = faulty("write every 2: error EIO before");
    assert!(write(&backend, 0, 1, 1).is_ok());
    faults.switch(false);
    assert!((0..10).all(|_| write(&backend, 0, 1, 1).is_ok()));
    faults.switch(true);
    drop(backend);
    let next = faults.backend(memory);
    assert!(write(&next, 0, 1, 1).is_err());
    assert_eq!(faults.counts()[0].calls, 2);
    assert_eq!(next.faults().plan().rules.len(), 1);
}

#[test]
fn stamps_come_from_the_clock() {
    let ticks = AtomicU64::new(10);
    let clock: crate::fault::Clock = Arc::new(move || ticks.fetch_add(1, Ordering::Relaxed));
    let plan = "write: error EIO after".parse().expect("a plan");
    let faults = Faults::with_clock(plan, SEED, clock);
    let backend = faults.backend(Memory::new(BYTES));
    assert!(write(&backend, 0, 1, 1).is_err());
    let [injection] = faults.take_injections()[..] else { panic!("one") };
    assert_eq!((injection.began, injection.ended), (10, 11));
    let json = serde_json::to_string(&injection).expect("json");
    assert_eq!(serde_json::from_str::<Injection>(&json).expect("json"), injection);
}

#[test]
fn one_seed_is_one_run() {
    let run = |seed: u64| {
        let mut rng = Seed::new(seed).rng();
        let mut plan = FaultPlan::draw(&mut rng, BYTES as u64 / 512);
        plan.rules.extend(FaultPlan::draw_silent(&mut rng, BYTES as u64 / 512).rules);
        let (backend, faults) = FaultBackend::new(Memory::new(BYTES), plan, Seed::new(seed));
        let mut buf = vec![0; 4096];
        let results: Vec<_> = (0..500)
            .map(|n| {
                let (offset, len) = (rng.below(120) * 512, rng.within(1..=8) as usize * 512);
                buf[..len].fill(n as u8);
                errno(match rng.below(4) {
                    0 => backend.flush(),
                    1 => backend.discard(offset, len as u64),
                    2 => backend.read_at(&mut buf[..len], offset),
                    _ => backend.write_at(&buf[..len], offset, WriteFlags::NONE),
                })
            })
            .collect();
        faults.switch(false);
        let mut all = vec![0; BYTES];
        assert!(backend.read_at(&mut all, 0).is_ok());
        (results, faults.take_injections(), all)
    };
    for seed in 0..50 {
        assert_eq!(run(seed), run(seed));
    }
}

#[test]
fn threads_may_call_at_once() {
    let (backend, faults, _) = faulty("write every 10: error EIO before; read rate 1/3: stale; any: lost");
    let failed = Mutex::new(0);
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let (backend, failed) = (&backend, &failed);
            scope.spawn(move || {
                let errors = (0..500).filter(|_| write(backend, thread * 8, 8, 1).is_err()).count();
                *failed.lock().expect("no panic") += errors;
            });
        }
    });
    assert_eq!(*failed.lock().expect("no panic"), 200);
    assert_eq!(faults.take_injections().len(), 2000);
}
