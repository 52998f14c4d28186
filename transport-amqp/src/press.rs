//! The connection on which all is published: its handshake, and its channels, each of which has one owner.
//!
//! It is not the client library's, because what publishing costs is what a call costs: the library hands each message over to a thread
//! of its own, with two promises, where here a batch of them is one write, and one frame confirms it.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use amq_protocol::frame::AMQPFrame;
use amq_protocol::protocol::{AMQPClass, channel, confirm, connection};
use futures_util::task::AtomicWaker;
use lapin::tcp::AMQPUriTcpExt;
use lapin::{BasicProperties, runtime};
use tokio::sync::{oneshot, watch};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::config::AmqpConfig;
use crate::error::Failure;
use crate::handshake::{refusal, shake_hands};
use crate::link::{Blocked, Life, bounded};
use crate::roller::{Roller, Socket};
use crate::slip::{Slip, Told};
use crate::wire::{self, Destination};

/// How long a connection is closed politely.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// One life of the connection that publishes.
#[derive(Debug)]
pub(crate) struct Press {
    number: u64,
    shared: Arc<Shared>,
    blocked: watch::Receiver<Option<Arc<str>>>,
    over: watch::Receiver<Option<Arc<str>>>,
}

/// What the connection's task, which owns its socket, and the owners of its channels share.
pub(crate) struct Shared {
    /// What is to be written, in whole frames. Whether a channel is open is changed under its lock too: nothing may follow the
    /// word that it is closed.
    out: Mutex<Vec<u8>>,
    /// The task, which is woken when there is something to write.
    pub(crate) task: AtomicWaker,
    channels: Mutex<Channels>,
    frame_max: usize,
    channel_max: u16,
    /// Ends the task, and with it the connection.
    cut: CancellationToken,
}

#[derive(Default)]
struct Channels {
    open: HashMap<u16, Arc<Slip>>,
    last: u16,
}

/// A channel on which the broker confirms what is published. Dropping it closes it.
pub(crate) struct PressChannel {
    id: u16,
    slip: Arc<Slip>,
    shared: Arc<Shared>,
}

impl Life for Press {
    async fn begin(
        config: &AmqpConfig,
        name: &'static str,
        limit: Duration,
        number: u64,
        blocked: Blocked,
    ) -> Result<Self, Failure> {
        let begun = async {
            let uri = config.uri();
            let runtime = runtime::default_runtime()?;
            let lost = |error: std::io::Error| Failure::Lost(error.to_string());
            let stream = uri.connect_async(&runtime).await.map_err(lost)?;
            #[cfg(feature = "rustls")]
            let stream = crate::tls::wrap(config, stream).await.map_err(lost)?;
            let mut socket = Socket::new(stream);
            let tuned = shake_hands(&mut socket, &uri, name).await?;
            socket.tune(tuned.frame_max);
            Ok::<_, Failure>((socket, tuned))
        };
        let begun = timeout(limit, begun).await;
        let (socket, tuned) = begun.map_err(|_| Failure::TimedOut("connecting"))??;
        let shared = Arc::new(Shared {
            out: Mutex::default(),
            task: AtomicWaker::new(),
            channels: Mutex::default(),
            frame_max: tuned.frame_max,
            channel_max: tuned.channel_max,
            cut: CancellationToken::new(),
        });
        let (ended, over) = watch::channel(None);
        let receiver = blocked.subscribe();
        let roller = Roller::new(socket, Arc::clone(&shared), blocked, tuned.heartbeat);
        let cut = shared.cut.clone();
        tokio::spawn(async move {
            let reason = roller.run(cut).await;
            ended.send_replace(Some(reason.into()));
        });
        Ok(Self {
            number,
            shared,
            blocked: receiver,
            over,
        })
    }

    fn number(&self) -> u64 {
        self.number
    }

    async fn over(&self) -> String {
        let mut over = self.over.clone();
        let reason = over.wait_for(Option::is_some).await;
        let reason = reason.ok().and_then(|reason| reason.clone());
        reason.map_or_else(
            || "the connection was closed".to_owned(),
            |reason| reason.to_string(),
        )
    }

    fn cut(&self) {
        self.shared.cut.cancel();
    }

    async fn close(&self) {
        let close = connection::Close {
            reply_code: 200,
            reply_text: "OK".into(),
            class_id: 0,
            method_id: 0,
        };
        self.shared.say(
            0,
            AMQPClass::Connection(connection::AMQPMethod::Close(close)),
        );
        let _ = timeout(CLOSE_TIMEOUT, self.over()).await;
        self.cut();
    }
}

impl Press {
    /// Opens a channel to publish on.
    pub(crate) async fn channel(&self) -> Result<PressChannel, Failure> {
        let (opening, opened) = oneshot::channel();
        let channel = self.shared.enter(opening)?;
        let opened = async {
            let lost = |_| Failure::Lost("the connection was lost".to_owned());
            opened.await.map_err(lost).flatten()
        };
        let opened = bounded("channel.open", opened).await;
        // Nothing but the broker stands behind the answer: none means that the connection is dead. While the broker blocks us it
        // answers nothing, and the connection is well.
        if matches!(opened, Err(Failure::TimedOut(_))) && self.blocked.borrow().is_none() {
            self.cut();
        }
        opened.map(|()| channel)
    }
}

impl Drop for Press {
    fn drop(&mut self) {
        self.cut();
    }
}

impl Shared {
    /// Takes all that is to be written.
    pub(crate) fn take_out(&self, into: &mut Vec<u8>) {
        std::mem::swap(&mut *self.out(), into);
    }

