//! Bugs of kernels that would end a run, and what is left out because of them: by name, never by silence.
//!
//! A scenario asks [`Context::gated`](crate::Context::gated) before it does what is known to wedge this kernel. What is left out is
//! said in the events and counted, so that a table of many kernels can show it.

use std::fmt;

/// A kernel's version: 7.2.12 is (7, 2, 12).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct KernelVersion(pub u32, pub u32, pub u32);

impl KernelVersion {
    /// The version in a release such as `6.12.117+deb12-amd64` or `7.3-rc7-amd64`; numbers that are missing are 0.
    #[must_use]
    pub fn of_release(release: &str) -> Self {
        let numeric = release.split(|c: char| !c.is_ascii_digit() && c != '.').next().unwrap_or_default();
        let mut numbers = numeric.split('.').map(|number| number.parse().unwrap_or(0));
        let mut next = || numbers.next().unwrap_or(0);
        Self(next(), next(), next())
    }

    /// Of the kernel that this runs on.
    #[must_use]
    pub fn here() -> Self {
        nix::sys::utsname::uname().map_or(Self(0, 0, 0), |uname| Self::of_release(&uname.release().to_string_lossy()))
    }
}

impl fmt::Display for KernelVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.0, self.1, self.2)
    }
}

/// A bug of some kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gate {
    /// Its short name.
    pub name: &'static str,
    /// What goes wrong in the kernel.
    pub bug: &'static str,
    /// Where it is put right, as far as is known.
    pub fixed: &'static str,
    /// The kernels that have it: from the first to before the second.
    pub kernels: &'static [(KernelVersion, KernelVersion)],
}

impl Gate {
    /// Whether `kernel` has the bug.
    #[must_use]
    pub fn is_shut(&self, kernel: KernelVersion) -> bool {
        self.kernels.iter().any(|(first, fixed)| (*first..*fixed).contains(&kernel))
    }
}

/// Debian's 6.18.15 dies in DEL of a device whose queues ended before START.
pub const ABANDONED_START: Gate = Gate {
    name: "abandoned-start",
    bug: "DEL of a device whose queues ended before START: use after free in __io_uring_cmd_done below ublk_stop_dev",
    fixed: "7.2.12 or earlier; 6.12.117 does not have it",
    kernels: &[(KernelVersion(6, 16, 0), KernelVersion(7, 1, 0))],
};

/// Kernels before 7.2 let START go on with commands that were cancelled when its server died.
pub const KILLED_START: Gate = Gate {
    name: "killed-start",
    bug: "a server that dies between its last FETCH and the end of START: START goes on with cancelled commands, which are \
          used after they were freed",
    fixed: "7.2.12",
    kernels: &[(KernelVersion(6, 0, 0), KernelVersion(7, 2, 0))],
};

/// Kernels before 6.18 read the partition table within START, and wait for it beyond any signal.
pub const KILLED_SCAN: Gate = Gate {
    name: "killed-scan",
    bug: "a server that dies while START reads the partition table: START holds the device's mutex and waits for the read, the \
          read for the server's end, and that for the mutex",
    fixed: "6.18, where START does not wait for the partition table",
    kernels: &[(KernelVersion(6, 0, 0), KernelVersion(6, 18, 0))],
};

/// Kernels before 6.16 notice the death of a server by its idle tags alone.
pub const FULL_QUEUE: Gate = Gate {
    name: "full-queue",
    bug: "a server that dies with every tag of a queue in hand: nothing is left to be cancelled, and the death is noticed when \
          the block layer's timeout comes, 30 s later",
    fixed: "6.16",
    kernels: &[(KernelVersion(6, 0, 0), KernelVersion(6, 16, 0))],
};

/// Kernels before 6.16 lose requests that are on their way to a ring while it is closed.
pub const DETACH_UNDER_LOAD: Gate = Gate {
    name: "detach-under-load",
    bug: "a ring that is closed while requests are on their way to it: the command that brings them is ended all the same, they are \
          never taken back, and the device, DEL included, hangs for ever",
    fixed: "6.18.15 or earlier; 6.12.117 has it",
    kernels: &[(KernelVersion(6, 0, 0), KernelVersion(6, 16, 0))],
};

/// Recoveries that are given up halfway leave these kernels in a state that nothing gets them out of.
pub const KILLED_RECOVERY: Gate = Gate {
    name: "killed-recovery",
    bug: "a server that dies after it has fetched in a recovery: 6.12 drops a reference to no task (put_task_struct(NULL)) in the \
          next START_USER_RECOVERY; 6.16 to 7.0 keep commands marked as cancelled, and the device, DEL included, hangs for ever",
    fixed: "7.1.13 or earlier",
    kernels: &[(KernelVersion(6, 0, 0), KernelVersion(7, 1, 0))],
};

