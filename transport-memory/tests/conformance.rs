//! The conformance suite on the memory transport.

use std::process::ExitCode;
use std::sync::Arc;

use antiphon_conformance::Harness;
use antiphon_memory::MemoryHarness;

fn main() -> ExitCode {
    antiphon_conformance::run(|| async { Ok(Arc::new(MemoryHarness::new()) as Arc<dyn Harness>) })
}
