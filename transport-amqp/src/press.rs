//! The connection on which all is published: its handshake, and its channels, each of which has one owner.
//!
//! It is not the client library's, because what publishing costs is what a call costs: the library hands each message over to a thread
//! of its own, with two promises, where here a batch of them is one write, and one frame confirms it.

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use amq_protocol::auth::Credentials;
use amq_protocol::frame::{AMQPFrame, ProtocolVersion};
use amq_protocol::protocol::{AMQPClass, channel, confirm, connection};
use futures_io::{AsyncRead, AsyncWrite};
use futures_util::task::AtomicWaker;
use lapin::BasicProperties;
use lapin::runtime;
use lapin::tcp::{AMQPUriTcpExt, TLSConfig};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::uri::AMQPUri;
use tokio::sync::{oneshot, watch};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::config::AmqpConfig;
use crate::error::Failure;
use crate::link::{Blocked, Life, bounded};
use crate::roller::{Roller, Socket};
use crate::wire::{self, Destination, Frame};

/// How long a connection is closed politely.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// What the library asks for as well: all that the broker may tell us.
const CAPABILITIES: [&str; 4] = [
    "publisher_confirms",
    "basic.nack",
    "connection.blocked",
    "authentication_failure_close",
];

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

/// A channel as the connection's task sees it.
#[derive(Default)]
pub(crate) struct Slip {
    open: AtomicBool,
    said: Mutex<Said>,
    /// Its owner.
    waker: AtomicWaker,
}

