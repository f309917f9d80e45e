use super::*;
use crate::sector::SECTOR;
use crate::seed::Seed;

const UNIT: usize = 16;

fn medium(units: usize, volatile_cache: bool) -> Medium {
    Medium::new(MediumOptions { bytes: (units * UNIT) as u64, volatile_cache, atomic_bytes: UNIT as u32 })
}

fn image(medium: &Medium) -> Vec<u8> {
    let mut image = vec![0; medium.options().bytes as usize];
    medium.read_at(&mut image, 0).expect("in range");
    image
}

/// Each unit on its own: what it held when it was last durable, and everything that it held since.
#[derive(Clone)]
struct Naive {
    units: Vec<Vec<u8>>,
    volatile_cache: bool,
}

impl Naive {
    fn change(&mut self, unit: usize, value: u8, through: bool) {
        if through || !self.volatile_cache {
            // What came before may survive, but never cover it.
            self.units[unit].clear();
        }
        self.units[unit].push(value);
    }

    fn flush(&mut self, units: std::ops::Range<usize>) {
        for unit in &mut self.units[units] {
            let newest = unit.pop().expect("never empty");
            *unit = vec![newest];
        }
    }
}

#[test]
fn reads_return_the_newest_and_cuts_leave_what_a_naive_model_allows() {
    for seed in 0..2000 {
        let mut rng = Seed::new(seed).rng();
        let volatile_cache = rng.chance(4, 5);
        let units = 8;
        let medium = medium(units, volatile_cache);
        let mut naive = Naive { units: vec![vec![0]; units], volatile_cache };
        for _ in 0..60 {
            let first = rng.below(units as u64) as usize;
            let count = 1 + rng.below((units - first) as u64) as usize;
            let (offset, len) = ((first * UNIT) as u64, count * UNIT);
            let value = rng.below(256) as u8;
            let through = rng.chance(1, 4);
            match rng.below(10) {
                0..5 => {
                    let buf = vec![value; len];
                    let write = if through { Medium::write_through } else { Medium::write_at };
                    write(&medium, &buf, offset).expect("in range");
                    (first..first + count).for_each(|unit| naive.change(unit, value, through));
                }
                5..7 => {
                    let zero = if through { Medium::zero_through } else { Medium::zero };
                    zero(&medium, offset, len as u64).expect("in range");
                    (first..first + count).for_each(|unit| naive.change(unit, 0, through));
                }
                7 => {
                    medium.flush().expect("in range");
                    naive.flush(0..units);
                }
                8 => {
                    medium.flush_range(offset, len as u64).expect("in range");
                    naive.flush(first..first + count);
                }
                _ => {
                    let fork = medium.fork();
                    let _cut = fork.power_cut(&mut rng);
                    check_cut(&fork, &naive, seed);
                    if rng.chance(1, 2) {
                        let _cut = medium.power_cut(&mut rng);
                        let left = check_cut(&medium, &naive, seed);
                        naive.units = left.into_iter().map(|value| vec![value]).collect();
                    }
                }
            }
            for (at, byte) in image(&medium).into_iter().enumerate() {
                assert_eq!(Some(&byte), naive.units[at / UNIT].last(), "seed {seed}, byte {at}");
            }
        }
    }
}

fn check_cut(medium: &Medium, naive: &Naive, seed: u64) -> Vec<u8> {
    let left = image(medium);
    for (unit, bytes) in left.chunks(UNIT).enumerate() {
        assert!(bytes.iter().all(|byte| *byte == bytes[0]), "seed {seed}: unit {unit} is torn");
        assert!(naive.units[unit].contains(&bytes[0]), "seed {seed}: unit {unit} holds {}", bytes[0]);
    }
    left.chunks(UNIT).map(|bytes| bytes[0]).collect()
}

/// Every allowed outcome of two overlapping writes happens, so the draw is not narrower than the promise.
#[test]
fn every_survivor_is_drawn() {
    let mut seen = std::collections::BTreeSet::new();
    let mut modes = Vec::new();
    for seed in 0..2000 {
        let medium = medium(2, true);
        medium.write_at(&[1; 2 * UNIT], 0).expect("in range");
        medium.write_at(&[2; UNIT], 0).expect("in range");
        let cut = medium.power_cut(&mut Seed::new(seed).rng());
        assert_eq!(cut.kept + cut.lost + cut.torn, 2);
        if !modes.contains(&cut.mode) {
            modes.push(cut.mode);
        }
        let image = image(&medium);
        seen.insert((image[0], image[UNIT]));
        // What is left is durable: another cut changes nothing.
        let _cut = medium.power_cut(&mut Seed::new(seed + 1).rng());
        assert_eq!(self::image(&medium), image);
    }
    assert_eq!(seen.into_iter().collect::<Vec<_>>(), [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]);
    assert_eq!(modes.len(), 5);
}

