//! A queue with many requests: what one more costs, and what it costs to take one.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use antiphon::{Client, Fault, ServiceName};
use bytes::Bytes;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::Growth;
use crate::Failure;
use crate::cpu::Watched;
use crate::report::median;

/// The whole is cut into so many parts; the first and the last few are compared.
const PARTS: usize = 20;
const COMPARED: usize = 4;

const SENDERS: usize = 256;
const HOUR: Duration = Duration::from_secs(3600);

/// What one part has used.
#[derive(Clone, Copy, Debug)]
struct Part {
    cpu: Duration,
    time: Duration,
}

pub(super) async fn measure(
    url: &str,
    broker: Vec<u32>,
    backlog: usize,
) -> Result<[Growth; 2], Failure> {
    let watched = Watched {
        ends: vec![std::process::id()],
        broker,
    };
    let part = (backlog / PARTS).max(1);
    let connection = antiphon::connect(url).await?;
    let client = connection.client().await?;
    let service = ServiceName::new("bench-backlog")?;

    let mut sent = Vec::new();
    for _ in 0..PARTS {
        let mark = Mark::now(&watched);
        send(&client, &service, part).await?;
        sent.push(mark.until_now(&watched));
    }

    let clock = Arc::new(Clock::new(watched, part));
    let (ended, mut end) = mpsc::channel(1);
    let counting = Arc::clone(&clock);
    let server = connection
        .server()
        .prefetch(SENDERS)
        .handle_raw(service, move |body: Bytes| {
            if counting.count() == PARTS * part {
                // It is the last one, and the only one.
                let _ = ended.try_send(());
            }
            async move { Ok::<_, Fault>(body) }
        })
        .start()
        .await?;
    end.recv().await.ok_or("the server is gone")?;
    drop(server);
    let mut taken = clock.parts();
    // The queue is full at first, and empty at last.
    taken.reverse();
    let growth = |what: String, parts: &[Part]| {
        let (plain, grown) = (first(parts), first_of_last(parts));
        let micros = |duration: f64| duration / part as f64 * 1e6;
        Growth {
            what,
            plain_us: micros(plain.0),
            grown_us: micros(grown.0),
            cpu: grown.0 / plain.0,
            time: grown.1 / plain.1,
        }
    };
    Ok([
        growth(format!("sending to a queue of {backlog}"), &sent),
        growth(format!("taking from a queue of {backlog}"), &taken),
    ])
}

/// Medians of processor time and time of the first parts, in seconds.
fn first(parts: &[Part]) -> (f64, f64) {
    let first = || parts.iter().take(COMPARED);
    (
        median(first().map(|part| part.cpu.as_secs_f64())),
        median(first().map(|part| part.time.as_secs_f64())),
    )
}

/// The same of the last ones.
fn first_of_last(parts: &[Part]) -> (f64, f64) {
    let last: Vec<Part> = parts.iter().rev().take(COMPARED).copied().collect();
    first(&last)
}

async fn send(client: &Client, service: &ServiceName, count: usize) -> Result<(), Failure> {
    let left = Arc::new(AtomicUsize::new(count));
    let mut senders = JoinSet::new();
    for _ in 0..SENDERS {
        let (client, service, left) = (client.clone(), service.clone(), Arc::clone(&left));
        senders.spawn(async move {
            let take = |left: usize| left.checked_sub(1);
            let order = Ordering::Relaxed;
            while left.fetch_update(order, order, take).is_ok() {
                let body = Bytes::from_static(&[b'x'; 64]);
                client
                    .notify_raw(service.clone(), body)
                    .timeout(HOUR)
                    .await?;
            }
            Ok::<(), Failure>(())
        });
    }
    while let Some(ended) = senders.join_next().await {
        ended??;
    }
    Ok(())
}

/// A point in time, and what had been used by then.
#[derive(Clone, Copy, Debug)]
struct Mark {
    cpu: Duration,
    time: Instant,
}

impl Mark {
    fn now(watched: &Watched) -> Self {
        let used = watched.used();
        Self {
            cpu: used.ends + used.broker,
            time: Instant::now(),
        }
    }

    fn until(self, later: Self) -> Part {
        Part {
            cpu: later.cpu.saturating_sub(self.cpu),
            time: later.time - self.time,
        }
    }

    fn until_now(self, watched: &Watched) -> Part {
        self.until(Self::now(watched))
    }
}

/// Counts requests, and looks at the clock at the end of each part.
#[derive(Debug)]
struct Clock {
    watched: Watched,
    part: usize,
    count: AtomicUsize,
    marks: Mutex<Vec<Mark>>,
}

impl Clock {
    fn new(watched: Watched, part: usize) -> Self {
        Self {
            marks: Mutex::new(vec![Mark::now(&watched)]),
            watched,
            part,
            count: AtomicUsize::new(0),
        }
    }

    /// How many there were, with this one.
    fn count(&self) -> usize {
        let count = self.count.fetch_add(1, Ordering::Relaxed) + 1;
        if count.is_multiple_of(self.part) {
            let mut marks = self.marks.lock().unwrap_or_else(PoisonError::into_inner);
            marks.push(Mark::now(&self.watched));
        }
        count
    }

    fn parts(&self) -> Vec<Part> {
        let marks = self.marks.lock().unwrap_or_else(PoisonError::into_inner);
        let pairs = marks.iter().zip(marks.iter().skip(1));
        pairs.map(|(begin, end)| begin.until(*end)).collect()
    }
}
