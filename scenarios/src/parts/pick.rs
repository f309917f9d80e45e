//! Which scenarios take part.

use crate::scenario::Entry;

/// Which scenarios take part.
#[derive(Clone, Debug, Default, clap::Args)]
#[command(next_help_heading = "Scenarios")]
pub(crate) struct Pick {
    /// These scenarios alone
    #[arg(long, value_name = "NAME,…", value_delimiter = ',', value_parser = parse_name)]
    pub(crate) only: Vec<String>,
    /// All but these
    #[arg(long, value_name = "NAME,…", value_delimiter = ',', value_parser = parse_name)]
    pub(crate) skip: Vec<String>,
}

fn parse_name(name: &str) -> Result<String, String> {
    let known: Vec<_> = runnable(crate::scenario::SCENARIOS).map(|entry| entry.name).collect();
    if known.contains(&name) {
        return Ok(name.to_owned());
    }
    Err(format!("no scenario with short runs is called {name:?}; there are {}", known.join(", ")))
}

/// Those that have short runs.
pub(crate) fn runnable(entries: &'static [Entry]) -> impl Iterator<Item = &'static Entry> {
    entries.iter().filter(|entry| !entry.short.is_empty())
}

impl Pick {
    /// Those of `entries` that take part, and the names of those that do not because it was asked for.
    pub(crate) fn from(&self, entries: &'static [Entry]) -> (Vec<&'static Entry>, Vec<&'static str>) {
        let takes_part = |entry: &&Entry| {
            (self.only.is_empty() || self.only.iter().any(|name| name == entry.name))
                && !self.skip.iter().any(|name| name == entry.name)
        };
        let (picked, left_out): (Vec<_>, Vec<_>) = runnable(entries).partition(takes_part);
        (picked, left_out.iter().map(|entry| entry.name).collect())
    }

    /// The options by name.
    pub(crate) fn options(&self) -> impl Iterator<Item = (String, serde_json::Value)> + use<> {
        [("only", &self.only), ("skip", &self.skip)]
            .map(|(name, value)| (name.to_owned(), serde_json::json!(value)))
            .into_iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scenario::SCENARIOS;

    fn names(only: &[&str], skip: &[&str]) -> (Vec<&'static str>, Vec<&'static str>) {
        let owned = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect();
        let pick = Pick { only: owned(only), skip: owned(skip) };
        let (picked, left_out) = pick.from(SCENARIOS);
        (picked.iter().map(|entry| entry.name).collect(), left_out)
    }

    #[test]
    fn what_is_left_out_is_named() {
        let (all, none) = names(&[], &[]);
        assert!(all.contains(&"probe") && all.contains(&"torture") && none.is_empty());
        let (picked, left_out) = names(&["probe"], &[]);
        assert_eq!(picked, ["probe"]);
        assert!(left_out.contains(&"torture") && !left_out.contains(&"probe"));
        let (picked, left_out) = names(&[], &["probe"]);
        assert!(!picked.contains(&"probe"));
        assert_eq!(left_out, ["probe"]);
    }

    #[test]
    fn what_has_no_short_runs_cannot_be_picked() {
        assert!(parse_name("probe").is_ok());
        let message = parse_name("replay").expect_err("no scenario of a device");
        assert!(message.contains("probe"), "{message}");
    }
}
