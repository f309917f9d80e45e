//! What is drawn is right, replays, and meets; what is read is checked.

use std::collections::{BTreeMap, BTreeSet};

use super::*;
use crate::seed::SeededRng;

fn setup_of(seed: u64) -> Setup {
    Setup::draw(&mut Seed::new(seed).rng())
}

fn actions(seed: u64, setup: &Setup, workload: Workload) -> Vec<Action> {
    Actions::new(Seed::new(seed), setup, workload).expect("a setup that was drawn").collect()
}

fn script(seed: u64, ops: u64) -> Script {
    let setup = setup_of(seed);
    Script {
        version: VERSION,
        seed: Seed::new(seed),
        setup,
        mutant: None,
        faults: FaultPlan::default(),
        actions: actions(seed, &setup, Workload::everything(ops)),
    }
}

#[test]
fn setups_are_consistent_and_cover_every_option() {
    let setups: Vec<Setup> = (0..2000).map(setup_of).collect();
    let mut seen: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for setup in &setups {
        assert_eq!(setup.validate(), Ok(()), "{setup}");
        assert!((64 << 10..=8 << 20).contains(&setup.bytes) && setup.max_io_bytes >= 4096, "{setup}");
        assert!(setup.max_io_bytes <= 2 << 20 && setup.queues <= 4 && setup.queue_depth <= 128, "{setup}");
        assert!(setup.workers <= 8 && setup.io_depth <= 64, "{setup}");
        let json = serde_json::to_value(setup).expect("plain data");
        for part in setup.to_string().split(' ') {
            let (name, value) = part.split_once('=').expect("name=value");
            let in_json = &json[name];
            assert_eq!(in_json.as_str().map_or(in_json.to_string(), str::to_owned), value);
            seen.entry(name.to_owned()).or_default().insert(value.to_owned());
        }
        assert_eq!(setup.to_string().split(' ').count(), json.as_object().expect("fields").len());
    }
    assert!(seen.values().all(|values| values.len() > 1), "{seen:?}");
    assert_eq!((seen["recovery"].len(), seen["workers"].len(), seen["reorder"].len()), (4, 8, 101));
    let small = setups.iter().filter(|setup| setup.bytes <= 1 << 20).count();
    assert!((1400..1950).contains(&small), "{small}");
}

#[test]
fn one_seed_is_one_run() {
    for seed in 0..20 {
        let setup = setup_of(seed);
        let drawn = actions(seed, &setup, Workload::everything(500));
        assert_eq!(drawn, actions(seed, &setup, Workload::everything(500)));
        let endless = Actions::new(Seed::new(seed), &setup, Workload { ops: None, ..Workload::everything(0) });
        let same = endless.expect("a setup that was drawn").take(drawn.len() - 2).collect::<Vec<_>>();
        assert_eq!(drawn[..drawn.len() - 2], same);
    }
    assert_ne!(actions(1, &setup_of(1), Workload::ops(50)), actions(2, &setup_of(1), Workload::ops(50)));
}

