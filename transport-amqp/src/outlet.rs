//! Publishing with confirms: what happened to each message, told to the one who published it.

use std::collections::VecDeque;
use std::hash::{BuildHasher, RandomState};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use lapin::message::BasicReturnMessage;
use lapin::options::BasicPublishOptions;
use lapin::protocol::AMQPErrorKind;
use lapin::types::ShortString;
use lapin::{BasicProperties, Channel, Confirmation};

/// Plain peers that have no inbox give addresses that begin so.
const DIRECT_REPLY_TO: &str = "amq.rabbitmq.reply-to";

/// How many messages wake who waits for their fate. The broker confirms about in order, and a sweep finds the rest.
const POLLED: usize = 8;

/// A message for one queue, or for all that are bound to an exchange by the key in its place.
#[derive(Debug)]
pub(crate) struct Message {
    /// Empty: the broker's own, which knows every queue by its name.
    pub(crate) exchange: ShortString,
    pub(crate) queue: ShortString,
    pub(crate) properties: BasicProperties,
    pub(crate) body: Bytes,
}

/// What became of a message.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    /// It is in its queue.
    Accepted,
    /// The broker has no room for it.
    Refused,
    /// There is no such queue.
    Returned,
    /// The channel died before the broker's word; `refused` if it was the broker that closed the channel alone, so that some
    /// message on it may be the reason.
    Lost { refused: bool },
}

/// A channel in confirm mode, owned by one task.
///
/// Only one task may publish on it: the client library counts confirms under one lock and queues frames under another, and two
/// publishers at once could get each other's confirms.
pub(crate) struct Outlet<T> {
    channel: Arc<Channel>,
    slots: VecDeque<Slot<T>>,
    /// Bytes in `slots`.
    bytes: usize,
    hasher: RandomState,
}

struct Slot<T> {
    token: T,
    /// Of queue and correlation id: by these the broker's return is known.
    key: u64,
    bytes: usize,
    prompt: bool,
    returned: bool,
    /// Its own confirm is here, and all returns that came before it are known.
    settled: bool,
    progress: Progress,
}

enum Progress {
    Waiting(Pin<Box<dyn Future<Output = lapin::Result<Confirmation>> + Send>>),
    Acked,
    Nacked,
    Lost { refused: bool },
}

impl<T> Outlet<T> {
    /// Publishes on `channel`, which is in confirm mode.
    pub(crate) fn new(channel: Channel) -> Self {
        Self {
            channel: Arc::new(channel),
            slots: VecDeque::new(),
            bytes: 0,
            hasher: RandomState::new(),
        }
    }

    /// False once nothing can be published any more.
    pub(crate) fn is_open(&self) -> bool {
        self.channel.status().connected()
    }

    /// How many messages wait for the broker's word, and their bytes.
    pub(crate) fn pending(&self) -> (usize, usize) {
        (self.slots.len(), self.bytes)
    }

    /// Publishes a message; what became of it comes from [`sweep`](Self::sweep), with the token. With `prompt`,
    /// [`poll_prompt`](Self::poll_prompt) wakes as soon as it is known.
    ///
    /// # Errors
    /// The token, if certainly nothing was sent.
    pub(crate) fn publish(&mut self, message: Message, prompt: bool, token: T) -> Result<(), T> {
        let Message {
            exchange,
            queue,
            properties,
            body,
        } = message;
        let correlation = properties.correlation_id().as_ref();
        let key = self.key(queue.as_str(), correlation.map(ShortString::as_str));
        let bytes = body.len();
        let channel = Arc::clone(&self.channel);
        // The broker hands what is for a pseudo-queue over by itself, and then finds that no queue took it.
        let mandatory = !queue.as_str().starts_with(DIRECT_REPLY_TO);
        let mut confirm = Box::pin(async move {
            let options = BasicPublishOptions {
                mandatory,
                ..BasicPublishOptions::default()
            };
            channel
                .basic_publish(exchange, queue, options, &body, properties)
                .await?
                .await
        });
        // The first poll queues the frames. Awaiting here would cost a wake-up per message.
        let mut cx = Context::from_waker(Waker::noop());
        let (progress, returned) = match confirm.as_mut().poll(&mut cx) {
            Poll::Pending => (Progress::Waiting(confirm), None),
            // Refused before its frames were queued.
            Poll::Ready(Err(_)) => return Err(token),
            // The broker was faster than we.
            Poll::Ready(Ok(confirmation)) => judge(Ok(confirmation)),
        };
        self.bytes += bytes;
        self.slots.push_back(Slot {
            token,
            key,
            bytes,
            prompt,
            returned: false,
            settled: false,
            progress,
        });
        // Only now: it may be its own.
        self.route(returned);
        Ok(())
    }