#[derive(Default)]
struct Said {
    told: Vec<Told>,
    /// The broker closed this channel alone.
    refused: bool,
    opening: Option<oneshot::Sender<Result<(), Failure>>>,
    /// The routing key of a message that is coming back.
    returning: Option<ShortString>,
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
            let stream = uri
                .connect_with_config_async(TLSConfig::default(), &runtime)
                .await
                .map_err(|error| Failure::Lost(error.to_string()))?;
            let mut socket = Socket::new(stream);
            let tuned = shake_hands(&mut socket, &uri, name).await?;
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
        {
            let mut out = self.out();
            slip.open.store(false, Ordering::Release);
            let ok = AMQPClass::Channel(channel::AMQPMethod::CloseOk(channel::CloseOk {}));
            // It has no content either.
            let _ = wire::put_method(&mut out, id, ok);
        }
        let mut said = slip.said();
        said.refused = true;
        if let Some(opening) = said.opening.take() {
            let _ = opening.send(Err(refusal(close.reply_code, &close.reply_text)));
        }
        drop(said);
        slip.waker.wake();
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
            slip.open.store(false, Ordering::Release);
        }
        drop(out);
        for slip in channels.values() {
            slip.said().opening = None;
            slip.waker.wake();
        }
    }

    fn enter(
        self: &Arc<Self>,
        opening: oneshot::Sender<Result<(), Failure>>,
    ) -> Result<PressChannel, Failure> {
        let slip = Arc::new(Slip::default());
        slip.said().opening = Some(opening);
        slip.open.store(true, Ordering::Release);
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

impl Slip {
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

impl PressChannel {
    /// False once nothing can be published any more.
    pub(crate) fn is_open(&self) -> bool {
        self.slip.open.load(Ordering::Acquire)
    }

    /// True if it was the broker that closed this channel alone.
    pub(crate) fn is_refused(&self) -> bool {
        self.slip.said().refused
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
        std::mem::take(&mut self.slip.said().told)
    }

    /// Ready if the broker said anything, or the channel is closed.
    pub(crate) fn poll_told(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.slip.waker.register(cx.waker());
        match self.slip.said().told.is_empty() && self.is_open() {
            true => Poll::Pending,
            false => Poll::Ready(()),
        }
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
        if !self.is_open() {
            return;
        }
        let close = channel::Close {
            reply_code: 200,
            reply_text: "OK".into(),
            class_id: 0,
            method_id: 0,
        };
        let close = AMQPClass::Channel(channel::AMQPMethod::Close(close));
        self.shared.say(self.id, close);
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

/// What both sides agreed on.
struct Tuned {
    channel_max: u16,
    frame_max: usize,
    heartbeat: Option<Duration>,
}

async fn shake_hands<S: AsyncRead + AsyncWrite + Unpin>(
    socket: &mut Socket<S>,
    uri: &AMQPUri,
    name: &str,
) -> Result<Tuned, Failure> {
    use connection::AMQPMethod as Method;
    let header = AMQPFrame::ProtocolHeader(ProtocolVersion::amqp_0_9_1());
    socket.send(|out| wire::put_frame(out, &header)).await?;
    let mut tuned = None;
    loop {
        let answer = match next_method(socket).await? {
            Method::Start(_) => Method::StartOk(start_ok(uri, name)),
            Method::Tune(offer) => {
                let (agreed, answer) = tune(uri, &offer);
                tuned = Some(agreed);
                socket.send(|out| say(out, Method::TuneOk(answer))).await?;
                Method::Open(connection::Open {
                    virtual_host: uri.vhost.as_str().into(),
                })
            }
            Method::OpenOk(_) => {
                let early = || Failure::Lost("the broker was not tuned".to_owned());
                return tuned.ok_or_else(early);
            }
            Method::Close(close) => return Err(refusal(close.reply_code, &close.reply_text)),
            other => {
                return Err(Failure::Lost(format!(
                    "unexpected in a handshake: {other:?}"
                )));
            }
        };
        socket.send(|out| say(out, answer)).await?;
    }
}

async fn next_method<S: AsyncRead + AsyncWrite + Unpin>(
    socket: &mut Socket<S>,
) -> Result<connection::AMQPMethod, Failure> {
    loop {
        match socket.receive().await? {
            Frame::Other(AMQPFrame::Method(0, AMQPClass::Connection(method))) => return Ok(method),
            Frame::Other(AMQPFrame::Heartbeat) => {}
            other => {
                return Err(Failure::Lost(format!(
                    "unexpected in a handshake: {other:?}"
                )));
            }
        }
    }
}

fn say(out: &mut Vec<u8>, method: connection::AMQPMethod) -> Result<(), String> {
    wire::put_method(out, 0, AMQPClass::Connection(method))
}

fn start_ok(uri: &AMQPUri, name: &str) -> connection::StartOk {
    let text = |text: &str| AMQPValue::LongString(text.into());
    let mut capabilities = FieldTable::default();
    for capability in CAPABILITIES {
        capabilities.insert(capability.into(), AMQPValue::Boolean(true));
    }
    let mut properties = FieldTable::default();
    for (key, value) in [
        ("connection_name", text(&format!("antiphon {name}"))),
        ("product", text(env!("CARGO_PKG_NAME"))),
        ("version", text(env!("CARGO_PKG_VERSION"))),
        ("platform", text("rust")),
        ("capabilities", AMQPValue::FieldTable(capabilities)),
    ] {
        properties.insert(key.into(), value);
    }
    let mechanism = uri.query.auth_mechanism.unwrap_or_default();
    let credentials = Credentials::from(uri.authority.userinfo.clone());
    connection::StartOk {
        client_properties: properties,
        mechanism: mechanism.name().into(),
        response: credentials.sasl_auth_string(mechanism),
        locale: "en_US".into(),
    }
}

/// The lower of what both want, where zero means: whatever the other one wants.
fn tune(uri: &AMQPUri, offer: &connection::Tune) -> (Tuned, connection::TuneOk) {
    fn lower<T: Ord + Default>(ours: T, theirs: T) -> T {
        match (ours == T::default(), theirs == T::default()) {
            (true, _) => theirs,
            (_, true) => ours,
            _ => ours.min(theirs),
        }
    }
    let answer = connection::TuneOk {
        channel_max: lower(uri.query.channel_max.unwrap_or_default(), offer.channel_max),
        frame_max: lower(uri.query.frame_max.unwrap_or_default(), offer.frame_max),
        heartbeat: lower(uri.query.heartbeat.unwrap_or_default(), offer.heartbeat),
    };
    let frame_max = usize::try_from(answer.frame_max).unwrap_or(usize::MAX);
    let tuned = Tuned {
        channel_max: match answer.channel_max {
            0 => u16::MAX,
            most => most,
        },
        frame_max: match frame_max {
            0 => usize::MAX,
            most => most,
        },
        heartbeat: (answer.heartbeat > 0).then(|| Duration::from_secs(answer.heartbeat.into())),
    };
    (tuned, answer)
}

fn refusal(code: u16, text: &ShortString) -> Failure {
    Failure::Refused {
        code,
        text: text.to_string(),
    }
}
