//! Whom to tell what became of a message.

use antiphon_core::{Error, Ticket};
use tokio::sync::oneshot;

use crate::error;

/// What became of a message, as the future of a send gets it. It gets nothing if the message was given up at close.
pub(crate) type Outcome = oneshot::Receiver<Result<(), Error>>;

/// Whom to tell what became of a message. A call is told at the latest when this is dropped.
#[derive(Debug)]
pub(crate) struct Done {
    /// None for a reply, and once it is told.
    ticket: Option<Ticket>,
    /// None for a call: its ticket is told, if it failed.
    future: Option<oneshot::Sender<Result<(), Error>>>,
}

impl Done {
    /// For a request that was posted.
    pub(crate) fn of_call(ticket: Ticket) -> Self {
        Self {
            ticket: Some(ticket),
            future: None,
        }
    }

    /// For a request that is sent by a future.
    pub(crate) fn of_request(ticket: Ticket) -> (Self, Outcome) {
        Self::of_future(Some(ticket))
    }

    pub(crate) fn of_reply() -> (Self, Outcome) {
        Self::of_future(None)
    }

    fn of_future(ticket: Option<Ticket>) -> (Self, Outcome) {
        let (future, outcome) = oneshot::channel();
        let future = Some(future);
        (Self { ticket, future }, outcome)
    }

    /// True if the message may be written now.
    pub(crate) fn commit(&self) -> bool {
        self.ticket.as_ref().is_none_or(Ticket::commit)
    }

    pub(crate) fn tell(mut self, result: Result<(), Error>) {
        let ticket = self.ticket.take();
        match (self.future.take(), result) {
            // Nobody waits for a send whose future was dropped.
            (Some(future), result) => drop(future.send(result)),
            (None, Err(error)) => fail(ticket, error),
            (None, Ok(())) => {}
        }
    }

    /// The message was not sent, or came back as it was.
    pub(crate) fn reopen(&self) {
        if let Some(ticket) = &self.ticket {
            ticket.reopen();
        }
    }

    /// True for a request that was withdrawn.
    pub(crate) fn is_withdrawn(&self) -> bool {
        self.ticket.as_ref().is_some_and(Ticket::is_withdrawn)
    }

    /// True if nobody waits for it any more, whether it was sent or not.
    pub(crate) fn is_abandoned(&self) -> bool {
        self.future.as_ref().is_some_and(oneshot::Sender::is_closed)
            || self.ticket.as_ref().is_some_and(Ticket::is_abandoned)
    }

    /// Waits until its future is gone. For ever for a call, which is no future.
    pub(crate) async fn closed(&mut self) {
        match &mut self.future {
            Some(future) => future.closed().await,
            None => std::future::pending().await,
        }
    }
}

impl Drop for Done {
    fn drop(&mut self) {
        // A future learns it by itself.
        if let (Some(ticket), None) = (self.ticket.take(), &self.future) {
            ticket.fail(error::closed());
        }
    }
}

fn fail(ticket: Option<Ticket>, error: Error) {
    if let Some(ticket) = ticket {
        ticket.fail(error);
    }
}