/// Kernels from 7.0 on die of a request to a queue that is recovered when its server dies before the others are.
pub const HALF_RECOVERED_DEATH: Gate = Gate {
    name: "half-recovered-death",
    bug: "a server that dies in a recovery when one queue has all its tags and another has not: the first queue is not marked as \
          canceling again, and its next request goes to a command that is gone (a NULL pointer is followed in ublk_queue_rq)",
    fixed: "not yet: 7.2.12 dies of it and 7.3-rc7 has the same code; a patch is on linux-block, 'ublk: clear ub->canceling with the \
            queue's own flag' of 2026-09-28",
    kernels: &[(KernelVersion(7, 0, 0), KernelVersion(u32::MAX, 0, 0))],
};

/// 6.16 to 7.0 die in `UPDATE_SIZE` of a device that has no disk.
pub const UPDATE_SIZE_UNSTARTED: Gate = Gate {
    name: "update-size-unstarted",
    bug: "UPDATE_SIZE of a device that is not started: a null pointer is followed",
    fixed: "7.1.13 or earlier; 6.12 has no such command",
    kernels: &[(KernelVersion(6, 16, 0), KernelVersion(7, 1, 0))],
};

/// A device that was stopped can be started again while its server still has it open, with commands that the driver has given
/// back: 6.12.117 waits for ever in the partition scan, with the driver's mutex.
pub const START_AFTER_STOP: Gate = Gate {
    name: "start-after-stop",
    bug: "START of a stopped device whose server still has it open is accepted, and its I/O goes to commands that have been \
          given back",
    fixed: "not known: 7.2.12 accepts it, later kernels were not tried",
    kernels: &[(KernelVersion(0, 0, 0), KernelVersion(u32::MAX, 0, 0))],
};

/// 6.12 and 6.18 start a device whose server has died.
pub const START_AFTER_DEATH: Gate = Gate {
    name: "start-after-death",
    bug: "START of a device whose server died is accepted with nobody there to serve it",
    fixed: "7.2.12 or earlier",
    kernels: &[(KernelVersion(0, 0, 0), KernelVersion(7, 1, 0))],
};

/// 6.12 ends a recovery that was not begun.
pub const UNBEGUN_RECOVERY: Gate = Gate {
    name: "unbegun-recovery",
    bug: "END_USER_RECOVERY before START_USER_RECOVERY is accepted with nobody there to serve the device",
    fixed: "6.18.15 or earlier",
    kernels: &[(KernelVersion(0, 0, 0), KernelVersion(6, 16, 0))],
};

/// On 6.12 a server that dies with a queue fetched in part does not end until its device is stopped.
pub const PARTLY_FETCHED_DEATH: Gate = Gate {
    name: "partly-fetched-death",
    bug: "a server that dies with a queue fetched in part leaves its commands where only STOP finds them; of a device that is \
          being deleted the id is never free again",
    fixed: "6.18.15 or earlier",
    kernels: &[(KernelVersion(0, 0, 0), KernelVersion(6, 16, 0))],
};

/// 6.16 to 7.0 take a new device's state from whoever asks for it.
pub const ADDED_LIVE: Gate = Gate {
    name: "added-live",
    bug: "ADD_DEV keeps the state that it is told: the device passes for live without a disk, and STOP follows a null pointer",
    fixed: "7.1.13 and 6.12.107, or earlier",
    kernels: &[(KernelVersion(6, 13, 0), KernelVersion(7, 1, 0))],
};

/// Every gate there is.
pub const GATES: &[&Gate] = &[
    &ABANDONED_START,
    &KILLED_START,
    &KILLED_SCAN,
    &FULL_QUEUE,
    &DETACH_UNDER_LOAD,
    &KILLED_RECOVERY,
    &HALF_RECOVERED_DEATH,
    &UPDATE_SIZE_UNSTARTED,
    &START_AFTER_STOP,
    &START_AFTER_DEATH,
    &UNBEGUN_RECOVERY,
    &PARTLY_FETCHED_DEATH,
    &ADDED_LIVE,
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_are_read() {
        for (release, version) in [
            ("6.12.117+deb12-amd64", KernelVersion(6, 12, 117)),
            ("7.3-rc7-amd64", KernelVersion(7, 3, 0)),
            ("7.3~rc7", KernelVersion(7, 3, 0)),
            ("", KernelVersion(0, 0, 0)),
        ] {
            assert_eq!(KernelVersion::of_release(release), version, "{release}");
        }
    }

    #[test]
    fn a_gate_is_shut_where_the_bug_is() {
        assert!(ABANDONED_START.is_shut(KernelVersion(6, 18, 15)));
        assert!(!ABANDONED_START.is_shut(KernelVersion(6, 12, 117)));
        assert!(!ABANDONED_START.is_shut(KernelVersion(7, 2, 12)));
    }

    #[test]
    fn names_are_unique_and_reasons_given() {
        for (index, gate) in GATES.iter().enumerate() {
            assert!(!gate.bug.is_empty() && !gate.fixed.is_empty() && !gate.kernels.is_empty(), "{}", gate.name);
            assert!(GATES[..index].iter().all(|other| other.name != gate.name), "{}", gate.name);
        }
    }
}
