//! What people type: mixes, seeds, mutants, oracles, fault plans, errnos, sizes and durations; and what the kernel logs.

use std::fmt::{Debug, Display};
use std::str::FromStr;

use ublk_torture::units::{format_bytes, parse_bytes, parse_bytes_u32, parse_duration};
use ublkit_harness::fault::{Errno, FaultPlan};
use ublkit_harness::kernel_log::{Alarm, Complaint, Record, complaints};
use ublkit_harness::mismatch::SectorDump;
use ublkit_harness::mutant::Planted;
use ublkit_harness::{Mix, Mutant, Oracle, Seed};

pub(super) fn run(bytes: &[u8]) {
    let text = &*String::from_utf8_lossy(bytes);
    text_round_trips::<Mix>(text);
    text_round_trips::<Seed>(text);
    text_round_trips::<Planted>(text);
    text_round_trips::<Mutant>(text);
    text_round_trips::<Oracle>(text);
    text_round_trips::<FaultPlan>(text);
    text_round_trips::<Errno>(text);
    if let Ok(bytes) = parse_bytes(text) {
        assert!(!format_bytes(bytes).is_empty());
        assert_eq!(parse_bytes_u32(text).ok(), u32::try_from(bytes).ok());
    }
    let _duration = parse_duration(text);
    let records: Vec<Record> = text.split('\0').filter_map(Record::parse).collect();
    let (kernel, mut all) = (complaints(&records, false), complaints(&records, true));
    all.retain(|one| one.alarm == Alarm::Kernel);
    let what = |found: &[Complaint]| found.iter().map(|one| one.what.clone()).collect::<Vec<_>>();
    assert_eq!(what(&kernel), what(&all), "what a device says hides nothing of the kernel's");
    if let Ok(dump) = SectorDump::try_from(text.to_owned()) {
        assert_eq!(String::from(dump), text.to_ascii_lowercase());
    }
}

fn text_round_trips<T>(text: &str)
where
    T: FromStr<Err: Display> + Display + PartialEq + Debug,
{
    match text.parse::<T>() {
        Ok(value) => assert_eq!(value.to_string().parse::<T>().ok(), Some(value)),
        Err(error) => assert!(!error.to_string().is_empty(), "an error says something"),
    }
}
