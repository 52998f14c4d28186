//! The connection on which all is published: its handshake, and its channels, each of which has one owner.
//!
//! It is not the client library's, because what publishing costs is what a call costs: the library hands each message over to a thread
//! of its own, with two promises, where here a batch of them is one write, and one frame confirms it.

use std::collections::HashMap;
use std::fmt;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use amq_protocol::frame::AMQPFrame;
use amq_protocol::protocol::{AMQPClass, channel, confirm, connection};
use futures_util::task::AtomicWaker;
use lapin::tcp::AMQPUriTcpExt;
use lapin::{BasicProperties, runtime};
use tokio::sync::{oneshot, watch};
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use crate::dial::Dialler;
use crate::error::Failure;
use crate::handshake::shake_hands;
use crate::link::{Blocked, Life, bounded};
use crate::roller::{Roller, Socket, silence};
use crate::slip::{Refusal, Slip, Told};
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
    /// How long a broker that speaks may leave something unanswered: as long as one may be silent.
    patience: Duration,
}

/// What the connection's task, which owns its socket, and the owners of its channels share.
pub(crate) struct Shared {
    /// What is to be written, in whole frames. Whether a channel is open is changed under its lock too: nothing may follow the
    /// word that it is closed.
    out: Mutex<Vec<u8>>,
    /// How many bytes the task took from there, and how many of these are written.
    taken: AtomicU64,
    written: AtomicU64,
    /// How often something was read.
    heard: AtomicU64,
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
        dialler: &Dialler,
        name: &'static str,
        number: u64,
        blocked: Blocked,
    ) -> Result<Self, Failure> {
        let uri = dialler.uri();
        let runtime = runtime::default_runtime()?;
        let lost = |error: std::io::Error| Failure::Lost(error.to_string());
        let stream = uri.connect_async(&runtime).await.map_err(lost)?;
        let stream = dialler.secure(stream).await.map_err(lost)?;
        let mut socket = Socket::new(stream);
        let tuned = shake_hands(&mut socket, uri, name).await?;
        socket.tune(tuned.frame_max);
        let shared = Arc::new(Shared::new(tuned.frame_max, tuned.channel_max));
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
            patience: tuned.heartbeat.map_or(Duration::ZERO, silence),
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
        let (channel, end) = self.shared.enter(opening)?;
        let mut opened = pin!(async {
            let lost = |_| Failure::Lost("the connection was lost".to_owned());
            opened.await.map_err(lost).flatten()
        });
        let mut written_since = Instant::now();
        let opened = loop {
            let before = self.shared.written.load(Ordering::Relaxed);
            let heard = self.shared.heard.load(Ordering::Relaxed);
            let opened = bounded("channel.open", opened.as_mut()).await;
            if !matches!(opened, Err(Failure::TimedOut(_))) {
                break opened;
            }
            // While what stands before it is still being written, its time has not begun.
            if before < end && before < self.shared.written.load(Ordering::Relaxed) {
                written_since = Instant::now();
                continue;
            }
            // Then the system still has it for a while. The broker speaks meanwhile, but it may do so without ever reading on.
            let speaks = heard != self.shared.heard.load(Ordering::Relaxed);
            if !speaks || written_since.elapsed() >= self.patience {
                break opened;
            }
        };
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
    fn new(frame_max: usize, channel_max: u16) -> Self {
        Self {
            out: Mutex::default(),
            taken: AtomicU64::new(0),
            written: AtomicU64::new(0),
            heard: AtomicU64::new(0),
            task: AtomicWaker::new(),
            channels: Mutex::default(),
            frame_max,
            channel_max,
            cut: CancellationToken::new(),
        }
    }

    /// Takes all that is to be written.
    pub(crate) fn take_out(&self, into: &mut Vec<u8>) {
        let mut out = self.out();
        self.taken.fetch_add(out.len() as u64, Ordering::Relaxed);
        std::mem::swap(&mut *out, into);
    }

    /// So many bytes of what was taken are written.
    pub(crate) fn note_written(&self, count: usize) {
        self.written.fetch_add(count as u64, Ordering::Relaxed);
    }

    /// The broker said something.
    pub(crate) fn note_heard(&self) {
        self.heard.fetch_add(1, Ordering::Relaxed);
    }

    /// Has a method written, and says how many bytes are written once it is.
    pub(crate) fn say(&self, id: u16, method: AMQPClass) -> u64 {
        let mut out = self.out();
        if let Err(reason) = wire::put_method(&mut out, id, method) {
            tracing::error!(reason, "a method that cannot be written");
        }
        let end = self.taken.load(Ordering::Relaxed) + out.len() as u64;
        drop(out);
        self.task.wake();
        end
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
        slip.refuse(Refusal {
            code: close.reply_code,
            text: close.reply_text.as_str().into(),
        });
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

    /// A channel on its way, and how many bytes are written once the broker is asked for it.
    fn enter(
        self: &Arc<Self>,
        opening: oneshot::Sender<Result<(), Failure>>,
    ) -> Result<(PressChannel, u64), Failure> {
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
        let end = self.say(id, AMQPClass::Confirm(select));
        let channel = PressChannel {
            id,
            slip,
            shared: Arc::clone(self),
        };
        Ok((channel, end))
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

    /// Why the broker closed this channel alone, if it did.
    pub(crate) fn refusal(&self) -> Option<Refusal> {
        self.slip.refusal()
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

#[cfg(test)]
mod tests {
    use std::io;
    use std::pin::Pin;

    use futures_io::{AsyncRead, AsyncWrite};
    use futures_util::future::poll_fn;
    use tokio::time::{Instant, Interval, interval};

    use super::*;

    /// A socket of which nothing comes, and which takes a kilobyte a second; or panics.
    struct Slow(Option<Interval>);

    impl AsyncRead for Slow {
        fn poll_read(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
            _: &mut [u8],
        ) -> Poll<io::Result<usize>> {
            Poll::Pending
        }
    }

    impl AsyncWrite for Slow {
        fn poll_write(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            bytes: &[u8],
        ) -> Poll<io::Result<usize>> {
            let ticks = self.0.as_mut().expect("a socket that works");
            ticks.poll_tick(cx).map(|_| Ok(bytes.len().min(1024)))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_close(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    fn roller(shared: &Arc<Shared>, socket: Slow) -> Roller<Slow> {
        let blocked = watch::Sender::new(None);
        Roller::new(Socket::new(socket), Arc::clone(shared), blocked, None)
    }

    #[tokio::test]
    async fn a_panic_of_its_task_is_the_end_of_the_connection() {
        let shared = Arc::new(Shared::new(4096, 8));
        let (opening, opened) = oneshot::channel();
        let (channel, _) = shared.enter(opening).unwrap();
        let task = tokio::spawn(roller(&shared, Slow(None)).run(CancellationToken::new()));
        assert!(task.await.unwrap_err().is_panic());
        assert!(opened.await.is_err(), "it will not come");
        let told = poll_fn(|cx| channel.poll_told(cx));
        timeout(CLOSE_TIMEOUT, told)
            .await
            .expect("its owner is woken");
        assert!(!channel.is_open());
    }

    #[tokio::test(start_paused = true)]
    async fn a_channel_waits_for_the_bodies_before_it() {
        let shared = Arc::new(Shared::new(4096, 8));
        let press = Press {
            number: 1,
            shared: Arc::clone(&shared),
            blocked: watch::channel(None).1,
            over: watch::channel(None).1,
            patience: Duration::ZERO,
        };
        *shared.out() = vec![0; 60 * 1024];
        let slow = Slow(Some(interval(Duration::from_secs(1))));
        let task = tokio::spawn(roller(&shared, slow).run(shared.cut.clone()));
        let begun = Instant::now();
        let failure = press.channel().await.unwrap_err();
        assert!(matches!(failure, Failure::TimedOut(_)), "{failure}");
        // A minute for the bodies, and then the time that an answer may take.
        let waited = begun.elapsed().as_secs();
        assert!((60..75).contains(&waited), "{waited} s");
        task.await.unwrap();
    }
}
