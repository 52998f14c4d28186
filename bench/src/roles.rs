//! The two halves of a contender, each in a process of its own that ends when its standard input does.

use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::runtime::{Builder, Runtime};

use crate::Failure;
use crate::args::{HotPath, Role};
use crate::contenders::{Extra, Measure};
use crate::load::{self, Arrivals, Caller, Point};
use crate::open_load;

/// The line that says that a role is live.
pub(crate) const READY: &str = "ready";

/// The runtime of one end: with one worker, Tokio's current-thread runtime.
pub(crate) fn runtime(workers: usize) -> Result<Runtime, Failure> {
    let mut builder = match workers {
        0 | 1 => Builder::new_current_thread(),
        _ => Builder::new_multi_thread(),
    };
    Ok(builder
        .worker_threads(workers.max(1))
        .enable_all()
        .build()?)
}

/// Answers until the standard input ends.
pub(crate) async fn serve(role: &Role) -> Result<(), Failure> {
    let serving = role.contender.serve(&role.place()).await?;
    println!("{READY}");
    let serving = async {
        match serving {
            Some(serving) => serving.await,
            None => Ok(()),
        }
    };
    let mut lines = BufReader::new(tokio::io::stdin()).lines();
    tokio::select! {
        ended = serving => ended,
        line = lines.next_line() => line.map(drop).map_err(Into::into),
    }
}

/// Measures the points that come as lines of JSON, until the standard input ends; the figures go out the same way.
pub(crate) async fn call(role: &Role) -> Result<(), Failure> {
    role.contender.call(&role.place(), Points).await
}

/// Calls so often, and ends: whoever watches from outside compares two numbers of calls.
pub(crate) async fn hot_path(hot_path: &HotPath) -> Result<(), Failure> {
    let service = format!("hot-path-{}", std::process::id());
    let role = Role {
        extra: hot_path.extra,
        ..Role::plain(hot_path.contender, String::new(), service, 1, 256)
    };
    let often = Often {
        concurrency: hot_path.concurrency,
        calls: hot_path.calls,
        size: hot_path.size,
    };
    let called = call_often(&role, often).await;
    // Mostly there is none.
    let _ = std::fs::remove_file(Extra::outbox(&role.service));
    called
}

/// Makes these calls, and nothing else.
pub(crate) async fn call_often(role: &Role, often: Often) -> Result<(), Failure> {
    role.contender.call(&role.place(), often).await
}

/// Calls to make.
pub(crate) struct Often {
    pub(crate) concurrency: usize,
    /// Of each caller.
    pub(crate) calls: usize,
    /// Of a body, in bytes.
    pub(crate) size: usize,
}

impl Measure for Often {
    type Output = ();

    async fn with(self, caller: impl Caller) -> Result<(), Failure> {
        load::call_often(caller, self.concurrency, self.calls, self.size).await
    }
}

struct Points;

impl Measure for Points {
    type Output = ();

    async fn with(self, caller: impl Caller) -> Result<(), Failure> {
        println!("{READY}");
        let mut lines = BufReader::new(tokio::io::stdin()).lines();
        while let Some(line) = lines.next_line().await? {
            let point: Point = serde_json::from_str(&line)?;
            let caller = caller.clone();
            let figures = match point.arrivals {
                Arrivals::Closed => load::measure(caller, &point).await?,
                Arrivals::Saturated => open_load::saturate(caller, &point).await?,
                Arrivals::Open(rate) => open_load::measure(caller, &point, rate).await?,
            };
            println!("{}", serde_json::to_string(&figures)?);
        }
        Ok(())
    }
}