    /// Ready when the fate of a prompt message is known: time for a sweep.
    pub(crate) fn poll_prompt(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let mut returns = Vec::new();
        let mut ready = false;
        let mut polled = 0;
        for slot in self.slots.iter_mut().filter(|slot| slot.prompt) {
            if !slot.is_known() && polled < POLLED {
                polled += 1;
                slot.poll(cx, &mut returns);
            }
            ready |= slot.is_known();
        }
        self.route(returns);
        if ready {
            Poll::Ready(())
        } else {
            Poll::Pending
        }
    }

    /// Takes out all messages whose fate is known.
    pub(crate) fn sweep(&mut self, fates: &mut Vec<(T, Fate)>) {
        if !self.collect() {
            return;
        }
        // The client library hangs a returned message on whichever confirm comes next, and resolves the confirms of one frame in any
        // order. So while a frame is being worked off, a confirm of ours can be seen before its own return. This call takes the lock
        // under which that happens: after it, all returns of what was confirmed above are on some confirm.
        let mut cx = Context::from_waker(Waker::noop());
        let mut barrier = Box::pin(self.channel.wait_for_confirms());
        let _ = barrier.as_mut().poll(&mut cx);
        drop(barrier);
        for slot in &mut self.slots {
            slot.settled = slot.is_known();
        }
        self.collect();
        for _ in 0..self.slots.len() {
            let Some(slot) = self.slots.pop_front() else {
                break;
            };
            // What was confirmed only by the second look has had no barrier yet.
            if slot.settled {
                self.bytes -= slot.bytes;
                fates.push(slot.into_fate());
            } else {
                self.slots.push_back(slot);
            }
        }
    }

    /// Takes out all messages; what is not known by now never will be. For a channel that is dead, or not needed any more.
    pub(crate) fn abandon(mut self, fates: &mut Vec<(T, Fate)>) {
        // Confirms that came just before the channel died.
        self.sweep(fates);
        fates.extend(self.slots.into_iter().map(Slot::into_fate));
    }

    /// Asks each confirm; true if any is known. It wakes nobody: who sleeps calls `poll_prompt` first.
    fn collect(&mut self) -> bool {
        let mut cx = Context::from_waker(Waker::noop());
        let mut returns = Vec::new();
        let mut any = false;
        for slot in &mut self.slots {
            slot.poll(&mut cx, &mut returns);
            any |= slot.is_known();
        }
        self.route(returns);
        any
    }

    /// Gives each returned message to the slot it belongs to, which is not the one whose confirm carried it.
    fn route(&mut self, returns: impl IntoIterator<Item = BasicReturnMessage>) {
        for message in returns {
            let delivery = &message.delivery;
            let correlation = delivery.properties.correlation_id().as_ref();
            let key = self.key(
                delivery.routing_key.as_str(),
                correlation.map(ShortString::as_str),
            );
            let slot = self
                .slots
                .iter_mut()
                .find(|slot| slot.key == key && !slot.returned);
            match slot {
                Some(slot) => slot.returned = true,
                None => tracing::warn!("a returned message that nobody sent"),
            }
        }
    }

    fn key(&self, queue: &str, correlation: Option<&str>) -> u64 {
        self.hasher.hash_one((queue, correlation))
    }
}

impl<T> std::fmt::Debug for Outlet<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Outlet")
            .field("channel", &self.channel.id())
            .field("pending", &self.slots.len())
            .finish_non_exhaustive()
    }
}

impl<T> Slot<T> {
    fn is_known(&self) -> bool {
        !matches!(self.progress, Progress::Waiting(_))
    }

    fn poll(&mut self, cx: &mut Context<'_>, returns: &mut Vec<BasicReturnMessage>) {
        if let Progress::Waiting(confirm) = &mut self.progress
            && let Poll::Ready(result) = confirm.as_mut().poll(cx)
        {
            let (progress, returned) = judge(result);
            self.progress = progress;
            returns.extend(returned);
        }
    }

    fn into_fate(self) -> (T, Fate) {
        let fate = match self.progress {
            _ if self.returned => Fate::Returned,
            // Known, but whether it came back is not: there was no barrier.
            Progress::Acked if !self.settled => Fate::Lost { refused: false },
            Progress::Acked => Fate::Accepted,
            Progress::Nacked => Fate::Refused,
            Progress::Lost { refused } => Fate::Lost { refused },
            Progress::Waiting(_) => Fate::Lost { refused: false },
        };
        (self.token, fate)
    }
}

fn judge(result: lapin::Result<Confirmation>) -> (Progress, Option<BasicReturnMessage>) {
    match result {
        Ok(Confirmation::Ack(returned)) => (Progress::Acked, returned),
        Ok(Confirmation::Nack(returned)) => (Progress::Nacked, returned),
        // Confirms are always on; without them nothing is known.
        Ok(Confirmation::NotRequested) => (Progress::Lost { refused: false }, None),
        Err(error) => {
            let refused = match error.kind() {
                lapin::ErrorKind::ProtocolError(error) => {
                    matches!(error.kind(), AMQPErrorKind::Soft(_))
                }
                _ => false,
            };
            (Progress::Lost { refused }, None)
        }
    }
}
