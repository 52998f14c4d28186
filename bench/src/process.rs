//! A process that is one half of a contender.

use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::time::timeout;

use crate::Failure;
use crate::args::Role;
use crate::load::{Figures, Point};
use crate::roles::READY;

/// How long a half may take to be live, a quorum queue's declaration included.
const START: Duration = Duration::from_secs(60);

/// How much longer than its point a measurement may take: calls that wait have their own deadlines.
const PATIENCE: Duration = Duration::from_secs(60);

const STOP: Duration = Duration::from_secs(2);

/// Dropping it kills the process.
#[derive(Debug)]
pub(crate) struct Half {
    child: Child,
    id: u32,
    input: ChildStdin,
    output: Lines<BufReader<ChildStdout>>,
}

impl Half {
    /// Starts the part, `serve` or `call`, of this program or of the contender's own, and waits until it is live.
    pub(crate) async fn start(part: &str, role: &Role) -> Result<Self, Failure> {
        let mut program = match role.contender.script() {
            Some(script) => {
                let mut node = Command::new("node");
                node.arg(script);
                node
            }
            // The program itself, even if another has been built in its place by now.
            None => Command::new("/proc/self/exe"),
        };
        let mut child = program
            .arg(part)
            .args(role.arguments())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let id = child.id().ok_or("it has ended")?;
        let input = child.stdin.take().ok_or("no input")?;
        let output = child.stdout.take().ok_or("no output")?;
        let mut this = Self {
            child,
            id,
            input,
            output: BufReader::new(output).lines(),
        };
        match this.line(START).await {
            Ok(line) if line == READY => Ok(this),
            Ok(line) => Err(format!("{part} of {}: {line:?}", role.contender).into()),
            Err(error) => Err(format!("{part} of {}: {error}", role.contender).into()),
        }
    }

    pub(crate) fn id(&self) -> u32 {
        self.id
    }

    /// Has a point measured, by a client.
    pub(crate) async fn measure(&mut self, point: &Point) -> Result<Figures, Failure> {
        let mut line = serde_json::to_string(point)?;
        line.push('\n');
        self.input.write_all(line.as_bytes()).await?;
        let line = self.line(point.warm_up + point.length + PATIENCE).await?;
        Ok(serde_json::from_str(&line)?)
    }

    /// Ends it by the end of its input.
    pub(crate) async fn stop(self) {
        let Self {
            mut child, input, ..
        } = self;
        drop(input);
        // What is still there then is killed.
        let _ = timeout(STOP, child.wait()).await;
    }

    async fn line(&mut self, patience: Duration) -> Result<String, Failure> {
        let line = timeout(patience, self.output.next_line())
            .await
            .map_err(|_| "no answer in time")??;
        line.ok_or_else(|| "it has ended".into())
    }
}
