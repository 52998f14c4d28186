//! One call that waits.

use std::sync::atomic::AtomicU8;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use tokio::time::Instant;

use super::Ended;
use crate::error::Error;

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
    /// Nobody waits any more.
    is_over: bool,
}

impl Wait {
    /// With the waker of who polls for it first, if that is known.
    pub(super) fn until(deadline: Instant, waker: Option<Waker>) -> Self {
        let state = State {
            waker,
            ..State::default()
        };
        Self {
            decided: AtomicU8::default(),
            deadline: Some(deadline),
            state: Mutex::new(state),
        }
    }

    /// Tells the call how it ended; for whoever took it out of the table. It has the last word: a reply is more than a send that
    /// failed.
    pub(super) fn end(&self, ended: Ended) {
        let mut state = self.lock();
        state.ended = Some(ended);
        wake(state);
    }

    /// Tells the call that its request was not sent, or not accepted. It is in the table still.
    pub(crate) fn fail(&self, error: Error) {
        let mut state = self.lock();
        if state.ended.is_none() && !state.is_over {
            state.ended = Some(Ended::SendFailed(error));
            wake(state);
        }
    }

    /// Waits for the end; not to be polled again after it.
    pub(super) fn poll(&self, cx: &Context<'_>) -> Poll<Ended> {
        let mut state = self.lock();
        if let Some(ended) = state.ended.take() {
            state.is_over = true;
            return Poll::Ready(ended);
        }
        match &mut state.waker {
            Some(waker) => waker.clone_from(cx.waker()),
            none => *none = Some(cx.waker().clone()),
        }
        Poll::Pending
    }

    /// Nobody waits for the end, whether it has come or not.
    pub(super) fn leave(&self) {
        let mut state = self.lock();
        state.is_over = true;
        let left = (state.ended.take(), state.waker.take());
        // Not under the lock: they may be the last of what they belong to.
        drop(state);
        drop(left);
    }

    /// True if it has ended, whether who waited knows it yet or not.
    pub(crate) fn is_over(&self) -> bool {
        let state = self.lock();
        state.is_over || state.ended.is_some()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Not under the lock: who is woken may look at once.
fn wake(mut state: MutexGuard<'_, State>) {
    let waker = state.waker.take();
    drop(state);
    if let Some(waker) = waker {
        waker.wake();
    }
}
