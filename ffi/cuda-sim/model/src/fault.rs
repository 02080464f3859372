//! Faults on demand: which call has which effect instead of its own.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

/// The faults that are asked for, and how often each function was called.
#[derive(Debug)]
pub struct Faults<E> {
    rules: Vec<Rule<E>>,
    calls: Mutex<BTreeMap<&'static str, u64>>,
}

#[derive(Debug)]
struct Rule<E> {
    function: String,
    /// From 1.
    call: u64,
    /// Every later call as well.
    later: bool,
    effect: E,
}

impl<E> Default for Faults<E> {
    fn default() -> Self {
        Faults { rules: Vec::new(), calls: Mutex::default() }
    }
}

/// The entries of a variable: separated by semicolons.
pub fn entries(text: &str) -> impl Iterator<Item = &str> {
    text.split(';').map(str::trim).filter(|entry| !entry.is_empty())
}

impl<E: Copy> Faults<E> {
    /// Adds `function:n=EFFECT` or `function:n+=EFFECT`. `effect` knows effects by function and name. `None`: the entry is not
    /// understood.
    pub fn add(&mut self, entry: &str, effect: impl FnOnce(&str, &str) -> Option<E>) -> Option<()> {
        let (what, name) = entry.split_once('=')?;
        let (function, call) = what.split_once(':')?;
        let (call, later) = call.strip_suffix('+').map_or((call, false), |call| (call, true));
        self.rules.push(Rule {
            function: function.to_owned(),
            call: call.parse().ok().filter(|call| *call > 0)?,
            later,
            effect: effect(function, name)?,
        });
        Some(())
    }

    /// Counts a call; what is to happen instead of it, if something is.
    pub fn called(&self, function: &'static str) -> Option<E> {
        if self.rules.is_empty() {
            return None;
        }
        // A panic while it was locked cannot have left it half-made.
        let mut calls = self.calls.lock().unwrap_or_else(PoisonError::into_inner);
        let count = calls.entry(function).or_insert(0);
        *count += 1;
        let now = |rule: &&Rule<E>| rule.call == *count || (rule.later && rule.call < *count);
        let mut rules = self.rules.iter().filter(|rule| rule.function == function);
        rules.find(now).map(|rule| rule.effect)
    }
}
