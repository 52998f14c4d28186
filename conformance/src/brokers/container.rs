//! A broker in a container.

use std::io;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use testcontainers::core::{ContainerPort, ExecCommand};
use testcontainers::runners::AsyncRunner;
use testcontainers::{
    ContainerAsync, ContainerRequest, CopyTargetOptions, GenericImage, ImageExt,
    TestcontainersError,
};
use tokio::runtime::Handle;
use tokio::time::timeout;

use super::{BrokerKind, BrokerOptions, Stop, ports, probe, process, rabbitmq, redis};
use crate::proxy::Proxy;

/// How long a broker may take from its container's start to its first answer.
const START: Duration = Duration::from_secs(120);

/// How long any one request to the container daemon may take.
const REQUEST: Duration = Duration::from_secs(60);

/// How often to look whether a container that starts has ended instead.
const CHECK: Duration = Duration::from_millis(500);

/// Seconds until a container that is asked to stop is killed.
const GRACE_SECONDS: i32 = 30;

#[derive(Debug)]
pub(super) struct Container {
    kind: BrokerKind,
    /// None only while it is dropped.
    container: Option<ContainerAsync<GenericImage>>,
    authority: String,
    tls: Option<Tls>,
    _watchdog: Option<Watchdog>,
}

/// How it is reached over TLS. Its certificate is for this host, and a container may be at another address, such as the gateway of
/// the daemon's network: so a proxy on this host is in front.
#[derive(Debug)]
struct Tls {
    authority: String,
    proxy: Proxy,
}

impl Container {
    pub(super) async fn start(options: &BrokerOptions, image: &str) -> io::Result<Self> {
        // The port is ours to choose, since the daemon would choose another one at each start.
        let port = ports::free_port()?;
        let tls_port = options.tls.is_some().then(ports::free_port).transpose()?;
        let container = request(options, image, port, tls_port)?
            .start()
            .await
            .map_err(|error| failed(image, &error))?;
        let watchdog = Watchdog::start(container.id());
        let host = container
            .get_host()
            .await
            .map_err(|error| failed(image, &error))?;
        // By name it might be tried over IPv6 first.
        let host = match host.to_string() {
            local if local == "localhost" => "127.0.0.1".to_owned(),
            host => host,
        };
        let tls = match tls_port {
            Some(port) => Some(Tls::start(format!("{host}:{port}")).await?),
            None => None,
        };
        let this = Self {
            kind: options.kind,
            container: Some(container),
            authority: format!("{host}:{port}"),
            tls,
            _watchdog: watchdog,
        };
        this.ready().await?;
        Ok(this)
    }

    pub(super) fn authority(&self) -> &str {
        &self.authority
    }

    pub(super) fn tls_authority(&self) -> Option<String> {
        let tls = self.tls.as_ref()?;
        Some(tls.proxy.addr().to_string())
    }

    pub(super) async fn stop(&self, how: Stop) -> io::Result<()> {
        let grace = match how {
            Stop::Graceful => GRACE_SECONDS,
            Stop::Kill => 0,
        };
        done("stop", self.container()?.stop_with_timeout(Some(grace))).await?;
        probe::gone(&self.authority, REQUEST).await
    }

    pub(super) async fn resume(&self) -> io::Result<()> {
        done("start", self.container()?.start()).await?;
        self.ready().await
    }

    pub(super) async fn freeze(&self) -> io::Result<()> {
        done("pause", self.container()?.pause()).await
    }

    pub(super) async fn thaw(&self) -> io::Result<()> {
        done("unpause", self.container()?.unpause()).await
    }

    pub(super) async fn ctl(&self, arguments: &[&str]) -> io::Result<String> {
        // The exit code is printed, since asking for it would make this future one that cannot move between threads.
        let script = [
            "sh",
            "-c",
            r#"rabbitmqctl "$@"; printf '\n%s' "$?""#,
            "rabbitmqctl",
        ];
        let command = ExecCommand::new(script.iter().chain(arguments).copied());
        let container = self.container()?;
        let run = async {
            let mut result = container.exec(command).await?;
            let printed = result.stdout_to_vec().await?;
            let complaint = result.stderr_to_vec().await?;
            Ok::<_, TestcontainersError>((printed, complaint))
        };
        let (printed, complaint) = done("exec", run).await?;
        let printed = String::from_utf8_lossy(&printed);
        if let Some(printed) = printed.strip_suffix("\n0") {
            return Ok(printed.to_owned());
        }
        let complaint = String::from_utf8_lossy(&complaint);
        Err(io::Error::other(format!(
            "rabbitmqctl {}: {printed}{complaint}",
            arguments.join(" ")
        )))
    }

    pub(super) async fn log_tail(&self) -> String {
        let Ok(container) = self.container() else {
            return String::new();
        };
        let logs = async { tokio::join!(container.stdout_to_vec(), container.stderr_to_vec()) };
        let Ok((stdout, stderr)) = timeout(REQUEST, logs).await else {
            return String::new();
        };
        process::tail(&[stdout.unwrap_or_default(), stderr.unwrap_or_default()].concat())
    }

