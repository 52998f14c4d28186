//! Bodies travel unchanged up to the limit; what is over it, or cannot be read, fails its own call only.

use std::time::Duration;

use antiphon_core::{ClientConfig, Code, ErrorKind, Executed, Fault};
use bytes::Bytes;

use crate::bench::*;
use crate::case::{Verdict, cases};
use crate::peers::*;

cases!("payload": [
    empty_body: G1,
    any_bytes: G1,
    one_mebibyte: G1,
    limit_is_inclusive: G5,
    over_the_limit_is_not_sent: G5,
    request_over_the_servers_limit_is_refused: G5,
    reply_over_the_servers_limit_is_a_fault: G3,
    reply_over_the_clients_limit_fails_its_call_only: G3,
    undecodable_reply_fails_its_call_only: G3,
]);

/// A limit that differs from every default.
const LIMIT: usize = 70_000;

async fn echo(body: Bytes) -> Result<Bytes, Fault> {
    Ok(body)
}

/// The reply is as long as the number that the request holds.
async fn sized(body: Bytes) -> Result<Bytes, Fault> {
    Ok(patterned(
        String::from_utf8_lossy(&body).parse().unwrap_or_default(),
    ))
}

/// Bytes in which a lost, doubled or moved one shows.
fn patterned(length: usize) -> Bytes {
    (0..length).map(|index| (index % 251) as u8).collect()
}

async fn round_trip(bench: &Bench, bodies: Vec<Bytes>) -> Verdict {
    let service = bench.service("payload")?;
    let _server = start(bench.server().await?.handle_raw(&service, echo)).await?;
    let client = bench.client().await?;
    for body in bodies {
        let reply = ok_within("call", 2 * PROMPT, client.call_raw(&service, body.clone())).await?;
        same("the length of the reply", reply.body.len(), body.len())?;
        ensure(
            "read the reply",
            reply.body == body,
            "the body comes back byte for byte",
        )?;
    }
    Ok(())
}

async fn empty_body(bench: Bench) -> Verdict {
    round_trip(&bench, vec![Bytes::new(), Bytes::new()]).await
}

async fn any_bytes(bench: Bench) -> Verdict {
    let all: Bytes = (0..=255).collect();
    let bodies = [
        &all[..],
        b"\0",
        b"\xff",
        b"\xc3",
        b"\r\n",
        b"\n\n{\"v\":1}\n",
        b"{\"error\":{\"code\":\"internal\"}}",
        b" ",
    ];
    round_trip(
        &bench,
        bodies.into_iter().map(Bytes::copy_from_slice).collect(),
    )
    .await
}

async fn one_mebibyte(bench: Bench) -> Verdict {
    let sizes = [
        1 << 20,
        15 << 10,
        16 << 10,
        (16 << 10) + 1,
        128 << 10,
        (1 << 20) + 1,
    ];
    round_trip(&bench, sizes.into_iter().map(patterned).collect()).await
}

async fn limit_is_inclusive(bench: Bench) -> Verdict {
    let service = bench.service("at-limit")?;
    let _server = start(
        bench
            .server()
            .await?
            .max_body(LIMIT)
            .handle_raw(&service, echo),
    )
    .await?;
    let client = client_on(
        &bench.connect().await?.transport,
        ClientConfig::default().max_body(LIMIT),
    )
    .await?;
    for length in [LIMIT - 1, LIMIT] {
        let reply = ok(
            "a call at the limit",
            client.call_raw(&service, patterned(length)),
        )
        .await?;
        ensure(
            "read the reply",
            reply.body == patterned(length),
            "the body comes back byte for byte",
        )?;
    }
    Ok(())
}

async fn over_the_limit_is_not_sent(bench: Bench) -> Verdict {
    let service = bench.service("over-limit")?;
    let server = bench.connect().await?.transport;
    let mut requests = Requests::shared(&server, &service, 4).await?;
    let client = client_on(
        &bench.connect().await?.transport,
        ClientConfig::default().max_body(LIMIT),
    )
    .await?;
    let call = client.call_raw(&service, patterned(LIMIT + 1));
    refused(
        "a call over the limit",
        call,
        ErrorKind::TooLarge,
        Executed::No,
    )
    .await?;
    let notify = client.notify_raw(&service, patterned(LIMIT + 1));
    refused(
        "a notification over the limit",
        notify,
        ErrorKind::TooLarge,
        Executed::No,
    )
    .await?;
    let call = tokio::spawn(client.call_raw(&service, patterned(LIMIT)).into_future());
    // The first that arrives is the one that was allowed: the others were never sent.
    let delivery = requests.next("take the request").await?;
    same(
        "the length of the first request that arrives",
        delivery.request.body.len(),
        LIMIT,
    )?;
    ensure(
        "read the request",
        delivery.request.body == patterned(LIMIT),
        "the body arrives byte for byte",
    )?;
    answer(delivery, "").await?;
    joined("the call at the limit", call).await.map(drop)
}

