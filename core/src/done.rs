//! How what became of a message is told, whether a future waits for it or a call.

use std::future::{Future, pending};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::sync::oneshot;

use crate::error::{Error, ErrorKind, Executed};
use crate::ticket::Ticket;

/// Whom a transport tells what became of a message that it took: the future of a [`send`](crate::Transport::send), or the call of a request
/// that was [posted](crate::Transport::post). It stands beside the message in the transport's own queue, so that the queue need not know
/// which of them waits.
///
/// A call costs no allocation, a future its channel.
///
/// **Dropped** untold it is told `Closed`, and a request is withdrawn: executed is `No` if it was not committed, else `Maybe`, as for a reply.
#[derive(Debug)]
#[must_use = "dropped, it says that the transport was closed"]
pub struct Done {
    /// None for a reply, and once it is told.
    ticket: Option<Ticket>,
    /// None for a call: its ticket is told, if it failed.
    future: Option<oneshot::Sender<Result<(), Error>>>,
}

/// Waits for what a [`Done`] is told.
///
/// **Cancel safety**: once it is dropped, the `Done` [is abandoned](Done::is_abandoned).
#[derive(Debug)]
pub struct Told(oneshot::Receiver<Result<(), Error>>);

impl Done {
    /// For a request that was posted: if all goes well, its call is not told.
    pub fn of_call(ticket: Ticket) -> Self {
        Self {
            ticket: Some(ticket),
            future: None,
        }
    }

    /// For a request that is sent by a future, which waits for the other half. Its ticket is not told: who waits says what failed.
    pub fn of_request(ticket: Ticket) -> (Self, Told) {
        Self::of_future(Some(ticket))
    }

    /// For a reply, which nobody can withdraw.
    pub fn of_reply() -> (Self, Told) {
        Self::of_future(None)
    }

    fn of_future(ticket: Option<Ticket>) -> (Self, Told) {
        let (sender, told) = Told::channel();
        let future = Some(sender);
        (Self { ticket, future }, told)
    }

    /// True if the message may be written now, and counts as sent from now on: [`Ticket::commit`], and always for a reply.
    #[must_use]
    pub fn commit(&self) -> bool {
        self.ticket.as_ref().is_none_or(Ticket::commit)
    }

    /// The message was not sent after all, or came back as it was: [`Ticket::reopen`]. Before it is committed again, see whether it
    /// [is abandoned](Self::is_abandoned).
    pub fn reopen(&self) {
        if let Some(ticket) = &self.ticket {
            ticket.reopen();
        }
    }

    /// True for a request that was withdrawn before it was sent; it may be forgotten. A reply never is.
    #[must_use]
    pub fn is_withdrawn(&self) -> bool {
        self.ticket.as_ref().is_some_and(Ticket::is_withdrawn)
    }

    /// True if nobody waits for it any more, whether it was sent or not: the future is dropped, or the call is over.
    #[must_use]
    pub fn is_abandoned(&self) -> bool {
        self.future.as_ref().is_some_and(oneshot::Sender::is_closed)
            || self.ticket.as_ref().is_some_and(Ticket::is_abandoned)
    }

    /// Waits until the future is dropped. For ever for a call, which is none.
    ///
    /// **Cancel safety**: dropping this changes nothing.
    pub async fn future_dropped(&mut self) {
        match &mut self.future {
            Some(future) => future.closed().await,
            None => pending().await,
        }
    }

    /// Tells what became of it: an error as of [`send`](crate::Transport::send).
    ///
    /// It waits for nothing, needs no runtime, and may be called by any thread, but not under a lock that the transport takes when it is used.
    pub fn tell(mut self, result: Result<(), Error>) {
        let ticket = self.ticket.take();
        match (self.future.take(), result) {
            // Nobody waits for a send whose future was dropped.
            (Some(future), result) => drop(future.send(result)),
            (None, Err(error)) => fail(ticket, error),
            (None, Ok(())) => {}
        }
    }

