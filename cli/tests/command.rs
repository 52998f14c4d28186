//! What needs no broker: usage, exit codes, and `bench` on memory.

#![cfg(feature = "memory")]

mod support;

use std::time::Duration;

use rustix::process::Signal;
use serde_json::{Value, json};

use support::{Running, antiphon, run, run_with_input};

const MEMORY: &str = "memory://command";

#[test]
fn help_and_version_are_no_errors() {
    assert!(run(&["--help"]).succeeded().text().contains("ANTIPHON_URL"));
    assert!(
        run(&["call", "--help"])
            .succeeded()
            .text()
            .contains("--expect-responder")
    );
    let version = format!("antiphon {}\n", env!("CARGO_PKG_VERSION"));
    assert_eq!(run(&["--version"]).succeeded().text(), version);
}

#[test]
fn usage_errors_are_one_line_and_exit_2() {
    for arguments in [
        &[][..],
        &["frob"],
        &["call"],
        &["call", "s", "--frob"],
        &["call", "s", "--timeout", "soon"],
        &["call", "s", "--timeout", "0s"],
        &["call", "s", "--header", "no-equals-sign"],
        &["serve", "s"],
        &["serve", "s", "--echo", "--fib"],
        &["serve", "s", "--echo", "--prefetch", "0"],
        &["bench", "s", "--calls", "1", "--duration", "1s"],
        &["bench", "s", "--concurrency", "0"],
    ] {
        let arguments = [&["--url", MEMORY], arguments].concat();
        let ended = run(&arguments);
        assert!(
            ended.failed(2, "invalid: ").output.is_empty(),
            "{arguments:?}"
        );
    }
}

#[test]
fn what_cannot_be_called_exits_2_before_any_io() {
    // Nobody listens there: whatever came after a connection would exit 3.
    let nowhere = "redis://127.0.0.1:1";
    for (arguments, kind) in [
        (
            &["--url", nowhere, "call", "a b"][..],
            "invalid: service name",
        ),
        (
            &["--url", nowhere, "call", "a@b@c"],
            "invalid: service name",
        ),
        (
            &["--url", nowhere, "call", "s", "--header", "Upper=1"],
            "invalid: header name",
        ),
        (
            &["--url", nowhere, "call", "s", "--header", "x-mine=1"],
            "invalid: header name",
        ),
        (
            &["--url", nowhere, "call", "s", "--content-type", "é"],
            "invalid: content type",
        ),
        (
            &["--url", nowhere, "serve", "a b", "--echo"],
            "invalid: service name",
        ),
        (&["--url", nowhere, "bench", "a b"], "invalid: service name"),
        (
            &["--url", nowhere, "bench", "s", "--size", "4194305"],
            "too_large: ",
        ),
        (
            &["--url", "kafka://localhost", "call", "s"],
            "unsupported: ",
        ),
        (&["--url", "localhost", "call", "s"], "invalid: "),
        (
            &["--url", "kafka://localhost", "serve", "s", "--echo"],
            "unsupported: ",
        ),
        (
            &["--url", "kafka://localhost", "bench", "s"],
            "unsupported: ",
        ),
    ] {
        run(arguments).failed(2, kind);
    }
    let large = vec![0; 4 * 1024 * 1024 + 1];
    run_with_input(&["--url", nowhere, "call", "s", "-"], &large).failed(2, "too_large: ");
}

#[test]
fn without_a_broker_both_ways_to_name_one_are_told() {
    for arguments in [
        &["call", "s"][..],
        &["serve", "s", "--echo"],
        &["bench", "s"],
    ] {
        let ended = run(arguments);
        let line = &ended.failed(2, "invalid: ").errors;
        assert!(
            line.contains("--url") && line.contains("ANTIPHON_URL"),
            "{line}"
        );
    }
    let mut empty = antiphon(&["call", "s"]);
    empty.env("ANTIPHON_URL", "");
    Running::start(empty).end().failed(2, "invalid: ");
}

