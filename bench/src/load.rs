//! A closed loop: as many callers as may wait at once, each calling again as soon as it has its reply.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};
use tokio::task::JoinSet;

use crate::Failure;
use crate::cpu::{self, Used, Watched};

/// What is called.
pub(crate) trait Caller: Clone + Send + Sync + 'static {
    /// Sends the body and waits for the reply, which is the same body; says how long that was, in bytes.
    fn call(&self, body: Bytes) -> impl Future<Output = Result<usize, Failure>> + Send;
}

/// One point to measure.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Point {
    pub(crate) concurrency: usize,
    /// Of a body, in bytes.
    pub(crate) size: usize,
    pub(crate) warm_up: Duration,
    pub(crate) length: Duration,
    pub(crate) arrivals: Arrivals,
    pub(crate) watched: Watched,
}

/// When calls begin.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) enum Arrivals {
    /// When the caller's last one has ended.
    Closed,
    /// When any has ended, each as a task: the most that an open loop can do.
    Saturated,
    /// When they are due, so many a second.
    Open(f64),
}

/// What was measured.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Figures {
    pub(crate) calls_per_second: f64,
    pub(crate) p50_us: f64,
    pub(crate) p99_us: f64,
    pub(crate) p999_us: f64,
    /// Processor time of client and server for 1,000 calls, in seconds.
    pub(crate) cpu_per_1000: f64,
    /// The broker's.
    pub(crate) broker_cpu_per_1000: f64,
    /// How many cores were busy with anything else.
    pub(crate) other_load: f64,
}

/// Where the loop is.
struct Phase(AtomicU8);

const WARMING: u8 = 0;
const MEASURING: u8 = 1;
const OVER: u8 = 2;

/// Calls until the point is measured.
///
/// # Errors
/// The first error of a call, or a reply that is no echo: a figure with errors in it would be none.
pub(crate) async fn measure(caller: impl Caller, point: &Point) -> Result<Figures, Failure> {
    let phase = Arc::new(Phase(AtomicU8::new(WARMING)));
    let body = Bytes::from(vec![b'x'; point.size]);
    let mut callers = JoinSet::new();
    for _ in 0..point.concurrency {
        callers.spawn(call_in_a_loop(
            caller.clone(),
            body.clone(),
            Arc::clone(&phase),
        ));
    }
    let clock = async {
        tokio::time::sleep(point.warm_up).await;
        let before = point.watched.used();
        let machine = cpu::of_machine();
        let begun = Instant::now();
        phase.0.store(MEASURING, Ordering::Relaxed);
        tokio::time::sleep(point.length).await;
        phase.0.store(OVER, Ordering::Relaxed);
        let lasted = begun.elapsed();
        let after = point.watched.used();
        (
            before,
            after,
            cpu::of_machine().saturating_sub(machine),
            lasted,
        )
    };
    let mut latencies = histogram();
    let (before, after, busy, lasted) = tokio::select! {
        times = clock => times,
        Some(ended) = callers.join_next() => match ended {
            Ok(Ok(_)) => return Err("a caller ended before its time".into()),
            Ok(Err(error)) => return Err(error),
            Err(error) => return Err(error.into()),
        },
    };
    while let Some(ended) = callers.join_next().await {
        latencies.add(ended??)?;
    }
    let spent = Spent::between(before, after, busy);
    figures(&latencies, spent, lasted)
}

/// Calls, as many by each caller, with bodies of so many bytes.
pub(crate) async fn call_often(
    caller: impl Caller,
    concurrency: usize,
    calls: usize,
    size: usize,
) -> Result<(), Failure> {
    let body = Bytes::from(vec![b'x'; size]);
    let mut callers = JoinSet::new();
    for _ in 0..concurrency {
        let (caller, body) = (caller.clone(), body.clone());
        callers.spawn(async move {
            for _ in 0..calls {
                caller.call(body.clone()).await?;
            }
            Ok::<(), Failure>(())
        });
    }
    while let Some(ended) = callers.join_next().await {
        ended??;
    }
    Ok(())
}

/// What was used while it was measured.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Spent {
    ends: Duration,
    broker: Duration,
    other: Duration,
}

impl Spent {
    pub(crate) fn between(before: Used, after: Used, busy: Duration) -> Self {
        let ends = after.ends.saturating_sub(before.ends);
        let broker = after.broker.saturating_sub(before.broker);
        Self {
            ends,
            broker,
            other: busy.saturating_sub(ends + broker),
        }
    }
}

pub(crate) fn figures(
    latencies: &Histogram<u64>,
    spent: Spent,
    lasted: Duration,
) -> Result<Figures, Failure> {
    let calls = latencies.len() as f64;
    if calls == 0.0 {
        return Err("no call ended in time".into());
    }
    let micros = |quantile| latencies.value_at_quantile(quantile) as f64 / 1e3;
    Ok(Figures {
        calls_per_second: calls / lasted.as_secs_f64(),
        p50_us: micros(0.5),
        p99_us: micros(0.99),
        p999_us: micros(0.999),
        cpu_per_1000: spent.ends.as_secs_f64() / calls * 1e3,
        broker_cpu_per_1000: spent.broker.as_secs_f64() / calls * 1e3,
        other_load: spent.other.as_secs_f64() / lasted.as_secs_f64(),
    })
}

async fn call_in_a_loop(
    caller: impl Caller,
    body: Bytes,
    phase: Arc<Phase>,
) -> Result<Histogram<u64>, Failure> {
    let mut latencies = histogram();
    let mut started = Instant::now();
    loop {
        let length = caller.call(body.clone()).await?;
        if length != body.len() {
            return Err(format!("a reply of {length} bytes to {}", body.len()).into());
        }
        let ended = Instant::now();
        match phase.0.load(Ordering::Relaxed) {
            WARMING => {}
            MEASURING => latencies.saturating_record(nanos(ended - started)),
            _ => return Ok(latencies),
        }
        started = ended;
    }
}

/// Of nanoseconds, up to a minute, to two digits.
pub(crate) fn histogram() -> Histogram<u64> {
    Histogram::new_with_max(60_000_000_000, 2).expect("the bounds are valid")
}

pub(crate) fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
