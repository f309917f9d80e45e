//! What a power cut left of a file system, held against what was promised.

use std::fs;
use std::path::Path;

use super::content::Content;
use super::model::{Directory, Judged, Names, Wrong};
use super::worker::{Place, file_name};
use super::{Kind, tool};
use crate::context::Context;
use crate::kernel_log::KernelLog;
use crate::probe::filesystem::Mounted;
use crate::probe::power::needs_replay;
use crate::scenario::Failure;
use crate::target::Target;

/// Mounts it, compares every name and every byte, unmounts it, and has it checked.
pub(super) fn at(
    context: &Context,
    kind: &Kind,
    promised: &[Directory],
    marks: Content,
    target: &Target,
) -> Result<(), Failure> {
    // Where it may not be read, there is nothing to see.
    let log = KernelLog::from_here().ok();
    let mut superblock = vec![0; 4096];
    target.storage().read_at(&mut superblock, 0)?;
    let mounted = Mounted::mount_as(context, &target.path(), kind.kernel_name, kind.mount_options)?;
    let replayed = match kind.kernel_name {
        "ext4" => needs_replay(&superblock),
        // Its superblock does not say; the kernel's log does.
        _ => log.is_some_and(|log| says(log, &target.path(), "Starting recovery")),
    };
    context.evidence().add("journals_replayed", replayed.into());
    let compared =
        promised.iter().try_for_each(|directory| look_into(context, kind, directory, marks, mounted.path()));
    let unmounted = mounted.unmount();
    compared.and(unmounted)?;
    tool(kind.fsck, &target.path())?;
    context.evidence().add("fscks", 1);
    Ok(())
}

fn look_into(
    context: &Context,
    kind: &Kind,
    directory: &Directory,
    marks: Content,
    root: &Path,
) -> Result<(), Failure> {
    let name = Place::name(directory.worker);
    let path = root.join(&name);
    let found = names_in(&path).map_err(|what| Failure::broke("durable", format!("{name}: {what}")))?;
    let possible = directory.judge_names(&found).map_err(|wrong| broke(&name, wrong))?;
    let mut first_wrong = None;
    for names in &possible {
        match look_at_files(directory, names, marks, &path) {
            Ok(looked) => {
                let evidence = context.evidence();
                evidence.add("names_judged", names.len() as u64);
                evidence.add("files_judged", looked.files);
                evidence.add("files_promised", looked.promised);
                evidence.add("bytes_promised", looked.judged.promised_bytes);
                evidence.add(&format!("bytes_judged_{}", kind.name), looked.judged.bytes);
                return Ok(());
            }
            Err(failure) => {
                first_wrong.get_or_insert(failure);
            }
        }
    }
    first_wrong.map_or(Ok(()), Err)
}

/// The names in a directory, as numbers.
fn names_in(path: &Path) -> Result<Vec<u32>, String> {
    let cannot = |error: std::io::Error| format!("the directory was durable and cannot be read: {error}");
    let mut names = Vec::new();
    for entry in fs::read_dir(path).map_err(cannot)? {
        let name = entry.map_err(cannot)?.file_name();
        let number = name.to_str().and_then(|name| name.strip_prefix('f')?.parse().ok());
        names.push(number.ok_or_else(|| format!("a name that nobody gave: {}", name.display()))?);
    }
    names.sort_unstable();
    Ok(names)
}

#[derive(Default)]
struct Looked {
    files: u64,
    promised: u64,
    judged: Judged,
}

fn look_at_files(directory: &Directory, names: &Names, marks: Content, path: &Path) -> Result<Looked, Failure> {
    let mut looked = Looked::default();
    for (name, id) in names {
        let file = directory
            .file(*id)
            .ok_or_else(|| Failure::Internal(format!("f{name} leads to a file that is not known")))?;
        let shown = format!("{}/{} (file {id:#x})", Place::name(directory.worker), file_name(*name));
        let bytes = fs::read(path.join(file_name(*name)))
            .map_err(|error| Failure::broke("durable", format!("{shown} cannot be read: {error}")))?;
        let Judged { bytes, promised_bytes } = file.judge(marks, &bytes).map_err(|wrong| broke(&shown, wrong))?;
        looked.files += 1;
        looked.promised += u64::from(file.is_promised());
        looked.judged.bytes += bytes;
        looked.judged.promised_bytes += promised_bytes;
    }
    Ok(looked)
}

fn broke(who: &str, Wrong { what, detail }: Wrong) -> Failure {
    Failure::broke_with("durable", format!("{who}: {what}"), detail)
}

/// Whether a line of the kernel's has both the name of a device and some text.
fn says(mut log: KernelLog, device: &Path, text: &str) -> bool {
    let name = device.file_name().unwrap_or_default().to_string_lossy().into_owned();
    log.read().iter().any(|record| record.text.contains(text) && record.text.contains(&name))
}