#[test]
fn an_older_change_never_covers_one_that_was_written_through() {
    for seed in 0..200 {
        let medium = medium(4, true);
        medium.write_at(&[1; 4 * UNIT], 0).expect("in range");
        medium.write_through(&[2; UNIT], UNIT as u64).expect("in range");
        let _cut = medium.power_cut(&mut Seed::new(seed).rng());
        assert_eq!(image(&medium)[UNIT], 2);
    }
}

/// Ten times what the log holds: the oldest are written back, in order.
#[test]
fn a_log_that_is_never_flushed_stays_bounded() {
    let medium = medium(4, true);
    for write in 0..20_000_u64 {
        medium.write_at(&write.to_le_bytes(), write % 4 * UNIT as u64).expect("in range");
        assert!(medium.unflushed() <= 2048);
    }
    for seed in 0..100 {
        let fork = medium.fork();
        let _cut = fork.power_cut(&mut Seed::new(seed).rng());
        let mut left = [0; 8];
        fork.read_at(&mut left, 0).expect("in range");
        assert!(u64::from_le_bytes(left) >= 20_000 - 2048 - 4, "{left:?}");
    }
}

#[test]
fn a_disk_on_it_does_what_its_flags_say() {
    let medium = medium(4, true);
    let disk = MediumDisk::new(medium.clone(), Geometry::bytes(64).fua());
    disk.write_at(&[7; UNIT], 0, WriteFlags::FUA).expect("in range");
    disk.write_at(&[8; UNIT], UNIT as u64, WriteFlags::NONE).expect("in range");
    disk.flush().expect("flush");
    let mut through = ZeroFlags::NONE;
    through.fua = true;
    disk.write_zeroes(0, 2, through).expect("in range");
    disk.discard(UNIT as u64, UNIT as u64).expect("in range");
    assert!(disk.read_at(&mut [0; 2], 63).is_err() && disk.discard(u64::MAX, 2).is_err());
    let mut seen = std::collections::BTreeSet::new();
    for seed in 0..100 {
        let fork = medium.fork();
        let _cut = fork.power_cut(&mut Seed::new(seed).rng());
        let image = image(&fork);
        assert_eq!((image[0], image[1], image[2]), (0, 0, 7));
        seen.insert(image[UNIT]);
    }
    assert_eq!(seen.into_iter().collect::<Vec<_>>(), [0, 8]);
}

/// Many crash images of one moment: each is a disk that a cut could leave, they differ, and the disk itself goes on.
#[test]
fn crash_images_leave_the_disk_alone_and_tell_what_was_lost() {
    let medium = medium(64, true);
    medium.write_at(&[1; 64 * UNIT], 0).expect("in range");
    medium.flush().expect("flush");
    medium.write_at(&[2; 32 * UNIT], 0).expect("in range");
    medium.zero(0, 16 * UNIT as u64).expect("in range");
    let (before, unflushed) = (image(&medium), medium.unflushed());
    let mut seen = std::collections::BTreeSet::new();
    for seed in 0..200 {
        let (crashed, report) = medium.crash_image(&mut Seed::new(seed).rng());
        let left = image(&crashed);
        assert_eq!((report.unflushed, crashed.unflushed()), (2, 0));
        assert_eq!(report.losses.len() as u64, report.cut.lost + report.cut.torn);
        let differing = left.chunks(SECTOR).zip(before.chunks(SECTOR)).filter(|(one, two)| one != two).count();
        assert_eq!(report.lost_sectors, differing as u64, "seed {seed}");
        assert_eq!(report.losses.is_empty(), report.cut.lost + report.cut.torn == 0);
        for loss in &report.losses {
            let whole = if loss.number == 0 { (0, 32, false) } else { (0, 16, true) };
            assert_eq!((loss.offset, loss.bytes / UNIT as u64, loss.zeroes), whole);
            assert!(loss.kept_bytes < loss.bytes);
        }
        // Nothing that was flushed is missing, and writing to it changes nothing elsewhere.
        assert_eq!(left[32 * UNIT..], before[32 * UNIT..]);
        crashed.write_at(&[9; UNIT], 40 * UNIT as u64).expect("in range");
        seen.insert(left);
    }
    assert!(seen.len() > 20, "{}", seen.len());
    assert_eq!((image(&medium), medium.unflushed()), (before, unflushed));
}

/// A disk larger than the memory that there is for it.
#[test]
fn zeroes_take_no_memory() {
    let medium = Medium::new(MediumOptions { bytes: 1 << 35, volatile_cache: true, atomic_bytes: 512 });
    medium.zero(0, 1 << 35).expect("in range");
    medium.write_at(&[1; 512], (1 << 35) - 512).expect("in range");
    medium.flush().expect("flush");
    let (crashed, _report) = medium.crash_image(&mut Seed::new(1).rng());
    let mut found = [0; 512];
    crashed.read_at(&mut found, (1 << 35) - 512).expect("in range");
    assert_eq!(found, [1; 512]);
}
