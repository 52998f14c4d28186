//! One call that waits.

use std::sync::atomic::AtomicU8;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use tokio::time::Instant;

use super::Ended;

/// What a call's future, the table and the request's [`Ticket`](crate::Ticket) share: one allocation for the three.
#[derive(Debug, Default)]
pub(crate) struct Wait {
    /// The ticket's.
    pub(crate) decided: AtomicU8,
    /// When it ends at the latest; none if that is not known.
    pub(crate) deadline: Option<Instant>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    ended: Option<Ended>,
    waker: Option<Waker>,
}

impl Wait {
    pub(super) fn until(deadline: Instant) -> Self {
        Self {
            deadline: Some(deadline),
            ..Self::default()
        }
    }

    /// Tells the call how it ended; for whoever took it out of the table.
    pub(super) fn end(&self, ended: Ended) {
        let waker = {
            let mut state = self.lock();
            state.ended = Some(ended);
            state.waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Waits for the end; not to be polled again after it.
    pub(super) fn poll(&self, cx: &Context<'_>) -> Poll<Ended> {
        let mut state = self.lock();
        if let Some(ended) = state.ended.take() {
            return Poll::Ready(ended);
        }
        match &mut state.waker {
            Some(waker) => waker.clone_from(cx.waker()),
            none => *none = Some(cx.waker().clone()),
        }
        Poll::Pending
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
