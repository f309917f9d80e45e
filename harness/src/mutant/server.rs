//! Servers that confuse slots, buffers and results.

mod buffers;
mod commits;

use std::collections::BTreeMap;
use std::fmt::Debug;

use super::Mutant;
use super::twist::Turn;
use crate::seed::SeededRng;
use crate::sim::server::{Buffers, Commit, Server, TagId, Work};

pub(super) use self::buffers::SEGMENT;

pub(super) fn plant(mutant: Mutant, inner: Box<dyn Server>, turn: &Turn) -> Result<Box<dyn Server>, Box<dyn Server>> {
    buffers::plant(mutant, inner, turn).or_else(|inner| commits::plant(mutant, inner, turn))
}

/// How a server is wrong: what it does not say passes through.
pub(super) trait ServerTwist: Debug + 'static {
    /// The driver hands a request over.
    fn take(&mut self, inner: &mut Inner, work: Work, buffers: &mut Buffers) {
        inner.take(work, buffers);
    }

    /// A step begins.
    fn step(&mut self, inner: &mut Inner, buffers: &mut Buffers, commits: &mut Vec<Commit>) {
        let _ = (inner, buffers, commits);
    }

    /// The server commits the result of `work`.
    fn commit(
        &mut self,
        inner: &mut Inner,
        work: Work,
        commit: Commit,
        buffers: &mut Buffers,
        commits: &mut Vec<Commit>,
    ) {
        let _ = (inner, work, buffers);
        commits.push(commit);
    }

    /// How many requests it holds that the server below does not have.
    fn held(&self) -> usize {
        0
    }

    fn fetches(&self, tag: TagId) -> bool {
        let _ = tag;
        true
    }

    /// Whether it has stopped: it does nothing any more.
    fn stopped(&self, inner: &Inner) -> bool {
        let _ = inner;
        false
    }

    fn allocates(&self) -> bool {
        false
    }

    fn io_flusher(&self) -> bool {
        true
    }
}

/// The server below a mutant, and what it has in hand.
#[derive(Debug)]
pub(super) struct Inner {
    server: Box<dyn Server>,
    works: BTreeMap<TagId, Work>,
    /// Commits that were made when nobody was there to take them.
    early: Vec<Commit>,
    /// For steps that the driver did not ask for.
    rng: SeededRng,
}

impl Inner {
    pub(super) fn take(&mut self, work: Work, buffers: &mut Buffers) {
        self.works.insert(work.tag, work);
        self.server.take(work, buffers);
    }

    /// What it has in hand.
    pub(super) fn works(&self) -> impl Iterator<Item = &Work> {
        self.works.values()
    }

    pub(super) fn has(&self, tag: TagId) -> bool {
        self.works.contains_key(&tag)
    }

    pub(super) fn pending(&self) -> usize {
        self.server.pending() + self.early.len()
    }

    /// Works until the request of `tag` is done, whose result nobody learns.
    pub(super) fn finish(&mut self, tag: TagId, buffers: &mut Buffers) {
        while self.works.contains_key(&tag) && self.server.pending() > 0 {
            let mut commits = Vec::new();
            self.server.step(buffers, &mut self.rng, &mut commits);
            for commit in commits {
                if commit.tag == tag {
                    self.works.remove(&tag);
                } else {
                    self.early.push(commit);
                }
            }
        }
    }
}

/// A server that is wrong.
#[derive(Debug)]
struct Twisted<T> {
    inner: Inner,
    twist: T,
}

/// `server` with a twist.
pub(super) fn twisted(server: Box<dyn Server>, turn: &Turn, twist: impl ServerTwist) -> Box<dyn Server> {
    let rng = turn.rng("server");
    Box::new(Twisted { inner: Inner { server, works: BTreeMap::new(), early: Vec::new(), rng }, twist })
}

impl<T: ServerTwist> Server for Twisted<T> {
    fn fetches(&self, tag: TagId) -> bool {
        self.inner.server.fetches(tag) && self.twist.fetches(tag)
    }

    fn take(&mut self, work: Work, buffers: &mut Buffers) {
        self.twist.take(&mut self.inner, work, buffers);
    }

    fn step(&mut self, buffers: &mut Buffers, rng: &mut SeededRng, commits: &mut Vec<Commit>) {
        if self.twist.stopped(&self.inner) {
            return;
        }
        self.twist.step(&mut self.inner, buffers, commits);
        let mut made = std::mem::take(&mut self.inner.early);
        self.inner.server.step(buffers, rng, &mut made);
        for commit in made {
            match self.inner.works.remove(&commit.tag) {
                Some(work) => self.twist.commit(&mut self.inner, work, commit, buffers, commits),
                None => commits.push(commit),
            }
        }
    }

    fn pending(&self) -> usize {
        if self.twist.stopped(&self.inner) { 0 } else { self.inner.pending() + self.twist.held() }
    }

    fn allocates(&self) -> bool {
        self.inner.server.allocates() || self.twist.allocates()
    }

    fn io_flusher(&self) -> bool {
        self.inner.server.io_flusher() && self.twist.io_flusher()
    }
}
