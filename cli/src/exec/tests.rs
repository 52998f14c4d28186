//! Commands behind a service in memory.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use antiphon::{Error, ErrorKind, Reply, RunningServer};
use rustix::process::test_kill_process;
use tokio::time::{Instant, sleep, timeout};

use super::*;

const PROMPT: Duration = Duration::from_secs(20);

struct Place {
    name: String,
    connection: antiphon::Connection,
    client: antiphon::Client,
    server: RunningServer,
}

impl Place {
    async fn serving(name: &str, command: &str) -> Self {
        let connection = antiphon::connect(&format!("memory://exec.{name}"))
            .await
            .unwrap();
        let command = std::sync::Arc::new(std::ffi::OsString::from(command));
        let handle = move |body: Bytes, context: Context| {
            let command = std::sync::Arc::clone(&command);
            async move { run("s", &command, body, &context).await }
        };
        let server = connection
            .server()
            .handle_raw("s", handle)
            .drain_timeout(Duration::from_millis(100));
        let server = server.start().await.unwrap();
        let client = connection.client().await.unwrap();
        Self {
            name: name.to_owned(),
            connection,
            client,
            server,
        }
    }

    async fn call(&self, body: impl Into<Bytes>) -> Result<Reply, Error> {
        self.client.call_raw("s", body).timeout(PROMPT).await
    }

    /// Where its command can leave a line.
    fn mark(name: &str) -> PathBuf {
        let path = env::temp_dir().join(format!("antiphon.exec.{name}.{}", std::process::id()));
        let _ = fs::remove_file(&path);
        path
    }

    async fn end(self) {
        let _ = fs::remove_file(Self::mark(&self.name));
        self.connection.close().await;
    }
}

/// Waits for two process ids, of the command and of what it started.
async fn pids(mark: &Path) -> Vec<Pid> {
    let read = async {
        loop {
            let line = fs::read_to_string(mark).unwrap_or_default();
            if line.ends_with('\n') {
                return line
                    .split_whitespace()
                    .map(|pid| Pid::from_raw(pid.parse().unwrap()).unwrap())
                    .collect();
            }
            sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(PROMPT, read).await.expect("the command's mark")
}

async fn gone(pids: &[Pid]) {
    // A process that is dead and not yet collected has no command line.
    let lives = |pid: &Pid| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        test_kill_process(*pid).is_ok() && !line.is_empty()
    };
    let wait = async {
        while pids.iter().any(lives) {
            sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(PROMPT, wait)
        .await
        .expect("the end of the process group");
}

#[tokio::test]
async fn input_and_output_flow_at_the_same_time() {
    let place = Place::serving("flow", "cat").await;
    let body: Vec<u8> = (0..3_000_000_u32)
        .map(|n| n.to_le_bytes()[0] ^ n.to_le_bytes()[1])
        .collect();
    assert!(place.call(body.clone()).await.unwrap().body == body);
    assert!(place.call("").await.unwrap().body.is_empty());
    place.end().await;
}

#[tokio::test]
async fn input_need_not_be_read() {
    let place = Place::serving("unread", "echo ok").await;
    assert_eq!(place.call(vec![0; 1 << 20]).await.unwrap().body, "ok\n");
    place.end().await;
}

#[tokio::test]
async fn a_failure_is_a_fault_with_the_end_of_standard_error() {
    let place = Place::serving(
        "failure",
        "cat >/dev/null; printf '%05000d' 7 >&2; echo oops >&2; exit 3",
    )
    .await;
    let error = place.call("x").await.unwrap_err();
    assert_eq!(
        (error.kind(), error.code()),
        (ErrorKind::Fault, Some(Code::Unknown))
    );
    let message = error.message();
    assert!(
        message.starts_with("exit status 3: 000") && message.ends_with("7oops"),
        "{message}"
    );
    assert!(
        (ERRORS_KEPT..ERRORS_KEPT + 32).contains(&message.len()),
        "{message}"
    );
    place.end().await;

    let place = Place::serving("suicide", "kill -9 $$").await;
    assert!(
        place
            .call("")
            .await
            .unwrap_err()
            .message()
            .starts_with("signal 9")
    );
    place.end().await;
}

#[tokio::test]
async fn output_is_bounded() {
    let place = Place::serving("bounded", "yes").await;
    let error = place.call("").await.unwrap_err();
    assert_eq!(
        (error.kind(), error.code()),
        (ErrorKind::Fault, Some(Code::ResourceExhausted))
    );
    place.end().await;
}

#[tokio::test]
async fn the_environment_describes_the_request() {
    let place = Place::serving("environment", "env").await;
    let call = place
        .client
        .call_raw("s", "")
        .timeout(PROMPT)
        .header("trace.id-x", "a b")
        .content_type("text/plain");
    let id = call.correlation_id().to_string();
    let reply = call.await.unwrap();
    let text = std::str::from_utf8(&reply.body).unwrap();
    for line in [
        "ANTIPHON_SERVICE=s".to_owned(),
        "ANTIPHON_ATTEMPT=1".to_owned(),
        "ANTIPHON_CONTENT_TYPE=text/plain".to_owned(),
        "ANTIPHON_HEADER_TRACE_ID_X=a b".to_owned(),
        format!("ANTIPHON_CORRELATION_ID={id}"),
    ] {
        assert!(
            text.lines().any(|other| other == line),
            "no {line} in {text}"
        );
    }
    let remaining = text
        .lines()
        .find_map(|line| line.strip_prefix("ANTIPHON_REMAINING_MS="))
        .unwrap();
    assert!(
        (1..=20_000).contains(&remaining.parse::<u64>().unwrap()),
        "{remaining}"
    );
    assert!(!text.contains("ANTIPHON_METHOD"), "{text}");
    place.end().await;
}

#[tokio::test]
async fn what_is_left_in_the_background_is_killed() {
    let place = Place::serving("background", "sleep 300 & echo $!").await;
    let started = Instant::now();
    let reply = place.call("").await.unwrap();
    assert!(started.elapsed() < PROMPT, "{:?}", started.elapsed());
    let pid = std::str::from_utf8(&reply.body)
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    gone(&[Pid::from_raw(pid).unwrap()]).await;
    place.end().await;
}

#[tokio::test]
async fn the_process_group_is_killed_at_the_deadline() {
    let mark = Place::mark("deadline");
    let command = format!("sleep 300 & echo $$ $! >{}; wait", mark.display());
    let place = Place::serving("deadline", &command).await;
    let error = place
        .client
        .call_raw("s", "")
        .timeout(Duration::from_millis(500))
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::DeadlineExceeded);
    gone(&pids(&mark).await).await;
    place.end().await;
}

#[tokio::test]
async fn the_process_group_is_killed_when_the_server_stops_waiting() {
    let mark = Place::mark("killed");
    let command = format!("sleep 300 & echo $$ $! >{}; wait", mark.display());
    let Place {
        name,
        connection,
        client,
        server,
    } = Place::serving("killed", &command).await;
    let call = tokio::spawn(client.call_raw("s", "").timeout(PROMPT).into_future());
    let pids = pids(&mark).await;
    assert_eq!(
        server.shutdown().await.unwrap_err().kind(),
        ErrorKind::DeadlineExceeded
    );
    gone(&pids).await;
    call.abort();
    let _ = fs::remove_file(Place::mark(&name));
    connection.close().await;
}
