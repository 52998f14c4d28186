//! What the broker says on one channel, between the connection's task and the channel's owner.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use futures_util::task::AtomicWaker;
use lapin::BasicProperties;
use lapin::types::ShortString;
use tokio::sync::oneshot;

use crate::error::Failure;

/// A channel as the connection's task sees it.
pub(crate) struct Slip {
    open: AtomicBool,
    said: Mutex<Said>,
    /// Its owner.
    waker: AtomicWaker,
}

/// What the broker said of a message, or of all up to it. Messages are counted from 1 on each channel.
#[derive(Debug)]
pub(crate) enum Told {
    Acked {
        tag: u64,
        multiple: bool,
    },
    Nacked {
        tag: u64,
        multiple: bool,
    },
    /// It had no queue. This comes before its acknowledgement.
    Returned {
        routing_key: ShortString,
        correlation: Option<ShortString>,
    },
}

/// Why the broker closed a channel: its reply code, and what it says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) code: u16,
    pub(crate) text: Arc<str>,
}

#[derive(Default)]
struct Said {
    told: Vec<Told>,
    /// Why the broker closed this channel alone.
    refused: Option<Refusal>,
    opening: Option<oneshot::Sender<Result<(), Failure>>>,
    /// The routing key of a message that is coming back.
    returning: Option<ShortString>,
}

impl Slip {
    /// A channel on its way; `opening` is told what becomes of it.
    pub(crate) fn new(opening: oneshot::Sender<Result<(), Failure>>) -> Self {
        Self {
            open: AtomicBool::new(true),
            said: Mutex::new(Said {
                opening: Some(opening),
                ..Said::default()
            }),
            waker: AtomicWaker::new(),
        }
    }

    /// False once nothing can be published any more.
    pub(crate) fn is_open(&self) -> bool {
        self.open.load(Ordering::Acquire)
    }

    /// Nothing can be published any more, which is to be told later, by [`end`](Self::end).
    pub(crate) fn shut(&self) {
        self.open.store(false, Ordering::Release);
    }

    /// It is over, perhaps with its connection.
    pub(crate) fn end(&self) {
        // Dropped, it tells that the channel will not come.
        self.said().opening = None;
        self.waker.wake();
    }

    /// The broker closed this channel alone: said before it is [`shut`](Self::shut).
    pub(crate) fn refuse(&self, refusal: Refusal) {
        let mut said = self.said();
        if let Some(opening) = said.opening.take() {
            let _ = opening.send(Err(Failure::Refused {
                code: refusal.code,
                text: refusal.text.to_string(),
            }));
        }
        said.refused = Some(refusal);
    }

    /// Why the broker closed this channel alone, if it did.
    pub(crate) fn refusal(&self) -> Option<Refusal> {
        self.said().refused.clone()
    }

    /// Takes what the broker said since the last time.
    pub(crate) fn take_told(&self) -> Vec<Told> {
        std::mem::take(&mut self.said().told)
    }

    /// Ready if the broker said anything, or the channel is closed.
    pub(crate) fn poll_told(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.waker.register(cx.waker());
        match self.said().told.is_empty() && self.is_open() {
            true => Poll::Pending,
            false => Poll::Ready(()),
        }
    }

    /// The channel is there, and confirms.
    pub(crate) fn opened(&self) {
        if let Some(opening) = self.said().opening.take() {
            let _ = opening.send(Ok(()));
        }
    }

    pub(crate) fn tell(&self, told: Told) {
        self.said().told.push(told);
        self.waker.wake();
    }

    /// A message is coming back; its properties follow.
    pub(crate) fn returning(&self, routing_key: ShortString) {
        self.said().returning = Some(routing_key);
    }

    /// The properties of what is coming back.
    pub(crate) fn returned(&self, properties: &BasicProperties) {
        let Some(routing_key) = self.said().returning.take() else {
            return;
        };
        let correlation = properties.correlation_id().clone();
        self.tell(Told::Returned {
            routing_key,
            correlation,
        });
    }

    fn said(&self) -> MutexGuard<'_, Said> {
        self.said.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
