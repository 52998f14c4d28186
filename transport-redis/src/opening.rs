//! A busy subscription's own connection, while it is being made.

use std::future::pending;
use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use crate::BLOCK;
use crate::connection::Live;
use crate::transport::Shared;

/// A connection that is being made beside all else, until this is dropped.
#[derive(Default)]
pub(crate) struct Opening(Option<AbortOnDropHandle<Option<Live>>>);

impl Opening {
    /// Begins, unless it has begun.
    pub(crate) fn begin(&mut self, shared: &Arc<Shared>, stopping: &CancellationToken) {
        let (shared, stopping) = (Arc::clone(shared), stopping.clone());
        self.0.get_or_insert_with(|| {
            AbortOnDropHandle::new(tokio::spawn(async move {
                let answer = BLOCK + Duration::from_secs(2);
                shared.connector.open_patiently(answer, &stopping).await
            }))
        });
    }

    /// The connection, once it is there; never, if it was not begun.
    pub(crate) async fn opened(&mut self) -> Live {
        if let Some(opening) = &mut self.0
            && let Ok(Some(live)) = opening.await
        {
            return live;
        }
        // Stopped.
        self.0 = None;
        pending().await
    }
}