/// A run drawn by another version has to be the same one, or no seed in a report is worth anything.
#[test]
fn draws_are_pinned() {
    assert_eq!(
        setup_of(42).to_string(),
        "bytes=265728 logical_block=512 max_io_bytes=32768 queues=2 queue_depth=32 workers=2 io_depth=6 \
         volatile_cache=true fua=false discard=true discard_zeroes=true write_zeroes=true read_only=false \
         recovery=reissue merges=false reorder=100 memory_pressure=false compressible=0"
    );
    let mut digest = 0_u64;
    for action in actions(42, &setup_of(42), Workload::everything(1000)) {
        for byte in format!("{action};").bytes() {
            digest = (digest ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }
    assert_eq!(digest, 17_741_126_207_782_170_616);
}

#[test]
fn a_script_from_before_payloads_compressed_still_loads() {
    let mut script = script(1, 5);
    script.setup.compressible = 0;
    let json = script.to_json();
    let older = json.replace(",\"compressible\":0", "");
    assert!(older.len() < json.len(), "{json}");
    assert_eq!(Script::from_json(&older), Ok(script.clone()));
    script.setup.compressible = 70;
    assert_eq!(Script::from_json(&script.to_json()), Ok(script.clone()));
    script.setup.compressible = 101;
    let error = script.validate().expect_err("more than all of it");
    assert_eq!(error.to_string(), "compressible is 101, more than 100");
}

#[test]
fn actions_are_possible_and_end_with_a_sweep() {
    let mut seen: BTreeMap<String, u64> = BTreeMap::new();
    for seed in 0..300 {
        let script = script(seed, 400);
        assert_eq!(script.validate(), Ok(()), "seed {seed}");
        assert_eq!(script.actions.last().map(|action| action.act), Some(Act::Sweep));
        let mut faults = true;
        let mut ops = 0;
        for action in &script.actions {
            match action.act {
                Act::Op { kind, .. } => {
                    ops += 1;
                    assert!(!(script.setup.read_only && kind.changes()));
                }
                Act::Kill => assert_ne!(script.setup.recovery, Recovery::None),
                Act::FaultsOff | Act::FaultsOn => {
                    assert_eq!(faults, action.act == Act::FaultsOff, "pairs");
                    faults = !faults;
                }
                _ => {}
            }
            let name = match action.act {
                Act::Op { kind, .. } => kind.to_string(),
                act => format!("{act:?}"),
            };
            *seen.entry(name).or_default() += 1;
        }
        assert_eq!((ops, faults), (400, false));
    }
    assert_eq!(seen.len(), 12, "{seen:?}");
    assert!(seen.values().all(|count| *count > 100), "{seen:?}");
}

#[test]
fn what_may_not_happen_does_not() {
    for seed in 0..50 {
        let drawn = actions(seed, &setup_of(seed), Workload::ops(300));
        assert!(drawn.iter().all(|action| matches!(action.act, Act::Op { .. } | Act::Sweep)));
    }
    assert!(Actions::new(Seed::new(1), &Setup { logical_block: 0, ..setup_of(1) }, Workload::ops(1)).is_err());
    assert!(Actions::new(Seed::new(1), &Setup { workers: 0, ..setup_of(1) }, Workload::ops(1)).is_err());
    assert!(Actions::new(Seed::new(1), &Setup { bytes: 0, ..setup_of(1) }, Workload::ops(1)).is_err());
}

/// Bugs of concurrency need operations of two workers that meet, one of which changes something.
#[test]
fn workers_meet() {
    let (mut runs, mut meetings) = (0, 0);
    for seed in 0..100 {
        let setup = setup_of(seed);
        if setup.workers == 1 || setup.read_only {
            continue;
        }
        let ops: Vec<(u32, OpKind, SectorRange)> = actions(seed, &setup, Workload::ops(500))
            .into_iter()
            .filter_map(|action| match action.act {
                Act::Op { kind, range } if kind != OpKind::Flush => Some((action.worker, kind, range)),
                _ => None,
            })
            .collect();
        let meets = |window: &&[(u32, OpKind, SectorRange)]| {
            let (worker, kind, range) = window[0];
            window[1..]
                .iter()
                .any(|next| next.0 != worker && next.2.overlaps(range) && (next.1.changes() || kind.changes()))
        };
        runs += ops.len();
        meetings += ops.windows(8).filter(meets).count();
    }
    assert!(meetings * 3 > runs, "{meetings} of {runs}");
}

#[test]
fn json_round_trips_one_action_a_line() {
    for seed in 0..20 {
        let script = script(seed, 100);
        let json = script.to_json();
        assert_eq!(Script::from_json(&json), Ok(script.clone()));
        assert_eq!(serde_json::from_str::<Script>(&json).ok(), Some(script.clone()));
        assert_eq!(json.lines().count(), script.actions.len() + 9, "{json}");
    }
    let empty = Script { actions: Vec::new(), ..script(1, 1) };
    assert_eq!(Script::from_json(&empty.to_json()), Ok(empty));
}

#[test]
fn files_round_trip_and_errors_name_them() {
    let dir = std::env::temp_dir().join(format!("script-{}-{}", std::process::id(), Seed::from_os()));
    let path = dir.join("script.json");
    let script = script(3, 20);
    let error = script.save(&path).expect_err("no such directory").to_string();
    assert!(error.contains("script.json: cannot write"), "{error}");
    std::fs::create_dir(&dir).expect("a directory");
    assert_eq!(script.save(&path), Ok(()));
    assert_eq!(Script::load(&path), Ok(script));
    std::fs::write(&path, "{\"version\": 1}").expect("a file");
    let error = Script::load(&path).expect_err("fields are missing").to_string();
    assert!(error.contains("script.json: not a script: missing field"), "{error}");
    std::fs::remove_dir_all(&dir).expect("ours");
    let error = Script::load(&path).expect_err("it is gone").to_string();
    assert!(error.contains("script.json: cannot read"), "{error}");
}

#[test]
fn what_is_wrong_is_refused() {
    let refuse = |change: &dyn Fn(&mut serde_json::Value), why: &str| {
        let setup = Setup { logical_block: 4096, bytes: 1 << 20, workers: 2, read_only: false, ..setup_of(1) };
        let range = SectorRange::new(8, 8);
        let action = Action { worker: 1, act: Act::Op { kind: OpKind::Write, range } };
        let script = Script { setup, actions: vec![action], ..script(1, 0) };
        let mut json: serde_json::Value = serde_json::from_str(&script.to_json()).expect("plain data");
        assert!(Script::from_json(&json.to_string()).is_ok());
        change(&mut json);
        let error = Script::from_json(&json.to_string()).expect_err(why).to_string();
        assert!(error.contains(why), "{error}");
    };
    refuse(&|json| json["version"] = 2.into(), "version 2; this program reads version 1");
    refuse(&|json| json["version"] = "x".into(), "no script");
    refuse(&|json| json["more"] = 1.into(), "unknown field `more`");
    refuse(&|json| json["setup"]["more"] = 1.into(), "unknown field `more`");
    refuse(&|json| json["actions"][0]["more"] = 1.into(), "unknown field `more`");
    refuse(
        &|json| json["actions"][0]["worker"] = 2.into(),
        "action 1 (worker 2 writes sectors 8+8): the setup has 2",
    );
    let range = |first: u64, sectors: u64| {
        move |json: &mut serde_json::Value| {
            json["actions"][0]["act"]["op"]["range"] = serde_json::json!({"first": first, "sectors": sectors});
        }
    };
    refuse(&|json| json["actions"][0]["act"]["op"]["more"] = 1.into(), "unknown field `more`");
    refuse(&range(2048, 8), "not all of them on the device");
    refuse(&range(u64::MAX - 7, 8), "not all of them on the device");
    refuse(&range(8, 0), "no sectors");
    refuse(&range(4, 8), "between logical blocks");
    refuse(&|json| json["actions"][0]["act"]["op"]["kind"] = "flush".into(), "a flush is for the whole device");
    refuse(&|json| json["setup"]["read_only"] = true.into(), "read_only");
    refuse(&|json| json["setup"]["logical_block"] = 1000.into(), "power of two");
    refuse(&|json| json["setup"]["bytes"] = 1000.into(), "multiple of the logical block");
    refuse(&|json| json["setup"]["max_io_bytes"] = 512.into(), "max_io_bytes");
    refuse(&|json| json["setup"]["queue_depth"] = 0.into(), "queue_depth is 0");
    refuse(&|json| json["setup"]["reorder"] = 101.into(), "reorder");
    refuse(
        &|json| {
            json["setup"]["discard"] = false.into();
            json["setup"]["discard_zeroes"] = true.into();
        },
        "discard_zeroes needs discard",
    );
    refuse(
        &|json| {
            json["setup"]["discard"] = false.into();
            json["setup"]["discard_zeroes"] = false.into();
            json["actions"][0]["act"]["op"]["kind"] = "discard".into();
        },
        "does not offer discard",
    );
}

#[test]
fn actions_read_as_sentences() {
    let mut rng: SeededRng = Seed::new(1).rng();
    let said = |kind, range| Action { worker: 1, act: Act::Op { kind, range } }.to_string();
    assert_eq!(said(OpKind::Write, SectorRange::new(8, 8)), "worker 1 writes sectors 8+8");
    assert_eq!(said(OpKind::Flush, SectorRange::default()), "worker 1 flushes");
    assert_eq!(Action { worker: 0, act: Act::PowerCut }.to_string(), "the power is cut");
    assert!(Setup::draw(&mut rng) != Setup::draw(&mut rng));
}