#[test]
fn the_argument_goes_before_the_environment() {
    for arguments in [
        &["bench", "s", "--calls", "3", "--json"][..],
        &["--url", MEMORY, "bench", "s", "--calls", "3", "--json"],
        &["bench", "s", "--calls", "3", "--json", "--url", MEMORY],
    ] {
        let mut command = antiphon(arguments);
        let given = arguments.contains(&MEMORY);
        command.env(
            "ANTIPHON_URL",
            if given { "kafka://localhost" } else { MEMORY },
        );
        assert_eq!(
            Running::start(command).end().succeeded().object()["ok"],
            3,
            "{arguments:?}"
        );
    }
}

#[cfg(all(feature = "redis", feature = "amqp"))]
#[test]
fn no_connection_exits_3() {
    for url in ["redis://127.0.0.1:1", "amqp://127.0.0.1:1"] {
        let ended = run(&["--url", url, "call", "s", "--timeout", "2s", "--json"]);
        let object = ended.failed(3, "connect: ").object();
        assert_eq!(
            (&object["kind"], &object["executed"]),
            (&json!("connect"), &json!("no"))
        );
        assert!(ended.took < Duration::from_secs(4), "{ended:?}");
        run(&["--url", url, "serve", "s", "--echo"]).failed(3, "connect: ");
        let ended = run(&["--url", url, "bench", "s", "--timeout", "2s", "--json"]);
        assert_eq!(
            ended.failed(3, "connect: ").object()["errors"],
            json!({"connect": 1})
        );
    }
}

#[test]
fn nobody_serves() {
    let ended = run(&["--url", MEMORY, "call", "s", "--expect-responder"]);
    assert!(ended.failed(3, "no_responder: ").output.is_empty());

    let ended = run(&["--url", MEMORY, "call", "s", "--timeout", "300ms", "--json"]);
    let object = ended.failed(4, "deadline_exceeded: ").object();
    assert_eq!(
        fields(&object),
        sorted([
            "ok",
            "kind",
            "code",
            "executed",
            "message",
            "body",
            "content_type",
            "headers",
            "correlation_id",
            "elapsed_us",
        ])
    );
    assert_eq!(
        (&object["ok"], &object["kind"]),
        (&json!(false), &json!("deadline_exceeded"))
    );
    assert_eq!(
        (&object["code"], &object["executed"]),
        (&Value::Null, &json!("maybe"))
    );
    assert!(
        object["elapsed_us"].as_u64().unwrap() >= 300_000,
        "{object}"
    );
    assert_eq!(object["correlation_id"].as_str().unwrap().len(), 36);
}

#[test]
fn json_is_printed_for_what_was_not_even_sent() {
    for (arguments, kind) in [
        (&["call", "s", "--json"][..], "invalid"),
        (&["--url", MEMORY, "call", "a b", "--json"], "invalid"),
        (
            &["--url", "kafka://localhost", "call", "s", "--json"],
            "unsupported",
        ),
    ] {
        let object = run(arguments).failed(2, kind).object();
        assert_eq!(
            (&object["kind"], &object["executed"]),
            (&json!(kind), &json!("no"))
        );
        assert_eq!(
            (&object["correlation_id"], &object["headers"]),
            (&Value::Null, &json!({}))
        );
    }
}

#[test]
fn an_interrupted_call_exits_130() {
    for signal in [Signal::INT, Signal::TERM] {
        let running =
            Running::start(antiphon(&["--url", MEMORY, "call", "s", "--json"])).handles_signals();
        running.signal(signal);
        let object = running.end().failed(130, "cancelled: ").object();
        assert_eq!(
            (&object["ok"], &object["kind"]),
            (&json!(false), &json!("cancelled"))
        );
    }
    // While it waits for its body.
    let mut running =
        Running::start(antiphon(&["--url", MEMORY, "call", "s", "-"])).handles_signals();
    let _input = running.hold_input();
    running.signal(Signal::INT);
    running.end().failed(130, "cancelled: ");
}

