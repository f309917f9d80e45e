//! Descriptors of requests: what the driver may leave in memory that both sides map.

use std::io;

use ublkit::sys::ublk::IoDesc;
use ublkit::{Io, Operation, result_code};

use crate::Input;

pub(super) fn run(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let descriptor =
        IoDesc { op_flags: input.u32(), nr_sectors: input.u32(), start_sector: input.u64(), addr: input.u64() };
    let io = Io::new(input.u32() as u16, input.u32() as u16, descriptor);
    assert_eq!(io.raw_flags(), descriptor.op_flags);
    assert_eq!(io.len(), u64::from(descriptor.nr_sectors) * 512);
    assert_eq!(io.is_empty(), descriptor.nr_sectors == 0);
    assert_eq!(io.offset() / 512, descriptor.start_sector & (u64::MAX >> 9));
    assert_eq!(io.write_flags().fua, io.fua());
    assert_eq!((io.zero_flags().fua, io.zero_flags().no_unmap), (io.fua(), io.no_unmap()));
    let number = match io.operation() {
        Operation::Read => 0,
        Operation::Write => 1,
        Operation::Flush => 2,
        Operation::Discard => 3,
        Operation::WriteZeroes => 5,
        Operation::Other(number) => number,
        other => panic!("{other:?} is new"),
    };
    assert_eq!(u32::from(number), descriptor.op_flags & 0xff);
    assert!(!io.operation().name().is_empty() && !format!("{io:?}").is_empty());

    // The other way, whatever a backend fails with is a failure to the driver.
    let code = result_code(&io::Error::from_raw_os_error(input.u32() as i32));
    assert!((-4095..0).contains(&code), "{code}");
}
