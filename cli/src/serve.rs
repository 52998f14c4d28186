//! `antiphon serve`.

use std::sync::Arc;

use antiphon::{Connection, Context, Error, Executed, RunningServer, ServiceName};
use bytes::Bytes;

use crate::args::ServeArgs;
use crate::exit::{self, Exit};
use crate::handler::Handler;
use crate::output;
use crate::signals::Signals;

/// Serves until a signal, then drains; a second signal ends it at once.
pub(crate) async fn run(url: Option<String>, args: ServeArgs) -> Exit {
    serve(url, &args)
        .await
        .unwrap_or_else(|error| output::failed(&error))
}

async fn serve(url: Option<String>, args: &ServeArgs) -> Result<Exit, Error> {
    let url = url.ok_or_else(exit::no_url)?;
    let service = ServiceName::new(&args.service)?;
    let mut signals = Signals::listen()?;
    let (connection, mut server) = tokio::select! {
        biased;
        () = signals.next() => return Ok(Exit::Success),
        started = start(&url, service, args) => started?,
    };
    // Whoever started it need not listen: it serves all the same.
    let _ = output::write(format!("ready {}\n", args.service).as_bytes());
    let over = tokio::select! {
        biased;
        () = signals.next() => None,
        error = server.over() => Some(error),
    };
    let drain = async {
        let drained = server.shutdown().await;
        connection.close().await;
        drained
    };
    tokio::select! {
        biased;
        drained = drain => match over {
            None => drained.map(|()| Exit::Success),
            Some(error) => Err(error),
        },
        () = signals.next() => Err(exit::interrupted(Executed::Maybe)),
    }
}

async fn start(
    url: &str,
    service: ServiceName,
    args: &ServeArgs,
) -> Result<(Connection, RunningServer), Error> {
    let connection = antiphon::connect(url).await?;
    let handler = Arc::new(Handler::of(args));
    let handle = move |body: Bytes, context: Context| {
        let handler = Arc::clone(&handler);
        async move { handler.handle(body, &context).await }
    };
    let mut server = connection
        .server()
        .handle_raw(service, handle)
        .prefetch(args.prefetch.into());
    if let Some(node) = &args.node {
        server = server.node(node);
    }
    if args.exclusive {
        server = server.exclusive();
    } else if args.standby {
        server = server.standby();
    } else if args.take_over {
        server = server.take_over();
    }
    #[cfg(feature = "disk-outbox")]
    if let Some(path) = &args.outbox {
        server = server.outbox_store(antiphon::DiskOutbox::new(path));
    }
    let running = server.start().await?;
    Ok((connection, running))
}
