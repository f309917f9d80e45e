//! What is kept of a failure: a directory that says what broke, and shows it again elsewhere.
//!
//! | file | what it is |
//! | --- | --- |
//! | `report.txt` | one page for a reader |
//! | `bundle.json` | the same for programs: seed, setup, failure, how to show it again |
//! | `shrunk.json` | the smallest script that was found to fail |
//! | `script.json` | the script of the run, up to the failure |
//! | `events.jsonl` | the last events |
//! | `kernel.log` | what the kernel logged meanwhile |
//!
//! `bundle.json` is written last: a directory without it is not a whole bundle.

mod dump;
mod page;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::event::Event;
use crate::oracle::Oracle;
use crate::script::{Script, Setup};
use crate::seed::Seed;
use crate::shrink::{Rate, Shrunk, Stop};
use crate::threads::ThreadDump;

/// The version of the format that is written. Version 1, which did not say what a failure was [found on](FoundOn), is read
/// too; others are refused.
pub const VERSION: u32 = 2;
const OLDEST: u32 = 1;

/// How many of the last events are kept.
pub const EVENTS_KEPT: usize = 10_000;

const ABOUT: &str = "bundle.json";
const REPORT: &str = "report.txt";
const SCRIPT: &str = "script.json";
const SHRUNK: &str = "shrunk.json";
const EVENTS: &str = "events.jsonl";
const KERNEL_LOG: &str = "kernel.log";

/// How many directories are tried before giving up.
const PLACES: u32 = 1000;

/// A failure, with everything that helps to understand it.
#[derive(Clone, Debug, PartialEq)]
pub struct Bundle {
    /// The scenario that failed.
    pub scenario: String,
    /// What kind of device it was found on.
    pub found_on: FoundOn,
    /// The number of the device, as its [`Pattern`](crate::Pattern) has it.
    pub device: u32,
    /// What broke.
    pub failure: Failure,
    /// What was done until then.
    pub script: Script,
    /// A smaller script that fails in the same way.
    pub shrunk: Option<Smaller>,
    /// The command that shows it again.
    pub repro: String,
    /// Versions of the programs and libraries that took part, by name.
    pub versions: BTreeMap<String, String>,
    /// The kernel's release.
    pub kernel: String,
    /// The last events, one JSON object or one line each.
    pub events: Vec<String>,
    /// Where each thread stood.
    pub threads: Vec<ThreadDump>,
    /// What the kernel logged meanwhile.
    pub kernel_log: Vec<String>,
}

/// What kind of device a failure was found on, and so where it is replayed unless another place is asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FoundOn {
    /// The simulated device.
    #[default]
    Simulator,
    /// A real device, served by the program that found it; how, beside what the [`Setup`] says, in its own words.
    Served(BTreeMap<String, Value>),
    /// A real device of somebody else's.
    External,
}

/// What broke.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Failure {
    /// Who says so.
    pub oracle: Oracle,
    /// What it says: a mismatch, a finding, or a hang.
    pub event: Event,
    /// How many operations had ended by then.
    pub after_ops: u64,
}

/// A smaller script that fails in the same way.
#[derive(Clone, Debug, PartialEq)]
pub struct Smaller {
    /// The script, with the seed that it fails with.
    pub script: Script,
    /// What breaks in it.
    pub failure: Failure,
    /// How often it fails.
    pub rate: Rate,
    /// How many runs it took to find it.
    pub runs: u64,
    /// Why it is not smaller still.
    pub stop: Stop,
}

impl Smaller {
    /// What came of shrinking, and how the result fails.
    #[must_use]
    pub fn new(shrunk: Shrunk, failure: Failure) -> Self {
        let Shrunk { script, runs, stop, rate, .. } = shrunk;
        Self { script, failure, rate, runs, stop }
    }
}

/// `bundle.json`.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct About {
    version: u32,
    scenario: String,
    #[serde(default)]
    found_on: FoundOn,
    seed: Seed,
    device: u32,
    setup: Setup,
    failure: Failure,
    script: String,
    shrunk: Option<AboutSmaller>,
    events: Option<String>,
    kernel_log: Option<String>,
    repro: String,
    versions: BTreeMap<String, String>,
    kernel: String,
    threads: Vec<ThreadDump>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct AboutSmaller {
    script: String,
    seed: Seed,
    actions: u64,
    failure: Failure,
    rate: Rate,
    runs: u64,
    stop: Stop,
}

/// The one field that every version has.
#[derive(Deserialize)]
struct AnyVersion {
    version: u64,
}

/// A bundle that cannot be written or read. The message says what to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BundleError(String);

impl Bundle {
    /// Writes the bundle and says where: to `dir`, or where that has something in it already, to `dir-2`, `dir-3`, …: an
    /// earlier failure is not overwritten.
    ///
    /// # Errors
    /// When a directory or a file cannot be written.
    pub fn write(&self, dir: &Path) -> Result<PathBuf, BundleError> {
        let dir = claim(dir)?;
        self.rewrite(&dir)?;
        Ok(dir)
    }

