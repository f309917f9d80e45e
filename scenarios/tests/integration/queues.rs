//! Threads: how many calls run at once, where, and as what.

use std::fs;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use ublkit::{Controller, Geometry};

use super::client::{self, MIB, direct, start_with};
use super::disk::{Disk, Op};
use super::runner::cases;

cases!("queues":
    four_workers_serve_four_calls_at_once,
    inline_calls_come_one_after_the_other,
    every_queue_is_used,
    queue_threads_run_where_their_io_comes_from,
    server_threads_are_marked_as_io_flushers,
    server_threads_can_stay_unmarked,
);

/// How many writes are inside the backend at once, at most, when four clients write at once and each call waits
/// `patience` for company.
fn most_at_once(workers: usize, patience: Duration) -> usize {
    let disk = Disk::new(Geometry::bytes(8 * MIB));
    let inside = Arc::new((Mutex::new(0), Condvar::new()));
    let most = Arc::new(AtomicUsize::new(0));
    disk.hook({
        let (inside, most) = (Arc::clone(&inside), Arc::clone(&most));
        move |call| {
            if call.op == Op::Write {
                let (count, changed) = &*inside;
                let mut now = count.lock().expect("lock");
                *now += 1;
                most.fetch_max(*now, Ordering::SeqCst);
                changed.notify_all();
                let alone = |now: &mut usize| *now < 4 && most.load(Ordering::SeqCst) < 4;
                let mut now = changed.wait_timeout_while(now, patience, alone).expect("lock").0;
                *now -= 1;
            }
            Ok(())
        }
    });
    let device = start_with(&disk, |builder| builder.workers(workers));
    let file = direct(&device);
    std::thread::scope(|scope| {
        for writer in 0..4 {
            let file = &file;
            scope.spawn(move || client::write(file, writer, writer * 2 * MIB, 512).expect("write"));
        }
    });
    let writes = disk.calls_of(Op::Write);
    assert_eq!(writes.len(), 4, "{writes:?}");
    let prefix = if workers > 0 { format!("ublk{}-w", device.id()) } else { format!("ublk{}-q", device.id()) };
    assert!(writes.iter().all(|call| call.thread.starts_with(&prefix)), "{writes:?}");
    drop(file);
    client::close(&device);
    most.load(Ordering::SeqCst)
}

fn four_workers_serve_four_calls_at_once() {
    assert_eq!(most_at_once(4, Duration::from_secs(10)), 4);
}

fn inline_calls_come_one_after_the_other() {
    assert_eq!(most_at_once(0, Duration::from_millis(100)), 1);
}

fn pin(cpu: usize) {
    let mut set = CpuSet::new();
    set.set(cpu).expect("a CPU");
    sched_setaffinity(Pid::from_raw(0), &set).expect("pin");
}

fn every_queue_is_used() {
    let disk = Disk::new(Geometry::bytes(8 * MIB));
    let device = start_with(&disk, |builder| builder.queues(2));
    let queues = device.info().queues();
    assert_eq!(queues, 2, "these trials need two CPUs");
    let controller = Controller::open().expect("open");
    let file = direct(&device);
    let mut covered = Vec::new();
    for queue in 0..queues {
        let cpus = controller.get_queue_affinity(device.id(), queue).expect("affinity");
        assert!(!cpus.is_empty());
        covered.extend(cpus.iter().copied());
        disk.forget();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                pin(cpus[0]);
                for round in 0..8 {
                    client::write(&file, 1, u64::from(queue) * 4 * MIB + round * 8192, 4096).expect("write");
                }
            });
        });
        let writes = disk.calls_of(Op::Write);
        let name = format!("ublk{}-q{queue}", device.id());
        assert_eq!(writes.len(), 8);
        assert!(writes.iter().all(|call| call.thread == name), "from CPU {}: {writes:?}", cpus[0]);
    }
    covered.sort_unstable();
    let present = (0..covered.len()).collect::<Vec<_>>();
    assert_eq!(covered, present, "each CPU has one queue");
    drop(file);
    client::close(&device);
    assert!(device.stats().iter().all(|queue| queue.requests >= 8 && queue.batches > 0), "{:?}", device.stats());
}

/// Threads of this process with this name: what `/proc` says of each in `file`.
fn threads(name: &str, file: &str) -> Vec<String> {
    fs::read_dir("/proc/self/task")
        .expect("tasks")
        .flatten()
        .filter(|task| fs::read_to_string(task.path().join("comm")).is_ok_and(|comm| comm.trim() == name))
        .map(|task| fs::read_to_string(task.path().join(file)).expect("read"))
        .collect()
}

fn allowed_cpus(name: &str) -> String {
    let status = threads(name, "status");
    let [status] = &status[..] else { panic!("one thread is called {name}: {}", status.len()) };
    let line = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).expect("in status");
    line.trim().to_owned()
}

fn queue_threads_run_where_their_io_comes_from() {
    let controller = Controller::open().expect("open");
    let disk = Disk::new(Geometry::bytes(MIB));
    let everywhere = allowed_cpus("trial");
    for affinity in [true, false] {
        let device = start_with(&disk, |builder| builder.queues(2).affinity(affinity));
        for queue in 0..2 {
            let cpus = controller.get_queue_affinity(device.id(), queue).expect("affinity");
            let allowed = allowed_cpus(&format!("ublk{}-q{queue}", device.id()));
            if affinity {
                let want = cpus.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
                assert_eq!(allowed, want, "queue {queue}");
            } else {
                assert_eq!(allowed, everywhere, "queue {queue}");
            }
        }
        client::close(&device);
    }
}

/// `PF_MEMALLOC_NOIO` and `PF_LOCAL_THROTTLE`, which `PR_SET_IO_FLUSHER` sets (`include/linux/sched.h`).
const IO_FLUSHER: u64 = 0x0008_0000 | 0x0010_0000;

fn marked(name: &str) -> bool {
    let stat = threads(name, "stat");
    let [stat] = &stat[..] else { panic!("one thread is called {name}: {stat:?}") };
    // The name, in parentheses, may hold anything; the flags are the seventh field behind it.
    let behind = stat.rsplit_once(')').expect("a name").1;
    let flags: u64 = behind.split_whitespace().nth(6).expect("flags").parse().expect("a number");
    assert!(flags & IO_FLUSHER == 0 || flags & IO_FLUSHER == IO_FLUSHER, "{name}: {flags:#x}");
    flags & IO_FLUSHER != 0
}

fn mark(on: bool) {
    let disk = Disk::new(Geometry::bytes(MIB));
    let device = start_with(&disk, |builder| builder.queues(2).workers(3).io_flusher(on));
    // A worker marks itself when it begins: one that has served surely has.
    client::eventually("the workers are marked", || marked(&format!("ublk{}-w2", device.id())) == on);
    for thread in ["q0", "q1", "w0", "w1"] {
        assert_eq!(marked(&format!("ublk{}-{thread}", device.id())), on, "{thread}");
    }
    assert!(!marked("trial"), "the threads of the program are left alone");
    client::close(&device);
}

fn server_threads_are_marked_as_io_flushers() {
    mark(true);
}

fn server_threads_can_stay_unmarked() {
    mark(false);
}
