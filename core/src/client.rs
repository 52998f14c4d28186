//! The client: one inbox, any number of calls at once.

use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot};
use tokio::task::AbortHandle;
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::attention::answer_unattended;
use crate::call::{Call, Notify};
use crate::channel::ChannelOptions;
use crate::config::{self, ClientConfig};
use crate::control::{self, NodeInfo, NodeStats};
use crate::envelope::{Outcome, Reply, Request};
use crate::error::{Error, ErrorKind, Executed};
use crate::gather::AskAll;
use crate::given_up::GivenUp;
use crate::listeners::Listeners;
use crate::many::CallMany;
use crate::name::{ReplyAddress, ServiceName};
use crate::pending::{Arrived, ClientStats, Pending};
use crate::signal::Signal;
use crate::transport::{Inbox, InboxEvent, Incoming, Transport};

/// Calls services. Cloning is cheap; all clones share one inbox, which is removed with the last of them.
#[derive(Clone)]
pub struct Client {
    inner: Arc<Inner>,
}

struct Inner {
    transport: Arc<dyn Transport>,
    config: ClientConfig,
    pending: Arc<Pending>,
    listeners: Arc<Listeners>,
    given_up: Arc<GivenUp>,
    joins: mpsc::UnboundedSender<Join>,
    dispatcher: AbortHandle,
    /// Cancelled when the dispatcher is gone, and its inbox with it.
    ended: CancellationToken,
}

impl Client {
    /// Opens a client: when this resolves, its inbox is live.
    ///
    /// Its two tasks run on the present Tokio runtime: one takes the replies, one ends calls at their deadlines.
    ///
    /// # Errors
    /// `Connect` if the connection is lost and not back within 10 s; others as of [`Transport::open_inbox`]; `Invalid` for a
    /// timeout above 30 days.
    pub async fn open(transport: Arc<dyn Transport>, config: ClientConfig) -> Result<Self, Error> {
        Self::open_at_desk(transport, config, None).await
    }

    /// The same for a server, which gets what is said to every server of the services that it [joins](Self::join).
    pub(crate) async fn open_at_desk(
        transport: Arc<dyn Transport>,
        config: ClientConfig,
        words: Option<mpsc::Sender<(ServiceName, Arc<Request>)>>,
    ) -> Result<Self, Error> {
        config::check_timeout(config.timeout)?;
        let inbox = config::bounded("open an inbox", transport.open_inbox()).await?;
        let pending = Pending::new(inbox.address(), config.max_pending);
        let listeners = Arc::new(Listeners::default());
        let ended = CancellationToken::new();
        let (joins, joined) = mpsc::unbounded_channel();
        let dispatcher = Dispatcher {
            inbox,
            transport: Arc::clone(&transport),
            pending: Arc::clone(&pending),
            listeners: Arc::clone(&listeners),
            joins: joined,
            words,
            max_body: config.max_body,
            arrived: Vec::new(),
            _ended: ended.clone().drop_guard(),
        };
        let dispatcher = tokio::spawn(dispatcher.run()).abort_handle();
        // It ends when the table is closed, as the dispatcher does at its end.
        tokio::spawn({
            let (pending, state) = (Arc::clone(&pending), transport.state());
            async move { pending.sweep(state).await }
        });
        Ok(Self {
            inner: Arc::new(Inner {
                given_up: GivenUp::new(Arc::clone(&transport)),
                transport,
                config,
                pending,
                listeners,
                joins,
                dispatcher,
                ended,
            }),
        })
    }

    /// Calls a service with a JSON body and reads the reply as JSON.
    ///
    /// Nothing happens until the returned [`Call`] is awaited.
    #[cfg(feature = "json")]
    pub fn call<Out>(
        &self,
        service: impl IntoServiceName,
        input: &(impl serde::Serialize + ?Sized),
    ) -> Call<Out>
    where
        Out: serde::de::DeserializeOwned,
    {
        Call::json(self.clone(), service.into_service_name(), input)
    }

