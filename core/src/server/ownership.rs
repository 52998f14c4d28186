//! How a server comes to serve a service: with others, alone, or when the other one goes.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep};

use crate::client::Client;
use crate::config::{self, Ownership, ServerConfig};
use crate::control;
use crate::error::{Error, ErrorKind};
use crate::name::ServiceName;
use crate::transport::{SubscribeOptions, Subscription, Transport};

/// How often a standby looks whether the owner has gone. Brokers do not tell.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// How long one question to hand over waits for its answer. Then it is asked again: who has just become the owner did not hear it.
const ASK_FOR: Duration = Duration::from_secs(1);

/// How long an owner may be silent beside the grace in which its handlers end.
const HEARS_WITHIN: Duration = Duration::from_secs(2);

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
        // Whose owner is asked to hand over, and since when.
        let mut asked: Option<(ServiceName, Instant)> = None;
        loop {
            // Once, and then the next owner has as long to hear.
            let hears_nobody =
                asked.take_if(|(_, since)| since.elapsed() >= self.config.grace + HEARS_WITHIN);
            let fenced_off = hears_nobody.map(|(service, _)| service);
            // None is kept while another is waited for: somebody else may need it meanwhile.
            let (service, error) = match self.try_subscribe(services, fenced_off.as_ref()).await {
                Ok(subscriptions) => return Ok(subscriptions),
                Err(failed) => failed,
            };
            match self.config.ownership {
                Ownership::Shared | Ownership::Exclusive => return Err(error),
                Ownership::Standby | Ownership::TakeOver if !may_pass(&error) => {
                    return Err(error);
                }
                Ownership::Standby => {}
                Ownership::TakeOver if error.kind() != ErrorKind::AlreadyOwned => asked = None,
                Ownership::TakeOver => {
                    let since = match asked {
                        Some((before, since)) if before == service => since,
                        _ => Instant::now(),
                    };
                    asked = match self.ask(&service).await {
                        Ok(false) => Some((service, since)),
                        Ok(true) => {
                            asked = None;
                            continue;
                        }
                        // That it was silent is not known.
                        Err(error) => {
                            tracing::debug!(%service, %error, "the owner could not be asked to hand over");
                            None
                        }
                    };
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
        fenced_off: Option<&ServiceName>,
    ) -> Result<Vec<Box<dyn Subscription>>, (ServiceName, Error)> {
        let prefetch = self.config.prefetch;
        let mut subscriptions = Vec::with_capacity(services.len());
        for service in services {
            let options = match self.config.ownership {
                Ownership::Shared => SubscribeOptions::shared(prefetch),
                _ if fenced_off == Some(service) => SubscribeOptions::take_over(prefetch),
                _ => SubscribeOptions::exclusive(prefetch),
            };
            let subscribe = self.transport.subscribe(service, options);
            match config::bounded("subscribe", subscribe).await {
                Ok(subscription) => subscriptions.push(subscription),
                Err(error) => return Err((service.clone(), error)),
            }
        }
        Ok(subscriptions)
    }

    /// Asks the owner to hand over. True if it has.
    async fn ask(&self, service: &ServiceName) -> Result<bool, Error> {
        let asked = self
            .client
            .ask_all_raw(service, "")
            .method(control::HAND_OVER)
            .timeout(ASK_FOR)
            .at_most(1);
        Ok(!asked.await?.answers.is_empty())
    }
}

/// True if waiting may mend it.
fn may_pass(error: &Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::AlreadyOwned | ErrorKind::Connect | ErrorKind::ConnectionLost
    )
}
