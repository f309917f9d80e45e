//! What the kernel complains of in its log while a run goes on.

use ublkit_harness::kernel_log::{Alarm, Record};

/// The kernel's log from a moment on.
pub(super) struct KernelLog(Option<crate::kernel_log::KernelLog>);

impl KernelLog {
    /// From now on. Where it may not be read there is nothing to see, and the run as a whole says so.
    pub(super) fn from_here() -> Self {
        Self(crate::kernel_log::KernelLog::from_here().ok())
    }

    /// The complaints since it was asked last. I/O that fails is none: servers are killed here.
    pub(super) fn complaints(&mut self) -> Vec<String> {
        let Some(log) = &mut self.0 else { return Vec::new() };
        let complains = |record: &Record| record.alarm() == Some(Alarm::Kernel);
        log.read().into_iter().filter(complains).map(|record| record.text).collect()
    }
}
