//! A harness whose connections are flawed.

use std::collections::{BTreeSet, VecDeque};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use antiphon_core::transport::{Delivery, Inbox, Outbound};
use antiphon_core::{CorrelationId, Error, ReplyAddress, ServiceName, Transport};
use async_trait::async_trait;
use tokio_util::sync::CancellationToken;

use super::Flaw;
use super::transport::Flawed;
use crate::harness::{Bounds, Connected, Harness, HookError, Link};

/// Another harness, with one flaw in all its connections.
#[derive(Debug)]
pub struct FlawedHarness {
    sound: Arc<dyn Harness>,
    world: Arc<World>,
}

impl FlawedHarness {
    /// Plants a flaw.
    #[must_use]
    pub fn new(sound: Arc<dyn Harness>, flaw: Flaw) -> Self {
        let (restarted, memory) = (CancellationToken::new(), Mutex::default());
        Self {
            sound,
            world: Arc::new(World {
                flaw,
                restarted,
                memory,
            }),
        }
    }
}

/// What flaws have to know across connections.
#[derive(Debug)]
pub(super) struct World {
    pub(super) flaw: Flaw,
    /// Fires when the broker is restarted.
    restarted: CancellationToken,
    memory: Mutex<Memory>,
}

#[derive(Default)]
pub(super) struct Memory {
    pub(super) last_subscribed: Option<ServiceName>,
    pub(super) served: BTreeSet<ServiceName>,
    pub(super) owned: BTreeSet<ServiceName>,
    pub(super) first_address: Option<ReplyAddress>,
    /// The ids of delivered requests that nobody replied to, oldest first.
    pub(super) unanswered: VecDeque<CorrelationId>,
    /// A request that lets the next one overtake it.
    pub(super) overtaken: Option<Outbound>,
    pub(super) leaked_inboxes: Vec<(Arc<dyn Transport>, Box<dyn Inbox>)>,
    pub(super) leaked_deliveries: Vec<Delivery>,
}

impl World {
    pub(super) fn memory(&self) -> MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Memory").finish_non_exhaustive()
    }
}

#[async_trait]
impl Harness for FlawedHarness {
    fn name(&self) -> String {
        format!("{} with a flaw: {:?}", self.sound.name(), self.world.flaw)
    }

    async fn connect(&self) -> Result<Connected, Error> {
        let Connected { transport, link } = self.sound.connect().await?;
        let cut = self.world.restarted.child_token();
        let link = FlawedLink {
            sound: link,
            cut: cut.clone(),
        };
        let transport = Flawed::new(transport, Arc::clone(&self.world), cut);
        Ok(Connected {
            transport: Arc::new(transport),
            link: Arc::new(link),
        })
    }

    fn bounds(&self) -> Bounds {
        self.sound.bounds()
    }

    async fn restart_broker(&self) -> Result<(), HookError> {
        self.world.restarted.cancel();
        self.sound.restart_broker().await
    }

    async fn leftovers(
        &self,
        service: &ServiceName,
        inboxes: &[ReplyAddress],
    ) -> Result<Vec<String>, HookError> {
        self.sound.leftovers(service, inboxes).await
    }

    async fn dead_letters(&self, service: &ServiceName) -> Result<u64, HookError> {
        self.sound.dead_letters(service).await
    }
}

/// Notes the faults, for the flaws that come with them.
#[derive(Debug)]
struct FlawedLink {
    sound: Arc<dyn Link>,
    cut: CancellationToken,
}

#[async_trait]
impl Link for FlawedLink {
    async fn cut(&self) -> Result<(), HookError> {
        self.cut.cancel();
        self.sound.cut().await
    }

    async fn sever(&self) -> Result<(), HookError> {
        self.cut.cancel();
        self.sound.sever().await
    }

    async fn restore(&self) -> Result<(), HookError> {
        self.sound.restore().await
    }
}
