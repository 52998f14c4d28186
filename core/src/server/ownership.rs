//! How a server comes to serve a service: with others, alone, or when the other one goes.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep};

use crate::client::Client;
use crate::config::{self, Ownership, ServerConfig};
use crate::control;
use crate::error::{Error, ErrorKind};
use crate::name::ServiceName;
use crate::transport::{SubscribeMode, SubscribeOptions, Subscription, Transport};

/// How often a standby looks whether the owner has gone. Brokers do not tell.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// How often a newcomer asks the owner to hand over.
const ASK_EVERY: Duration = Duration::from_secs(2);

/// Subscribes for one server.
#[derive(Clone, Debug)]
pub(crate) struct Owner {
    pub(crate) transport: Arc<dyn Transport>,
    pub(crate) client: Client,
    pub(crate) config: ServerConfig,
}

impl Owner {
    /// Subscribes to services, to all or none; a standby and a newcomer wait until they own them.
    pub(crate) async fn subscribe(
        &self,
        services: &[ServiceName],
    ) -> Result<Vec<Box<dyn Subscription>>, Error> {
        let mut asked: Option<Instant> = None;
        let mut options = match self.config.ownership {
            Ownership::Shared => SubscribeOptions::shared(self.config.prefetch),
            _ => SubscribeOptions::exclusive(self.config.prefetch),
        };
        loop {
            // None is kept while another is waited for: somebody else may need it meanwhile.
            let (service, error) = match self.try_subscribe(services, options).await {
                Ok(subscriptions) => return Ok(subscriptions),
                Err(failed) => failed,
            };
            match self.config.ownership {
                Ownership::Shared | Ownership::Exclusive => return Err(error),
                Ownership::Standby | Ownership::TakeOver if !may_pass(&error) => {
                    return Err(error);
                }
                Ownership::Standby => {}
                Ownership::TakeOver => {
                    if asked.is_none_or(|asked| asked.elapsed() >= ASK_EVERY) {
                        asked = Some(Instant::now());
                        if !self.ask(&service).await {
                            // It hears nobody: it hangs, or is cut off.
                            options.mode = SubscribeMode::TakeOver;
                        }
                        // Either way there is nothing to wait for.
                        continue;
                    }
                }
            }
            // Not all at once, if many stand by.
            let spread = uuid::Uuid::new_v4().as_u128() % 50;
            let spread = Duration::from_millis(u64::try_from(spread).unwrap_or_default());
            sleep(LOOK_EVERY + spread).await;
        }
    }

    async fn try_subscribe(
        &self,
        services: &[ServiceName],
        options: SubscribeOptions,
    ) -> Result<Vec<Box<dyn Subscription>>, (ServiceName, Error)> {
        let mut subscriptions = Vec::with_capacity(services.len());
        for service in services {
            let subscribe = self.transport.subscribe(service, options);
            match config::bounded("subscribe", subscribe).await {
                Ok(subscription) => subscriptions.push(subscription),
                Err(error) => return Err((service.clone(), error)),
            }
        }
        Ok(subscriptions)
    }

    /// Asks the owner to hand over. True if it has.
    async fn ask(&self, service: &ServiceName) -> bool {
        let asked = self
            .client
            .ask_all_raw(service, "")
            .method(control::HAND_OVER)
            .timeout(self.config.grace + ASK_EVERY)
            .at_most(1)
            .await;
        match asked {
            Ok(gathered) => !gathered.answers.is_empty(),
            Err(error) => {
                tracing::debug!(%service, %error, "the owner could not be asked to hand over");
                false
            }
        }
    }
}

/// True if waiting may mend it.
fn may_pass(error: &Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::AlreadyOwned | ErrorKind::Connect | ErrorKind::ConnectionLost
    )
}
