//! The terminal: a progress bar for a human who watches, quiet lines for a log.

use std::env;
use std::fmt;
use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::Reporter;
use super::text::{self, Text};
use crate::event::{Event, Progress};

/// How long a log stays without a sign of progress.
const QUIET_MS: u64 = 10_000;

/// How finely a bar shows a fraction.
const BAR_STEPS: u64 = 1000;

/// Shows a run to a human.
pub struct Terminal {
    text: Text,
    to: Box<dyn Write + Send>,
    bar: Option<ProgressBar>,
    /// When progress was last written to a log.
    logged_ms: u64,
}

impl Terminal {
    /// A progress bar when stderr is a terminal, plain lines otherwise; colours unless `NO_COLOR` is set.
    #[must_use]
    pub fn stderr() -> Self {
        let watched = io::stderr().is_terminal();
        let colour = watched && env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        let bar = watched.then(|| {
            let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
            bar.set_style(style("{spinner} [{elapsed_precise}] {msg}"));
            bar.enable_steady_tick(Duration::from_millis(100));
            bar
        });
        Self { text: Text { colour }, to: Box::new(io::stderr()), bar, logged_ms: 0 }
    }

    /// Plain lines, without colours, to anywhere.
    #[must_use]
    pub fn plain(to: impl Write + Send + 'static) -> Self {
        Self { text: Text { colour: false }, to: Box::new(to), bar: None, logged_ms: 0 }
    }

    fn line(&mut self, text: &str) -> io::Result<()> {
        let to = &mut self.to;
        let mut write = || writeln!(to, "{text}").and_then(|()| to.flush());
        match &self.bar {
            Some(bar) => bar.suspend(write),
            None => write(),
        }
    }

    fn progress(&mut self, progress: &Progress) -> io::Result<()> {
        let text = text::progress(progress);
        if let Some(bar) = &self.bar {
            if let Some(fraction) = progress.fraction {
                if bar.length().is_none() {
                    bar.set_length(BAR_STEPS);
                    bar.set_style(style("{spinner} [{elapsed_precise}] {bar:30} {msg}"));
                }
                bar.set_position((fraction * BAR_STEPS as f64) as u64);
            }
            bar.set_message(text);
            return Ok(());
        }
        // The time begins anew with each piece of work.
        let due = progress.elapsed_ms >= self.logged_ms + QUIET_MS || progress.elapsed_ms < self.logged_ms;
        if due {
            self.logged_ms = progress.elapsed_ms;
            self.line(&text)?;
        }
        Ok(())
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_typo| ProgressStyle::default_spinner())
}

impl Reporter for Terminal {
    fn report(&mut self, event: &Event) -> io::Result<()> {
        match (event, &self.bar) {
            (Event::Progress(progress), _) => return self.progress(progress),
            (Event::StepStarted(step), Some(bar)) => bar.set_message(step.name.clone()),
            (Event::Verdict(_), Some(bar)) => bar.finish_and_clear(),
            _ => {}
        }
        self.text.lines(event).map_or(Ok(()), |text| self.line(&text))
    }
}

impl fmt::Debug for Terminal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Terminal").field("bar", &self.bar.is_some()).finish_non_exhaustive()
    }
}