#[test]
fn bench_on_memory_serves_itself() {
    let ended = run(&[
        "--url",
        MEMORY,
        "bench",
        "s",
        "--calls",
        "2000",
        "--concurrency",
        "50",
        "--size",
        "0",
        "--json",
    ]);
    let object = ended.succeeded().object();
    assert_eq!(
        fields(&object),
        sorted([
            "calls",
            "ok",
            "errors",
            "duplicates",
            "late",
            "unknown",
            "seconds",
            "calls_per_second",
            "p50_us",
            "p90_us",
            "p99_us",
            "max_us",
        ])
    );
    let number = |field: &str| object[field].as_f64().unwrap();
    assert_eq!(
        (number("calls"), number("ok"), &object["errors"]),
        (2000.0, 2000.0, &json!({}))
    );
    assert_eq!(
        (number("duplicates"), number("late"), number("unknown")),
        (0.0, 0.0, 0.0)
    );
    assert!(
        (number("calls_per_second") * number("seconds") - 2000.0).abs() < 1.0,
        "{object}"
    );
    let latencies = ["p50_us", "p90_us", "p99_us", "max_us"].map(number);
    assert!(
        latencies.is_sorted() && latencies[3] / 1e6 <= number("seconds") * 1.01,
        "{object}"
    );
}

#[test]
fn each_task_is_seen_with_its_attempt_and_its_time() {
    let mut command = antiphon(&["--url", MEMORY, "bench", "s", "--calls", "1"]);
    command.env("ANTIPHON_LOG", "antiphon_core=debug");
    let ended = Running::start(command).end();
    let seen = |line: &&str| {
        let parts = [
            "a handler has ended",
            "service=s",
            " id=",
            "attempt=1",
            "elapsed=",
        ];
        parts.iter().all(|part| line.contains(part))
    };
    let seen = ended.errors.lines().filter(seen).count();
    assert!(seen >= 1, "{}", ended.errors);
}

#[test]
fn bench_for_a_time_starts_calls_until_then() {
    let ended = run(&["--url", MEMORY, "bench", "s", "--duration", "300ms"]);
    assert!(ended.succeeded().text().contains("p99"), "{ended:?}");
    assert!(ended.took >= Duration::from_millis(300), "{ended:?}");
}

#[test]
fn an_interrupted_bench_says_what_it_measured() {
    let arguments = ["--url", MEMORY, "bench", "s", "--duration", "1h", "--json"];
    let running = Running::start(antiphon(&arguments)).handles_signals();
    running.signal(Signal::INT);
    let object = running.end().failed(130, "cancelled: ").object();
    assert_eq!(object["calls"], object["ok"]);
}

#[cfg(feature = "conform")]
#[test]
fn the_suite_is_run_and_reported() {
    let report = support::Mark::new();
    let ended = run(&["--url", MEMORY, "conform", "--json", report.path()]);
    let summary = ended.succeeded().text().lines().last().unwrap();
    let object: Value = serde_json::from_slice(&std::fs::read(report.path()).unwrap()).unwrap();
    let passed = object["passed"].as_u64().unwrap();
    assert!(passed > 0 && object["failed"] == 0, "{object}");
    assert!(
        summary.starts_with(&format!("{passed} passed, 0 failed")),
        "{summary}"
    );

    run(&["conform"]).failed(2, "invalid: ");
    run(&["--url", "kafka://localhost", "conform"]).failed(2, "unsupported: ");
    run(&["--url", MEMORY, "conform", "--json", "/nowhere/report.json"])
        .failed(2, "invalid: /nowhere");
}

fn fields(object: &Value) -> Vec<&str> {
    let mut fields: Vec<&str> = object
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .collect();
    fields.sort_unstable();
    fields
}

fn sorted<const N: usize>(mut fields: [&str; N]) -> [&str; N] {
    fields.sort_unstable();
    fields
}
