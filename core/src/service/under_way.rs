//! A settlement for which no task waits.

use std::sync::Weak;

use futures_util::FutureExt;
use tokio_util::task::task_tracker::TaskTrackerToken;

use super::Service;
use super::execution::Unsent;
use crate::error::Error;

/// A settlement under way, as the transport has it.
pub(crate) struct UnderWay {
    /// Not a share: a service has its transport, which has this, perhaps for as long as there is no broker.
    service: Weak<Service>,
    /// None if there is no reply, or none that could be sent later.
    unsent: Option<Unsent>,
    /// A shutdown waits for it.
    _counted: TaskTrackerToken,
}

impl UnderWay {
    pub(super) fn new(
        service: Weak<Service>,
        unsent: Option<Unsent>,
        counted: TaskTrackerToken,
    ) -> Self {
        Self {
            service,
            unsent,
            _counted: counted,
        }
    }

    /// Keeps a reply that could not be sent, or counts what was not settled.
    pub(crate) fn end(self, settled: Result<(), Error>) {
        let Err(error) = settled else {
            return;
        };
        let Some(service) = self.service.upgrade() else {
            return;
        };
        // As for a task of the server's: who killed it wants to hear no more.
        if service.kill.is_cancelled() {
            return;
        }
        // It waits for a store only, and with one there is a task that waits for the settlement.
        let _ = service
            .keep_or_count(&error, self.unsent.as_ref(), None)
            .now_or_never();
    }
}
