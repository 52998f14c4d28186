//! The services that were refused because another one owns them: who stands by asks again and again.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use antiphon_core::{Error, ErrorKind, ServiceName};
use tokio::time::Instant;

use crate::topology::Lingering;

/// Who asks again within this time stands by.
const LATELY: Duration = Duration::from_secs(1);

/// After so many refusals in a row. Before, an owner may be just going away, and whoever asks but once waits for that.
const STANDS_BY: u32 = 2;

/// How often each service was refused in a row, and when last.
#[derive(Debug, Default)]
pub(crate) struct Refused(Mutex<HashMap<ServiceName, (u32, Instant)>>);

impl Refused {
    /// How long to wait for an owner that may be going away: who stands by asks again soon, and is refused at once.
    pub(crate) fn lingering(&self, service: &ServiceName) -> Lingering {
        let mut refused = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        refused.retain(|_, (_, last)| last.elapsed() < LATELY);
        match refused.get(service) {
            Some((times, _)) if *times >= STANDS_BY => Lingering::AGAIN,
            _ => Lingering::OTHERS,
        }
    }

    /// How a try to own it ended.
    pub(crate) fn note(&self, service: &ServiceName, error: Option<&Error>) {
        let mut refused = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match error {
            Some(error) if error.kind() == ErrorKind::AlreadyOwned => {
                let (times, last) = refused
                    .entry(service.clone())
                    .or_insert_with(|| (0, Instant::now()));
                *times = times.saturating_add(1);
                *last = Instant::now();
            }
            _ => drop(refused.remove(service)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn who_asks_again_soon_is_refused_at_once() {
        let refused = Refused::default();
        let service = ServiceName::new("fib").unwrap();
        let owned = Error::not_executed(ErrorKind::AlreadyOwned, "");
        for expected in [Lingering::OTHERS, Lingering::OTHERS, Lingering::AGAIN] {
            assert_eq!(refused.lingering(&service), expected);
            refused.note(&service, Some(&owned));
        }
        tokio::time::advance(LATELY).await;
        assert_eq!(refused.lingering(&service), Lingering::OTHERS);
        refused.note(&service, Some(&owned));
        refused.note(&service, Some(&owned));
        refused.note(&service, None);
        assert_eq!(refused.lingering(&service), Lingering::OTHERS);
    }
}
