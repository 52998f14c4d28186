//! How a settlement that is under way is told to have ended.

use std::fmt;

use tokio::sync::oneshot;

use crate::done::{Told, closed};
use crate::error::{Error, ErrorKind, Executed};
use crate::service::UnderWay;
use crate::transport::Settle;

/// Whom a transport tells how a settlement ended, for one that cannot be known at once: it has made this by [`Later`], and keeps it
/// with what it sent. Whoever drains a server waits for it.
///
/// **Dropped** untold it is told `Closed`.
#[must_use = "dropped, it says that the transport was closed"]
pub struct Settled(Option<Whom>);

/// Somebody who waits, or nobody: then a task of its own would only be in the way.
enum Whom {
    Service(UnderWay),
    Waiter(oneshot::Sender<Result<(), Error>>),
}

/// Makes a [`Settled`], for a settlement whose end cannot be known at once. Not to be asked costs nothing.
pub struct Later<'a>(&'a mut dyn FnMut(&Settle) -> Settled);

/// What was not settled, and why.
#[derive(Debug)]
#[non_exhaustive]
pub struct Unsettled {
    /// An error as of [`Delivery::reply`](crate::transport::Delivery::reply).
    pub error: Error,
    /// As it was given: its reply may be kept.
    pub settle: Settle,
}

impl Unsettled {
    /// For transports.
    #[must_use]
    pub fn new(error: Error, settle: Settle) -> Self {
        Self { error, settle }
    }
}

impl Settled {
    /// Tells a service.
    pub(crate) fn to_service(settlement: UnderWay) -> Self {
        Self(Some(Whom::Service(settlement)))
    }

    /// Tells somebody who waits for it.
    pub(crate) fn to_waiter() -> (Self, Told) {
        let (waiter, told) = Told::channel();
        (Self(Some(Whom::Waiter(waiter))), told)
    }

    /// Tells how it ended: an error as of [`Delivery::reply`](crate::transport::Delivery::reply).
    ///
    /// It waits for nothing, needs no runtime, and may be called by any thread, but not under a lock that the transport takes when it is used:
    /// a reply that could not be sent is put by here.
    pub fn tell(mut self, settled: Result<(), Error>) {
        self.say(settled);
    }

    fn say(&mut self, settled: Result<(), Error>) {
        match self.0.take() {
            Some(Whom::Service(settlement)) => settlement.end(settled),
            // If nobody waits any more, it is no matter to anybody.
            Some(Whom::Waiter(waiter)) => drop(waiter.send(settled)),
            None => {}
        }
    }
}

impl Drop for Settled {
    fn drop(&mut self) {
        if self.0.is_some() {
            self.say(Err(closed(Executed::Maybe)));
        }
    }
}

impl fmt::Debug for Settled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Settled").finish_non_exhaustive()
    }
}

impl<'a> Later<'a> {
    pub(crate) fn new(make: &'a mut dyn FnMut(&Settle) -> Settled) -> Self {
        Self(make)
    }

    /// Whom to tell. What was to be settled is under way from now on.
    pub fn settled(self, settle: &Settle) -> Settled {
        (self.0)(settle)
    }
}

impl fmt::Debug for Later<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Later").finish_non_exhaustive()
    }
}

/// Of a transport that waits for the broker's word, and has nobody to tell.
pub(crate) fn never_told() -> Error {
    let message = "the transport keeps to itself how settling ended";
    Error::maybe_executed(ErrorKind::Broker, message)
}
