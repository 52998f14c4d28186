//! The tool itself, on memory only and for moments: it measures, compares and writes.

use std::path::Path;
use std::process::Command;

use serde_json::Value;

#[test]
fn memory_is_measured_beside_its_floor_and_its_peer() {
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join("smoke");
    let file = |name: &str| directory.join(name);
    let output = Command::new(env!("CARGO_BIN_EXE_antiphon-bench"))
        .args([
            "--only=memory",
            "--rounds=1",
            "--seconds=0.05",
            "--repeat=0",
        ])
        .args(["--concurrency", "1,4", "--size", "64"])
        .args(["--contender", "memory,memory-json"])
        .arg("--json")
        .arg(file("bench.json"))
        .arg("--markdown")
        .arg(file("bench.md"))
        .arg("--svg")
        .arg(file("bench.svg"))
        .output()
        .unwrap();
    let printed = String::from_utf8(output.stdout).unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");

    let json = std::fs::read_to_string(file("bench.json")).unwrap();
    let report: Value = serde_json::from_str(&json).unwrap();
    let rows = report["rows"].as_array().unwrap();
    let mut contenders: Vec<&str> = rows
        .iter()
        .filter(|row| row["concurrency"] == 4)
        .map(|row| row["contender"].as_str().unwrap())
        .collect();
    contenders.sort_unstable();
    assert_eq!(contenders, ["memory", "memory-json", "spawn", "tarpc"]);
    for row in rows {
        let figures = &row["figures"];
        for name in ["calls_per_second", "p50_us", "p99_us", "cpu_per_1000"] {
            assert!(figures[name].as_f64().unwrap() > 0.0, "{name}: {row}");
        }
        let is_ours = row["contender"].as_str().unwrap().starts_with("memory");
        assert_eq!(
            is_ours,
            row["floor"]["to"] == "spawn" && row["peer"]["to"] == "tarpc"
        );
    }

    let markdown = std::fs::read_to_string(file("bench.md")).unwrap();
    assert!(
        printed.contains(&markdown) && markdown.contains("| memory-json |"),
        "{printed}"
    );
    let svg = std::fs::read_to_string(file("bench.svg")).unwrap();
    assert_eq!(svg.matches("<polyline").count(), 4, "{svg}");
}
