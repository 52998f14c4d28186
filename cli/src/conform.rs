//! `antiphon conform`.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;

use antiphon::{Error, ErrorKind, Executed};
use antiphon_conformance::Harness;
#[cfg(any(feature = "redis", feature = "amqp"))]
use antiphon_conformance::brokers::{Broker, BrokerKind};

use crate::args::ConformArgs;
use crate::exit::{self, Exit};
use crate::output;
use crate::signals::Signals;

/// Runs the conformance suite, and prints its report.
pub(crate) async fn run(url: Option<String>, args: ConformArgs) -> Exit {
    conform(url, args)
        .await
        .unwrap_or_else(|error| output::failed(&error))
}

async fn conform(url: Option<String>, args: ConformArgs) -> Result<Exit, Error> {
    let url = url.ok_or_else(exit::no_url)?;
    let mut signals = Signals::listen()?;
    // The suite takes its time: what would be in vain is found before.
    let file = args.json.as_deref().map(create).transpose()?;
    let suite = async {
        antiphon::connect(&url).await?.close().await;
        Ok::<_, Error>(antiphon_conformance::report(harness(&url).await?, "").await)
    };
    let report = tokio::select! {
        biased;
        () = signals.next() => return Err(exit::interrupted(Executed::Maybe)),
        report = suite => report?,
    };
    output::write(format!("{report}\n").as_bytes())?;
    if let Some(mut file) = file {
        file.write_all(report.to_json().as_bytes())
            .map_err(|error| exit::local("the report's file", &error))?;
    }
    // The report says what failed.
    Ok(if report.is_success() {
        Exit::Success
    } else {
        Exit::Remote
    })
}

fn create(path: &Path) -> Result<File, Error> {
    File::create(path).map_err(|error: io::Error| {
        Error::not_executed(ErrorKind::Invalid, format!("{}: {error}", path.display()))
    })
}

/// The harness of the backend that the URL's scheme names. That there is one is known: it has connected.
async fn harness(url: &str) -> Result<Arc<dyn Harness>, Error> {
    match url.split_once("://").map(|(scheme, _)| scheme) {
        #[cfg(feature = "memory")]
        Some("memory") => Ok(Arc::new(antiphon_memory::MemoryHarness::new())),
        #[cfg(feature = "redis")]
        Some("redis") => {
            let broker = broker(BrokerKind::Redis, url).await?;
            Ok(Arc::new(antiphon_redis::RedisHarness::new(broker)))
        }
        #[cfg(feature = "amqp")]
        Some("amqp") => {
            let queue_type = antiphon_amqp::AmqpConfig::from_url(url)?.queue_type;
            let broker = broker(BrokerKind::RabbitMq, url).await?;
            Ok(Arc::new(antiphon_amqp::AmqpHarness::new(
                broker, queue_type,
            )))
        }
        _ => Err(Error::not_executed(
            ErrorKind::Unsupported,
            "the suite cuts connections on their way, and cannot do that to encrypted ones",
        )),
    }
}

#[cfg(any(feature = "redis", feature = "amqp"))]
async fn broker(kind: BrokerKind, url: &str) -> Result<Arc<Broker>, Error> {
    match Broker::at(kind, url).await {
        Ok(broker) => Ok(Arc::new(broker)),
        Err(error) => Err(Error::not_executed(ErrorKind::Connect, error.to_string())),
    }
}