    /// Calls a service with a body of bytes and returns the whole reply.
    ///
    /// Nothing happens until the returned [`Call`] is awaited.
    pub fn call_raw(&self, service: impl IntoServiceName, body: impl Into<Bytes>) -> Call<Reply> {
        Call::raw(self.clone(), service.into_service_name(), body.into())
    }

    /// Sends a request with a JSON body that nobody replies to. Awaiting it ends when the broker has accepted it.
    #[cfg(feature = "json")]
    pub fn notify(
        &self,
        service: impl IntoServiceName,
        input: &(impl serde::Serialize + ?Sized),
    ) -> Notify {
        Notify::one_way_json(self.clone(), service.into_service_name(), input)
    }

    /// Sends a request with a body of bytes that nobody replies to. Awaiting it ends when the broker has accepted it.
    pub fn notify_raw(&self, service: impl IntoServiceName, body: impl Into<Bytes>) -> Notify {
        Notify::one_way_raw(self.clone(), service.into_service_name(), body.into())
    }

    /// Asks every live server of a service, with a JSON body, and reads their replies as JSON.
    ///
    /// Nothing happens until the returned [`AskAll`] is awaited. Those that serve a request at the time are asked, whatever they
    /// are busy with; nothing is queued. Its errors are told [there](AskAll#errors).
    #[cfg(feature = "json")]
    pub fn ask_all<Out>(
        &self,
        service: impl IntoServiceName,
        input: &(impl serde::Serialize + ?Sized),
    ) -> AskAll<Out>
    where
        Out: serde::de::DeserializeOwned,
    {
        let service = service.into_service_name();
        let call = Call::of(
            self.clone(),
            service,
            crate::codec::encode(input),
            Some(crate::name::ContentType::JSON),
        );
        AskAll::new(call, |reply| crate::codec::read(&reply.body))
    }

    /// The same with a body of bytes, and whole replies.
    pub fn ask_all_raw(
        &self,
        service: impl IntoServiceName,
        body: impl Into<Bytes>,
    ) -> AskAll<Reply> {
        AskAll::new(self.call_raw(service, body), Ok)
    }

    /// Asks which servers of a service are alive.
    pub fn ping(&self, service: impl IntoServiceName) -> AskAll<()> {
        self.inquire(service, control::PING, |_| Ok(()))
    }

    /// Asks the live servers of a service what they are.
    pub fn info(&self, service: impl IntoServiceName) -> AskAll<NodeInfo> {
        self.inquire(service, control::INFO, |reply| read_json(&reply))
    }

    /// Asks the live servers of a service what they have done.
    pub fn node_stats(&self, service: impl IntoServiceName) -> AskAll<NodeStats> {
        self.inquire(service, control::STATS, |reply| read_json(&reply))
    }

    fn inquire<Out>(
        &self,
        service: impl IntoServiceName,
        method: &str,
        read: fn(Reply) -> Result<Out, Error>,
    ) -> AskAll<Out> {
        AskAll::new(self.call_raw(service, Bytes::new()).method(method), read)
    }

    /// Calls a service with each of many inputs, as JSON, some at once.
    ///
    /// Nothing happens until the outputs are asked for.
    #[cfg(feature = "json")]
    pub fn call_many<Out, In>(
        &self,
        service: impl IntoServiceName,
        inputs: impl IntoIterator<Item = In, IntoIter: Send + 'static>,
    ) -> CallMany<Out>
    where
        In: serde::Serialize,
        Out: serde::de::DeserializeOwned + Send + 'static,
    {
        let (client, service) = (self.clone(), service.into_service_name());
        let call = move |input| Call::json(client.clone(), service.clone(), &input);
        CallMany::new(inputs.into_iter().map(call))
    }

    /// The same with bodies of bytes, and whole replies.
    pub fn call_many_raw<In>(
        &self,
        service: impl IntoServiceName,
        inputs: impl IntoIterator<Item = In, IntoIter: Send + 'static>,
    ) -> CallMany<Reply>
    where
        In: Into<Bytes>,
    {
        let (client, service) = (self.clone(), service.into_service_name());
        let call = move |input: In| Call::raw(client.clone(), service.clone(), input.into());
        CallMany::new(inputs.into_iter().map(call))
    }

