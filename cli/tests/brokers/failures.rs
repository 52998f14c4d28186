//! Nobody there, deadlines, signals and killed servers.

use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::json;

use crate::support::{Mark, Running, antiphon, eventually, fresh, lives, run};

pub(crate) fn nobody_serves(url: &str) {
    let service = fresh("nobody");
    let ended = run(&[
        "--url",
        url,
        "call",
        &service,
        "--expect-responder",
        "--json",
    ]);
    let object = ended.failed(3, "no_responder: ").object();
    assert_eq!(
        (&object["kind"], &object["executed"]),
        (&json!("no_responder"), &json!("no"))
    );
    let ended = run(&["--url", url, "call", &service, "--timeout", "1s"]);
    ended.failed(4, "deadline_exceeded: ");
    assert!((900..2500).contains(&ended.took.as_millis()), "{ended:?}");
}

pub(crate) fn a_failed_call_fails_the_bench(url: &str) {
    let service = fresh("faults");
    let server = Running::serve(url, &service, &["--fib"]);
    let ended = run(&["--url", url, "bench", &service, "--calls", "100", "--json"]);
    let object = ended.failed(1, "fault invalid_argument: ").object();
    assert_eq!(
        (&object["calls"], &object["ok"], &object["errors"]),
        (&json!(100), &json!(0), &json!({"fault": 100}))
    );
    server.terminate();
}

pub(crate) fn the_process_group_dies_at_the_deadline(url: &str) {
    let (service, mark) = (fresh("deadline"), Mark::new());
    let command = format!("sleep 300 & echo $$ $! >{}; wait", mark.path());
    let server = Running::serve(url, &service, &["--exec", &command]);
    run(&["--url", url, "call", &service, "--timeout", "1s"]).failed(4, "deadline_exceeded: ");
    let pids: Vec<i32> = mark
        .line()
        .split(' ')
        .map(|pid| pid.parse().unwrap())
        .collect();
    assert_eq!(pids.len(), 2);
    eventually("the end of the command and of what it started", || {
        !pids.iter().any(|pid| lives(*pid))
    });
    server.terminate();
}

pub(crate) fn a_server_drains(url: &str) {
    for signal in [Signal::TERM, Signal::INT] {
        let (service, mark) = (fresh("drain"), Mark::new());
        let command = format!("echo taken >{}; sleep 1; echo done", mark.path());
        let server = Running::serve(url, &service, &["--exec", &command]);
        let call = Running::start(antiphon(&["--url", url, "call", &service]));
        mark.line();
        server.signal(signal);
        assert_eq!(call.end().succeeded().text(), "done\n");
        server.end().succeeded();
    }
}

pub(crate) fn a_second_signal_ends_it_at_once(url: &str) {
    let (service, mark) = (fresh("second"), Mark::new());
    let command = format!("echo $$ >{}; sleep 300", mark.path());
    let mut server = Running::serve(url, &service, &["--exec", &command]);
    let _call = Running::start(antiphon(&["--url", url, "call", &service]));
    let pid = mark.line().parse().unwrap();
    let started = Instant::now();
    // Two that come too close to each other are one.
    eventually("the end after the second signal", || {
        server.signal(Signal::TERM);
        server.has_ended()
    });
    server.end().failed(130, "cancelled: ");
    assert!(
        started.elapsed() < Duration::from_secs(10),
        "{:?}",
        started.elapsed()
    );
    eventually("the command's end", || !lives(pid));
}

pub(crate) fn the_second_exclusive_server_is_refused(url: &str) {
    let service = fresh("exclusive");
    let arguments = ["--url", url, "serve", &service, "--echo", "--exclusive"];
    let first = Running::serve(url, &service, &["--echo", "--exclusive"]);
    let second = run(&arguments);
    second.failed(3, "already_owned: ");
    assert!(
        second.output.is_empty() && second.took < Duration::from_secs(5),
        "{second:?}"
    );
    assert_eq!(
        run(&["--url", url, "call", &service, "x"])
            .succeeded()
            .text(),
        "x"
    );
    first.terminate();
    let next = Running::serve(url, &service, &["--echo", "--exclusive"]);
    assert_eq!(
        run(&["--url", url, "call", &service, "x"])
            .succeeded()
            .text(),
        "x"
    );
    next.terminate();
}

/// The one that is killed never answers: whatever it has taken must come back.
pub(crate) fn no_call_is_lost_with_a_killed_server(url: &str) {
    let (service, mark) = (fresh("killed"), Mark::new());
    let command = format!("echo $$ >>{}; sleep 300", mark.path());
    let doomed = Running::serve(url, &service, &["--exec", &command, "--prefetch", "4"]);
    let survivor = Running::serve(url, &service, &["--echo", "--prefetch", "4"]);
    let arguments = [
        "--calls",
        "2000",
        "--concurrency",
        "32",
        "--timeout",
        "30s",
        "--json",
    ];
    let bench = Running::start(antiphon(
        &[&["--url", url, "bench", &service], &arguments[..]].concat(),
    ));
    mark.line();
    drop(doomed);
    let object = bench.end().succeeded().object();
    assert_eq!(
        (&object["calls"], &object["ok"], &object["errors"]),
        (&json!(2000), &json!(2000), &json!({}))
    );
    // Within a lease of 10 s and 1 s, and a little for a busy machine.
    assert!(object["max_us"].as_u64().unwrap() < 13_000_000, "{object}");
    survivor.terminate();
    // What it was doing outlives a server that is killed.
    for group in std::fs::read_to_string(mark.path()).unwrap().lines() {
        let kill = ["-KILL", "--", &format!("-{group}")];
        let killed = std::process::Command::new("kill").args(kill).status();
        assert!(killed.unwrap().success(), "{group}");
    }
}
