//! Rules as text: `OPERATIONS [CLAUSE…]: EFFECT [then STATE]`.

use std::fmt;
use std::str::{FromStr, SplitWhitespace};

use super::{Effect, Errno, FaultPlan, Injection, Ops, Rule, Stage, Trigger};
use crate::plan::OpKind;
use crate::range::SectorRange;

/// What is written for no faults at all.
const NONE: &str = "none";

const CLAUSES: &str = "nth N, every N, rate N/M, burst N/M, range FIRST+SECTORS, calls FROM-TO, times N, state N";
const EFFECTS: &str = "error ERRNO before|partway|after, short, delay N, hold, lost, torn, misdirected, stale, \
                       flipped, panic";

/// A rule that says nothing, or contradicts itself. The message says where, and what would be right.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FaultError(String);

impl fmt::Display for FaultError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for FaultError {}

fn wrong<T>(message: impl Into<String>) -> Result<T, FaultError> {
    Err(FaultError(message.into()))
}

impl fmt::Display for FaultPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            return f.write_str(NONE);
        }
        for (at, rule) in self.rules.iter().enumerate() {
            write!(f, "{}{rule}", if at == 0 { "" } else { "\n" })?;
        }
        Ok(())
    }
}

impl FromStr for FaultPlan {
    type Err = FaultError;

    fn from_str(text: &str) -> Result<Self, FaultError> {
        if text.trim() == NONE {
            return Ok(Self::NONE);
        }
        let mut rules = Vec::new();
        for (line, text) in (1..).zip(text.lines()) {
            let text = text.split('#').next().unwrap_or_default();
            for rule in text.split(';').map(str::trim).filter(|rule| !rule.is_empty()) {
                let rule = rule.parse().map_err(|FaultError(why)| FaultError(format!("line {line}: {why}")))?;
                rules.push(rule);
            }
        }
        Ok(Self { rules })
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.ops)?;
        match self.trigger {
            Trigger::Always => {}
            Trigger::Nth(n) => write!(f, " nth {n}")?,
            Trigger::Every(n) => write!(f, " every {n}")?,
            Trigger::Rate { hits, out_of } => write!(f, " rate {hits}/{out_of}")?,
            Trigger::Burst { hits, out_of } => write!(f, " burst {hits}/{out_of}")?,
        }
        if let Some(range) = self.range {
            write!(f, " range {range}")?;
        }
        if let Some((from, to)) = self.calls {
            write!(f, " calls {from}-{to}")?;
        }
        if let Some(times) = self.times {
            write!(f, " times {times}")?;
        }
        if let Some(state) = self.state {
            write!(f, " state {state}")?;
        }
        write!(f, ": {}", self.effect)?;
        if let Some(then) = self.then {
            write!(f, " then {then}")?;
        }
        Ok(())
    }
}

impl FromStr for Rule {
    type Err = FaultError;

    fn from_str(text: &str) -> Result<Self, FaultError> {
        let text = text.trim();
        let inside = |FaultError(why)| FaultError(format!("in \"{text}\": {why}"));
        let Some((when, what)) = text.split_once(':') else {
            return wrong(format!("\"{text}\" has no colon: a rule is OPERATIONS [CLAUSE…]: EFFECT [then STATE]"));
        };
        let rule = parse_rule(when, what).map_err(inside)?;
        rule.validate()?;
        Ok(rule)
    }
}

