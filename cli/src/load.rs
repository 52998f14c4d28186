//! A closed loop of calls: as many callers as may wait at once, each calling again when it has its reply.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use antiphon::{Client, Error, ServiceName};
use bytes::Bytes;
use hdrhistogram::Histogram;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::report::BenchReport;

/// What to do.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) service: ServiceName,
    pub(crate) body: Bytes,
    pub(crate) timeout: Duration,
    pub(crate) concurrency: u16,
    pub(crate) limit: Limit,
}

/// When no more calls are started.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Limit {
    Calls(u64),
    Duration(Duration),
}

/// Calls that are under way.
#[derive(Debug)]
pub(crate) struct Load {
    run: Arc<Run>,
    callers: JoinSet<()>,
}

impl Load {
    pub(crate) fn start(client: Client, plan: Plan) -> Self {
        let run = Arc::new(Run {
            client,
            plan,
            begun: Instant::now(),
            started: AtomicU64::new(0),
            tally: Mutex::new(Tally::new()),
        });
        let callers = (0..run.plan.concurrency)
            .map(|_| Arc::clone(&run).call_in_a_loop())
            .collect();
        Self { run, callers }
    }

    /// Waits for the last caller. **Cancel safety**: dropping the future stops nothing.
    pub(crate) async fn ended(&mut self) {
        while self.callers.join_next().await.is_some() {}
    }

    /// How much of the limit is behind us: calls, or milliseconds.
    pub(crate) fn position(&self) -> u64 {
        match self.run.plan.limit {
            Limit::Calls(_) => self.run.tally().calls(),
            Limit::Duration(_) => {
                u64::try_from(self.run.begun.elapsed().as_millis()).unwrap_or(u64::MAX)
            }
        }
    }

    /// Stops what is in flight, and says what was measured, and the first error.
    pub(crate) fn stop(mut self) -> (BenchReport, Option<Error>) {
        // First the counters: what is in flight is given up below, and would count as late.
        let stats = self.run.client.stats();
        self.callers.abort_all();
        let tally = self.run.tally();
        let seconds = tally
            .ended
            .saturating_duration_since(self.run.begun)
            .as_secs_f64();
        let quantile = |quantile| tally.latencies.value_at_quantile(quantile);
        let report = BenchReport {
            calls: tally.calls(),
            ok: tally.ok,
            errors: tally.errors.clone(),
            duplicates: stats.duplicates,
            late: stats.late,
            unknown: stats.unknown,
            seconds,
            calls_per_second: if seconds > 0.0 {
                tally.ok as f64 / seconds
            } else {
                0.0
            },
            p50_us: quantile(0.5),
            p90_us: quantile(0.9),
            p99_us: quantile(0.99),
            max_us: tally.latencies.max(),
        };
        (report, tally.first_error.clone())
    }
}

#[derive(Debug)]
struct Run {
    client: Client,
    plan: Plan,
    begun: Instant,
    started: AtomicU64,
    tally: Mutex<Tally>,
}

impl Run {
    async fn call_in_a_loop(self: Arc<Self>) {
        while self.may_start() {
            let call = self
                .client
                .call_raw(self.plan.service.clone(), self.plan.body.clone());
            let started = Instant::now();
            let ended = call.timeout(self.plan.timeout).await;
            self.tally().add(started, ended.err());
        }
    }

    fn may_start(&self) -> bool {
        match self.plan.limit {
            Limit::Calls(calls) => self.started.fetch_add(1, Ordering::Relaxed) < calls,
            Limit::Duration(duration) => self.begun.elapsed() < duration,
        }
    }

    fn tally(&self) -> MutexGuard<'_, Tally> {
        self.tally.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What has come back.
#[derive(Debug)]
struct Tally {
    ok: u64,
    errors: BTreeMap<&'static str, u64>,
    first_error: Option<Error>,
    /// Of the calls that are ok, in microseconds.
    latencies: Histogram<u64>,
    /// When the last one came back.
    ended: Instant,
}

impl Tally {
    fn new() -> Self {
        // Up to an hour, to three digits.
        let latencies = Histogram::new_with_max(3_600_000_000, 3).expect("the bounds are valid");
        Self {
            ok: 0,
            errors: BTreeMap::new(),
            first_error: None,
            latencies,
            ended: Instant::now(),
        }
    }

    fn add(&mut self, started: Instant, error: Option<Error>) {
        self.ended = Instant::now();
        match error {
            None => {
                self.ok += 1;
                let latency = self.ended.saturating_duration_since(started).as_micros();
                self.latencies
                    .saturating_record(u64::try_from(latency).unwrap_or(u64::MAX));
            }
            Some(error) => {
                *self.errors.entry(error.kind().as_str()).or_default() += 1;
                self.first_error.get_or_insert(error);
            }
        }
    }

    fn calls(&self) -> u64 {
        self.ok + self.errors.values().sum::<u64>()
    }
}
