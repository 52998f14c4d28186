//! A coordinated channel: many tasks out, a private stream of results back, each acknowledged.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use futures_util::stream::Stream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;

use crate::call::Call;
use crate::client::Client;
use crate::config::ClientConfig;
use crate::envelope::Reply;
use crate::error::{Error, ErrorKind};
use crate::name::ServiceName;

/// How many tasks may be sent and not acknowledged, if nobody says.
const WINDOW: usize = 256;

/// How a channel is opened; see [`Client::channel`](crate::Client::channel).
#[must_use = "a channel is leased when it is opened"]
#[derive(Clone, Debug)]
pub struct ChannelOptions {
    client: Client,
    service: Result<ServiceName, Error>,
    timeout: Option<Duration>,
    window: usize,
}

impl ChannelOptions {
    pub(crate) fn new(client: Client, service: Result<ServiceName, Error>) -> Self {
        Self {
            client,
            service,
            timeout: None,
            window: WINDOW,
        }
    }

    /// How long each task may take, from when it is sent to its result. Default: the client's, 30 s.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(timeout);
        self
    }

    /// How many tasks may be sent and not yet acknowledged: one more waits. Default: 256. At least 1.
    pub fn window(mut self, tasks: usize) -> Self {
        self.window = tasks.clamp(1, Semaphore::MAX_PERMITS);
        self
    }

    /// Leases the channel: an inbox of its own, so that its results never mix with others.
    ///
    /// `M` is what the caller ties to a task, and gets back with its result; it does not travel.
    ///
    /// # Errors
    /// `Invalid` for a bad name, before any I/O; others as of [`Client::open`].
    pub async fn open<M: Send + Sync + 'static>(
        self,
    ) -> Result<(TaskSender<M>, TaskResults<M>), Error> {
        let service = self.service?;
        let mut config = *self.client.config();
        if let Some(timeout) = self.timeout {
            config = config.timeout(timeout);
        }
        config = ClientConfig {
            max_pending: config.max_pending.max(self.window),
            ..config
        };
        let client = Client::open(Arc::clone(self.client.shared_transport()), config).await?;
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                ready: VecDeque::new(),
                outstanding: 0,
                closed: false,
                waker: None,
            }),
            window: Arc::new(Semaphore::new(self.window)),
        });
        let over = CancellationToken::new();
        let sender = TaskSender {
            client: client.clone(),
            service,
            shared: Arc::clone(&shared),
            over: over.clone(),
        };
        let results = TaskResults {
            shared,
            over,
            client,
        };
        Ok((sender, results))
    }
}

/// What both halves, the tasks under way and the results in hand share.
#[derive(Debug)]
struct Shared<M> {
    state: Mutex<State<M>>,
    window: Arc<Semaphore>,
}

#[derive(Debug)]
struct State<M> {
    /// With how often each was delivered before.
    ready: VecDeque<(Arc<Task<M>>, u32)>,
    /// Tasks that were sent and not acknowledged.
    outstanding: usize,
    /// No more will be sent.
    closed: bool,
    /// Who waits for a result, or that there will be none.
    waker: Option<Waker>,
}

#[derive(Debug)]
struct Task<M> {
    metadata: M,
    outcome: Result<Reply, Error>,
    /// Its place in the window, free once it is gone.
    _place: OwnedSemaphorePermit,
}

