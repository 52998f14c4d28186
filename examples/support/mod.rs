//! What the Fibonacci examples share.

use antiphon::{Code, Fault};

/// The nth Fibonacci number; the 93rd is the last that fits.
#[allow(dead_code, reason = "the client example only asks for numbers")]
pub(crate) fn fibonacci(n: u64) -> Result<u64, Fault> {
    if n > 93 {
        return Err(Fault::new(Code::OutOfRange, format!("{n} is above 93")));
    }
    let (mut this, mut next) = (0_u64, 1_u64);
    for _ in 0..n {
        (this, next) = (next, this.wrapping_add(next));
    }
    Ok(this)
}

/// The broker's URL, or a word on why there must be one. Memory ends at the process, and these are two.
#[allow(dead_code, reason = "the example in one process needs no broker")]
pub(crate) fn broker_url(argument: Option<String>, usage: &str) -> String {
    match argument {
        Some(url) if !url.starts_with("memory:") => url,
        _ => {
            eprintln!(
                "usage: {usage}\nURL is a broker's, such as redis://127.0.0.1:6379 or amqp://127.0.0.1:5672"
            );
            std::process::exit(2);
        }
    }
}
