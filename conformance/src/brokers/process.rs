//! A private process that does not outlive its owner.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use uuid::Uuid;

use super::Stop;

/// How long a process may take to end when it is asked to.
const GRACE: Duration = Duration::from_secs(30);

/// How long a killed process may take to be gone.
const KILLED: Duration = Duration::from_secs(5);

const PAUSE: Duration = Duration::from_millis(5);

/// Becomes the command, and leaves a watchdog in its process group. The watchdog waits on a pipe of which the owner holds
/// the other end: a line on it kills the group; its end, which comes when the owner dies, removes the directory as well.
/// It has to be one script: were the watchdog started after the command, an owner that dies in between would leave it.
const GUARDED: &str = r#"
exec 3<&0
(read -r line <&3 || rm -rf -- "$0"; kill -KILL 0) &
exec "$@" </dev/null 3<&-
"#;

/// A process in a process group of its own. Dropping it kills the group.
#[derive(Debug)]
pub(super) struct Process {
    leader: Child,
}

impl Process {
    /// Starts `program`, which is found in `PATH` if it is only a name. What it prints goes to the directory's log.
    pub(super) fn start(
        directory: &Directory,
        program: &Path,
        configure: impl FnOnce(&mut Command),
    ) -> io::Result<Self> {
        let log = directory.open_log()?;
        let mut command = Command::new("sh");
        command
            .args(["-c", GUARDED])
            .arg(directory.path())
            .arg(program);
        command
            .stdin(Stdio::piped())
            .stdout(log.try_clone()?)
            .stderr(log);
        #[cfg(unix)]
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        configure(&mut command);
        Ok(Self {
            leader: command.spawn()?,
        })
    }

    pub(super) fn pid(&self) -> u32 {
        self.leader.id()
    }

    /// An error if the process has ended.
    pub(super) fn check_alive(&mut self) -> io::Result<()> {
        match self.leader.try_wait()? {
            None => Ok(()),
            Some(status) => Err(io::Error::new(
                io::ErrorKind::BrokenPipe,
                format!("it ended with {status}"),
            )),
        }
    }

    /// Ends the process and its group, and keeps what it has on disk.
    pub(super) async fn stop(mut self, how: Stop) -> io::Result<()> {
        if how == Stop::Graceful && self.leader.try_wait()?.is_none() {
            signal(self.pid(), "TERM").await?;
            let end = Instant::now() + GRACE;
            while self.leader.try_wait()?.is_none() && Instant::now() < end {
                tokio::time::sleep(PAUSE).await;
            }
        }
        self.kill();
        Ok(())
    }