    fn container(&self) -> io::Result<&ContainerAsync<GenericImage>> {
        let container = self.container.as_ref();
        container.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "the container is gone"))
    }

    async fn ready(&self) -> io::Result<()> {
        let answers = async {
            probe::ready(self.kind, &self.authority, START, || Ok(())).await?;
            if self.kind == BrokerKind::RabbitMq {
                self.ctl(&rabbitmq::BOOTED).await?;
            }
            match &self.tls {
                Some(tls) => probe::listens(&tls.authority, START).await,
                None => Ok(()),
            }
        };
        let ready = tokio::select! {
            ready = answers => ready,
            error = self.ended() => Err(error),
        };
        let Err(error) = ready else {
            return Ok(());
        };
        let reason = format!("{error}; its log ends with:\n{}", self.log_tail().await);
        Err(io::Error::new(error.kind(), reason))
    }

    /// Waits until the container does not run.
    async fn ended(&self) -> io::Error {
        loop {
            let container = match self.container() {
                Ok(container) => container,
                Err(error) => return error,
            };
            if matches!(container.is_running().await, Ok(false)) {
                return io::Error::new(io::ErrorKind::BrokenPipe, "the container ended");
            }
            tokio::time::sleep(CHECK).await;
        }
    }
}

impl Tls {
    async fn start(authority: String) -> io::Result<Self> {
        let proxy = Proxy::start(authority.clone()).await?;
        Ok(Self { authority, proxy })
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        // Removing a container needs a runtime, and panics without one; a test's own may have ended by now.
        let runtime = match Handle::try_current() {
            Ok(_) => None,
            Err(_) => tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .ok(),
        };
        let _entered = runtime.as_ref().map(|runtime| runtime.enter());
        drop(self.container.take());
    }
}

fn request(
    options: &BrokerOptions,
    image: &str,
    port: u16,
    tls_port: Option<u16>,
) -> io::Result<ContainerRequest<GenericImage>> {
    let (name, tag) = name_and_tag(image);
    let inner = ContainerPort::Tcp(options.kind.default_port());
    let mut request = GenericImage::new(name, tag)
        .with_exposed_port(inner)
        .with_mapped_port(port, inner);
    let inner_tls_port = match options.kind {
        BrokerKind::Redis | BrokerKind::Valkey => 6380,
        BrokerKind::RabbitMq => 5671,
    };
    if let (Some(tls), Some(port)) = (&options.tls, tls_port) {
        request = request.with_mapped_port(port, ContainerPort::Tcp(inner_tls_port));
        for file in [
            tls.ca_file(),
            tls.server_certificate_file(),
            tls.server_key_file(),
        ] {
            // The broker, which has a user of its own, must be able to read it.
            let target = CopyTargetOptions::new(inside(file.clone())).with_mode(0o644);
            request = request.with_copy_to(target, std::fs::read(file)?);
        }
    }
    let tls = options.tls_settings(inner_tls_port, inside);
    Ok(match options.kind {
        BrokerKind::Redis | BrokerKind::Valkey => {
            let server = format!("{}-server", options.kind);
            let reachable = ["--bind", "0.0.0.0", "--protected-mode", "no"].map(str::to_owned);
            request.with_cmd(
                [server]
                    .into_iter()
                    .chain(reachable)
                    .chain(redis::arguments(options, &tls)),
            )
        }
        BrokerKind::RabbitMq => {
            let mut configuration = "loopback_users = none\n".to_owned();
            if tls_port.is_some() {
                configuration.push_str(&format!("listeners.ssl.default = {inner_tls_port}\n"));
            }
            configuration.push_str(&rabbitmq::common_configuration(options, tls));
            request.with_copy_to(
                "/etc/rabbitmq/conf.d/90-antiphon.conf",
                configuration.into_bytes(),
            )
        }
    })
}

/// Where a file of the broker's is in its container.
fn inside(file: PathBuf) -> String {
    let name = file.file_name().unwrap_or_default();
    format!("/etc/antiphon-{}", name.to_string_lossy())
}

/// The tag is what follows a colon behind the last slash; before that, a colon is of a registry's port.
fn name_and_tag(image: &str) -> (&str, &str) {
    match image.rsplit_once(':') {
        Some((name, tag)) if !tag.contains('/') => (name, tag),
        _ => (image, "latest"),
    }
}

async fn done<T>(
    what: &str,
    request: impl Future<Output = Result<T, TestcontainersError>>,
) -> io::Result<T> {
    match timeout(REQUEST, request).await {
        Ok(result) => result.map_err(|error| failed(what, &error)),
        Err(elapsed) => Err(elapsed.into()),
    }
}

fn failed(what: &str, error: &TestcontainersError) -> io::Error {
    io::Error::other(format!("container ({what}): {error}"))
}

/// Removes the container when its pipe ends, which it does when this is dropped or the process dies.
#[derive(Debug)]
struct Watchdog(Child);

impl Watchdog {
    /// None if there is no shell. Without the command `docker`, it does nothing.
    fn start(container: &str) -> Option<Self> {
        let mut command = Command::new("sh");
        command.args([
            "-c",
            r#"read -r line; docker rm --force --volumes "$0""#,
            container,
        ]);
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        #[cfg(unix)]
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        command.spawn().ok().map(Self)
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        // The container is mostly gone by now: its own drop comes before that of this field, but keeps its failures
        // to itself.
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_has_a_name_and_a_tag() {
        assert_eq!(name_and_tag("redis:8"), ("redis", "8"));
        assert_eq!(
            name_and_tag("antiphon-test/redis:8.0"),
            ("antiphon-test/redis", "8.0")
        );
        assert_eq!(
            name_and_tag("somewhere:5000/redis"),
            ("somewhere:5000/redis", "latest")
        );
        assert_eq!(name_and_tag("redis"), ("redis", "latest"));
    }
}
