//! Settles deliveries: whatever has piled up, in one trip.

use std::collections::VecDeque;
use std::mem;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use antiphon_core::Reply;
use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use crate::config::RedisConfig;
use crate::connection::{Backoff, Link};
use crate::error;
use crate::naming::InboxKeys;
use crate::session::Session;
use crate::settle_batch::Batch;
use crate::settlement::RedisSettlement;

/// The most settlements of one batch. Lua unpacks no more than about 8,000 values.
const BATCH_MAX: usize = 512;

/// The most bytes of replies in one batch, more or less.
const BATCH_BYTES: usize = 1 << 20;

/// What a reply takes besides its body, more or less.
const FRAME_BYTES: usize = 96;

/// The most batches under way at once.
const WAVES: usize = 2;

/// One request to settle. It stays where it is on all its ways.
pub(crate) type Item = Box<RedisSettlement>;

/// How a request ends.
#[derive(Debug)]
pub(crate) enum End {
    /// With a small reply or none: moved in batches. If there is one, there is an inbox for it.
    Plain { reply: Option<Arc<Reply>> },
    /// With more to it.
    Full(Box<FullEnd>),
    /// Back to the service, for this attempt.
    GiveBack { attempt: u32 },
}

impl End {
    /// Bytes, more or less.
    pub(crate) fn size(&self) -> usize {
        match self {
            Self::Plain { reply: Some(reply) } => FRAME_BYTES + reply.body.len(),
            Self::Full(full) => full.reply_body.as_ref().map_or(0, |body| body.bytes.len()),
            Self::Plain { reply: None } | Self::GiveBack { .. } => 0,
        }
    }
}

/// An end with bodies in their own keys, or in the dead letters.
#[derive(Debug, Default)]
pub(crate) struct FullEnd {
    pub(crate) reply: Option<(InboxKeys, Vec<u8>)>,
    pub(crate) reply_body: Option<ApartBody>,
    /// The key of the request's body.
    pub(crate) request_body: Option<String>,
    /// The head of the dead letter.
    pub(crate) dead: Option<Vec<u8>>,
}

/// A body in its own key.
#[derive(Debug)]
pub(crate) struct ApartBody {
    pub(crate) key: String,
    pub(crate) bytes: Bytes,
    /// The plain SET was refused, for lack of memory.
    pub(crate) by_script: bool,
}

impl ApartBody {
    pub(crate) fn new(key: String, bytes: Bytes) -> Self {
        Self {
            key,
            bytes,
            by_script: false,
        }
    }
}

/// The queue of settlements.
#[derive(Debug, Default)]
pub(crate) struct Completer {
    queue: Mutex<Queue>,
    arrived: Notify,
}

#[derive(Debug, Default)]
struct Queue {
    items: VecDeque<Item>,
    leaving: Vec<Arc<Session>>,
    closed: bool,
    /// How long to wait after a refusal, and until when.
    backoff: Backoff,
    paused: Option<Instant>,
    /// Something in it may have waited for a connection or a pause, so that its reply may be of use to nobody any more. What goes
    /// out at once is not looked at.
    held_up: bool,
}

impl Completer {
    /// Settles, soon.
    pub(crate) fn push(&self, mut item: Item) {
        let mut queue = self.lock();
        if queue.closed {
            drop(queue);
            item.session.let_go(1);
            item.tell(Err(error::closed()));
            return;
        }
        queue.items.push_back(item);
        drop(queue);
        self.arrived.notify_one();
    }

