//! A token that can be looked at for next to nothing.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio_util::sync::CancellationToken;

/// A [`CancellationToken`] with a flag beside it. To look whether a token is cancelled takes its lock, and this is looked at for
/// every request.
#[derive(Debug, Default)]
pub struct FlaggedToken {
    flag: AtomicBool,
    token: CancellationToken,
    /// Cancelled with this one.
    parent: Option<Arc<Self>>,
}

impl FlaggedToken {
    /// One that is not cancelled.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// One that is cancelled with another one, or before.
    #[must_use]
    pub fn child_of(parent: &Arc<Self>) -> Self {
        Self {
            flag: AtomicBool::new(false),
            token: parent.token.child_token(),
            parent: Some(Arc::clone(parent)),
        }
    }

    /// Cancels it, for good.
    pub fn cancel(&self) {
        // First, so that whoever is woken by the token sees it.
        self.flag.store(true, Ordering::Release);
        self.token.cancel();
    }

    /// True once it is cancelled.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        let parent = self.parent.as_ref();
        self.flag.load(Ordering::Acquire) || parent.is_some_and(|parent| parent.is_cancelled())
    }

    /// Waits until it is cancelled.
    ///
    /// **Cancel safety**: dropping the future changes nothing.
    pub async fn cancelled(&self) {
        self.token.cancelled().await;
    }

    /// Waits for a future, but not beyond the cancellation: none then, and the future is dropped.
    pub async fn run_until_cancelled<F: Future>(&self, future: F) -> Option<F::Output> {
        self.token.run_until_cancelled(future).await
    }

    /// For who only waits.
    pub(crate) fn token(&self) -> CancellationToken {
        self.token.clone()
    }
}

/// Cancels when it is dropped.
#[derive(Debug)]
pub(crate) struct CancelOnDrop(pub(crate) Arc<FlaggedToken>);

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        self.0.cancel();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_child_ends_with_its_parent_and_not_the_other_way_round() {
        let parent = Arc::new(FlaggedToken::new());
        let (first, second) = (
            FlaggedToken::child_of(&parent),
            FlaggedToken::child_of(&parent),
        );
        first.cancel();
        first.cancelled().await;
        assert!(first.is_cancelled() && !second.is_cancelled() && !parent.is_cancelled());
        drop(CancelOnDrop(parent));
        second.cancelled().await;
        assert!(second.is_cancelled());
        assert_eq!(
            second
                .run_until_cancelled(std::future::pending::<()>())
                .await,
            None
        );
    }
}
