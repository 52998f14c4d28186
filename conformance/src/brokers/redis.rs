//! A private `redis-server` or `valkey-server`.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use tokio::sync::Mutex;

use super::process::{self, Directory, Process};
use super::{BrokerKind, BrokerOptions, Durability, Stop, ports, probe};

const START: Duration = Duration::from_secs(20);
const STOPPED: Duration = Duration::from_secs(5);

/// How often to try with another port if somebody else takes it.
const ATTEMPTS: u32 = 3;

#[derive(Debug)]
pub(super) struct RedisProcess {
    options: BrokerOptions,
    program: PathBuf,
    port: u16,
    tls_port: Option<u16>,
    // Declared, and so dropped, before the directory that it writes to.
    process: Mutex<Option<Process>>,
    directory: Directory,
}

impl RedisProcess {
    pub(super) async fn start(options: &BrokerOptions) -> io::Result<Self> {
        let name = match options.kind {
            BrokerKind::Valkey => "valkey-server",
            BrokerKind::Redis | BrokerKind::RabbitMq => "redis-server",
        };
        let program = process::find_program(&[name])?;
        let mut attempt = 1;
        loop {
            let this = Self {
                options: options.clone(),
                program: program.clone(),
                port: ports::free_port()?,
                tls_port: options.tls.is_some().then(ports::free_port).transpose()?,
                process: Mutex::new(None),
                directory: Directory::create()?,
            };
            match this.resume().await {
                Ok(()) => return Ok(this),
                Err(error) if attempt == ATTEMPTS => return Err(error),
                Err(_) => attempt += 1,
            }
        }
    }

    pub(super) fn authority(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    pub(super) fn tls_authority(&self) -> Option<String> {
        self.tls_port.map(|port| format!("127.0.0.1:{port}"))
    }

    pub(super) fn pid(&self) -> Option<u32> {
        self.process.try_lock().ok()?.as_ref().map(Process::pid)
    }

    pub(super) async fn stop(&self, how: Stop) -> io::Result<()> {
        let mut process = self.process.lock().await;
        if let Some(process) = process.take() {
            process.stop(how).await?;
        }
        probe::gone(&self.authority(), STOPPED).await
    }

    pub(super) async fn resume(&self) -> io::Result<()> {
        let mut running = self.process.lock().await;
        if running.is_some() {
            return Ok(());
        }
        let mut process = Process::start(&self.directory, &self.program, |command| {
            let port = self.port.to_string();
            command
                .args(["--port", &port, "--bind", "127.0.0.1"])
                .args(arguments(&self.options, &self.tls_settings()));
            command.arg("--dir").arg(self.directory.path());
        })?;
        let ready = self.ready(&mut process).await;
        ready.map_err(|error| {
            self.directory
                .explain(&self.program.display().to_string(), &error)
        })?;
        *running = Some(process);
        Ok(())
    }

    async fn ready(&self, process: &mut Process) -> io::Result<()> {
        let (kind, authority) = (self.options.kind, self.authority());
        probe::ready(kind, &authority, START, || process.check_alive()).await?;
        match self.tls_authority() {
            Some(authority) => probe::listens(&authority, START).await,
            None => Ok(()),
        }
    }

    fn tls_settings(&self) -> Vec<(String, String)> {
        let port = self.tls_port.unwrap_or_default();
        let here = |file: PathBuf| file.display().to_string();
        self.options.tls_settings(port, here)
    }

    pub(super) fn log_tail(&self) -> String {
        self.directory.log_tail()
    }
}

/// Durability and settings, as arguments of the server; the test's own come last.
pub(super) fn arguments(options: &BrokerOptions, tls: &[(String, String)]) -> Vec<String> {
    let durability: &[&str] = match options.durability {
        Durability::Memory => &["--save", "", "--appendonly", "no"],
        Durability::Disk => &[
            "--save",
            "",
            "--appendonly",
            "yes",
            "--appendfsync",
            "always",
        ],
    };
    let mut arguments: Vec<_> = durability
        .iter()
        .map(|&argument| argument.to_owned())
        .collect();
    for (name, value) in tls.iter().chain(&options.settings) {
        arguments.extend([format!("--{name}"), value.clone()]);
    }
    arguments
}
