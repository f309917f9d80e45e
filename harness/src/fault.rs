//! Plans of faults, and a backend that has them.

use std::convert::Infallible;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Which faults happen when.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct FaultPlan {
    /// The rules.
    pub rules: Vec<Rule>,
}

/// When something happens, and what.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub struct Rule {
    text: String,
    /// Only in this state. A plan begins in state 0.
    pub state: Option<u32>,
    /// Which of the calls that are left.
    pub trigger: Trigger,
    /// Only from the first to the second of these calls, counted from 1, both included.
    pub calls: Option<(u64, u64)>,
}

/// Which of the calls that a rule is for it fires on, counted from 1 for each rule.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Trigger {
    /// All.
    #[default]
    Always,
    /// The nth alone.
    Nth(u64),
}

impl fmt::Display for FaultPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lines: Vec<&str> = self.rules.iter().map(|rule| rule.text.as_str()).collect();
        f.write_str(&lines.join("\n"))
    }
}

impl FromStr for FaultPlan {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        let lines = text.split([';', '\n']).map(str::trim).filter(|line| !line.is_empty());
        Ok(Self { rules: lines.map(|line| Rule::from(line.to_owned())).collect() })
    }
}

impl From<String> for Rule {
    fn from(text: String) -> Self {
        let trigger = if text.contains("rate") { Trigger::Nth(1000) } else { Trigger::Always };
        Self { text, state: None, trigger, calls: None }
    }
}

impl From<Rule> for String {
    fn from(rule: Rule) -> Self {
        rule.text
    }
}
