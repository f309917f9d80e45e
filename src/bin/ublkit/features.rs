//! `ublkit features`

use std::fmt::Write;

use serde_json::json;
use ublkit::Controller;
use ublkit::sys::ublk::Features;

use crate::args;
use crate::failure::Failure;
use crate::output;

pub(crate) fn run(arguments: &args::Features) -> Result<(), Failure> {
    let features = Controller::open()?.features();
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let kernel = kernel.trim();
    if arguments.json {
        let names: Vec<String> = features.names().collect();
        let bits = format!("{:#x}", features.bits());
        return output::print(format_args!("{}\n", json!({ "kernel": kernel, "bits": bits, "features": names })));
    }
    output::print(table(kernel, features))
}

fn table(kernel: &str, features: Features) -> String {
    if features == Features::NONE {
        return format!("Linux {kernel}: its ublk_drv cannot say what it can do (that came with Linux 6.5)\n");
    }
    let mut text = format!("Linux {kernel}: ublk_drv {:#x}\n", features.bits());
    for (bit, name) in (0..u64::BITS).filter(|bit| features.bits() >> bit & 1 == 1).zip(features.names()) {
        let name = if name.starts_with("bit ") { "not known to this program" } else { &name };
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{bit:>4}  {name}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bit_has_a_line() {
        let text = table("9.9", Features::USER_COPY | Features::from_bits(1 << 42));
        assert_eq!(text, "Linux 9.9: ublk_drv 0x40000000080\n   7  USER_COPY\n  42  not known to this program\n");
        assert!(table("6.1", Features::NONE).contains("6.5"));
    }
}
