//! What is in flight, for whoever waits for it.

use super::{Driver, Stage, State};

/// How many operations and requests are listed.
const LISTED: usize = 64;

impl Driver {
    /// An operation that has come no closer to its end for more than `patience` steps, if there is one.
    pub(crate) fn stuck(&self, patience: u64) -> Option<u32> {
        // Long queues take their time.
        let busy = (self.requests.len() - self.free_requests.len()) as u64;
        let limit = patience + 64 * busy;
        self.bios_in_flight().find(|(_, bio)| self.now - bio.progress > limit).map(|(slot, _)| slot)
    }

    /// Everything in flight, a line each, the oldest first.
    pub(crate) fn dump(&self) -> Vec<String> {
        let mut lines = Vec::new();
        match &self.server {
            Some(server) if self.starves() => {
                lines.push(format!("the server has {} requests in hand and waits for memory", server.pending()));
            }
            Some(server) => lines.push(format!("the server has {} requests in hand", server.pending())),
            None => lines.push("there is no server".to_owned()),
        }
        let mut bios: Vec<_> = self.bios_in_flight().map(|(_, bio)| bio).collect();
        bios.sort_by_key(|bio| bio.began);
        for bio in bios.iter().take(LISTED) {
            let stage = if bio.stage == Stage::Finished { ", ended, not told yet" } else { "" };
            let (id, age, parts) = (bio.id, self.now - bio.began, bio.parts);
            lines.push(format!(
                "worker {} #{} {} {}: {age} steps old, {parts} parts left{stage}",
                id.worker, id.index, bio.kind, bio.range
            ));
        }
        let mut requests: Vec<_> = self.requests.iter().filter(|request| request.state != State::Free).collect();
        requests.sort_by_key(|request| request.made);
        lines.extend(requests.iter().take(LISTED).map(|request| request.words(self.now)));
        let listed = bios.len().min(LISTED) + requests.len().min(LISTED);
        let more = bios.len() + requests.len() - listed;
        if more > 0 {
            lines.push(format!("and {more} more"));
        }
        for (queue, number) in self.queues.iter().zip(0..) {
            let waiting = queue.flush_pending.len();
            if waiting > 0 {
                lines.push(format!("queue {number}: {waiting} operations wait for a flush to begin"));
            }
        }
        lines
    }
}