async fn request_over_the_servers_limit_is_refused(bench: Bench) -> Verdict {
    let service = bench.service("servers-limit")?;
    let _server = start(
        bench
            .server()
            .await?
            .max_body(LIMIT)
            .handle_raw(&service, echo),
    )
    .await?;
    let client = bench.client().await?;
    let call = client.call_raw(&service, patterned(LIMIT + 1));
    let error = refused(
        "a call over the server's limit",
        call,
        ErrorKind::Rejected,
        Executed::No,
    )
    .await?;
    same("the code", error.code(), Some(Code::ResourceExhausted))?;
    ok("the next call", client.call_raw(&service, patterned(LIMIT)))
        .await
        .map(drop)
}

async fn reply_over_the_servers_limit_is_a_fault(bench: Bench) -> Verdict {
    let service = bench.service("big-reply")?;
    let _server = start(
        bench
            .server()
            .await?
            .max_body(LIMIT)
            .handle_raw(&service, sized),
    )
    .await?;
    let client = bench.client().await?;
    let call = client.call_raw(&service, (LIMIT + 1).to_string());
    let error = refused(
        "a call whose reply is too large",
        call,
        ErrorKind::Fault,
        Executed::Yes,
    )
    .await?;
    same("the code", error.code(), Some(Code::ResourceExhausted))?;
    let reply = ok(
        "the next call",
        client.call_raw(&service, LIMIT.to_string()),
    )
    .await?;
    same("the length of the reply", reply.body.len(), LIMIT)
}

async fn reply_over_the_clients_limit_fails_its_call_only(bench: Bench) -> Verdict {
    let service = bench.service("clients-limit")?;
    let _server = start(bench.server().await?.handle_raw(&service, sized)).await?;
    let client = client_on(
        &bench.connect().await?.transport,
        ClientConfig::default().max_body(LIMIT),
    )
    .await?;
    let calls = [LIMIT + 1, LIMIT, 2 * LIMIT, 1]
        .map(|length| client.call_raw(&service, length.to_string()));
    let [over, at, far_over, one] =
        calls.map(|call| tokio::spawn(call.timeout(Duration::from_secs(4)).into_future()));
    for task in [over, far_over] {
        let result = ended("a call whose reply is too large", PROMPT, task).await?;
        is_error(
            "a call whose reply is too large",
            result,
            ErrorKind::BadReply,
            Executed::Yes,
        )?;
    }
    same(
        "the length of a reply at the limit",
        joined("its neighbour", at).await?.body.len(),
        LIMIT,
    )?;
    same(
        "the length of a small reply",
        joined("its neighbour", one).await?.body.len(),
        1,
    )?;
    ok("the next call", client.call_raw(&service, "5"))
        .await
        .map(drop)
}

async fn undecodable_reply_fails_its_call_only(bench: Bench) -> Verdict {
    let service = bench.service("bad-reply")?;
    let _server = start(bench.server().await?.handle_raw(&service, echo)).await?;
    let client = bench.client().await?;
    let number = |text: &'static str| {
        let raw = client
            .call::<u64>(&service, &text)
            .timeout(Duration::from_secs(4));
        tokio::spawn(raw.into_future())
    };
    // The reply is the JSON text that was sent, which is no number.
    let bad = [number("a"), number("b")];
    let good = tokio::spawn(
        client
            .call::<u64>(&service, &42)
            .timeout(Duration::from_secs(4))
            .into_future(),
    );
    for task in bad {
        let result = ended("a call whose reply is of another type", PROMPT, task).await?;
        is_error(
            "a call whose reply is of another type",
            result,
            ErrorKind::BadReply,
            Executed::Yes,
        )?;
    }
    same(
        "the neighbour's reply",
        joined("its neighbour", good).await?,
        42,
    )?;
    same(
        "the next reply",
        ok("the next call", client.call::<u64>(&service, &7)).await?,
        7,
    )
}
