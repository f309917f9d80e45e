//! Scripts in files.
//!
//! A script may come from anywhere, so nothing of it is believed before it was checked. JSON has one action a line: what
//! two scripts differ in can be seen.

use std::fmt;
use std::fs;
use std::path::Path;

use serde::Deserialize;

use super::{Act, Action, Script, Setup, VERSION};
use crate::plan::OpKind;
use crate::sector::{LBA_LIMIT, SECTOR};

/// The largest number of queues, requests and workers that is believed.
const MANY: u32 = 4096;

/// A script that cannot be had or is not right. The message says what to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScriptError(String);

impl ScriptError {
    fn at(self, path: &Path) -> Self {
        Self(format!("{}: {}", path.display(), self.0))
    }
}

/// The one field that every version has.
#[derive(Deserialize)]
struct AnyVersion {
    version: u64,
}

impl Script {
    /// The script that `json` says.
    ///
    /// # Errors
    /// When it is no script, of another version, or not [right](Self::validate).
    pub fn from_json(json: &str) -> Result<Self, ScriptError> {
        let AnyVersion { version } =
            serde_json::from_str(json).map_err(|error| ScriptError(format!("this is no script: {error}")))?;
        if version != u64::from(VERSION) {
            return Err(ScriptError(format!(
                "a script of version {version}; this program reads version {VERSION}: use the program that wrote it"
            )));
        }
        let script: Self =
            serde_json::from_str(json).map_err(|error| ScriptError(format!("not a script: {error}")))?;
        script.validate()?;
        Ok(script)
    }

    /// The script as JSON, one action a line.
    #[must_use]
    pub fn to_json(&self) -> String {
        let Self { version, seed, setup, mutant, faults, actions } = self;
        let actions: Vec<String> = actions.iter().map(|action| format!("\n    {}", json(action))).collect();
        let end = if actions.is_empty() { "" } else { "\n  " };
        format!(
            "{{\n  \"version\": {version},\n  \"seed\": {},\n  \"setup\": {},\n  \"mutant\": {},\n  \"faults\": {},\n  \
             \"actions\": [{}{end}]\n}}\n",
            json(seed),
            json(setup),
            json(mutant),
            json(faults),
            actions.join(","),
        )
    }

    /// Reads a script from a file.
    ///
    /// # Errors
    /// When the file cannot be read or is not a right script of this version.
    pub fn load(path: &Path) -> Result<Self, ScriptError> {
        let text = fs::read_to_string(path)
            .map_err(|error| ScriptError(format!("cannot read the script: {error}")).at(path))?;
        Self::from_json(&text).map_err(|error| error.at(path))
    }

    /// Writes the script to a file, in place of what is there.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn save(&self, path: &Path) -> Result<(), ScriptError> {
        fs::write(path, self.to_json())
            .map_err(|error| ScriptError(format!("cannot write the script: {error}")).at(path))
    }

    /// Whether the script can be run: the setup is consistent and every action is possible on such a device.
    ///
    /// # Errors
    /// The first thing that is wrong, with the number of the action, counted from 1.
    pub fn validate(&self) -> Result<(), ScriptError> {
        check(self.version == VERSION, || format!("the version is {}, not {VERSION}", self.version))?;
        self.setup.validate()?;
        for (number, action) in (1..).zip(&self.actions) {
            action
                .validate(&self.setup)
                .map_err(|error| ScriptError(format!("action {number} ({action}): {}", error.0)))?;
        }
        Ok(())
    }
}

impl Setup {
    /// Whether there can be such a device.
    ///
    /// # Errors
    /// The first option that is wrong, and what it must be.
    pub fn validate(&self) -> Result<(), ScriptError> {
        let Self { bytes, logical_block: block, max_io_bytes: max_io, .. } = *self;
        check(block.is_power_of_two() && (SECTOR as u32..=64 << 10).contains(&block), || {
            format!("logical_block is {block}, not a power of two from {SECTOR} to 65536")
        })?;
        check(bytes > 0 && bytes.is_multiple_of(block.into()) && bytes / SECTOR as u64 <= LBA_LIMIT, || {
            format!("bytes is {bytes}, not a multiple of the logical block of {block} bytes up to 512 TiB")
        })?;
        check(max_io >= block && max_io.is_multiple_of(block), || {
            format!("max_io_bytes is {max_io}, not a multiple of the logical block of {block} bytes")
        })?;
        for (name, value) in [
            ("queues", self.queues.into()),
            ("queue_depth", self.queue_depth.into()),
            ("workers", self.workers),
            ("io_depth", self.io_depth),
        ] {
            check((1..=MANY).contains(&value), || format!("{name} is {value}, not a number from 1 to {MANY}"))?;
        }
        for (name, percent) in [("reorder", self.reorder), ("compressible", self.compressible)] {
            check(percent <= 100, || format!("{name} is {percent}, more than 100"))?;
        }
        check(self.volatile_cache || !self.fua, || "fua needs volatile_cache".to_owned())?;
        check(self.discard || !self.discard_zeroes, || "discard_zeroes needs discard".to_owned())
    }
}

impl Action {
    fn validate(&self, setup: &Setup) -> Result<(), ScriptError> {
        check(self.worker < setup.workers, || {
            format!("the setup has {} workers, and the first is worker 0", setup.workers)
        })?;
        let Act::Op { kind, range } = self.act else { return Ok(()) };
        if kind == OpKind::Flush {
            return check(range.is_empty(), || "a flush is for the whole device and has no sectors".to_owned());
        }
        let end = range.first.checked_add(range.sectors);
        check(!range.is_empty() && end.is_some_and(|end| end <= setup.device().end()), || {
            format!("no sectors, or not all of them on the device, which has {}", setup.device().end())
        })?;
        let block = setup.block_sectors();
        check(range.first.is_multiple_of(block) && range.sectors.is_multiple_of(block), || {
            format!("does not begin and end between logical blocks of {block} sectors")
        })?;
        check(!(kind.changes() && setup.read_only), || "the setup says read_only".to_owned())?;
        let offered = match kind {
            OpKind::Discard => setup.discard,
            OpKind::WriteZeroes => setup.write_zeroes,
            _ => true,
        };
        check(offered, || format!("the setup does not offer {kind}"))
    }
}

fn check(right: bool, message: impl FnOnce() -> String) -> Result<(), ScriptError> {
    if right { Ok(()) } else { Err(ScriptError(message())) }
}

/// Plain data: it always has a text.
fn json<T: serde::Serialize>(value: &T) -> String {
    serde_json::to_string(value).unwrap_or_else(|error| format!("\"{error}\""))
}

impl fmt::Display for ScriptError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for ScriptError {}