    /// A channel to a service: many tasks out, a private stream of results back, each acknowledged. It is leased when it is
    /// [opened](ChannelOptions::open).
    pub fn channel(&self, service: impl IntoServiceName) -> ChannelOptions {
        ChannelOptions::new(self.clone(), service.into_service_name())
    }

    /// What this client has seen.
    #[must_use]
    pub fn stats(&self) -> ClientStats {
        self.inner.pending.stats()
    }

    /// The present address of its inbox.
    #[must_use]
    pub fn inbox(&self) -> ReplyAddress {
        self.inner.pending.address()
    }

    /// Ends all calls that wait with `Closed`, as given up, and removes the inbox. Idempotent. The transport stays open.
    pub async fn close(&self) {
        self.end();
        self.inner.ended.cancelled().await;
    }

    /// As [`close`](Self::close), without waiting for it.
    pub(crate) fn end(&self) {
        self.inner.pending.close(&closed());
        self.inner.dispatcher.abort();
    }

    pub(crate) fn transport(&self) -> &dyn Transport {
        &*self.inner.transport
    }

    pub(crate) fn config(&self) -> &ClientConfig {
        &self.inner.config
    }

    pub(crate) fn shared_transport(&self) -> &Arc<dyn Transport> {
        &self.inner.transport
    }

    pub(crate) fn pending(&self) -> &Arc<Pending> {
        &self.inner.pending
    }

    pub(crate) fn listeners(&self) -> &Arc<Listeners> {
        &self.inner.listeners
    }

    pub(crate) fn given_up(&self) -> &Arc<GivenUp> {
        &self.inner.given_up
    }

    /// Has what is said to every server of a service arrive at this client's inbox too.
    pub(crate) async fn join(&self, service: &ServiceName) -> Result<(), Error> {
        let (done, joined) = oneshot::channel();
        // If the dispatcher is gone, so is the other end.
        let _ = self.inner.joins.send((service.clone(), done));
        config::bounded("join a service", async {
            joined.await.unwrap_or_else(|_| Err(closed()))
        })
        .await
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client")
            .field("inbox", &self.inbox())
            .field("stats", &self.stats())
            .finish_non_exhaustive()
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.dispatcher.abort();
    }
}

/// A service to join, and whom to tell.
type Join = (ServiceName, oneshot::Sender<Result<(), Error>>);

/// Hands replies to calls until the inbox is over. It runs no code of the user's, so no caller can hold up another.
struct Dispatcher {
    // Dropped in this order: who waits for the end finds no inbox.
    inbox: Box<dyn Inbox>,
    transport: Arc<dyn Transport>,
    pending: Arc<Pending>,
    listeners: Arc<Listeners>,
    joins: mpsc::UnboundedReceiver<Join>,
    /// Where the server hears what is said to it; none if it is none.
    words: Option<mpsc::Sender<(ServiceName, Arc<Request>)>>,
    max_body: usize,
    /// Empty between two batches of replies; kept for its memory.
    arrived: Vec<Arrived>,
    _ended: DropGuard,
}

/// So many calls are ended under one lock of the table, which nobody enters meanwhile.
const RESOLVED_TOGETHER: usize = 32;

impl Dispatcher {
    async fn run(mut self) {
        loop {
            let event = tokio::select! {
                biased;
                event = self.inbox.recv() => event,
                Some((service, done)) = self.joins.recv() => {
                    // Who asked may have gone.
                    let _ = done.send(self.inbox.join(&service).await);
                    continue;
                }
            };
            match event {
                InboxEvent::Replies(replies) => {
                    let now = Instant::now();
                    for incoming in replies {
                        self.deliver(incoming, now);
                    }
                    self.pending.resolve(&mut self.arrived, now);
                }
                InboxEvent::Lost(error) => {
                    tracing::warn!(%error, "the inbox was lost; what waited for a reply ends");
                    self.pending.inbox_lost(&error, self.inbox.address());
                }
                InboxEvent::Closed(error) => return self.pending.close(&error),
            }
        }
    }

