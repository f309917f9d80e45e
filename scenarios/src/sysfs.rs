//! What the kernel says in sysfs of block devices, and of the character devices of ublk.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::scenario::Failure;

/// A block device's directory in sysfs.
#[derive(Clone, Debug)]
pub struct BlockDir(PathBuf);

impl BlockDir {
    /// The directory of the device whose node is at `node`, such as `/dev/ublkb0`.
    #[must_use]
    pub fn of(node: &Path) -> Self {
        Self(Path::new("/sys/class/block").join(node.file_name().unwrap_or_default()))
    }

    /// The text of an attribute, such as `queue/fua`, without the newline.
    ///
    /// # Errors
    /// [`Failure::DeviceBroke`] if it cannot be read.
    pub fn text(&self, attribute: &str) -> Result<String, Failure> {
        let path = self.0.join(attribute);
        fs::read_to_string(&path)
            .map(|text| text.trim().to_owned())
            .map_err(|error| Failure::io(format_args!("read {}", path.display()), &error))
    }

    /// Sets an attribute, such as `queue/nomerges`.
    ///
    /// # Errors
    /// [`Failure::Environment`] if the kernel does not take it.
    pub fn set(&self, attribute: &str, value: &str) -> Result<(), Failure> {
        let path = self.0.join(attribute);
        fs::write(&path, value)
            .map_err(|error| Failure::Environment(format!("failed to set {} to {value}: {error}", path.display())))
    }

    /// The number in an attribute.
    ///
    /// # Errors
    /// As [`text`](Self::text), and if it is no number.
    pub fn number(&self, attribute: &str) -> Result<u64, Failure> {
        let text = self.text(attribute)?;
        text.parse().map_err(|_| {
            Failure::broke("sysfs", format!("{} holds '{text}', no number", self.0.join(attribute).display()))
        })
    }

    /// How many hardware queues there are.
    ///
    /// # Errors
    /// [`Failure::DeviceBroke`] if they cannot be listed.
    pub fn hardware_queues(&self) -> Result<usize, Failure> {
        let path = self.0.join("mq");
        fs::read_dir(&path)
            .map(|entries| entries.flatten().filter(|entry| entry.path().is_dir()).count())
            .map_err(|error| Failure::io(format_args!("list {}", path.display()), &error))
    }
}

/// The directory of a ublk device's character device: there as long as the id is taken.
#[derive(Clone, Debug)]
pub struct CharDir(PathBuf);

impl CharDir {
    /// Of the device with this id.
    #[must_use]
    pub fn of(id: u32) -> Self {
        Self::under(Path::new("/sys"), id)
    }

    /// As [`of`](Self::of), with `sys` in place of `/sys`.
    #[must_use]
    pub fn under(sys: &Path, id: u32) -> Self {
        Self(sys.join(format!("class/ublk-char/ublkc{id}")))
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Whether the driver has such a device.
    #[must_use]
    pub fn exists(&self) -> bool {
        self.0.exists()
    }

    /// Its inode: not used again, unlike the id.
    #[must_use]
    pub fn inode(&self) -> Option<u64> {
        fs::metadata(&self.0).ok().map(|meta| meta.ino())
    }
}
