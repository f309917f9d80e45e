//! How much a process and the kernel hold, and whether that grows with what they do.
//!
//! One look proves little: memory is kept for later use, and other processes use the kernel too. A leak is what grows
//! in *every* part of a run, in step with the cycles: what is kept for later use stops growing, and what
//! others do is not in step. So a run is cut into [parts](PARTS), and a [`Measure`] is one of a leak if it grew in each of
//! them by at least its [rate](Measure::rate), and by more than its [noise](Measure::noise).

use std::collections::BTreeMap;
use std::fs;

use serde::{Deserialize, Serialize};

/// How many parts of a run a leak has to grow in.
pub(crate) const PARTS: usize = 3;

/// What is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Measure {
    /// Open descriptors.
    Descriptors,
    /// Threads, without those of io_uring's that the kernel keeps as it likes.
    Threads,
    /// Memory maps.
    Maps,
    /// Bytes of address space.
    MappedBytes,
    /// Bytes of memory of its own.
    ResidentBytes,
    /// Bytes that may not leave memory.
    LockedBytes,
    /// Bytes of the kernel that cannot be reclaimed: slabs, stacks, page tables, per-processor data.
    KernelBytes,
    /// Bytes of the whole machine that are not available.
    UnavailableBytes,
    /// ublk devices that there are.
    Devices,
}

impl Measure {
    pub(crate) const ALL: [Self; 9] = [
        Self::Descriptors,
        Self::Threads,
        Self::Maps,
        Self::MappedBytes,
        Self::ResidentBytes,
        Self::LockedBytes,
        Self::KernelBytes,
        Self::UnavailableBytes,
        Self::Devices,
    ];

    /// Growth for each cycle, in thousandths, from which on it is a leak. Things that can be counted leak from one in ten
    /// cycles on; memory from 2 KiB a cycle on, half of the smallest that anybody can leak as a page; and where other
    /// processes take part, from what they were seen to do.
    pub(crate) const fn rate(self) -> u64 {
        match self {
            Self::Descriptors | Self::Threads | Self::Maps | Self::Devices => 100,
            Self::LockedBytes => 1000,
            Self::MappedBytes | Self::ResidentBytes => 2048 * 1000,
            Self::KernelBytes => 16_384 * 1000,
            Self::UnavailableBytes => 65_536 * 1000,
        }
    }

    /// Growth within one part of a run that may have any cause.
    pub(crate) const fn noise(self) -> u64 {
        match self {
            Self::Descriptors | Self::Threads | Self::Maps | Self::Devices | Self::LockedBytes => 0,
            Self::MappedBytes | Self::ResidentBytes => 32 << 10,
            Self::KernelBytes => 1 << 20,
            Self::UnavailableBytes => 16 << 20,
        }
    }

    /// Other processes have a part in it: fewer cycles in a part than make their noise up at its [rate](Self::rate) say nothing.
    const fn least_cycles(self) -> u64 {
        match self {
            Self::KernelBytes | Self::UnavailableBytes => self.noise() * 1000 / self.rate(),
            _ => 1,
        }
    }

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Descriptors => "descriptors",
            Self::Threads => "threads",
            Self::Maps => "memory maps",
            Self::MappedBytes => "bytes of address space",
            Self::ResidentBytes => "bytes of its own memory",
            Self::LockedBytes => "locked bytes",
            Self::KernelBytes => "bytes of the kernel's own memory",
            Self::UnavailableBytes => "bytes of the machine's memory",
            Self::Devices => "ublk devices",
        }
    }
}

/// What there was after some number of cycles.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Sample {
    pub(crate) cycles: u64,
    pub(crate) held: BTreeMap<Measure, u64>,
}

impl Sample {
    /// Of this process and the machine, now.
    pub(crate) fn take(cycles: u64) -> Self {
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        let machine = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let kernel = ["SUnreclaim", "KernelStack", "PageTables", "Percpu"];
        let total = kilobytes(&machine, "MemTotal");
        let held = [
            (Measure::Descriptors, entries("/proc/self/fd", |_| true)),
            (Measure::Threads, threads()),
            (Measure::Maps, fs::read_to_string("/proc/self/maps").map_or(0, |maps| maps.lines().count() as u64)),
            (Measure::MappedBytes, kilobytes(&status, "VmSize")),
            (Measure::ResidentBytes, kilobytes(&status, "RssAnon")),
            (Measure::LockedBytes, kilobytes(&status, "VmLck") + kilobytes(&status, "VmPin")),
            (Measure::KernelBytes, kernel.iter().map(|name| kilobytes(&machine, name)).sum()),
            (Measure::UnavailableBytes, total.saturating_sub(kilobytes(&machine, "MemAvailable"))),
            (Measure::Devices, entries("/sys/class/ublk-char", |name| name.starts_with("ublkc"))),
        ];
        Self { cycles, held: held.into() }
    }

    pub(crate) fn of(&self, measure: Measure) -> u64 {
        self.held.get(&measure).copied().unwrap_or(0)
    }
}

