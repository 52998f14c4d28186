//! Where and with what figures were measured.

use std::fs;
use std::process::Command;

use serde::Serialize;

/// The versions of everything that was built.
const LOCK: &str = include_str!("../../Cargo.lock");

/// The crates whose versions matter.
const CRATES: [&str; 5] = ["tokio", "redis", "lapin", "async-nats", "tarpc"];

#[derive(Clone, Debug, Serialize)]
pub(crate) struct Machine {
    pub(crate) processor: String,
    pub(crate) cores: usize,
    pub(crate) memory_gib: u64,
    pub(crate) system: String,
    pub(crate) rust: String,
    pub(crate) crates: Vec<String>,
    /// Of the project; with a plus if files were changed.
    pub(crate) revision: String,
}

impl Machine {
    pub(crate) fn look() -> Self {
        let kernel = read("/proc/sys/kernel/osrelease");
        let distribution = field("/etc/os-release", "PRETTY_NAME", '=').unwrap_or_default();
        let kib: u64 = field("/proc/meminfo", "MemTotal", ':')
            .and_then(|text| text.split(' ').next()?.parse().ok())
            .unwrap_or_default();
        Self {
            processor: field("/proc/cpuinfo", "model name", ':').unwrap_or_default(),
            cores: std::thread::available_parallelism().map_or(0, Into::into),
            memory_gib: kib / 1024 / 1024,
            system: format!(
                "{}, Linux {}",
                distribution.trim_matches('"'),
                kernel.trim()
            ),
            rust: output("rustc", &["--version"]),
            crates: CRATES.iter().filter_map(|name| locked(name)).collect(),
            revision: revision(),
        }
    }
}

fn revision() -> String {
    let revision = output("git", &["rev-parse", "--short", "HEAD"]);
    match output("git", &["status", "--porcelain", "--untracked-files=no"]).is_empty() {
        true => revision,
        false => format!("{revision}+"),
    }
}

/// The name and version of a crate in the lock file, the lowest if there are several.
fn locked(name: &str) -> Option<String> {
    let entry = format!("name = \"{name}\"\nversion = \"");
    let (_, rest) = LOCK.split_once(&entry)?;
    let (version, _) = rest.split_once('"')?;
    Some(format!("{name} {version}"))
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

/// The value of the first line with this name.
fn field(path: &str, name: &str, separator: char) -> Option<String> {
    read(path).lines().find_map(|line| {
        let (key, value) = line.split_once(separator)?;
        (key.trim() == name).then(|| value.trim().to_owned())
    })
}

/// What a program prints; nothing if it cannot be run.
fn output(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output();
    let text = output.map(|output| output.stdout).unwrap_or_default();
    String::from_utf8_lossy(&text).trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_come_from_the_lock_file() {
        for name in CRATES {
            let version = locked(name).unwrap();
            assert!(version.contains('.'), "{version}");
        }
        assert!(locked("no-such-crate").is_none());
    }
}
