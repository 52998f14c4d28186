//! A handler that is a shell command.

use std::env;
use std::ffi::OsStr;
use std::io;
use std::process::{ExitStatus, Stdio};

use antiphon::{ClientConfig, Code, Context, Fault};
use bytes::{Bytes, BytesMut};
use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, ChildStdin, Command};

/// How much of a failed command's standard error its fault carries, in bytes.
const ERRORS_KEPT: usize = 1024;

/// What the variables begin with that describe the request.
const PREFIX: &str = "ANTIPHON_";

/// Runs a command with the body on its standard input, and gives its standard output.
///
/// The command is the leader of a process group of its own. Whatever is left of the group when the command has ended, when
/// the request's cancellation fires, or when this future is dropped, is killed.
pub(crate) async fn run(
    service: &str,
    command: &OsStr,
    body: Bytes,
    context: &Context,
) -> Result<Bytes, Fault> {
    let child = command_of(service, command, context).spawn();
    let mut child = child.map_err(|error| failed("the command did not start", &error))?;
    let group = Group::led_by(&child);
    let cancellation = context.cancellation();
    tokio::select! {
        biased;
        ended = converse(&mut child, group, body) => answer(ended?),
        () = cancellation.cancelled() => {
            Err(Fault::new(Code::DeadlineExceeded, "the command was killed at the deadline"))
        }
    }
}

fn command_of(service: &str, command: &OsStr, context: &Context) -> Command {
    let mut shell = Command::new("sh");
    shell
        .arg("-c")
        .arg(command)
        .process_group(0)
        .kill_on_drop(true)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    // Within a command that itself was started for a request, the variables of that one would be misleading.
    let header_prefix = format!("{PREFIX}HEADER_");
    let inherited = env::vars_os().map(|(name, _)| name);
    for name in inherited.filter(|name| name.to_string_lossy().starts_with(&header_prefix)) {
        shell.env_remove(name);
    }
    let mut set = |name: &str, value: Option<String>| {
        let name = format!("{PREFIX}{name}");
        match value {
            Some(value) => shell.env(name, value),
            None => shell.env_remove(name),
        };
    };
    set("SERVICE", Some(service.to_owned()));
    set("METHOD", context.method().map(str::to_owned));
    set("CORRELATION_ID", Some(context.correlation_id().to_string()));
    set("ATTEMPT", Some(context.attempt().to_string()));
    set(
        "REMAINING_MS",
        Some(context.remaining().as_millis().to_string()),
    );
    set("CONTENT_TYPE", context.content_type().map(str::to_owned));
    for (name, value) in context.headers().iter() {
        let name = name.to_ascii_uppercase().replace(['.', '-'], "_");
        set(&format!("HEADER_{name}"), Some(value.to_owned()));
    }
    shell
}

/// What a command that ended has said.
struct Ended {
    status: ExitStatus,
    output: Bytes,
    errors: Vec<u8>,
}

/// Writes, reads and waits at the same time: a command may answer before it has read everything.
async fn converse(child: &mut Child, group: Option<Group>, body: Bytes) -> Result<Ended, Fault> {
    let (input, output, errors) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let exit = async {
        let status = child
            .wait()
            .await
            .map_err(|error| failed("the command was lost", &error));
        // What it left running in the background has its pipes open; they would never end.
        drop(group);
        status
    };
    let (status, output, errors, ()) = tokio::try_join!(
        exit,
        read_output(output),
        read_errors(errors),
        write_input(input, body)
    )?;
    Ok(Ended {
        status,
        output,
        errors,
    })
}

fn answer(ended: Ended) -> Result<Bytes, Fault> {
    if ended.status.success() {
        return Ok(ended.output);
    }
    // "exit status: 3" or "signal: 9 (SIGKILL)"
    let mut message = ended.status.to_string().replacen(": ", " ", 1);
    let errors = String::from_utf8_lossy(&ended.errors);
    if !errors.trim().is_empty() {
        message = format!("{message}: {}", errors.trim());
    }
    Err(Fault::new(Code::Unknown, message))
}

async fn write_input(input: Option<ChildStdin>, body: Bytes) -> Result<(), Fault> {
    let Some(mut input) = input else {
        return Ok(());
    };
    match input.write_all(&body).await {
        Ok(()) => Ok(()),
        // It need not read its input.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        Err(error) => Err(failed("standard input", &error)),
    }
}

/// All of it, up to the limit of a reply's body.
async fn read_output(output: Option<impl AsyncRead + Unpin>) -> Result<Bytes, Fault> {
    let limit = ClientConfig::default().max_body;
    let mut all = BytesMut::new();
    let Some(mut output) = output else {
        return Ok(Bytes::new());
    };
    while output
        .read_buf(&mut all)
        .await
        .map_err(|error| failed("standard output", &error))?
        > 0
    {
        if all.len() > limit {
            let message = format!("the command's output is over the limit of {limit} bytes");
            return Err(Fault::new(Code::ResourceExhausted, message));
        }
    }
    Ok(all.freeze())
}

/// The end of it.
async fn read_errors(errors: Option<impl AsyncRead + Unpin>) -> Result<Vec<u8>, Fault> {
    let mut end = Vec::new();
    let Some(mut errors) = errors else {
        return Ok(end);
    };
    while errors
        .read_buf(&mut end)
        .await
        .map_err(|error| failed("standard error", &error))?
        > 0
    {
        end.drain(..end.len().saturating_sub(ERRORS_KEPT));
    }
    Ok(end)
}

fn failed(what: &str, error: &io::Error) -> Fault {
    Fault::new(Code::Internal, format!("{what}: {error}"))
}

/// A process group that is killed when this is dropped.
struct Group(Pid);

impl Group {
    fn led_by(child: &Child) -> Option<Self> {
        let id = child.id().and_then(|id| i32::try_from(id).ok())?;
        Pid::from_raw(id).map(Self)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // If nothing is left of it, there is nothing to kill.
        let _ = kill_process_group(self.0, Signal::KILL);
    }
}

#[cfg(all(test, feature = "memory"))]
mod tests;