    /// Writes the bundle to `dir` where it, with less in it, is already. It is whole at every moment.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn rewrite(&self, dir: &Path) -> Result<(), BundleError> {
        let put = |name: &str, text: &str| {
            let path = dir.join(name);
            fs::write(&path, text).map_err(|error| {
                BundleError(format!(
                    "cannot write {}: {error}; is there room, and may it be written?",
                    path.display()
                ))
            })
        };
        put(SCRIPT, &self.script.to_json())?;
        if let Some(shrunk) = &self.shrunk {
            put(SHRUNK, &shrunk.script.to_json())?;
        }
        if !self.events.is_empty() {
            put(EVENTS, &lines(&self.events[self.events.len().saturating_sub(EVENTS_KEPT)..]))?;
        }
        if !self.kernel_log.is_empty() {
            put(KERNEL_LOG, &lines(&self.kernel_log))?;
        }
        put(REPORT, &self.report())?;
        let about = serde_json::to_string_pretty(&self.about())
            .map_err(|error| BundleError(format!("the failure has no JSON: {error}")))?;
        put(ABOUT, &(about + "\n"))
    }

    /// Reads a bundle from its directory.
    ///
    /// # Errors
    /// When there is no whole bundle, or one of another version, or a file in it is not what it should be.
    pub fn load(dir: &Path) -> Result<Self, BundleError> {
        let text = fs::read_to_string(dir.join(ABOUT)).map_err(|error| {
            let what = dir.display();
            let kind = error.kind();
            BundleError(if kind == io::ErrorKind::NotFound || kind == io::ErrorKind::NotADirectory {
                format!("{what} is no bundle, or was not written to the end: give the directory that has a {ABOUT}")
            } else {
                format!("cannot read {ABOUT} in {what}: {error}")
            })
        })?;
        let about = About::from_json(&text)
            .map_err(|error| BundleError(format!("{}: {}", dir.join(ABOUT).display(), error.0)))?;
        let script = |name: &str| Script::load(&inside(dir, name)?).map_err(|error| BundleError(error.to_string()));
        let read = |name: Option<String>| name.map_or(Ok(Vec::new()), |name| read_lines(&inside(dir, &name)?));
        let shrunk = match about.shrunk {
            None => None,
            Some(AboutSmaller { script: name, failure, rate, runs, stop, .. }) => {
                Some(Smaller { script: script(&name)?, failure, rate, runs, stop })
            }
        };
        Ok(Self {
            scenario: about.scenario,
            found_on: about.found_on,
            device: about.device,
            failure: about.failure,
            script: script(&about.script)?,
            shrunk,
            repro: about.repro,
            versions: about.versions,
            kernel: about.kernel,
            events: read(about.events)?,
            threads: about.threads,
            kernel_log: read(about.kernel_log)?,
        })
    }

    /// The page for a reader.
    #[must_use]
    pub fn report(&self) -> String {
        page::page(self)
    }

    fn about(&self) -> About {
        let named = |there: bool, name: &str| there.then(|| name.to_owned());
        About {
            version: VERSION,
            scenario: self.scenario.clone(),
            found_on: self.found_on.clone(),
            seed: self.script.seed,
            device: self.device,
            setup: self.script.setup,
            failure: self.failure.clone(),
            script: SCRIPT.to_owned(),
            shrunk: self.shrunk.as_ref().map(|smaller| AboutSmaller {
                script: SHRUNK.to_owned(),
                seed: smaller.script.seed,
                actions: smaller.script.actions.len() as u64,
                failure: smaller.failure.clone(),
                rate: smaller.rate,
                runs: smaller.runs,
                stop: smaller.stop,
            }),
            events: named(!self.events.is_empty(), EVENTS),
            kernel_log: named(!self.kernel_log.is_empty(), KERNEL_LOG),
            repro: self.repro.clone(),
            versions: self.versions.clone(),
            kernel: self.kernel.clone(),
            threads: self.threads.clone(),
        }
    }
}

impl About {
    fn from_json(text: &str) -> Result<Self, BundleError> {
        let AnyVersion { version } =
            serde_json::from_str(text).map_err(|error| BundleError(format!("this describes no bundle: {error}")))?;
        if !(OLDEST.into()..=VERSION.into()).contains(&version) {
            return Err(BundleError(format!(
                "a bundle of version {version}; this program reads versions {OLDEST} to {VERSION}: use the program that \
                 wrote it"
            )));
        }
        serde_json::from_str(text).map_err(|error| BundleError(format!("this does not describe a bundle: {error}")))
    }
}

/// An empty directory that is `dir`, or near it.
fn claim(dir: &Path) -> Result<PathBuf, BundleError> {
    let cannot = |dir: &Path, error: io::Error| {
        BundleError(format!("cannot make the directory {}: {error}; name another one", dir.display()))
    };
    if let Some(parent) = dir.parent() {
        fs::create_dir_all(parent).map_err(|error| cannot(parent, error))?;
    }
    for place in 1..=PLACES {
        let mut name = dir.as_os_str().to_owned();
        if place > 1 {
            name.push(format!("-{place}"));
        }
        let dir = PathBuf::from(name);
        match fs::create_dir(&dir) {
            Ok(()) => return Ok(dir),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                if fs::read_dir(&dir).is_ok_and(|mut entries| entries.next().is_none()) {
                    return Ok(dir);
                }
            }
            Err(error) => return Err(cannot(&dir, error)),
        }
    }
    Err(BundleError(format!("there are {PLACES} bundles at {}; remove some", dir.display())))
}

/// A file of the bundle. What a file says that came from elsewhere does not lead out of its directory.
fn inside(dir: &Path, name: &str) -> Result<PathBuf, BundleError> {
    let path = Path::new(name);
    if path.file_name() == Some(path.as_os_str()) {
        return Ok(dir.join(name));
    }
    Err(BundleError(format!("{}: {name:?} is not the name of a file in the bundle", dir.join(ABOUT).display())))
}

fn read_lines(path: &Path) -> Result<Vec<String>, BundleError> {
    let text = fs::read_to_string(path)
        .map_err(|error| BundleError(format!("cannot read {}: {error}; the bundle is not whole", path.display())))?;
    Ok(text.lines().map(str::to_owned).collect())
}

fn lines(lines: &[String]) -> String {
    lines.iter().map(|line| line.replace('\n', " ") + "\n").collect()
}

impl fmt::Display for BundleError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for BundleError {}