    /// Kills the group. Repeated calls do nothing.
    fn kill(&mut self) {
        let Some(mut watchdog) = self.leader.stdin.take() else {
            return;
        };
        let _ = watchdog.write_all(b"kill\n");
        let _ = wait(&mut self.leader, KILLED);
        // It is dead by now, unless somebody has killed the watchdog.
        let _ = self.leader.kill();
        let _ = self.leader.wait();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

fn wait(child: &mut Child, patience: Duration) -> io::Result<Option<ExitStatus>> {
    let end = Instant::now() + patience;
    loop {
        let status = child.try_wait()?;
        if status.is_some() || Instant::now() >= end {
            return Ok(status);
        }
        std::thread::sleep(PAUSE);
    }
}

/// Sends a signal, such as `TERM`, to a process that has not been waited for, so that its id is still its own.
pub(super) async fn signal(pid: u32, name: &str) -> io::Result<()> {
    // `kill` is a program only where somebody installed it, but always a built-in of the shell.
    let mut command = tokio::process::Command::new("sh");
    command
        .args(["-c", r#"kill -s "$0" "$1""#, name, &pid.to_string()])
        .stdin(Stdio::null());
    let output = command.output().await?;
    if output.status.success() {
        Ok(())
    } else {
        Err(io::Error::other(format!(
            "kill -s {name} {pid}: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        )))
    }
}

/// The path of the first of these programs that exists.
pub(super) fn find_program(candidates: &[&str]) -> io::Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    for candidate in candidates {
        // A candidate that is an absolute path replaces the directory that it is joined to.
        let found = std::env::split_paths(&path)
            .map(|directory| directory.join(candidate))
            .find(|file| file.is_file());
        if let Some(found) = found {
            return Ok(found);
        }
    }
    let name = candidates.last().copied().unwrap_or_default();
    Err(io::Error::new(
        io::ErrorKind::NotFound,
        format!("{name} is not installed"),
    ))
}

/// A temporary directory with a log. Dropping it removes it; while a test panics, its log is printed before.
#[derive(Debug)]
pub(super) struct Directory(PathBuf);

impl Directory {
    pub(super) fn create() -> io::Result<Self> {
        let path = std::env::temp_dir().join(format!("antiphon-{}", Uuid::new_v4().simple()));
        fs::create_dir(&path)?;
        Ok(Self(path))
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }

    fn log(&self) -> PathBuf {
        self.0.join("log")
    }

    fn open_log(&self) -> io::Result<File> {
        OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.log())
    }

    /// The last lines of the log.
    pub(super) fn log_tail(&self) -> String {
        tail(&fs::read(self.log()).unwrap_or_default())
    }

    /// The error, with the last lines of the log.
    pub(super) fn explain(&self, what: &str, error: &io::Error) -> io::Error {
        io::Error::new(
            error.kind(),
            format!("{what}: {error}; its log ends with:\n{}", self.log_tail()),
        )
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!(
                "the log of the broker in {} ends with:\n{}",
                self.0.display(),
                self.log_tail()
            );
        }
        // A process of the killed group may still be on its way out, and write a last file while these are removed.
        let end = Instant::now() + KILLED;
        while fs::remove_dir_all(&self.0).is_err() && self.0.exists() && Instant::now() < end {
            std::thread::sleep(PAUSE);
        }
    }
}

/// The last 40 lines.
pub(super) fn tail(log: &[u8]) -> String {
    let text = String::from_utf8_lossy(log);
    let lines: Vec<_> = text.lines().collect();
    let first = lines.len().saturating_sub(40);
    lines
        .iter()
        .skip(first)
        .map(|line| format!("    {line}\n"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sleeper(directory: &Directory) -> Process {
        let sh = find_program(&["sh"]).unwrap();
        Process::start(directory, &sh, |command| {
            command.args(["-c", "echo started; sleep 600 & wait"]);
        })
        .unwrap()
    }

    /// Waits until the log says that the process runs: its group then has a leader, a child and the watchdog.
    fn started(directory: &Directory) {
        let end = Instant::now() + KILLED;
        while !directory.log_tail().contains("started") {
            assert!(
                Instant::now() < end,
                "not started: {}",
                directory.log_tail()
            );
            std::thread::sleep(PAUSE);
        }
    }

    /// True if the group has no member. The leader must have been waited for.
    fn is_empty_group(leader: u32) -> bool {
        let script = r#"kill -s 0 -- "-$0" 2>/dev/null"#;
        !Command::new("sh")
            .args(["-c", script, &leader.to_string()])
            .status()
            .unwrap()
            .success()
    }

    fn assert_group_ends(leader: u32) {
        let end = Instant::now() + KILLED;
        while !is_empty_group(leader) {
            assert!(Instant::now() < end, "the group {leader} lives on");
            std::thread::sleep(PAUSE);
        }
    }

    #[test]
    fn a_dropped_process_takes_its_group_with_it() {
        let directory = Directory::create().unwrap();
        let process = sleeper(&directory);
        started(&directory);
        let leader = process.pid();
        assert!(!is_empty_group(leader));
        drop(process);
        assert_group_ends(leader);
        assert!(directory.path().exists(), "the data stays for a restart");
        let path = directory.path().to_owned();
        drop(directory);
        assert!(!path.exists());
    }

    #[test]
    fn an_owner_that_dies_leaves_neither_process_nor_directory() {
        let directory = Directory::create().unwrap();
        let mut process = sleeper(&directory);
        started(&directory);
        // The system closes the pipe of an owner that dies, and nothing else happens.
        drop(process.leader.stdin.take());
        assert!(wait(&mut process.leader, KILLED).unwrap().is_some());
        assert_group_ends(process.pid());
        assert!(!directory.path().exists());
    }

    #[tokio::test]
    async fn a_process_that_ends_by_itself_is_noticed() {
        let directory = Directory::create().unwrap();
        let sh = find_program(&["sh"]).unwrap();
        let mut process = Process::start(&directory, &sh, |command| {
            command.args(["-c", "echo no such setting >&2; exit 3"]);
        })
        .unwrap();
        assert!(wait(&mut process.leader, KILLED).unwrap().is_some());
        let error = process.check_alive().unwrap_err();
        let explained = directory.explain("server", &error).to_string();
        assert!(
            explained.contains("3") && explained.contains("no such setting"),
            "{explained}"
        );
        process.stop(Stop::Graceful).await.unwrap();
    }

    #[test]
    fn a_program_is_found_by_path_or_by_name_or_not_at_all() {
        let sh = find_program(&["sh"]).unwrap();
        assert_eq!(
            find_program(&["/no/such/program", sh.to_str().unwrap()]).unwrap(),
            sh
        );
        let error = find_program(&["/no/such/program", "antiphon-no-such-program"]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "antiphon-no-such-program is not installed"
        );
    }

    #[test]
    fn the_tail_of_a_log_is_its_last_lines() {
        let log: String = (0..100).map(|line| format!("line {line}\n")).collect();
        let tail = tail(log.as_bytes());
        assert_eq!(tail.lines().count(), 40);
        assert!(tail.starts_with("    line 60\n") && tail.ends_with("line 99\n"));
    }
}
