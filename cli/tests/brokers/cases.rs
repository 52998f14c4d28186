//! Servers and calls that go well, and faults.

use std::time::Duration;

use serde_json::{Value, json};

use crate::support::{Running, fresh, run, run_with_input};

pub(crate) fn a_body_goes_and_comes_back_byte_for_byte(url: &str) {
    let service = fresh("echo");
    let server = Running::serve(url, &service, &["--echo"]);
    let call = ["--url", url, "call", &service, "-"];

    let all: Vec<u8> = (0..=u8::MAX).cycle().take(1 << 20).collect();
    assert!(run_with_input(&call, &all).succeeded().output == all);
    assert_eq!(
        run(&["--url", url, "call", &service, "-15"])
            .succeeded()
            .text(),
        "-15"
    );

    let object = run_with_input(&[&call[..], &["--json"]].concat(), b"\xff\xfe")
        .succeeded()
        .object();
    assert_eq!(
        (&object["body_base64"], object.get("body")),
        (&json!("//4="), None)
    );
    server.terminate();
}

pub(crate) fn no_body_is_an_empty_one(url: &str) {
    let service = fresh("empty");
    let server = Running::serve(url, &service, &["--exec", "wc -c | tr -d ' \\n'"]);
    assert_eq!(
        run(&["--url", url, "call", &service]).succeeded().text(),
        "0"
    );
    assert_eq!(
        run_with_input(&["--url", url, "call", &service, "-"], b"")
            .succeeded()
            .text(),
        "0"
    );
    server.terminate();
}

pub(crate) fn content_type_and_headers_are_passed_on(url: &str) {
    let service = fresh("headers");
    let server = Running::serve(url, &service, &["--echo"]);
    let ended = run(&[
        "--url",
        url,
        "call",
        &service,
        "{}",
        "--json",
        "--content-type",
        "application/json",
        "--header",
        "a=1=2",
        "--header",
        "trace.id=ü",
    ]);
    let object = ended.succeeded().object();
    assert_eq!(object["headers"], json!({"a": "1=2", "trace.id": "ü"}));
    let expected = json!({
        "ok": true, "kind": null, "code": null, "executed": "yes", "message": null, "body": "{}",
        "content_type": "application/json", "headers": object["headers"],
        "correlation_id": object["correlation_id"], "elapsed_us": object["elapsed_us"],
    });
    assert_eq!(object, expected);
    assert_eq!(object["correlation_id"].as_str().unwrap().len(), 36);
    assert!(object["elapsed_us"].as_u64().unwrap() > 0);

    let object = run(&["--url", url, "call", &service, "x", "--json"])
        .succeeded()
        .object();
    assert_eq!(
        (&object["content_type"], &object["headers"]),
        (&Value::Null, &json!({}))
    );
    server.terminate();
}

pub(crate) fn fibonacci_numbers_and_faults(url: &str) {
    let service = fresh("fib");
    let server = Running::serve(url, &service, &["--fib"]);
    let call = |body| run(&["--url", url, "call", &service, body]);
    assert_eq!(call("30").succeeded().text(), "832040");
    assert_eq!(call("93").succeeded().text(), "12200160415121876738");
    let ended = call("94");
    assert_eq!(
        ended.failed(1, "fault out_of_range: ").errors,
        "fault out_of_range: n is above 93\n"
    );
    call("many").failed(1, "fault invalid_argument: ");
    call("-1").failed(1, "fault invalid_argument: ");

    let object = run(&["--url", url, "call", &service, "94", "--json"])
        .failed(1, "fault out_of_range: ")
        .object();
    let expected = json!({
        "ok": false, "kind": "fault", "code": "out_of_range", "executed": "yes", "message": "n is above 93", "body": null,
        "content_type": null, "headers": {}, "correlation_id": object["correlation_id"],
        "elapsed_us": object["elapsed_us"],
    });
    assert_eq!(object, expected);
    server.terminate();
}

pub(crate) fn a_reply_may_take_its_time(url: &str) {
    let service = fresh("sleep");
    let server = Running::serve(url, &service, &["--sleep", "300"]);
    let ended = run(&["--url", url, "call", &service, "x"]);
    assert_eq!(ended.succeeded().text(), "x");
    assert!(ended.took >= Duration::from_millis(300), "{ended:?}");
    run(&["--url", url, "call", &service, "x", "--timeout", "200ms"])
        .failed(4, "deadline_exceeded: ");
    server.terminate();
}

pub(crate) fn a_command_answers_or_fails(url: &str) {
    let service = fresh("exec");
    let command =
        "read what; case $what in upper) echo YES ;; *) echo \"$what?\" >&2; exit 3 ;; esac";
    let server = Running::serve(url, &service, &["--exec", command]);
    assert_eq!(
        run(&["--url", url, "call", &service, "upper"])
            .succeeded()
            .text(),
        "YES\n"
    );
    let ended = run(&["--url", url, "call", &service, "lower"]);
    assert_eq!(
        ended.failed(1, "fault unknown: ").errors,
        "fault unknown: exit status 3: lower?\n"
    );
    server.terminate();
}

pub(crate) fn a_measurement_counts_every_call(url: &str) {
    let service = fresh("bench");
    let server = Running::serve(url, &service, &["--echo"]);
    let bench = ["--url", url, "bench", &service, "--json"];
    let object = run(&[&bench[..], &["--calls", "500"]].concat())
        .succeeded()
        .object();
    assert_eq!(
        (&object["calls"], &object["ok"], &object["errors"]),
        (&json!(500), &json!(500), &json!({}))
    );
    let object = run(&[&bench[..], &["--duration", "500ms"]].concat())
        .succeeded()
        .object();
    assert!(
        object["ok"].as_u64().unwrap() > 0 && object["seconds"].as_f64().unwrap() >= 0.5,
        "{object}"
    );
    server.terminate();
}

pub(crate) fn a_measurement_tells_how_long_calls_take(url: &str) {
    let service = fresh("latency");
    let server = Running::serve(url, &service, &["--sleep", "50"]);
    let arguments = ["--calls", "20", "--concurrency", "4", "--json"];
    let object = run(&[&["--url", url, "bench", &service], &arguments[..]].concat())
        .succeeded()
        .object();
    for field in ["p50_us", "p90_us", "p99_us", "max_us"] {
        assert!(object[field].as_u64().unwrap() >= 50_000, "{object}");
    }
    server.terminate();
}
