//! Which devices a run made, kept where the next run finds it after a `SIGKILL`.

/// The record of this run.
#[derive(Debug, Default)]
pub struct RunRecord {}

impl RunRecord {
    /// This run made device `id`.
    pub(crate) fn made(&mut self, id: u32) {
        let _ = id;
    }

    /// Device `id` is gone.
    pub(crate) fn gone(&mut self, id: u32) {
        let _ = id;
    }
}
