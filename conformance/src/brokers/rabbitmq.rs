//! A private `rabbitmq-server`: one node with ports, data, cookie and name daemon of its own.

use std::fs;
use std::io;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use tokio::sync::Mutex;
use tokio::time::timeout;

use super::process::{self, Directory, Process};
use super::{BrokerOptions, Stop, ports, probe};

const START: Duration = Duration::from_secs(120);
const STOPPED: Duration = Duration::from_secs(10);
const EPMD_START: Duration = Duration::from_secs(10);
/// Resolves when the node has booted. It takes connections a moment before, in which it drops what is sent to
/// `amq.rabbitmq.reply-to`: it does not count itself among the nodes that run.
pub(super) const BOOTED: [&str; 1] = ["await_startup"];

const CTL: Duration = Duration::from_secs(60);

/// How often to try with other ports if somebody else takes one of them.
const ATTEMPTS: u32 = 2;

/// Where packages keep the programs themselves. What is in `PATH` may be a wrapper that only the user `rabbitmq` or the
/// system's own node can be run with.
const SERVER: [&str; 2] = ["/usr/lib/rabbitmq/bin/rabbitmq-server", "rabbitmq-server"];
const CTL_PROGRAM: [&str; 2] = ["/usr/lib/rabbitmq/bin/rabbitmqctl", "rabbitmqctl"];

#[derive(Debug)]
pub(super) struct RabbitMqProcess {
    program: PathBuf,
    port: u16,
    tls_port: Option<u16>,
    environment: Vec<(&'static str, String)>,
    // Declared, and so dropped, before the directory that they write to.
    process: Mutex<Option<Process>>,
    _epmd: Process,
    directory: Directory,
}

impl RabbitMqProcess {
    pub(super) async fn start(options: &BrokerOptions) -> io::Result<Self> {
        let program = process::find_program(&SERVER)?;
        let epmd = process::find_program(&["epmd"])?;
        let mut attempt = 1;
        loop {
            let result = Self::attempt(options, program.clone(), &epmd).await;
            if result.is_ok() || attempt == ATTEMPTS {
                return result;
            }
            attempt += 1;
        }
    }

    async fn attempt(
        options: &BrokerOptions,
        program: PathBuf,
        epmd: &std::path::Path,
    ) -> io::Result<Self> {
        let directory = Directory::create()?;
        let port = ports::free_port()?;
        let tls_port = options.tls.is_some().then(ports::free_port).transpose()?;
        let epmd_port = ports::free_port()?;
        fs::write(
            directory.path().join("rabbitmq.conf"),
            configuration(options, port, tls_port),
        )?;
        fs::write(directory.path().join("enabled_plugins"), "[].\n")?;
        fs::write(directory.path().join("rabbitmq-env.conf"), "")?;
        let environment = environment(&directory, port, epmd_port)?;
        // The node would start a daemon by itself, which would stay for ever.
        let mut epmd = Process::start(&directory, epmd, |command| {
            command.args(["-address", "127.0.0.1", "-port", &epmd_port.to_string()]);
        })?;
        listens(epmd_port, &mut epmd)
            .await
            .map_err(|error| directory.explain("epmd", &error))?;
        let this = Self {
            program,
            port,
            tls_port,
            environment,
            process: Mutex::new(None),
            _epmd: epmd,
            directory,
        };
        this.resume().await?;
        Ok(this)
    }

    pub(super) fn authority(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    pub(super) fn tls_authority(&self) -> Option<String> {
        self.tls_port.map(|port| format!("127.0.0.1:{port}"))
    }

    /// The node's own id. The process that was started is a script that waits for the node.
    pub(super) fn pid(&self) -> Option<u32> {
        self.process.try_lock().ok()?.as_ref()?;
        fs::read_to_string(self.directory.path().join("pid"))
            .ok()?
            .trim()
            .parse()
            .ok()
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
            command
                .env_clear()
                .envs(self.environment.iter().map(|(name, value)| (name, value)));
        })?;
        let ready = self.ready(&mut process).await;
        ready.map_err(|error| self.directory.explain("rabbitmq-server", &error))?;
        *running = Some(process);
        Ok(())
    }