fn parse_rule(when: &str, what: &str) -> Result<Rule, FaultError> {
    let mut when = when.split_whitespace();
    let ops = when.next().unwrap_or_default().parse()?;
    let mut what = what.split_whitespace();
    let mut rule = Rule::new(ops, parse_effect(&mut what)?);
    while let Some(clause) = when.next() {
        let value = when.next().unwrap_or_default();
        match clause {
            "nth" => set_trigger(&mut rule, Trigger::Nth(number(clause, value)?))?,
            "every" => set_trigger(&mut rule, Trigger::Every(number(clause, value)?))?,
            "rate" => {
                let (hits, out_of) = pair(clause, value, '/', "1/1000")?;
                set_trigger(&mut rule, Trigger::Rate { hits, out_of })?;
            }
            "burst" => {
                let (hits, out_of) = pair(clause, value, '/', "3/100")?;
                set_trigger(&mut rule, Trigger::Burst { hits, out_of })?;
            }
            "range" => {
                let (first, sectors) = pair(clause, value, '+', "0+2048")?;
                once(clause, &mut rule.range, SectorRange::new(first, sectors))?;
            }
            "calls" => once(clause, &mut rule.calls, pair(clause, value, '-', "10-20")?)?,
            "times" => once(clause, &mut rule.times, number(clause, value)?)?,
            "state" => once(clause, &mut rule.state, number(clause, value)?)?,
            _ => return wrong(format!("\"{clause}\" is no clause; there are {CLAUSES}")),
        }
    }
    match (what.next(), what.next()) {
        (None, _) => {}
        (Some("then"), state) => rule.then = Some(number("then", state.unwrap_or_default())?),
        (Some(word), _) => return wrong(format!("\"{word}\" after the effect; only \"then STATE\" may follow")),
    }
    match what.next() {
        None => Ok(rule),
        Some(word) => wrong(format!("\"{word}\" after the state; nothing may follow")),
    }
}

fn once<T>(clause: &str, slot: &mut Option<T>, value: T) -> Result<(), FaultError> {
    match slot.replace(value) {
        None => Ok(()),
        Some(_) => wrong(format!("\"{clause}\" twice; once is enough")),
    }
}

fn set_trigger(rule: &mut Rule, trigger: Trigger) -> Result<(), FaultError> {
    if rule.trigger != Trigger::Always {
        return wrong("more than one of nth, every, rate and burst; they exclude each other");
    }
    rule.trigger = trigger;
    Ok(())
}

fn number<N: FromStr<Err = std::num::ParseIntError>>(clause: &str, value: &str) -> Result<N, FaultError> {
    value
        .parse()
        .or_else(|_| wrong(format!("\"{clause}\" takes a whole number, such as {clause} 3, not \"{value}\"")))
}

fn pair(clause: &str, value: &str, between: char, example: &str) -> Result<(u64, u64), FaultError> {
    value.split_once(between).and_then(|(left, right)| Some((left.parse().ok()?, right.parse().ok()?))).map_or_else(
        || wrong(format!("\"{clause}\" takes two numbers, such as {clause} {example}, not \"{value}\"")),
        Ok,
    )
}

fn parse_effect(words: &mut SplitWhitespace<'_>) -> Result<Effect, FaultError> {
    let word = words.next().unwrap_or_default();
    Ok(match word {
        "error" => {
            let errno = words.next().unwrap_or_default();
            let errno = errno.parse::<Errno>().or_else(|error| wrong(error.to_string()))?;
            let stage = match words.next().unwrap_or_default() {
                "before" => Stage::Before,
                "partway" => Stage::Partway,
                "after" => Stage::After,
                other => {
                    return wrong(format!(
                        "\"error {errno} {other}\" does not say how much is done by then: before, partway or after"
                    ));
                }
            };
            Effect::Error { errno, stage }
        }
        "delay" => Effect::Delay(number(word, words.next().unwrap_or_default())?),
        "short" => Effect::Short,
        "hold" => Effect::Hold,
        "lost" => Effect::Lost,
        "torn" => Effect::Torn,
        "misdirected" => Effect::Misdirected,
        "stale" => Effect::Stale,
        "flipped" => Effect::Flipped,
        "panic" => Effect::Panic,
        _ => return wrong(format!("\"{word}\" is no effect; there are {EFFECTS}")),
    })
}

