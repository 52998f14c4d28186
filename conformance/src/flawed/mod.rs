//! Transports with planted defects: the suite's own test.
//!
//! A case that passes on a transport which breaks its promise proves nothing. So each [`Flaw`] names the cases that must
//! catch it, and the suite's self-check runs each of them against [`FlawedHarness`], which spoils a transport that is
//! sound by just that flaw. Whoever adds a case adds the flaw that it catches, and for each bug that a transport ever
//! had, the flaw that it was.

mod flaw;
mod harness;
mod inbox;
mod subscription;
mod transport;

pub use flaw::Flaw;
pub use harness::FlawedHarness;
