//! Stopping threads, and taking what their stacks are read from.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use nix::sys::ptrace::{self, Options};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

/// How long threads may take to stop. Those that do not sleep uninterruptibly take microseconds.
const STOP: Duration = Duration::from_millis(400);
/// How much of a stack is taken at once; what is deeper is read when it is asked for.
const TAKEN_BYTES: usize = 128 << 10;

/// Registers and stack of a thread at one moment.
pub(super) struct Taken {
    pub(super) tid: u32,
    pub(super) registers: Registers,
    stack: Vec<u8>,
}

/// What unwinding begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Registers {
    pub(super) pc: u64,
    pub(super) sp: u64,
    /// The frame pointer: `rbp` or `x29`.
    pub(super) fp: u64,
    /// The link register, where there is one.
    pub(super) lr: u64,
}

impl Taken {
    /// The word at `address`, if it is in what was taken.
    pub(super) fn word(&self, address: u64) -> Option<u64> {
        let at = usize::try_from(address.checked_sub(self.registers.sp)?).ok()?;
        self.stack.get(at..)?.first_chunk().map(|bytes| u64::from_ne_bytes(*bytes))
    }
}

/// Takes registers and stacks of all threads of process `pid`, at the same moment as nearly as that can be had, and lets
/// them go on. Says why some are missing.
pub(super) fn take(pid: u32) -> (Vec<Taken>, Vec<String>) {
    let tasks = format!("/proc/{pid}/task");
    let mut remarks = Vec::new();
    let mut tids: Vec<u32> = match fs::read_dir(&tasks) {
        Ok(entries) => entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect(),
        Err(error) => return (Vec::new(), vec![format!("its threads cannot be listed: {error}")]),
    };
    tids.sort_unstable();
    let memory = match File::open(format!("/proc/{pid}/mem")) {
        Ok(memory) => memory,
        Err(error) => return (Vec::new(), vec![format!("its memory cannot be read: {error}")]),
    };
    let mut seized = Vec::new();
    let mut refused = None;
    for &tid in &tids {
        let thread = Pid::from_raw(tid.cast_signed());
        match ptrace::seize(thread, Options::empty()).and_then(|()| ptrace::interrupt(thread)) {
            Ok(()) => seized.push((tid, false)),
            // Ended meanwhile, or somebody else traces it.
            Err(error) => refused = Some(error),
        }
    }
    if let (true, Some(error)) = (seized.is_empty(), refused) {
        remarks.push(format!("its threads cannot be stopped: {error}"));
    }
    wait_stopped(&mut seized);
    let stopped = |tid: u32| seized.contains(&(tid, true));
    let taken = tids
        .iter()
        .filter_map(|&tid| {
            let registers = if stopped(tid) { of_stopped(tid) } else { of_sleeping(&tasks, tid) };
            let registers = registers?;
            let mut stack = vec![0; TAKEN_BYTES];
            let len = memory.read_at(&mut stack, registers.sp).unwrap_or(0);
            stack.truncate(len);
            Some(Taken { tid, registers, stack })
        })
        .collect();
    for (tid, _) in seized {
        // One that did not stop is let go when this process ends.
        let _ = ptrace::detach(Pid::from_raw(tid.cast_signed()), None);
    }
    (taken, remarks)
}

/// Waits until all of them have stopped or do not seem to.
fn wait_stopped(seized: &mut [(u32, bool)]) {
    let deadline = Instant::now() + STOP;
    while seized.iter().any(|(_, stopped)| !stopped) && Instant::now() < deadline {
        for (tid, stopped) in seized.iter_mut().filter(|(_, stopped)| !stopped) {
            let flags = WaitPidFlag::__WALL | WaitPidFlag::WNOHANG;
            match waitpid(Pid::from_raw(tid.cast_signed()), Some(flags)) {
                Ok(WaitStatus::StillAlive) => {}
                // Gone is as good as stopped: its registers cannot be read then.
                _ => *stopped = true,
            }
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[cfg(target_arch = "x86_64")]
fn of_stopped(tid: u32) -> Option<Registers> {
    let registers = ptrace::getregs(Pid::from_raw(tid.cast_signed())).ok()?;
    Some(Registers { pc: registers.rip, sp: registers.rsp, fp: registers.rbp, lr: 0 })
}

#[cfg(target_arch = "aarch64")]
fn of_stopped(tid: u32) -> Option<Registers> {
    let registers = ptrace::getregs(Pid::from_raw(tid.cast_signed())).ok()?;
    Some(Registers { pc: registers.pc, sp: registers.sp, fp: registers.regs[29], lr: registers.regs[30] })
}

/// What the kernel says of a thread that sleeps in it: without the frame pointer, for which code that was compiled
/// without one has no use.
fn of_sleeping(tasks: &str, tid: u32) -> Option<Registers> {
    in_syscall(&fs::read_to_string(format!("{tasks}/{tid}/syscall")).ok()?)
}

/// Number, six arguments, stack pointer, program counter; a page fault has the last two only. `running` says nothing.
fn in_syscall(text: &str) -> Option<Registers> {
    let mut words = text.split_ascii_whitespace().rev();
    let mut hex = || u64::from_str_radix(words.next()?.strip_prefix("0x")?, 16).ok();
    let (pc, sp) = (hex()?, hex()?);
    Some(Registers { pc, sp, fp: 0, lr: 0 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_a_sleeping_thread_came_from_is_read() {
        let place = Some(Registers { pc: 0x7f01, sp: 0x7ffc, fp: 0, lr: 0 });
        assert_eq!(in_syscall("0 0x3 0x55 0x1000 0x0 0x0 0x0 0x7ffc 0x7f01\n"), place);
        assert_eq!(in_syscall("-1 0x7ffc 0x7f01\n"), place);
        assert_eq!(in_syscall("running\n"), None);
        assert_eq!(in_syscall(""), None);
    }

    #[test]
    fn words_outside_of_what_was_taken_are_none() {
        let registers = Registers { pc: 0, sp: 0x1000, fp: 0, lr: 0 };
        let taken =
            Taken { tid: 1, registers, stack: [1u64, 2].iter().flat_map(|word| word.to_ne_bytes()).collect() };
        assert_eq!((taken.word(0x1000), taken.word(0x1008)), (Some(1), Some(2)));
        assert_eq!((taken.word(0x1009), taken.word(0xfff), taken.word(u64::MAX)), (None, None, None));
    }
}