impl Rule {
    /// Whether it does not contradict itself.
    ///
    /// # Errors
    /// Says in what it does.
    pub fn validate(&self) -> Result<(), FaultError> {
        let check = |right: bool, message: &dyn Fn() -> String| {
            if right { Ok(()) } else { wrong(format!("in \"{self}\": {}", message())) }
        };
        let suits = |kind| self.effect.suits(kind) && (self.range.is_none() || kind != OpKind::Flush);
        check(self.ops.iter().any(suits), &|| {
            if self.range.is_some() && self.ops == Ops::only(OpKind::Flush) {
                return "a flush has no range".to_owned();
            }
            let able: Vec<_> =
                OpKind::ALL.into_iter().filter(|kind| suits(*kind)).map(|kind| kind.to_string()).collect();
            format!("\"{}\" can only happen to {}", self.effect, able.join(", "))
        })?;
        check(
            self.range.is_none_or(|range| !range.is_empty() && range.first.checked_add(range.sectors).is_some()),
            &|| "a range has at least one sector, and ends within what 64 bits count".to_owned(),
        )?;
        let counts = "calls are counted from 1";
        match self.trigger {
            Trigger::Always => {}
            Trigger::Nth(n) | Trigger::Every(n) => check(n > 0, &|| counts.to_owned())?,
            Trigger::Rate { hits, out_of } | Trigger::Burst { hits, out_of } => {
                check(hits > 0 && hits <= out_of, &|| {
                    format!("{hits} of {out_of} is not from 1 of {out_of} to all of them")
                })?;
            }
        }
        if let Some((from, to)) = self.calls {
            check(from > 0 && from <= to, &|| format!("{counts}, and {from} to {to} are none"))?;
        }
        check(self.times != Some(0), &|| "a rule that fires 0 times is none".to_owned())
    }
}

impl fmt::Display for Ops {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if *self == Self::ANY {
            return f.write_str("any");
        }
        for (at, kind) in self.iter().enumerate() {
            write!(f, "{}{kind}", if at == 0 { "" } else { "," })?;
        }
        Ok(())
    }
}

impl FromStr for Ops {
    type Err = FaultError;

    fn from_str(text: &str) -> Result<Self, FaultError> {
        text.split(',').try_fold(Self::NONE, |ops, name| {
            if name == "any" {
                return Ok(Self::ANY);
            }
            match OpKind::ALL.into_iter().find(|kind| kind.to_string() == name) {
                Some(kind) => Ok(ops.with(kind)),
                None => wrong(format!(
                    "\"{name}\" is no operation; there are read, write, fua, flush, discard, zeroes, and any for all"
                )),
            }
        })
    }
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Before => "before",
            Self::Partway => "partway",
            Self::After => "after",
        })
    }
}

impl fmt::Display for Effect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Error { errno, stage } => write!(f, "error {errno} {stage}"),
            Self::Delay(time) => write!(f, "delay {time}"),
            Self::Short => f.pad("short"),
            Self::Hold => f.pad("hold"),
            Self::Lost => f.pad("lost"),
            Self::Torn => f.pad("torn"),
            Self::Misdirected => f.pad("misdirected"),
            Self::Stale => f.pad("stale"),
            Self::Flipped => f.pad("flipped"),
            Self::Panic => f.pad("panic"),
        }
    }
}

impl FromStr for Effect {
    type Err = FaultError;

    fn from_str(text: &str) -> Result<Self, FaultError> {
        let mut words = text.split_whitespace();
        let effect = parse_effect(&mut words)?;
        match words.next() {
            None => Ok(effect),
            Some(word) => wrong(format!("\"{word}\" after the effect \"{effect}\"; nothing may follow")),
        }
    }
}

impl fmt::Display for Injection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "fault #{} on {}", self.number, self.kind)?;
        if self.kind != OpKind::Flush {
            write!(f, " {}", self.range)?;
        }
        write!(f, ": {}", self.effect)
    }
}

impl From<Rule> for String {
    fn from(rule: Rule) -> Self {
        rule.to_string()
    }
}

impl TryFrom<String> for Rule {
    type Error = FaultError;

    fn try_from(text: String) -> Result<Self, FaultError> {
        text.parse()
    }
}

impl From<Effect> for String {
    fn from(effect: Effect) -> Self {
        effect.to_string()
    }
}

impl TryFrom<String> for Effect {
    type Error = FaultError;

    fn try_from(text: String) -> Result<Self, FaultError> {
        text.parse()
    }
}
