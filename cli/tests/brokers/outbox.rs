//! A server that is killed with finished replies in its outbox.

use std::collections::HashSet;
use std::fs;
use std::process::Command;

use antiphon_conformance::proxy::{Proxy, replace_authority};
use rustix::process::Signal;
use tokio::runtime::Runtime;

use crate::support::{Mark, Running, antiphon, eventually, fresh};

/// How many calls are under way.
const CALLS: usize = 3;

/// Its connection is lost, its handlers end, their replies are kept, it is killed, and another one starts on its outbox: each
/// caller has its reply, and each handler ran once.
pub(crate) fn kept_replies_survive_a_kill(url: &str) {
    let runtime = Runtime::new().unwrap();
    let (service, outbox, runs, gate, log) = (
        fresh("outbox"),
        Mark::new(),
        Mark::new(),
        Mark::new(),
        Mark::new(),
    );
    let lines = |mark: &Mark| fs::read_to_string(mark.path()).unwrap_or_default();
    let proxy = runtime.block_on(Proxy::start(authority(url))).unwrap();
    let proxied = replace_authority(url, proxy.addr());
    let handler = format!(
        "echo run >>{}; until [ -e {} ]; do sleep 0.02; done; cat",
        runs.path(),
        gate.path()
    );
    let arguments = [
        "--url",
        &*proxied,
        "serve",
        &*service,
        "--exec",
        &*handler,
        "--outbox",
        outbox.path(),
    ];

    let first = Running::start(logging(&arguments, &log));
    let calls: Vec<_> = (0..CALLS)
        .map(|number| {
            let body = format!("body {number}");
            let call = ["--url", url, "call", &*service, &*body, "--timeout", "50s"];
            Running::start(antiphon(&call))
        })
        .collect();
    eventually("the handlers", || lines(&runs).lines().count() == CALLS);
    runtime.block_on(proxy.refuse());
    fs::write(gate.path(), "").unwrap();
    eventually("the replies in the outbox", || {
        // One may be kept twice: at first to answer its request, then to be sent.
        let log = lines(&log);
        let kept = log
            .lines()
            .filter(|line| line.contains("a reply survives in the outbox"));
        let ids: HashSet<_> = kept.filter_map(|line| line.split("id=").nth(1)).collect();
        ids.len() == CALLS
    });
    first.signal(Signal::KILL);
    drop(first);

    runtime.block_on(proxy.restore()).unwrap();
    let second = Running::serve(&proxied, &service, &arguments[4..]);
    for (number, call) in calls.into_iter().enumerate() {
        assert_eq!(call.end().succeeded().text(), format!("body {number}"));
    }
    assert_eq!(lines(&runs).lines().count(), CALLS, "none ran again");
    second.terminate();
}

/// The command, with its log in a file.
fn logging(arguments: &[&str], log: &Mark) -> Command {
    let mut command = Command::new("sh");
    command
        .args(["-c", "exec \"$0\" \"$@\" 2>\"$LOG\""])
        .arg(env!("CARGO_BIN_EXE_antiphon"))
        .args(arguments)
        .env("LOG", log.path())
        .env("ANTIPHON_LOG", "antiphon_core=debug");
    command
}

/// The `host:port` of a broker's URL.
fn authority(url: &str) -> &str {
    let (_, rest) = url.split_once("://").unwrap();
    let authority = rest.split('/').next().unwrap();
    authority.rsplit('@').next().unwrap()
}