/// The number of kB behind `name:` in a file of such lines, in bytes.
fn kilobytes(text: &str, name: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.and_then(|rest| rest.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()).unwrap_or(0) * 1024
}

/// Bytes of memory that the machine can give.
pub(crate) fn available_bytes() -> u64 {
    kilobytes(&fs::read_to_string("/proc/meminfo").unwrap_or_default(), "MemAvailable")
}

fn entries(path: &str, wanted: impl Fn(&str) -> bool) -> u64 {
    let Ok(entries) = fs::read_dir(path) else { return 0 };
    entries.flatten().filter(|entry| wanted(&entry.file_name().to_string_lossy())).count() as u64
}

fn threads() -> u64 {
    let Ok(tasks) = fs::read_dir("/proc/self/task") else { return 0 };
    let names = tasks.flatten().filter_map(|task| fs::read_to_string(task.path().join("comm")).ok());
    names.filter(|name| !name.starts_with("iou-")).count() as u64
}

/// What grew all the time, one line each. Fewer samples than it takes to tell show nothing.
pub(crate) fn leaks(samples: &[Sample]) -> Vec<String> {
    Measure::ALL.iter().filter_map(|measure| leak(samples, *measure)).collect()
}

fn leak(samples: &[Sample], measure: Measure) -> Option<String> {
    if samples.len() <= PARTS {
        return None;
    }
    let last = samples.len() - 1;
    let corners: Vec<&Sample> = (0..=PARTS).map(|part| &samples[last * part / PARTS]).collect();
    let grew = |pair: &[&Sample]| {
        let cycles = pair[1].cycles.saturating_sub(pair[0].cycles);
        let growth = pair[1].of(measure).saturating_sub(pair[0].of(measure));
        cycles >= measure.least_cycles()
            && growth > measure.noise()
            && growth.saturating_mul(1000) >= measure.rate().saturating_mul(cycles)
    };
    corners.windows(2).all(grew).then(|| {
        let values: Vec<String> =
            corners.iter().map(|sample| format!("{} after {} cycles", sample.of(measure), sample.cycles)).collect();
        format!("{} grow with the cycles: {}", measure.name(), values.join(", "))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn series(measure: Measure, values: &[u64]) -> Vec<Sample> {
        values
            .iter()
            .enumerate()
            .map(|(at, value)| Sample { cycles: 100 * at as u64, held: [(measure, *value)].into() })
            .collect()
    }

    #[test]
    fn what_grows_in_step_is_a_leak() {
        let found = leaks(&series(Measure::Descriptors, &[9, 19, 29, 39, 49]));
        assert_eq!(found.len(), 1);
        assert!(found[0].starts_with("descriptors grow") && found[0].contains("49 after 400"), "{found:?}");
        assert_eq!(leaks(&series(Measure::Maps, &[50, 150, 250, 350])).len(), 1);
        let pages: Vec<u64> = (0..7).map(|part| 1_000_000 + part * 100 * 4096).collect();
        assert_eq!(leaks(&series(Measure::ResidentBytes, &pages)).len(), 1, "4 KiB a cycle");
    }

    #[test]
    fn what_is_kept_for_later_use_is_none() {
        for values in [&[9, 40, 40, 40][..], &[9, 10, 40, 40, 39], &[40, 40, 40, 41], &[40, 30, 20, 10]] {
            assert!(leaks(&series(Measure::Descriptors, values)).is_empty(), "{values:?}");
        }
        let noise: Vec<u64> = (0..7).map(|part| 1_000_000 + part * 100 * 200).collect();
        assert!(leaks(&series(Measure::ResidentBytes, &noise)).is_empty(), "200 bytes a cycle are not a page");
    }

    #[test]
    fn what_others_take_part_in_needs_a_longer_look() {
        let kernel: Vec<u64> = (0..4).map(|part| 15_000_000 + part * (2 << 20)).collect();
        assert_eq!(leaks(&series(Measure::KernelBytes, &kernel)).len(), 1, "20 KiB a cycle, for 300 cycles");
        let mut short = series(Measure::KernelBytes, &kernel);
        for sample in &mut short {
            sample.cycles /= 10;
        }
        assert!(leaks(&short).is_empty(), "as much in 30 cycles is what anybody may do");
    }

    #[test]
    fn too_few_samples_say_nothing() {
        assert!(leaks(&series(Measure::Threads, &[1, 200, 400])).is_empty());
        assert!(leaks(&[]).is_empty());
    }

    #[test]
    fn this_process_has_something_of_most() {
        let sample = Sample::take(0);
        for measure in [Measure::Descriptors, Measure::Threads, Measure::Maps, Measure::MappedBytes] {
            assert!(sample.of(measure) > 0, "{measure:?}");
        }
        assert!(sample.of(Measure::KernelBytes) > 0 && sample.of(Measure::UnavailableBytes) > 0);
        let more = vec![1_u8; 3 << 20];
        assert!(Sample::take(1).of(Measure::MappedBytes) >= sample.of(Measure::MappedBytes) + more.len() as u64 / 2);
    }
}
