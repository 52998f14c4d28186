//! An open loop: calls begin when they are due, whether or not others have ended, and their latency counts from then.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use hdrhistogram::Histogram;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::Failure;
use crate::cpu;
use crate::load::{self, Caller, Figures, Point, Spent};

/// The most calls under way: with more, the rate is above what can be done, and no latency is worth a word.
const UNDER_WAY: usize = 50_000;

/// Calls at a rate, with exponential gaps, until the point is measured.
///
/// # Errors
/// The first error of a call, or if calls pile up.
pub(crate) async fn measure(
    caller: impl Caller,
    point: &Point,
    rate: f64,
) -> Result<Figures, Failure> {
    let body = Bytes::from(vec![b'x'; point.size]);
    let begin = Instant::now() + point.warm_up;
    let end = begin + point.length;
    let latencies = Arc::new(Mutex::new(load::histogram()));
    let mut due = due(rate, end);
    let mut calls = JoinSet::new();
    let mut batch = Vec::new();
    let mut before = None;
    while due.recv_many(&mut batch, 1024).await > 0 {
        if before.is_none() && Instant::now() >= begin {
            before = Some((point.watched.used(), cpu::of_machine()));
        }
        for due in batch.drain(..) {
            let latencies = (due >= begin).then(|| Arc::clone(&latencies));
            calls.spawn(call(caller.clone(), body.clone(), due, latencies));
        }
        while let Some(ended) = calls.try_join_next() {
            ended??;
        }
        if calls.len() > UNDER_WAY {
            return Err(format!("{rate:.0} calls/s are too many").into());
        }
    }
    while let Some(ended) = calls.join_next().await {
        ended??;
    }
    let lasted = begin.elapsed();
    let (before, machine) = before.ok_or("no call was due")?;
    let busy = cpu::of_machine().saturating_sub(machine);
    let spent = Spent::between(before, point.watched.used(), busy);
    let latencies = latencies.lock().unwrap_or_else(PoisonError::into_inner);
    load::figures(&latencies, spent, lasted)
}

/// Begins a call whenever one ends, with as many under way as the point says.
///
/// # Errors
/// The first error of a call.
pub(crate) async fn saturate(caller: impl Caller, point: &Point) -> Result<Figures, Failure> {
    let body = Bytes::from(vec![b'x'; point.size]);
    let latencies = Arc::new(Mutex::new(load::histogram()));
    let mut calls = JoinSet::new();
    let start = |calls: &mut JoinSet<_>, latencies: Option<Arc<_>>| {
        calls.spawn(call(
            caller.clone(),
            body.clone(),
            Instant::now(),
            latencies,
        ));
    };
    for _ in 0..point.concurrency {
        start(&mut calls, None);
    }
    let begin = Instant::now() + point.warm_up;
    while Instant::now() < begin {
        calls.join_next().await.ok_or("no call")???;
        start(&mut calls, None);
    }
    let (before, machine) = (point.watched.used(), cpu::of_machine());
    let begin = Instant::now();
    while begin.elapsed() < point.length {
        calls.join_next().await.ok_or("no call")???;
        start(&mut calls, Some(Arc::clone(&latencies)));
    }
    let lasted = begin.elapsed();
    let busy = cpu::of_machine().saturating_sub(machine);
    let spent = Spent::between(before, point.watched.used(), busy);
    let latencies = latencies.lock().unwrap_or_else(PoisonError::into_inner);
    load::figures(&latencies, spent, lasted)
}

async fn call(
    caller: impl Caller,
    body: Bytes,
    due: Instant,
    latencies: Option<Arc<Mutex<Histogram<u64>>>>,
) -> Result<(), Failure> {
    caller.call(body).await?;
    if let Some(latencies) = latencies {
        let mut latencies = latencies.lock().unwrap_or_else(PoisonError::into_inner);
        latencies.saturating_record(load::nanos(due.elapsed()));
    }
    Ok(())
}

/// When calls are due, each told when it is. A thread of its own, since Tokio's timers are a millisecond coarse.
fn due(rate: f64, end: Instant) -> mpsc::UnboundedReceiver<Instant> {
    let (sender, receiver) = mpsc::unbounded_channel();
    std::thread::spawn(move || {
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        let mut next = Instant::now();
        while next < end {
            let now = Instant::now();
            if next > now {
                std::thread::sleep(next - now);
                continue;
            }
            if sender.send(next).is_err() {
                return;
            }
            next += Duration::from_secs_f64(random.exponential() / rate);
        }
    });
    receiver
}

/// A small generator of numbers; the same in every run.
struct Random(u64);

impl Random {
    /// Of mean 1.
    fn exponential(&mut self) -> f64 {
        // xorshift64*
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let bits = self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11;
        // In (0, 1], so that its logarithm is finite.
        let uniform = (bits + 1) as f64 / (1_u64 << 53) as f64;
        -uniform.ln()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_have_mean_one() {
        let mut random = Random(1);
        let mean = (0..100_000).map(|_| random.exponential()).sum::<f64>() / 1e5;
        assert!((mean - 1.0).abs() < 0.02, "{mean}");
    }
}