impl<M> Shared<M> {
    fn lock(&self) -> MutexGuard<'_, State<M>> {
        // No code of a user runs under the lock, so a poisoned state is still a whole one.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the state, and has whoever waits look at it.
    fn change(&self, change: impl FnOnce(&mut State<M>)) {
        let waker = {
            let mut state = self.lock();
            change(&mut state);
            state.waker.take()
        };
        // Not under the lock: it may run code of the user's.
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

/// The half that sends tasks. Dropping it closes it: the results of what was sent still come, and end the stream.
#[derive(Debug)]
pub struct TaskSender<M> {
    client: Client,
    service: ServiceName,
    shared: Arc<Shared<M>>,
    over: CancellationToken,
}

impl<M: Send + Sync + 'static> TaskSender<M> {
    /// Sends a task with a JSON body. Waits while the window is full.
    ///
    /// A task that cannot be sent has a result too, an error: what was taken here comes back there, in any case.
    ///
    /// **Cancel safety**: dropping the future sends nothing.
    ///
    /// # Errors
    /// `Invalid` for an input that cannot be encoded; `Closed` once the results were dropped.
    #[cfg(feature = "json")]
    pub async fn send(
        &self,
        input: &(impl serde::Serialize + ?Sized),
        metadata: M,
    ) -> Result<(), Error> {
        let body = crate::codec::encode(input)?;
        let json = crate::name::ContentType::JSON.as_str().to_owned();
        self.dispatch(
            |client, service| client.call_raw(service, body).content_type(&json),
            metadata,
        )
        .await
    }

    /// Sends a task with a body of bytes, as [`send`](Self::send).
    ///
    /// # Errors
    /// `Closed` once the results were dropped.
    pub async fn send_raw(&self, body: impl Into<bytes::Bytes>, metadata: M) -> Result<(), Error> {
        let body = body.into();
        self.dispatch(|client, service| client.call_raw(service, body), metadata)
            .await
    }

    /// Closes it, as dropping does: the stream of results ends after the last one.
    pub fn close(self) {
        drop(self);
    }

    async fn dispatch(
        &self,
        call: impl FnOnce(&Client, &ServiceName) -> Call<Reply>,
        metadata: M,
    ) -> Result<(), Error> {
        let place = tokio::select! {
            biased;
            () = self.over.cancelled() => None,
            place = Arc::clone(&self.shared.window).acquire_owned() => place.ok(),
        };
        let Some(place) = place else {
            return Err(Error::not_executed(
                ErrorKind::Closed,
                "the channel's results were dropped",
            ));
        };
        self.shared.lock().outstanding += 1;
        let call = call(&self.client, &self.service);
        let (shared, over) = (Arc::clone(&self.shared), self.over.clone());
        tokio::spawn(async move {
            let outcome = tokio::select! {
                biased;
                () = over.cancelled() => return,
                outcome = call => outcome,
            };
            let task = Arc::new(Task {
                metadata,
                outcome,
                _place: place,
            });
            shared.change(|state| state.ready.push_back((task, 0)));
        });
        Ok(())
    }
}

impl<M> Drop for TaskSender<M> {
    fn drop(&mut self) {
        self.shared.change(|state| state.closed = true);
    }
}

/// The half that gets the results, in the order in which they come: a [`Stream`], for which [`next`](Self::next) is enough.
/// Dropping it gives up what is under way, as dropping a call does, and removes the inbox.
#[derive(Debug)]
pub struct TaskResults<M> {
    shared: Arc<Shared<M>>,
    over: CancellationToken,
    client: Client,
}

impl<M> Drop for TaskResults<M> {
    fn drop(&mut self) {
        // First the tasks under way, then their inbox, which the sender would keep.
        self.over.cancel();
        self.client.end();
    }
}

impl<M> TaskResults<M> {
    /// The next result; none after the last one of a closed sender.
    ///
    /// **Cancel safety**: no result is lost by dropping the future.
    pub async fn next(&mut self) -> Option<TaskResult<M>> {
        poll_fn(|cx| self.poll_result(cx)).await
    }

    fn poll_result(&mut self, cx: &Context<'_>) -> Poll<Option<TaskResult<M>>> {
        let mut state = self.shared.lock();
        if let Some((task, deliveries)) = state.ready.pop_front() {
            return Poll::Ready(Some(TaskResult {
                task,
                deliveries: deliveries + 1,
                acknowledged: false,
                shared: Arc::clone(&self.shared),
            }));
        }
        if state.closed && state.outstanding == 0 {
            return Poll::Ready(None);
        }
        state.waker = Some(cx.waker().clone());
        Poll::Pending
    }
}

impl<M> Stream for TaskResults<M> {
    type Item = TaskResult<M>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<TaskResult<M>>> {
        self.get_mut().poll_result(cx)
    }
}

/// One result, in its owner's hands until it is [acknowledged](Self::ack). Dropped before, it is delivered again, behind
/// those that are there.
#[derive(Debug)]
pub struct TaskResult<M> {
    task: Arc<Task<M>>,
    deliveries: u32,
    acknowledged: bool,
    shared: Arc<Shared<M>>,
}

impl<M> TaskResult<M> {
    /// What the sender tied to the task.
    #[must_use]
    pub fn metadata(&self) -> &M {
        &self.task.metadata
    }

    /// The whole reply, or why there is none.
    ///
    /// # Errors
    /// Those of a call.
    pub fn reply(&self) -> Result<&Reply, &Error> {
        self.task.outcome.as_ref()
    }

    /// The body of the reply, or why there is none.
    ///
    /// # Errors
    /// Those of a call.
    pub fn body(&self) -> Result<&bytes::Bytes, &Error> {
        self.reply().map(|reply| &reply.body)
    }

    /// The reply, read as JSON.
    ///
    /// # Errors
    /// Those of a call; `BadReply` if it is of another type.
    #[cfg(feature = "json")]
    pub fn read<Out: serde::de::DeserializeOwned>(&self) -> Result<Out, Error> {
        let body = self.body().map_err(Error::clone)?;
        crate::codec::read(body)
    }

    /// How often it was delivered: 1, and one more for each time that it was dropped without having been acknowledged.
    #[must_use]
    pub fn deliveries(&self) -> u32 {
        self.deliveries
    }

    /// It is dealt with: it will not come again, and its place in the window is free.
    pub fn ack(mut self) {
        self.acknowledged = true;
    }
}

impl<M> Drop for TaskResult<M> {
    fn drop(&mut self) {
        self.shared.change(|state| {
            if self.acknowledged {
                state.outstanding -= 1;
            } else {
                let again = (Arc::clone(&self.task), self.deliveries);
                state.ready.push_back(again);
            }
        });
    }
}