    /// Takes a session that is over off the registry.
    pub(crate) fn leave(&self, session: Arc<Session>) {
        self.lock().leaving.push(session);
        self.arrived.notify_one();
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_empty(&self) -> bool {
        let queue = self.lock();
        queue.items.is_empty() && queue.leaving.is_empty()
    }

    /// Takes the next batch.
    fn take(&self) -> Batch {
        let mut queue = self.lock();
        let mut bytes = 0;
        let count = queue
            .items
            .iter()
            .take(BATCH_MAX)
            .take_while(|item| {
                let fits = bytes < BATCH_BYTES;
                bytes += item.end.size();
                fits
            })
            .count();
        let mut items: Vec<_> = queue.items.drain(..count).collect();
        if queue.held_up {
            let now = Instant::now();
            for item in &mut items {
                item.drop_expired(now);
            }
            queue.held_up = !queue.items.is_empty();
        }
        Batch {
            items,
            leaving: mem::take(&mut queue.leaving),
        }
    }

    /// Puts back what may not have been executed.
    pub(crate) fn put_back(&self, items: Vec<Item>, leaving: Vec<Arc<Session>>) {
        let mut queue = self.lock();
        for mut item in items.into_iter().rev() {
            item.repeated = true;
            queue.items.push_front(item);
        }
        queue.held_up = true;
        queue.leaving.extend(leaving);
    }

    /// Notes if Redis refused something: then there is a pause before the next batch, longer each time.
    pub(crate) fn note(&self, refused: bool) {
        let mut queue = self.lock();
        if refused {
            let pause = queue.backoff.next();
            queue.paused = Some(Instant::now() + pause);
            queue.held_up = true;
        } else {
            queue.backoff = Backoff::default();
            queue.paused = None;
        }
    }

    /// Until when nothing is settled.
    fn paused(&self) -> Option<Instant> {
        self.lock().paused.filter(|until| *until > Instant::now())
    }

    /// Ends the queue: what is still in it was not settled.
    fn close(&self) {
        let items = {
            let mut queue = self.lock();
            queue.closed = true;
            mem::take(&mut queue.items)
        };
        for mut item in items {
            item.session.let_go(1);
            item.tell(Err(error::closed()));
        }
    }

    /// Settles until `ending`, then what is there if there is a connection, and no more.
    pub(crate) async fn run(
        self: Arc<Self>,
        mut link: Link,
        config: Arc<RedisConfig>,
        ending: CancellationToken,
    ) {
        let mut waves = FuturesUnordered::new();
        loop {
            let room = waves.len() < WAVES;
            let paused = self.paused();
            if room && paused.is_none() && !self.is_empty() {
                self.drop_lost();
                let live = match link.now() {
                    Some(live) => Some(live),
                    None if ending.is_cancelled() => None,
                    // Leases may end while there is no connection, so this does not wait for ever.
                    None => {
                        self.lock().held_up = true;
                        tokio::time::timeout(Duration::from_millis(100), link.ready(&ending))
                            .await
                            .ok()
                            .flatten()
                    }
                };
                match live {
                    Some(live) => waves.push(self.take().settle(
                        live,
                        Arc::clone(&self),
                        Arc::clone(&config),
                    )),
                    None if ending.is_cancelled() => break,
                    None => {}
                }
                continue;
            }
            if ending.is_cancelled() && waves.is_empty() && self.is_empty() {
                break;
            }
            tokio::select! {
                Some(()) = waves.next() => {}
                () = self.arrived.notified(), if room && paused.is_none() => {}
                () = sleep_until(paused.unwrap_or_else(Instant::now)), if paused.is_some() => {}
                () = ending.cancelled(), if !ending.is_cancelled() => {}
            }
        }
        self.close();
    }

    /// Ends what belongs to lost leases, without asking.
    fn drop_lost(&self) {
        let mut lost = Vec::new();
        {
            let mut queue = self.lock();
            if queue
                .items
                .iter()
                .any(|item| item.session.lease.is_cancelled())
            {
                let items = mem::take(&mut queue.items);
                let (gone, kept): (VecDeque<_>, VecDeque<_>) = items
                    .into_iter()
                    .partition(|item| item.session.lease.is_cancelled());
                queue.items = kept;
                lost = gone.into();
            }
            queue
                .leaving
                .retain(|session| !session.lease.is_cancelled());
        }
        for mut item in lost {
            item.session.let_go(1);
            item.tell(Err(error::lost_lease()));
        }
    }
}

/// Milliseconds, as Redis takes them.
pub(crate) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use antiphon_core::{CorrelationId, ServiceName};

    use super::*;
    use crate::naming::ServiceKeys;

    const WAITS: Duration = Duration::from_millis(10);

    fn push(completer: &Completer) {
        let keys = Arc::new(ServiceKeys::new(&ServiceName::new("fib").unwrap()));
        let session = Session::new("1".to_owned(), &keys, &Arc::default());
        let reply = Reply::value(CorrelationId::random(), "reply");
        let expires = Some(Instant::now() + WAITS);
        completer.push(Item::new(RedisSettlement::replying(
            session, reply, expires,
        )));
    }

    fn replies(completer: &Completer) -> usize {
        let items = completer.take().items;
        let has_reply = |item: &&Item| matches!(&item.end, End::Plain { reply: Some(_) });
        items.iter().filter(has_reply).count()
    }

    #[tokio::test(start_paused = true)]
    async fn a_pause_is_not_waited_for_in_vain() {
        let completer = Completer::default();
        push(&completer);
        completer.note(true);
        push(&completer);
        sleep_until(completer.paused().unwrap() + WAITS).await;
        // Still waited for.
        push(&completer);
        assert_eq!(replies(&completer), 1);

        // A batch that is under way when the pause begins comes back too.
        push(&completer);
        let batch = completer.take();
        completer.note(true);
        completer.put_back(batch.items, Vec::new());
        sleep_until(completer.paused().unwrap() + WAITS).await;
        assert_eq!(replies(&completer), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn more_than_a_batch_may_have_waited() {
        let completer = Completer::default();
        completer.note(true);
        for _ in 0..=BATCH_MAX {
            push(&completer);
        }
        sleep_until(completer.paused().unwrap() + WAITS).await;
        assert_eq!((replies(&completer), replies(&completer)), (0, 0));
    }
}
