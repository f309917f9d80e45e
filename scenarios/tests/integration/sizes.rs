//! Devices from one block to a tebibyte, and what happens at their end.

use std::io::{Seek, SeekFrom};
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use ublkit::{Geometry, blkdev};

use super::client::{self, Aligned, GIB, KIB, MIB, assert_same, direct, errno, start};
use super::disk::{Disk, Op};
use super::runner::cases;

cases!("sizes":
    the_first_and_last_block_of_every_size in 60 s,
    requests_at_and_across_the_end,
    offsets_beyond_32_bits_arrive_whole,
);

fn the_first_and_last_block_of_every_size() {
    for (size, block) in [
        (512, 512),
        (4096, 4096),
        (4096, 512),
        (MIB + 512, 512),
        (4 * GIB + 4096, 4096),
        (1 << 40, 512),
        (1 << 40, 4096),
    ] {
        let disk = Disk::new(Geometry::bytes(size).logical_block(block));
        let device = start(&disk);
        let mut file = direct(&device);
        assert_eq!(blkdev::size(&file).expect("size"), size);
        assert_eq!(file.seek(SeekFrom::End(0)).expect("seek"), size);
        for (writer, offset) in [(1, 0), (2, size - u64::from(block))] {
            disk.forget();
            let wrote = client::write(&file, writer, offset, block as usize).expect("write");
            assert_same(&disk.stored(offset, block as usize), &wrote, &format!("{size} bytes, stored at {offset}"));
            let writes = disk.calls_of(Op::Write);
            assert!(
                writes.len() == 1 && writes[0].offset == offset && writes[0].len == u64::from(block),
                "{writes:?}"
            );
            let back = client::read(&file, offset, block as usize).expect("read");
            assert_same(&back, &wrote, &format!("{size} bytes, read at {offset}"));
        }
        if size > u64::from(block) {
            let first = client::read(&file, 0, block as usize).expect("read");
            assert_same(
                &first,
                &client::pattern(1, 0, block as usize),
                "the first block, after the last was written",
            );
        }
        drop(file);
        client::close(&device);
    }
}

fn requests_at_and_across_the_end() {
    let size = MIB + 512;
    let disk = Disk::new(Geometry::bytes(size));
    let device = start(&disk);
    for file in [direct(&device), client::open(&device, 0)] {
        disk.forget();
        let mut two = Aligned::pattern(7, size - 512, 1024);
        assert_eq!(file.read_at(&mut two, size).expect("read at the end"), 0);
        assert_eq!(errno(file.write_at(&two, size)), Some(Errno::ENOSPC as i32));
        assert_eq!(errno(file.write_at(&two, size + MIB)), Some(Errno::ENOSPC as i32));
        let two = Aligned::pattern(7, size - 512, 1024);
        assert_eq!(file.write_at(&two, size - 512).expect("write across the end"), 512);
        file.sync_all().expect("sync");
        let mut back = Aligned::zeroed(1024);
        assert_eq!(file.read_at(&mut back, size - 512).expect("read across the end"), 512);
        assert_same(&back[..512], &two[..512], "what is inside");
        assert_same(&back[512..], &[0; 512], "what is outside");
        assert_same(&disk.stored(size - 512, 512), &two[..512], "stored");
        assert!(disk.calls_of(Op::Write).iter().all(|call| call.offset + call.len <= size), "{:?}", disk.calls());
    }
    client::close(&device);
}

/// 32 bits of bytes end at 4 GiB, 31 at 2 GiB, 32 bits of sectors at 2 TiB: none may wrap around.
fn offsets_beyond_32_bits_arrive_whole() {
    let disk = Disk::new(Geometry::bytes(8 << 40));
    let device = start(&disk);
    let file = direct(&device);
    let borders = [2 * GIB, 4 * GIB, 2 << 40, 4 << 40];
    for (writer, border) in (10..).zip(borders) {
        client::write(&file, writer, border - 4 * KIB, 8192).expect("write");
    }
    for (writer, border) in (10..).zip(borders) {
        let want = client::pattern(writer, border - 4 * KIB, 8192);
        assert_same(&disk.stored(border - 4 * KIB, 8192), &want, &format!("stored around {border}"));
        assert_same(
            &client::read(&file, border - 4 * KIB, 8192).expect("read"),
            &want,
            &format!("read around {border}"),
        );
    }
    assert_same(&disk.stored(0, 8192), &[0; 8192], "the start, which nobody wrote");
    drop(file);
    client::close(&device);
}
