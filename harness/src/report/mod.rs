//! Reporters: what makes events visible.

mod collect;
mod jsonl;
mod sink;
mod terminal;
#[cfg(test)]
mod tests;
mod text;

pub use collect::{Collected, Collector};
pub use jsonl::JsonLines;
pub use sink::{EventLoop, EventSink, Reporter};
pub use terminal::Terminal;
