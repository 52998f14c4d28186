//! A call's place in the table.

use std::future::poll_fn;
use std::mem;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use super::{Ended, Pending, Wait};
use crate::ticket::Ticket;

/// A call's place in the table. It does not leave by itself, which would take a share of the table for every call: whoever has
/// it sees to that, or makes it a [`Slot`].
#[derive(Debug)]
pub(crate) struct Place {
    id: u128,
    ticket: Ticket,
    /// It is out of the table already.
    is_out: bool,
}

impl Place {
    pub(super) fn new(id: u128, wait: Arc<Wait>) -> Self {
        Self {
            id,
            ticket: Ticket::of(wait),
            is_out: false,
        }
    }

    /// The ticket for its request.
    pub(crate) fn ticket(&self) -> &Ticket {
        &self.ticket
    }

    /// The id to take out of the table, unless that is done.
    pub(super) fn take_out(&mut self) -> Option<u128> {
        (!mem::replace(&mut self.is_out, true)).then_some(self.id)
    }

    /// Waits for the end; not to be polled again after it.
    pub(crate) fn poll_ended(&mut self, cx: &mut Context<'_>) -> Poll<Ended> {
        let ended = ready!(self.ticket.wait().poll(cx));
        self.is_out = !matches!(ended, Ended::SendFailed(_));
        Poll::Ready(ended)
    }
}

/// A place in the table that is left when this is dropped.
#[derive(Debug)]
pub(crate) struct Slot<'a> {
    pub(crate) pending: &'a Pending,
    pub(crate) place: Place,
}

impl Slot<'_> {
    /// Waits for the end; not to be called again after it.
    ///
    /// **Cancel safety**: the end is not lost by dropping the future.
    pub(crate) async fn ended(&mut self) -> Ended {
        poll_fn(|cx| self.place.poll_ended(cx)).await
    }
}

impl Drop for Slot<'_> {
    fn drop(&mut self) {
        self.pending.leave(&mut self.place);
    }
}
