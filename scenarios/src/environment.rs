//! The machine a run takes place on: what it is, and whether it has what a run needs.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use nix::unistd::{SysconfVar, Uid, sysconf};
use ublkit::Controller;

use crate::scenario::{Failure, Needs};

/// What a machine is, for the first event of a run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Host {
    /// The kernel's release.
    pub kernel: String,
    /// Architecture, processors, memory, by name.
    pub facts: BTreeMap<String, String>,
    /// The features of this kernel's ublk driver; empty where there is none or it may not be asked.
    pub features: Vec<String>,
    /// Versions of the programs that take part, by name.
    pub versions: BTreeMap<String, String>,
}

impl Host {
    /// This machine.
    #[must_use]
    pub fn here() -> Self {
        let uname = nix::sys::utsname::uname().ok();
        let text = |name: &std::ffi::OsStr| name.to_string_lossy().into_owned();
        let mut facts = BTreeMap::new();
        if let Some(uname) = &uname {
            facts.insert("arch".to_owned(), text(uname.machine()));
            facts.insert("kernel_version".to_owned(), text(uname.version()));
        }
        if let Ok(cpus) = std::thread::available_parallelism() {
            facts.insert("cpus".to_owned(), cpus.to_string());
        }
        if let (Ok(Some(pages)), Ok(Some(page))) = (sysconf(SysconfVar::_PHYS_PAGES), sysconf(SysconfVar::PAGE_SIZE))
        {
            facts.insert("memory_bytes".to_owned(), pages.saturating_mul(page).to_string());
        }
        let mut versions = BTreeMap::new();
        versions.insert("ublk-torture".to_owned(), env!("CARGO_PKG_VERSION").to_owned());
        if let Some(commit) = option_env!("UBLK_TORTURE_COMMIT") {
            versions.insert("commit".to_owned(), commit.to_owned());
        }
        Self {
            kernel: uname.as_ref().map(|uname| text(uname.release())).unwrap_or_default(),
            facts,
            features: ublk_features(),
            versions,
        }
    }
}

fn ublk_features() -> Vec<String> {
    let Ok(controller) = Controller::open() else { return Vec::new() };
    // It prints as a number and, in brackets, the names.
    let features = format!("{:?}", controller.features());
    let names = features.split_once('[').map_or(features.as_str(), |(_, names)| names.trim_end_matches(']'));
    names.split_ascii_whitespace().map(str::to_owned).collect()
}

/// Checks that a run can begin.
///
/// # Errors
/// [`Failure::Environment`] for the first lack, with what to do about it.
pub fn check(needs: &Needs) -> Result<(), Failure> {
    if needs.ublk {
        check_ublk(Uid::effective().is_root(), Path::new("/dev/ublk-control"))?;
    }
    for tool in needs.tools {
        check_tool(tool, std::env::var_os("PATH").as_deref())?;
    }
    Ok(())
}

fn check_ublk(root: bool, control: &Path) -> Result<(), Failure> {
    let mut lacks = Vec::new();
    if !control.exists() {
        lacks.push(format!(
            "this kernel offers no ublk ({} does not exist): load the driver with `modprobe ublk_drv` (Linux 6.0 or \
             later, CONFIG_BLK_DEV_UBLK), or run this in a VM that has it",
            control.display()
        ));
    }
    if !root {
        lacks.push("ublk needs root (CAP_SYS_ADMIN): run this with sudo".to_owned());
    }
    if lacks.is_empty() { Ok(()) } else { Err(Failure::Environment(lacks.join("; and "))) }
}

/// Where a program is, looked for as a shell would and where an unprivileged user's path does not lead.
#[must_use]
pub fn find_tool(tool: &str, path: Option<&std::ffi::OsStr>) -> Option<PathBuf> {
    let listed = path.map(|path| std::env::split_paths(path).collect::<Vec<_>>()).unwrap_or_default();
    let usual = ["/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from);
    listed.into_iter().chain(usual).map(|dir| dir.join(tool)).find(|candidate| is_executable(candidate))
}

fn is_executable(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    fs::metadata(path).is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

fn check_tool(tool: &str, path: Option<&std::ffi::OsStr>) -> Result<(), Failure> {
    if find_tool(tool, path).is_some() {
        return Ok(());
    }
    let package = match tool {
        "mkfs.ext4" | "fsck.ext4" | "e2fsck" => "e2fsprogs",
        "mkfs.xfs" | "xfs_repair" => "xfsprogs",
        _ => tool,
    };
    Err(Failure::Environment(format!(
        "`{tool}` is not installed: install the package {package} (on Debian: `apt-get install {package}`)"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_lack_is_named_with_its_remedy() {
        let nowhere = Path::new("/nonexistent/ublk-control");
        let both = check_ublk(false, nowhere).expect_err("lacking").to_string();
        assert!(both.contains("modprobe ublk_drv") && both.contains("sudo"), "{both}");
        let module = check_ublk(true, nowhere).expect_err("lacking").to_string();
        assert!(module.contains("modprobe ublk_drv") && !module.contains("sudo"), "{module}");
        assert!(check_ublk(true, Path::new("/dev/null")).is_ok());
    }

    #[test]
    fn a_missing_tool_names_its_package() {
        let dir = tempfile::tempdir().expect("temp dir");
        let path = Some(dir.path().as_os_str());
        let message = check_tool("mkfs.no-such-fs", path).expect_err("missing").to_string();
        assert!(message.contains("mkfs.no-such-fs"), "{message}");
        assert!(check_tool("sh", path).is_ok(), "found in the usual places");
    }
}