    /// Not with what drops every message: there is hardly ever anything to tell.
    #[cold]
    fn tell_closed(&mut self) {
        let ticket = self.ticket.take();
        let executed = ticket.as_ref().map_or(Executed::Maybe, Ticket::executed);
        let error = closed(executed);
        match self.future.take() {
            Some(future) => drop(future.send(Err(error))),
            None => fail(ticket, error),
        }
    }
}

impl Drop for Done {
    fn drop(&mut self) {
        if self.ticket.is_some() || self.future.is_some() {
            self.tell_closed();
        }
    }
}

fn fail(ticket: Option<Ticket>, error: Error) {
    if let Some(ticket) = ticket {
        ticket.fail(error);
    }
}

impl Told {
    /// What is told to one end is waited for at the other.
    pub(crate) fn channel() -> (oneshot::Sender<Result<(), Error>>, Self) {
        let (sender, told) = oneshot::channel();
        (sender, Self(told))
    }
}

impl Future for Told {
    type Output = Result<(), Error>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let told = ready!(Pin::new(&mut self.0).poll(cx));
        Poll::Ready(told.unwrap_or_else(|_| Err(closed(Executed::Maybe))))
    }
}

/// What is told by whoever is dropped untold.
pub(crate) fn closed(executed: Executed) -> Error {
    let message = "the transport was closed before the broker's word";
    Error::new(ErrorKind::Closed, executed, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn overloaded() -> Error {
        Error::not_executed(ErrorKind::Overloaded, "no room")
    }

    #[tokio::test]
    async fn a_future_is_told_all() {
        let ticket = Ticket::new();
        let (done, told) = Done::of_request(ticket.clone());
        assert!(done.commit() && !ticket.withdraw());
        done.tell(Ok(()));
        told.await.unwrap();
        let (done, told) = Done::of_reply();
        assert!(done.commit());
        done.tell(Err(overloaded()));
        assert_eq!(told.await.unwrap_err().kind(), ErrorKind::Overloaded);
    }

    #[tokio::test]
    async fn dropped_it_says_whether_it_was_sent() {
        let end = |sent: bool| {
            let (done, told) = Done::of_request(Ticket::new());
            assert!(!sent || done.commit());
            told
        };
        let (reply, replied) = Done::of_reply();
        drop(reply);
        for (told, executed) in [
            (end(false), Executed::No),
            (end(true), Executed::Maybe),
            (replied, Executed::Maybe),
        ] {
            let error = told.await.unwrap_err();
            assert_eq!(
                (error.kind(), error.executed()),
                (ErrorKind::Closed, executed)
            );
        }
        // Nobody can send what is gone.
        let ticket = Ticket::new();
        drop(Done::of_call(ticket.clone()));
        assert!(ticket.is_withdrawn());
    }

    #[test]
    fn what_is_told_withdraws_nothing() {
        let ticket = Ticket::new();
        Done::of_call(ticket.clone()).tell(Ok(()));
        assert!(!ticket.is_withdrawn());
    }

    #[test]
    fn a_request_is_withdrawn_by_its_ticket_alone() {
        let ticket = Ticket::new();
        let (done, told) = Done::of_request(ticket.clone());
        assert!(!done.is_withdrawn() && !done.is_abandoned());
        drop(told);
        assert!(!done.is_withdrawn() && done.is_abandoned());
        assert!(ticket.withdraw());
        assert!(done.is_withdrawn() && !done.commit());
        let (done, told) = Done::of_reply();
        drop(told);
        assert!(!done.is_withdrawn() && done.is_abandoned());
    }

    #[test]
    fn what_came_back_may_be_withdrawn() {
        let ticket = Ticket::new();
        let done = Done::of_call(ticket.clone());
        assert!(done.commit() && !ticket.withdraw());
        done.reopen();
        assert!(ticket.withdraw() && !done.commit());
    }

    #[tokio::test(start_paused = true)]
    async fn a_dropped_future_is_noticed() {
        let (mut done, told) = Done::of_request(Ticket::new());
        drop(told);
        done.future_dropped().await;
        let mut call = Done::of_call(Ticket::new());
        let dropped = call.future_dropped();
        let waited = tokio::time::timeout(std::time::Duration::from_secs(3600), dropped).await;
        assert!(waited.is_err(), "a call is no future");
    }
}
