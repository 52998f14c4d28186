//! The cases, one file per group.

mod cancel;
mod channels;
mod close;
mod clutch;
mod competing;
mod correlation;
mod deadlines;
mod drain;
mod exclusive;
mod faults;
mod given_up;
mod leaks;
mod long_calls;
mod no_responder;
mod nodes;
mod offers;
mod payload;
mod poison;
mod reconnect;
mod redelivery;
mod round_trip;
mod standby;

use crate::case::{Case, Promise};

const GROUPS: &[&[Case]] = &[
    round_trip::CASES,
    correlation::CASES,
    deadlines::CASES,
    no_responder::CASES,
    faults::CASES,
    payload::CASES,
    competing::CASES,
    redelivery::CASES,
    poison::CASES,
    exclusive::CASES,
    leaks::CASES,
    close::CASES,
    reconnect::CASES,
    nodes::CASES,
    cancel::CASES,
    given_up::CASES,
    offers::CASES,
    drain::CASES,
    long_calls::CASES,
    channels::CASES,
    standby::CASES,
    clutch::CASES,
];

/// A case of the suite.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct CaseInfo {
    /// `group/case`. Stable.
    pub name: &'static str,
    /// The promise that it checks.
    pub promise: Promise,
}

/// All cases, in the order of the report.
#[must_use]
pub fn all() -> Vec<CaseInfo> {
    table()
        .into_iter()
        .map(|case| CaseInfo {
            name: case.name,
            promise: case.promise,
        })
        .collect()
}

pub(crate) fn table() -> Vec<&'static Case> {
    GROUPS.iter().copied().flatten().collect()
}
