//! Publishing with confirms: what happened to each message, told to the one who published it.

use std::collections::VecDeque;
use std::task::{Context, Poll};

use bytes::Bytes;
use lapin::BasicProperties;
use lapin::types::ShortString;

use crate::press::{PressChannel, Told, Unsent};
use crate::wire::Destination;

/// Plain peers that have no inbox give addresses that begin so.
const DIRECT_REPLY_TO: &str = "amq.rabbitmq.reply-to";

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

/// A channel on which all is confirmed, owned by one task.
#[derive(Debug)]
pub(crate) struct Outlet<T> {
    channel: PressChannel,
    /// The tag of the first slot.
    first: u64,
    /// What was published and not confirmed, by its tag. None: confirmed before what was published before it.
    slots: VecDeque<Option<Slot<T>>>,
    /// How many slots there are, their bytes, and how many of them are to wake who waits.
    pending: usize,
    bytes: usize,
    prompt: usize,
}

#[derive(Debug)]
struct Slot<T> {
    token: T,
    /// By these the broker's return is known.
    queue: ShortString,
    properties: BasicProperties,
    bytes: usize,
    prompt: bool,
    returned: bool,
}

impl<T> Outlet<T> {
    pub(crate) fn new(channel: PressChannel) -> Self {
        Self {
            channel,
            // The broker counts from 1 on each channel.
            first: 1,
            slots: VecDeque::new(),
            pending: 0,
            bytes: 0,
            prompt: 0,
        }
    }

    /// False once nothing can be published any more.
    pub(crate) fn is_open(&self) -> bool {
        self.channel.is_open()
    }

    /// How many messages wait for the broker's word, and their bytes.
    pub(crate) fn pending(&self) -> (usize, usize) {
        (self.pending, self.bytes)
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
        let to = Destination {
            exchange: exchange.as_str(),
            routing_key: queue.as_str(),
            // The broker hands what is for a pseudo-queue over by itself, and then finds that no queue took it.
            mandatory: !queue.as_str().starts_with(DIRECT_REPLY_TO),
        };
        match self.channel.publish(to, &properties, &body) {
            Ok(()) => {}
            Err(Unsent::Closed) => return Err(token),
            Err(Unsent::Unwritable(reason)) => {
                tracing::error!(reason, "a message that cannot be written");
                return Err(token);
            }
        }
        self.pending += 1;
        self.bytes += body.len();
        self.prompt += usize::from(prompt);
        self.slots.push_back(Some(Slot {
            token,
            queue,
            properties,
            bytes: body.len(),
            prompt,
            returned: false,
        }));
        Ok(())
    }

    /// Ready when there may be news of a prompt message, or the channel is closed: time for a sweep.
    pub(crate) fn poll_prompt(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        match self.prompt {
            0 => Poll::Pending,
            _ => self.channel.poll_told(cx),
        }
    }

    /// Takes out all messages whose fate is known.
    pub(crate) fn sweep(&mut self, fates: &mut Vec<(T, Fate)>) {
        for told in self.channel.take_told() {
            match told {
                Told::Acked { tag, multiple } => self.confirm(tag, multiple, true, fates),
                Told::Nacked { tag, multiple } => self.confirm(tag, multiple, false, fates),
                Told::Returned {
                    routing_key,
                    correlation,
                } => self.come_back(&routing_key, correlation.as_ref()),
            }
        }
    }

    /// Takes out all messages; what is not known by now never will be. For a channel that is dead, or not needed any more.
    pub(crate) fn abandon(mut self, fates: &mut Vec<(T, Fate)>) {
        // Confirms that came just before the channel died.
        self.sweep(fates);
        let refused = self.channel.is_refused();
        let left = self.slots.into_iter().flatten();
        fates.extend(left.map(|slot| {
            let fate = match slot.returned {
                true => Fate::Returned,
                false => Fate::Lost { refused },
            };
            (slot.token, fate)
        }));
    }

    fn confirm(&mut self, tag: u64, multiple: bool, accepted: bool, fates: &mut Vec<(T, Fate)>) {
        let Some(index) = tag.checked_sub(self.first) else {
            return;
        };
        let index = usize::try_from(index).unwrap_or(usize::MAX);
        let mut settled = 0;
        if multiple {
            for slot in self
                .slots
                .drain(..self.slots.len().min(index.saturating_add(1)))
            {
                settled += 1;
                if let Some(slot) = slot {
                    self.pending -= 1;
                    self.bytes -= slot.bytes;
                    self.prompt -= usize::from(slot.prompt);
                    fates.push(slot.into_fate(accepted));
                }
            }
        } else if let Some(slot) = self.slots.get_mut(index).and_then(Option::take) {
            self.pending -= 1;
            self.bytes -= slot.bytes;
            self.prompt -= usize::from(slot.prompt);
            fates.push(slot.into_fate(accepted));
        }
        while let Some(None) = self.slots.front() {
            self.slots.pop_front();
            settled += 1;
        }
        self.first += settled;
    }

    /// The broker does not say which message it was, but what was in it. It comes before its confirm.
    fn come_back(&mut self, routing_key: &ShortString, correlation: Option<&ShortString>) {
        let slot = self.slots.iter_mut().flatten().find(|slot| {
            !slot.returned
                && slot.queue == *routing_key
                && slot.properties.correlation_id().as_ref() == correlation
        });
        match slot {
            Some(slot) => slot.returned = true,
            None => tracing::warn!("a returned message that nobody sent"),
        }
    }
}

impl<T> Slot<T> {
    fn into_fate(self, accepted: bool) -> (T, Fate) {
        let fate = match (self.returned, accepted) {
            (true, _) => Fate::Returned,
            (false, true) => Fate::Accepted,
            (false, false) => Fate::Refused,
        };
        (self.token, fate)
    }
}