    async fn ready(&self, process: &mut Process) -> io::Result<()> {
        let kind = super::BrokerKind::RabbitMq;
        probe::ready(kind, &self.authority(), START, || process.check_alive()).await?;
        self.ctl(&BOOTED).await?;
        match self.tls_authority() {
            Some(authority) => probe::listens(&authority, START).await,
            None => Ok(()),
        }
    }

    pub(super) async fn ctl(&self, arguments: &[&str]) -> io::Result<String> {
        let mut command = tokio::process::Command::new(process::find_program(&CTL_PROGRAM)?);
        command
            .args(arguments)
            .stdin(Stdio::null())
            .kill_on_drop(true);
        command
            .env_clear()
            .envs(self.environment.iter().map(|(name, value)| (name, value)));
        let output = timeout(CTL, command.output()).await??;
        let printed = String::from_utf8_lossy(&output.stdout).into_owned();
        if output.status.success() {
            return Ok(printed);
        }
        let complaint = String::from_utf8_lossy(&output.stderr).into_owned();
        Err(io::Error::other(format!(
            "rabbitmqctl {}: {printed}{complaint}",
            arguments.join(" ")
        )))
    }

    pub(super) fn log_tail(&self) -> String {
        self.directory.log_tail()
    }
}

/// The text of `rabbitmq.conf` beside the listeners: alarms only where a test sets them.
pub(super) fn common_configuration(options: &BrokerOptions, tls: Vec<(String, String)>) -> String {
    let mut lines = "disk_free_limit.absolute = 1MB\n".to_owned();
    for (name, value) in tls.iter().chain(&options.settings) {
        lines.push_str(&format!("{name} = {value}\n"));
    }
    lines
}

fn configuration(options: &BrokerOptions, port: u16, tls_port: Option<u16>) -> String {
    let mut lines = format!("listeners.tcp.1 = 127.0.0.1:{port}\n");
    if let Some(port) = tls_port {
        lines.push_str(&format!("listeners.ssl.1 = 127.0.0.1:{port}\n"));
    }
    let here = |file: PathBuf| file.display().to_string();
    let tls = options.tls_settings(tls_port.unwrap_or_default(), here);
    lines + &common_configuration(options, tls)
}

fn environment(
    directory: &Directory,
    port: u16,
    epmd_port: u16,
) -> io::Result<Vec<(&'static str, String)>> {
    let file = |name: &str| directory.path().join(name).display().to_string();
    Ok(vec![
        ("PATH", std::env::var("PATH").unwrap_or_default()),
        ("LANG", "C.UTF-8".to_owned()),
        ("HOME", file("")),
        ("ERL_EPMD_ADDRESS", "127.0.0.1".to_owned()),
        ("ERL_EPMD_PORT", epmd_port.to_string()),
        ("RABBITMQ_NODENAME", format!("antiphon-{port}@localhost")),
        ("RABBITMQ_NODE_IP_ADDRESS", "127.0.0.1".to_owned()),
        ("RABBITMQ_NODE_PORT", port.to_string()),
        ("RABBITMQ_DIST_PORT", ports::free_port()?.to_string()),
        (
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS",
            "-kernel inet_dist_use_interface {127,0,0,1}".to_owned(),
        ),
        ("RABBITMQ_CONF_ENV_FILE", file("rabbitmq-env.conf")),
        ("RABBITMQ_CONFIG_FILE", file("rabbitmq.conf")),
        ("RABBITMQ_ENABLED_PLUGINS_FILE", file("enabled_plugins")),
        ("RABBITMQ_MNESIA_BASE", file("data")),
        ("RABBITMQ_LOG_BASE", file("logs")),
        ("RABBITMQ_LOGS", "-".to_owned()),
        ("RABBITMQ_PID_FILE", file("pid")),
    ])
}

/// Waits until the name daemon takes connections.
async fn listens(port: u16, epmd: &mut Process) -> io::Result<()> {
    let connected = async {
        loop {
            epmd.check_alive()?;
            if tokio::net::TcpStream::connect(("127.0.0.1", port))
                .await
                .is_ok()
            {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(EPMD_START, connected).await?
}
