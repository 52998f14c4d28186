//! The client: one inbox, any number of calls at once.

use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::OnceCell;
use tokio::task::AbortHandle;
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::call::{Call, Notify};
use crate::config::{self, ClientConfig};
use crate::envelope::{Outcome, Reply};
use crate::error::{Error, ErrorKind, Executed};
use crate::name::{ReplyAddress, ServiceName};
use crate::pending::{ClientStats, Ended, Pending};
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
        config::check_timeout(config.timeout)?;
        let inbox = config::bounded("open an inbox", transport.open_inbox()).await?;
        let pending = Pending::new(inbox.address(), config.max_pending);
        let ended = CancellationToken::new();
        let dispatcher = Dispatcher {
            inbox,
            pending: Arc::clone(&pending),
            max_body: config.max_body,
            _ended: ended.clone().drop_guard(),
        };
        let dispatcher = tokio::spawn(dispatcher.run()).abort_handle();
        // It ends when the table is closed, as the dispatcher does at its end.
        tokio::spawn({
            let pending = Arc::clone(&pending);
            async move { pending.sweep().await }
        });
        Ok(Self {
            inner: Arc::new(Inner {
                transport,
                config,
                pending,
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
        Call::json(
            ClientSource::Open(self.clone()),
            service.into_service_name(),
            input,
        )
    }

    /// Calls a service with a body of bytes and returns the whole reply.
    ///
    /// Nothing happens until the returned [`Call`] is awaited.
    pub fn call_raw(&self, service: impl IntoServiceName, body: impl Into<Bytes>) -> Call<Reply> {
        Call::raw(
            ClientSource::Open(self.clone()),
            service.into_service_name(),
            body.into(),
        )
    }

    /// Sends a request with a JSON body that nobody replies to. Awaiting it ends when the broker has accepted it.
    #[cfg(feature = "json")]
    pub fn notify(
        &self,
        service: impl IntoServiceName,
        input: &(impl serde::Serialize + ?Sized),
    ) -> Notify {
        Notify::one_way_json(
            ClientSource::Open(self.clone()),
            service.into_service_name(),
            input,
        )
    }

    /// Sends a request with a body of bytes that nobody replies to. Awaiting it ends when the broker has accepted it.
    pub fn notify_raw(&self, service: impl IntoServiceName, body: impl Into<Bytes>) -> Notify {
        Notify::one_way_raw(
            ClientSource::Open(self.clone()),
            service.into_service_name(),
            body.into(),
        )
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

    /// Ends all calls that wait with `Closed`, and removes the inbox. Idempotent. The transport stays open.
    pub async fn close(&self) {
        self.inner.pending.close(&closed());
        self.inner.dispatcher.abort();
        self.inner.ended.cancelled().await;
    }

    pub(crate) fn transport(&self) -> &dyn Transport {
        &*self.inner.transport
    }

    pub(crate) fn config(&self) -> &ClientConfig {
        &self.inner.config
    }

    pub(crate) fn pending(&self) -> &Arc<Pending> {
        &self.inner.pending
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

/// Hands replies to calls until the inbox is over. It runs no code of the user's, so no caller can hold up another.
struct Dispatcher {
    // Dropped in this order: who waits for the end finds no inbox.
    inbox: Box<dyn Inbox>,
    pending: Arc<Pending>,
    max_body: usize,
    _ended: DropGuard,
}

impl Dispatcher {
    async fn run(mut self) {
        loop {
            match self.inbox.recv().await {
                InboxEvent::Replies(replies) => {
                    let now = Instant::now();
                    for incoming in replies {
                        self.deliver(incoming, now);
                    }
                }
                InboxEvent::Lost(error) => {
                    tracing::warn!(%error, "the inbox was lost; what waited for a reply ends");
                    self.pending.inbox_lost(&error, self.inbox.address());
                }
                InboxEvent::Closed(error) => return self.pending.close(&error),
            }
        }
    }

    fn deliver(&self, incoming: Incoming, now: Instant) {
        match incoming {
            Incoming::Reply(reply) => {
                let size = match &reply.outcome {
                    Outcome::Value => reply.body.len(),
                    Outcome::Fault { fault, .. } => fault.details_size(),
                };
                let id = reply.id.clone();
                let ended = match config::check_size(size, self.max_body) {
                    Ok(()) => Ended::Reply(reply),
                    Err(error) => Ended::Bad(bad_reply(error.message())),
                };
                self.pending.resolve(&id, ended, now);
            }
            Incoming::Undecodable {
                id: Some(id),
                reason,
            } => {
                // It may have been a refusal.
                let error = bad_reply(&reason).with_executed(Executed::Maybe);
                self.pending.resolve(&id, Ended::Bad(error), now);
            }
            Incoming::Undecodable { id: None, reason } => {
                tracing::warn!(reason, "a reply that cannot be decoded was discarded");
                self.pending.count_unknown();
            }
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

/// A client that a call may have to open first.
#[derive(Clone, Debug)]
pub(crate) enum ClientSource {
    Open(Client),
    Lazy(Arc<LazyClient>),
}

/// The client of a server's handlers, opened at their first call.
#[derive(Debug)]
pub(crate) struct LazyClient {
    transport: Arc<dyn Transport>,
    config: ClientConfig,
    client: OnceCell<Client>,
}

impl LazyClient {
    pub(crate) fn new(transport: Arc<dyn Transport>, config: ClientConfig) -> Self {
        Self {
            transport,
            config,
            client: OnceCell::new(),
        }
    }

    pub(crate) async fn client(&self) -> Result<&Client, Error> {
        let open = || Client::open(Arc::clone(&self.transport), self.config);
        self.client.get_or_try_init(open).await
    }

    pub(crate) async fn close(&self) {
        if let Some(client) = self.client.get() {
            client.close().await;
        }
    }
}
