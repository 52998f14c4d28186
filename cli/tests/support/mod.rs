//! The command as a process, with every wait bounded.

#![allow(dead_code, reason = "each test target uses its part")]
#![allow(unreachable_pub, reason = "the test target is its only crate")]

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use serde_json::Value;

/// The longest that any command of a test may run.
const PATIENCE: Duration = Duration::from_secs(60);

/// The command with these arguments, and nothing from the environment of the tests.
pub fn antiphon(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_antiphon"));
    command
        .args(arguments)
        .env_remove("ANTIPHON_URL")
        .env_remove("ANTIPHON_LOG");
    command
}

/// Runs the command to its end.
pub fn run(arguments: &[&str]) -> Ended {
    Running::start(antiphon(arguments)).end()
}

/// Runs the command to its end, with this on its standard input.
pub fn run_with_input(arguments: &[&str], input: &[u8]) -> Ended {
    let mut running = Running::start(antiphon(arguments));
    running.write(input);
    running.end()
}

/// How a command ended.
#[derive(Debug)]
pub struct Ended {
    pub status: ExitStatus,
    pub output: Vec<u8>,
    pub errors: String,
    pub took: Duration,
}

impl Ended {
    /// It ended with this exit code, and one line of this beginning on standard error.
    #[track_caller]
    pub fn failed(&self, code: i32, beginning: &str) -> &Self {
        assert_eq!(self.status.code(), Some(code), "{self:?}");
        assert_eq!(self.errors.lines().count(), 1, "{self:?}");
        assert!(
            self.errors.starts_with(beginning),
            "not {beginning:?}: {self:?}"
        );
        self
    }

    /// It ended well, without a word on standard error.
    #[track_caller]
    pub fn succeeded(&self) -> &Self {
        assert_eq!(
            (self.status.code(), &*self.errors),
            (Some(0), ""),
            "{self:?}"
        );
        self
    }

    /// The one object on standard output.
    #[track_caller]
    pub fn object(&self) -> Value {
        let text = String::from_utf8(self.output.clone()).unwrap();
        assert_eq!(text.lines().count(), 1, "{self:?}");
        serde_json::from_str(&text).unwrap()
    }

    #[track_caller]
    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.output).unwrap()
    }
}

/// A command that runs. It is killed when it is dropped.
pub struct Running {
    child: Child,
    output: Option<BufReader<ChildStdout>>,
    errors: Option<thread::JoinHandle<String>>,
    started: Instant,
}

impl Running {
    pub fn start(mut command: Command) -> Self {
        let piped = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = piped.spawn().unwrap();
        let output = child.stdout.take().map(BufReader::new);
        let mut errors = child.stderr.take().unwrap();
        let errors = thread::spawn(move || {
            let mut text = String::new();
            errors.read_to_string(&mut text).unwrap();
            text
        });
        Self {
            child,
            output,
            errors: Some(errors),
            started: Instant::now(),
        }
    }

    /// A server that is subscribed.
    #[track_caller]
    pub fn serve(url: &str, service: &str, arguments: &[&str]) -> Self {
        let mut running = Self::start(antiphon(
            &[&["--url", url, "serve", service], arguments].concat(),
        ));
        let mut line = String::new();
        running
            .output
            .as_mut()
            .unwrap()
            .read_line(&mut line)
            .unwrap();
        if line != format!("ready {service}\n") {
            panic!("{line:?} instead of ready: {:?}", running.end());
        }
        running
    }

    /// Writes to its standard input and closes that.
    pub fn write(&mut self, input: &[u8]) {
        self.child.stdin.take().unwrap().write_all(input).unwrap();
    }

    /// Its standard input, which stays open for as long as this is held.
    pub fn hold_input(&mut self) -> ChildStdin {
        self.child.stdin.take().unwrap()
    }

    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    pub fn signal(&self, signal: Signal) {
        // It may just have ended.
        let _ = kill_process(self.pid(), signal);
    }

    /// Waits until it has taken SIGINT into its own hands.
    pub fn handles_signals(self) -> Self {
        let path = format!("/proc/{}/status", self.pid());
        eventually("a handler for SIGINT", || {
            let status = fs::read_to_string(&path).unwrap();
            let caught = status
                .lines()
                .find_map(|line| line.strip_prefix("SigCgt:"))
                .unwrap();
            u64::from_str_radix(caught.trim(), 16).unwrap() & (1 << (Signal::INT.as_raw() - 1)) != 0
        });
        self
    }

    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    /// Waits for its end.
    #[track_caller]
    pub fn end(mut self) -> Ended {
        drop(self.child.stdin.take());
        let mut output = self.output.take().unwrap();
        let output = thread::spawn(move || {
            let mut bytes = Vec::new();
            output.read_to_end(&mut bytes).unwrap();
            bytes
        });
        eventually("the command's end", || {
            self.child.try_wait().unwrap().is_some()
        });
        Ended {
            took: self.started.elapsed(),
            status: self.child.wait().unwrap(),
            output: output.join().unwrap(),
            errors: self.errors.take().unwrap().join().unwrap(),
        }
    }

    /// It drains and ends well.
    #[track_caller]
    pub fn terminate(self) -> Ended {
        self.signal(Signal::TERM);
        let ended = self.end();
        ended.succeeded();
        ended
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits for a condition.
#[track_caller]
pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !condition() {
        assert!(
            Instant::now() < end,
            "still waiting for {what} after {PATIENCE:?}"
        );
        thread::sleep(Duration::from_millis(5));
    }
}

/// True while a process of this id exists.
pub fn lives(pid: i32) -> bool {
    let state = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let zombie = state
        .rsplit(')')
        .next()
        .is_some_and(|rest| rest.trim_start().starts_with('Z'));
    !zombie && test_kill_process(Pid::from_raw(pid).unwrap()).is_ok()
}

/// A name that nothing else has: for a service, or a file.
pub fn fresh(label: &str) -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let now = std::time::UNIX_EPOCH.elapsed().unwrap().as_micros();
    format!(
        "cli.{label}.{}.{now}.{}",
        std::process::id(),
        NEXT.fetch_add(1, Ordering::Relaxed)
    )
}

/// A file that a command writes a sign of life to, removed when it is dropped.
pub struct Mark(PathBuf);

impl Mark {
    pub fn new() -> Self {
        Self(PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(fresh("mark")))
    }

    pub fn path(&self) -> &str {
        self.0.to_str().unwrap()
    }

    /// Waits until there is a whole line, and gives it.
    pub fn line(&self) -> String {
        let mut line = String::new();
        eventually("the command's mark", || {
            line = fs::read_to_string(&self.0).unwrap_or_default();
            line.ends_with('\n')
        });
        line.trim().to_owned()
    }
}

impl Drop for Mark {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}
