//! How a server comes to serve: its inbox, its subscriptions, its desk, and a loop for each service.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::clutch::{Clutch, LostServices};
use super::desk::{self, Desk, Owned, Served};
use super::ownership::Owner;
use super::serving::Serving;
use super::{Counters, Engagement, Handlers, Outbox, Running, RunningServer};
use crate::client::Client;
use crate::config::{self, ClientConfig, Ownership, ServerConfig};
use crate::error::Error;
use crate::flagged_token::CancelOnDrop;
use crate::name::{Node, ServiceName};
use crate::service::Service;
use crate::transport::{FlaggedToken, Transport};

/// A server that is to serve.
pub(super) struct Starting {
    pub(super) transport: Arc<dyn Transport>,
    pub(super) config: ServerConfig,
    pub(super) services: BTreeMap<ServiceName, Handlers>,
    pub(super) node: Node,
    pub(super) outbox: Arc<Outbox>,
    /// Ends all of it, the sender of the outbox too.
    pub(super) kill: Arc<FlaggedToken>,
}

impl Starting {
    /// Subscribes to all services, and serves them.
    pub(super) async fn start(self) -> Result<RunningServer, Error> {
        let Self {
            transport,
            config,
            services,
            node,
            outbox,
            kill,
        } = self;
        let killed_on_drop = CancelOnDrop(Arc::clone(&kill));
        let (words, heard) = mpsc::channel(desk::BACKLOG_MAX);
        let client = Client::open_at_desk(
            Arc::clone(&transport),
            ClientConfig::default()
                .max_body(config.max_body)
                // What a handler calls has the handler's own deadline.
                .timeout(config::TIMEOUT_MAX),
            Some(words),
        )
        .await?;
        let owner = Owner {
            transport: Arc::clone(&transport),
            client: client.clone(),
            config,
        };
        let names: Vec<_> = services.keys().cloned().collect();
        // Each is joined as soon as it is served: in between it hears of nothing that is given up. But who waits for another
        // server gets all or none.
        let at_once = match config.ownership {
            Ownership::Shared | Ownership::Exclusive => 1,
            Ownership::Standby | Ownership::TakeOver => names.len(),
        };
        let mut subscriptions = Vec::with_capacity(names.len());
        for names in names.chunks(at_once) {
            subscriptions.extend(owner.subscribe(names).await?);
            // Not before it serves: who stands by is not asked.
            for name in names {
                client.join(name).await?;
            }
        }

        let stop = CancellationToken::new();
        let counters = Arc::new(Counters::default());
        let running = Arc::new(Running::default());
        let (engagement, shown) = watch::channel(Engagement::Engaged);
        let lost = LostServices::default();
        let (handlers_running, mut loops) = (TaskTracker::new(), JoinSet::new());
        let mut desk = Desk {
            transport: Arc::clone(&transport),
            config,
            node: node.clone(),
            services: HashMap::new(),
            running: Arc::clone(&running),
            counters: Arc::clone(&counters),
            outbox: Arc::clone(&outbox),
            handlers: handlers_running.clone(),
            started: Instant::now(),
        };
        let mut servings = Vec::with_capacity(subscriptions.len());
        let mut settling = Vec::with_capacity(subscriptions.len());
        for (subscription, (name, handlers)) in subscriptions.into_iter().zip(services) {
            let service = Arc::new(Service {
                name: name.clone(),
                node: node.clone(),
                handlers,
                config,
                counters: Arc::clone(&counters),
                client: client.clone(),
                running: Arc::clone(&running),
                outbox: Arc::clone(&outbox),
                kill: FlaggedToken::child_of(&kill),
                settling: TaskTracker::new(),
            });
            settling.push(service.settling.clone());
            let served = Served {
                service,
                own: TaskTracker::new(),
                owned: Owned::default(),
            };
            desk.services.insert(name, served.clone());
            // Before the desk is there, which hears what is asked of an owner.
            let hand_over = served.owned.begin();
            servings.push(Serving {
                hand_over,
                subscription,
                served,
                all: handlers_running.clone(),
                stop: stop.clone(),
                owner: owner.clone(),
                lost: lost.clone(),
            });
        }
        // Before anything is served: what was given up until now was said to it.
        tokio::spawn(desk.run(heard, stop.clone(), kill.token()));
        for serving in servings {
            let shown = engagement.clone();
            loops.spawn(async move {
                let error = serving.run().await?;
                let reason = error.to_string().into();
                shown.send_replace(Engagement::Stopped { reason });
                Some(error)
            });
        }
        let clutch = Clutch {
            transport,
            policy: config.when_disengaged,
            engagement,
            lost,
        };
        loops.spawn(clutch.run(stop.clone()));
        Ok(RunningServer {
            stop: stop.drop_guard(),
            kill: killed_on_drop,
            loops,
            handlers: handlers_running,
            settling,
            counters,
            client,
            outbox,
            node,
            engagement: shown,
            drain_timeout: config.drain_timeout,
        })
    }
}