    /// Has a method written.
    pub(crate) fn say(&self, id: u16, method: AMQPClass) {
        let mut out = self.out();
        if let Err(reason) = wire::put_method(&mut out, id, method) {
            tracing::error!(reason, "a method that cannot be written");
        }
        drop(out);
        self.task.wake();
    }

    /// Has a heartbeat written.
    pub(crate) fn beat(&self) {
        // It has no content, so that it can always be written.
        let _ = wire::put_frame(&mut self.out(), &AMQPFrame::Heartbeat);
    }

    /// What the broker says on a channel.
    pub(crate) fn slip(&self, id: u16) -> Option<Arc<Slip>> {
        self.channels().open.get(&id).map(Arc::clone)
    }

    /// The broker closed a channel, for a reason that may be a message on it.
    pub(crate) fn refuse(&self, id: u16, close: &channel::Close) {
        let Some(slip) = self.channels().open.remove(&id) else {
            return;
        };
        // First: who sees it shut must see why.
        slip.refuse(refusal(close.reply_code, &close.reply_text));
        {
            let mut out = self.out();
            slip.shut();
            let ok = AMQPClass::Channel(channel::AMQPMethod::CloseOk(channel::CloseOk {}));
            // It has no content either.
            let _ = wire::put_method(&mut out, id, ok);
        }
        slip.end();
    }

    /// A channel that we closed is closed.
    pub(crate) fn leave(&self, id: u16) {
        self.channels().open.remove(&id);
    }

    /// The connection is over, and all channels with it.
    pub(crate) fn end(&self) {
        // Whoever enters a channel from now on sees this, and who did so before is found.
        self.cut.cancel();
        let channels = std::mem::take(&mut self.channels().open);
        let out = self.out();
        for slip in channels.values() {
            slip.shut();
        }
        drop(out);
        for slip in channels.values() {
            slip.end();
        }
    }

    fn enter(
        self: &Arc<Self>,
        opening: oneshot::Sender<Result<(), Failure>>,
    ) -> Result<PressChannel, Failure> {
        let slip = Arc::new(Slip::new(opening));
        let mut channels = self.channels();
        // An id that was just given back is the last to be given again.
        let ids = (1..=self.channel_max).cycle().skip(channels.last.into());
        let id = ids
            .take(self.channel_max.into())
            .find(|id| !channels.open.contains_key(id))
            .ok_or_else(|| Failure::Lost("no channel is free".to_owned()))?;
        channels.last = id;
        channels.open.insert(id, Arc::clone(&slip));
        drop(channels);
        if self.cut.is_cancelled() {
            self.leave(id);
            return Err(Failure::Lost("the connection was lost".to_owned()));
        }
        let open = channel::AMQPMethod::Open(channel::Open {});
        let select = confirm::AMQPMethod::Select(confirm::Select { nowait: false });
        self.say(id, AMQPClass::Channel(open));
        self.say(id, AMQPClass::Confirm(select));
        Ok(PressChannel {
            id,
            slip,
            shared: Arc::clone(self),
        })
    }

    fn out(&self) -> MutexGuard<'_, Vec<u8>> {
        self.out.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn channels(&self) -> MutexGuard<'_, Channels> {
        self.channels.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PressChannel {
    /// False once nothing can be published any more.
    pub(crate) fn is_open(&self) -> bool {
        self.slip.is_open()
    }

    /// True if it was the broker that closed this channel alone.
    pub(crate) fn is_refused(&self) -> bool {
        self.slip.is_refused()
    }

    /// Publishes a message. It is written soon, with all that is published until then.
    ///
    /// # Errors
    /// The channel is closed, and nothing was sent.
    pub(crate) fn publish(
        &self,
        to: Destination<'_>,
        properties: &BasicProperties,
        body: &[u8],
    ) -> Result<(), Unsent> {
        let mut out = self.shared.out();
        if !self.is_open() {
            return Err(Unsent::Closed);
        }
        let was_empty = out.is_empty();
        wire::put_message(
            &mut out,
            self.id,
            to,
            properties,
            body,
            self.shared.frame_max,
        )
        .map_err(Unsent::Unwritable)?;
        drop(out);
        if was_empty {
            self.shared.task.wake();
        }
        Ok(())
    }

    /// Takes what the broker said since the last time.
    pub(crate) fn take_told(&self) -> Vec<Told> {
        self.slip.take_told()
    }

    /// Ready if the broker said anything, or the channel is closed.
    pub(crate) fn poll_told(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.slip.poll_told(cx)
    }
}

/// Why a message was not sent.
#[derive(Debug)]
pub(crate) enum Unsent {
    /// The channel is closed.
    Closed,
    /// No channel would take it.
    Unwritable(String),
}

impl Drop for PressChannel {
    fn drop(&mut self) {
        let close = channel::Close {
            reply_code: 200,
            reply_text: "OK".into(),
            class_id: 0,
            method_id: 0,
        };
        let close = AMQPClass::Channel(channel::AMQPMethod::Close(close));
        let mut out = self.shared.out();
        // Asked under the lock: nothing may follow the answer to the broker's own closing.
        if self.is_open() {
            let _ = wire::put_method(&mut out, self.id, close);
        }
        drop(out);
        self.shared.task.wake();
    }
}

impl fmt::Debug for PressChannel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PressChannel")
            .field("id", &self.id)
            .field("open", &self.is_open())
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").finish_non_exhaustive()
    }
}
