//! Calls that were given up after their requests had gone out: those are taken back, or the servers told.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::stream::{self, StreamExt};
use tokio::runtime::Handle;
use tokio::time::{Instant, timeout_at};

use crate::control;
use crate::envelope::{CorrelationId, Deadline, Request};
use crate::error::Error;
use crate::name::{Method, ServiceName};
use crate::signal::Signals;
use crate::transport::Transport;

/// How many are taken back at once.
const WITHDRAWALS: usize = 64;

/// For how long it is tried, at most: the broker may be away.
const TOLD_WITHIN: Duration = Duration::from_secs(600);

/// How many ids one word to the servers carries.
const IDS_MAX: usize = 1000;

/// What a client has given up and the servers do not know yet. Its task runs only while there is something.
#[derive(Debug)]
pub(crate) struct GivenUp {
    transport: Arc<dyn Transport>,
    runtime: Handle,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    waiting: Vec<Lost>,
    /// A task deals with what waits.
    busy: bool,
}

/// One request that nobody wants any more.
#[derive(Debug)]
pub(crate) struct Lost {
    pub(crate) service: ServiceName,
    pub(crate) id: CorrelationId,
    /// Nothing is to be told after its deadline.
    pub(crate) deadline: Instant,
}

impl GivenUp {
    /// Its task runs on the present runtime.
    pub(crate) fn new(transport: Arc<dyn Transport>) -> Arc<Self> {
        Arc::new(Self {
            transport,
            runtime: Handle::current(),
            state: Mutex::default(),
        })
    }

    /// Gives up a request. May be called from anywhere, such as where a future is dropped.
    pub(crate) fn add(self: &Arc<Self>, mut lost: Lost) {
        lost.deadline = lost.deadline.min(Instant::now() + TOLD_WITHIN);
        let mut state = self.lock();
        state.waiting.push(lost);
        if !std::mem::replace(&mut state.busy, true) {
            drop(state);
            self.runtime.spawn(Arc::clone(self).run());
        }
    }

    async fn run(self: Arc<Self>) {
        while let Some(lost) = self.next() {
            let mut services: HashMap<ServiceName, Vec<Lost>> = HashMap::new();
            for lost in lost {
                services.entry(lost.service.clone()).or_default().push(lost);
            }
            for (service, lost) in services {
                self.give_up(&service, lost).await;
            }
        }
    }

    fn next(&self) -> Option<Vec<Lost>> {
        let mut state = self.lock();
        let now = Instant::now();
        state.waiting.retain(|lost| lost.deadline > now);
        // Under the lock: who adds one now sees that nobody is busy.
        state.busy = !state.waiting.is_empty();
        state.busy.then(|| std::mem::take(&mut state.waiting))
    }

    async fn give_up(&self, service: &ServiceName, lost: Vec<Lost>) {
        let taken: Vec<Lost> = if self.transport.capabilities().withdrawal {
            stream::iter(lost)
                .map(|lost| self.withdraw(lost))
                .buffer_unordered(WITHDRAWALS)
                .filter_map(std::future::ready)
                .collect()
                .await
        } else {
            lost
        };
        for lost in taken.chunks(IDS_MAX) {
            if let Err(error) = self.tell(service, lost).await {
                tracing::debug!(%service, %error, "the servers do not know that calls were given up");
            }
        }
    }

    /// Takes a request back; returns one that could not be.
    async fn withdraw(&self, lost: Lost) -> Option<Lost> {
        let withdrawn = self.transport.withdraw(&lost.service, &lost.id);
        match timeout_at(lost.deadline, withdrawn).await {
            Ok(Ok(true)) | Err(_) => None,
            Ok(Ok(false) | Err(_)) => Some(lost),
        }
    }

    async fn tell(&self, service: &ServiceName, lost: &[Lost]) -> Result<(), Error> {
        let now = Instant::now();
        let deadline = lost.iter().map(|lost| lost.deadline).max().unwrap_or(now);
        let mut body = String::with_capacity(lost.len() * 37);
        for lost in lost {
            lost.id.with_str(|id| body.push_str(id));
            body.push('\n');
        }
        let mut request = Request::new(Deadline::after(deadline - now), body);
        request.method = Some(Method::new(control::CANCEL)?);
        request.signals = Signals::None;
        match timeout_at(deadline, self.transport.broadcast(service, request)).await {
            Ok(told) => told.map(drop),
            Err(_) => Ok(()),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // No code of a user runs under the lock, so a poisoned state is still a whole one.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
