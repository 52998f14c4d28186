//! Whether a server is engaged with its broker, and what it does when it is not.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::error::{Error, ErrorKind};
use crate::name::ServiceName;
use crate::transport::{ConnectionState, Transport};

/// Whether a server is engaged with its broker.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Engagement {
    /// It takes requests.
    Engaged,
    /// The broker is away or takes nothing: handlers that run go on, and finished replies are kept until it is back. Or this
    /// server has lost a service to another one, and [stands by](crate::Server::standby) for it again.
    Disengaged {
        /// Why.
        reason: Arc<str>,
    },
    /// It is over.
    Stopped {
        /// Why.
        reason: Arc<str>,
    },
}

/// What a server does when its broker is away.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum WhenDisengaged {
    /// It waits until the broker is back, however long that takes.
    #[default]
    Reconnect,
    /// It waits so long, and is over then.
    GiveUpAfter(Duration),
    /// It is over at once.
    Stop,
}

/// The services that a standby had and lost, and why. It waits for them.
pub(crate) type LostServices = watch::Sender<BTreeMap<ServiceName, Arc<str>>>;

/// Follows the connection for a server, until `stop` or until its policy says that it is over.
pub(crate) struct Clutch {
    pub(crate) transport: Arc<dyn Transport>,
    pub(crate) policy: WhenDisengaged,
    pub(crate) engagement: watch::Sender<Engagement>,
    pub(crate) lost: LostServices,
}

impl Clutch {
    /// Why the server is over, unless it was told to stop; it is told then.
    pub(crate) async fn run(self, stop: CancellationToken) -> Option<Error> {
        let mut state = self.transport.state();
        let mut lost = self.lost.subscribe();
        let follow = async {
            loop {
                let now = engagement(&state.borrow_and_update());
                self.show(&self.seen(now.clone()));
                match now {
                    Engagement::Stopped { .. } => {
                        return Error::not_executed(ErrorKind::Closed, "the connection is closed");
                    }
                    Engagement::Disengaged { reason } => {
                        if let Some(error) = self.disengaged(&mut state, &reason).await {
                            return error;
                        }
                    }
                    Engagement::Engaged => {
                        let changed = tokio::select! {
                            changed = state.changed() => changed,
                            changed = lost.changed() => changed,
                        };
                        if changed.is_err() {
                            return Error::not_executed(
                                ErrorKind::Closed,
                                "the connection is gone",
                            );
                        }
                    }
                }
            }
        };
        let error = tokio::select! {
            biased;
            () = stop.cancelled() => None,
            error = follow => Some(error),
        };
        let reason = error.as_ref().map_or_else(
            || "the server was stopped".into(),
            |error| error.to_string().into(),
        );
        self.show(&Engagement::Stopped { reason });
        stop.cancel();
        error
    }

    /// Waits as long as the policy allows; the error if that was not long enough.
    async fn disengaged(
        &self,
        state: &mut watch::Receiver<ConnectionState>,
        reason: &str,
    ) -> Option<Error> {
        let patience = match self.policy {
            WhenDisengaged::Reconnect => None,
            WhenDisengaged::GiveUpAfter(patience) => Some(patience),
            WhenDisengaged::Stop => Some(Duration::ZERO),
        };
        let back = async {
            let is_over = |state: &ConnectionState| {
                self.show(&self.seen(engagement(state)));
                matches!(state, ConnectionState::Connected | ConnectionState::Closed)
            };
            // An error would mean that the transport is gone; the caller looks again.
            let _ = state.wait_for(is_over).await;
        };
        let Some(patience) = patience else {
            back.await;
            return None;
        };
        tokio::time::timeout(patience, back).await.err().map(|_| {
            let message = format!("the broker was away for {patience:?}: {reason}");
            Error::not_executed(ErrorKind::ConnectionLost, message)
        })
    }

    /// What the embedder sees: the connection alone does not make a server that stands by take requests.
    fn seen(&self, by_connection: Engagement) -> Engagement {
        match (&by_connection, self.lost.borrow().iter().next()) {
            (Engagement::Engaged, Some((service, error))) => Engagement::Disengaged {
                reason: format!("it stands by for {service}: {error}").into(),
            },
            _ => by_connection,
        }
    }

    fn show(&self, now: &Engagement) {
        self.engagement.send_if_modified(|shown| {
            // What is over stays so.
            let is_new = shown != now && !matches!(shown, Engagement::Stopped { .. });
            if is_new {
                tracing::info!(?now, "engagement");
                shown.clone_from(now);
            }
            is_new
        });
    }
}

fn engagement(state: &ConnectionState) -> Engagement {
    match state {
        ConnectionState::Connected => Engagement::Engaged,
        ConnectionState::Disconnected { reason } | ConnectionState::Blocked { reason } => {
            Engagement::Disengaged {
                reason: Arc::clone(reason),
            }
        }
        ConnectionState::Closed => Engagement::Stopped {
            reason: "the connection is closed".into(),
        },
    }
}