    /// Answers are gathered in `arrived`.
    fn deliver(&mut self, incoming: Incoming, now: Instant) {
        match incoming {
            Incoming::Reply(reply) => match &reply.outcome {
                Outcome::Signal(signal) => {
                    // What arrived before it was said before.
                    self.pending.resolve(&mut self.arrived, now);
                    self.hear(signal, &reply, now);
                }
                Outcome::Value => self.answer(reply.body.len(), reply, now),
                Outcome::Fault { fault, .. } => self.answer(fault.details_size(), reply, now),
            },
            Incoming::Request { service, request } => {
                if let Some(words) = &self.words {
                    // Too much at once is as if it had not arrived.
                    let _ = words.try_send((service, request));
                }
            }
            Incoming::Undecodable { id: Some(id), .. } if self.listeners.gathers(&id) => {}
            Incoming::Undecodable {
                id: Some(id),
                reason,
            } => {
                // It may have been a refusal.
                let error = bad_reply(&reason).with_executed(Executed::Maybe);
                self.arrived.push(Arrived::bad(&id, error));
            }
            Incoming::Undecodable { id: None, reason } => {
                tracing::warn!(reason, "a reply that cannot be decoded was discarded");
                self.pending.count_unknown();
            }
        }
    }

    /// Ends the call that a reply is for, or gives it to the gathering.
    fn answer(&mut self, size: usize, reply: Arc<Reply>, now: Instant) {
        let arrived = match config::check_size(size, self.max_body) {
            Ok(()) => match self.listeners.hear(reply) {
                Some(reply) => Arrived::reply(reply),
                None => return,
            },
            // One among many answers that is too large is as if it had not come.
            Err(_) if self.listeners.gathers(&reply.id) => return,
            Err(error) => Arrived::bad(&reply.id, bad_reply(error.message())),
        };
        self.arrived.push(arrived);
        // The others enter their calls in the meantime.
        if self.arrived.len() >= RESOLVED_TOGETHER {
            self.pending.resolve(&mut self.arrived, now);
        }
    }

    /// Hands on what a server says before its reply.
    fn hear(&self, signal: &Signal, reply: &Arc<Reply>, now: Instant) {
        match signal {
            // Of many servers one may well be lost.
            Signal::Running { every, .. } if !self.listeners.gathers(&reply.id) => {
                self.pending.hear(&reply.id, *every, now);
            }
            Signal::Offer { to, id, .. } if !self.listeners.listens(&reply.id) => {
                let is_wanted = self.pending.waits(&reply.id);
                let server = (to.clone(), id.clone());
                return answer_unattended(&self.transport, server, is_wanted);
            }
            _ => {}
        }
        // A word that is too large is as if it had not come.
        if config::check_size(reply.body.len(), self.max_body).is_ok() {
            self.listeners.hear(Arc::clone(reply));
        }
    }
}

impl Drop for Dispatcher {
    fn drop(&mut self) {
        // Such as with the runtime that it was opened on. Without it nobody would be told.
        self.pending.close(&closed());
    }
}

pub(crate) fn bad_reply(reason: &str) -> Error {
    Error::new(ErrorKind::BadReply, Executed::Yes, reason)
}

fn closed() -> Error {
    Error::not_executed(ErrorKind::Closed, "the client is closed")
}

/// What may be given as a service: a [`ServiceName`], or text that is parsed when the call is first polled.
pub trait IntoServiceName {
    /// The name, or why it is none.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] if it is not of the grammar.
    fn into_service_name(self) -> Result<ServiceName, Error>;
}

impl<T> IntoServiceName for T
where
    T: TryInto<ServiceName>,
    T::Error: Into<Error>,
{
    fn into_service_name(self) -> Result<ServiceName, Error> {
        self.try_into().map_err(Into::into)
    }
}

fn read_json<T: serde::de::DeserializeOwned>(reply: &Reply) -> Result<T, Error> {
    serde_json::from_slice(&reply.body)
        .map_err(|error| bad_reply(&format!("the answer cannot be read: {error}")))
}
