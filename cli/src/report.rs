//! The objects that `--json` prints. Their fields are for programs: none is ever renamed.

use std::collections::BTreeMap;
use std::time::Duration;

use antiphon::{Code, ContentType, Error, ErrorKind, Executed, Reply};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::{Serialize, Serializer};

/// How a call ended.
#[derive(Debug, Serialize)]
pub(crate) struct CallReport<'a> {
    ok: bool,
    kind: Option<&'static str>,
    code: Option<&'static str>,
    executed: &'static str,
    message: Option<&'a str>,
    #[serde(flatten)]
    body: Body<'a>,
    content_type: Option<&'a str>,
    #[serde(serialize_with = "as_map")]
    headers: Vec<(&'a str, &'a str)>,
    correlation_id: Option<&'a str>,
    elapsed_us: u128,
}

/// Under the one key or the other.
#[derive(Debug, Serialize)]
#[serde(rename_all = "snake_case")]
enum Body<'a> {
    /// Text; none if the call failed.
    Body(Option<&'a str>),
    /// What is not UTF-8.
    BodyBase64(String),
}

impl<'a> CallReport<'a> {
    pub(crate) fn new(
        result: &'a Result<Reply, Error>,
        correlation_id: Option<&'a str>,
        elapsed: Duration,
    ) -> Self {
        let error = result.as_ref().err();
        let reply = result.as_ref().ok();
        Self {
            ok: error.is_none(),
            kind: error.map(Error::kind).map(ErrorKind::as_str),
            code: error.and_then(Error::code).map(Code::as_str),
            executed: error.map_or(Executed::Yes, Error::executed).as_str(),
            message: error.map(Error::message),
            body: Body::of(reply),
            content_type: reply
                .and_then(|reply| reply.content_type.as_ref())
                .map(ContentType::as_str),
            headers: reply.map_or_else(Vec::new, |reply| reply.headers.iter().collect()),
            correlation_id,
            elapsed_us: elapsed.as_micros(),
        }
    }

    pub(crate) fn to_line(&self) -> String {
        line(self)
    }
}

impl<'a> Body<'a> {
    fn of(reply: Option<&'a Reply>) -> Self {
        let Some(reply) = reply else {
            return Self::Body(None);
        };
        match std::str::from_utf8(&reply.body) {
            Ok(text) => Self::Body(Some(text)),
            Err(_) => Self::BodyBase64(BASE64.encode(&reply.body)),
        }
    }
}

/// What came of asking every server.
#[derive(Debug, Serialize)]
pub(crate) struct GatherReport<'a, T> {
    ok: bool,
    kind: Option<&'static str>,
    code: Option<&'static str>,
    executed: &'static str,
    message: Option<&'a str>,
    answers: Vec<T>,
    /// Who was heard of and did not answer, and how many were not even heard of.
    silent: Vec<&'a str>,
    unheard: usize,
    elapsed_us: u128,
}

impl<'a, T: Serialize> GatherReport<'a, T> {
    pub(crate) fn new(
        error: Option<&'a Error>,
        answers: Vec<T>,
        silent: Vec<&'a str>,
        unheard: usize,
        elapsed: Duration,
    ) -> Self {
        Self {
            ok: error.is_none(),
            kind: error.map(Error::kind).map(ErrorKind::as_str),
            code: error.and_then(Error::code).map(Code::as_str),
            executed: error.map_or(Executed::Yes, Error::executed).as_str(),
            message: error.map(Error::message),
            answers,
            silent,
            unheard,
            elapsed_us: elapsed.as_micros(),
        }
    }

    pub(crate) fn to_line(&self) -> String {
        line(self)
    }
}

/// What a measurement found.
#[derive(Debug, Default, Serialize)]
pub(crate) struct BenchReport {
    /// Calls that ended.
    pub(crate) calls: u64,
    /// Calls that got a reply that is no fault.
    pub(crate) ok: u64,
    /// All others, by their error's kind.
    pub(crate) errors: BTreeMap<&'static str, u64>,
    /// Replies that were discarded: to a call that had one, to one that was given up, and to none.
    pub(crate) duplicates: u64,
    pub(crate) late: u64,
    pub(crate) unknown: u64,
    /// From the first call to the last end.
    pub(crate) seconds: f64,
    /// Of those that are ok.
    pub(crate) calls_per_second: f64,
    /// Latencies of those that are ok; 0 if there are none.
    pub(crate) p50_us: u64,
    pub(crate) p90_us: u64,
    pub(crate) p99_us: u64,
    pub(crate) max_us: u64,
}

impl BenchReport {
    /// The report on a measurement that did not begin.
    pub(crate) fn of_failure(error: &Error) -> Self {
        Self {
            errors: [(error.kind().as_str(), 1)].into(),
            ..Self::default()
        }
    }

    pub(crate) fn to_line(&self) -> String {
        line(self)
    }

    pub(crate) fn to_text(&self) -> String {
        let Self {
            calls,
            ok,
            seconds,
            calls_per_second,
            duplicates,
            late,
            unknown,
            ..
        } = self;
        let errors: Vec<String> = self
            .errors
            .iter()
            .map(|(kind, count)| format!("{count} {kind}"))
            .collect();
        let errors = if errors.is_empty() {
            "none".to_owned()
        } else {
            errors.join(", ")
        };
        let millis = |micros: u64| Duration::from_micros(micros).as_secs_f64() * 1e3;
        let [p50, p90, p99, max] = [self.p50_us, self.p90_us, self.p99_us, self.max_us].map(millis);
        format!(
            "calls      {calls} in {seconds:.3} s, {ok} ok\n\
             errors     {errors}\n\
             discarded  {duplicates} duplicate, {late} late, {unknown} unknown\n\
             rate       {calls_per_second:.0} calls/s\n\
             latency    p50 {p50:.3} ms, p90 {p90:.3} ms, p99 {p99:.3} ms, max {max:.3} ms\n"
        )
    }
}

fn line(report: &impl Serialize) -> String {
    // Text and numbers under text keys: there is nothing in a report that has no JSON form.
    let mut line = serde_json::to_string(report).unwrap_or_default();
    line.push('\n');
    line
}

fn as_map<S: Serializer>(headers: &[(&str, &str)], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_map(headers.iter().copied())
}

#[cfg(test)]
mod tests {
    use antiphon::{CorrelationId, Fault};
    use serde_json::{Value, json};

    use super::*;

    fn object(result: Result<Reply, Error>) -> Value {
        let report = CallReport::new(&result, Some("id"), Duration::from_millis(2));
        let line = report.to_line();
        assert!(line.ends_with("}\n") && line.lines().count() == 1, "{line}");
        serde_json::from_str(&line).unwrap()
    }

    #[test]
    fn a_reply_is_text_or_base64() {
        let mut reply = Reply::value(CorrelationId::random(), "55");
        reply.headers.insert("a", "b").unwrap();
        reply.content_type = Some(ContentType::JSON);
        let expected = json!({
            "ok": true, "kind": null, "code": null, "executed": "yes", "message": null, "body": "55",
            "content_type": "application/json", "headers": {"a": "b"}, "correlation_id": "id", "elapsed_us": 2000,
        });
        assert_eq!(object(Ok(reply)), expected);

        let binary = object(Ok(Reply::value(CorrelationId::random(), &b"\xff\x00"[..])));
        assert_eq!(
            (&binary["body_base64"], binary.get("body")),
            (&json!("/wA="), None)
        );
    }

    #[test]
    fn a_failure_has_the_same_fields() {
        let fault = Fault::new(Code::OutOfRange, "too\nmuch");
        let expected = json!({
            "ok": false, "kind": "fault", "code": "out_of_range", "executed": "yes", "message": "too\nmuch", "body": null,
            "content_type": null, "headers": {}, "correlation_id": "id", "elapsed_us": 2000,
        });
        assert_eq!(
            object(Err(Error::from_fault(fault, Executed::Yes))),
            expected
        );
    }

    #[test]
    fn a_measurement_is_one_object_or_five_lines() {
        let report = BenchReport {
            calls: 3,
            ok: 2,
            errors: [("fault", 1)].into(),
            seconds: 0.5,
            calls_per_second: 4.0,
            p50_us: 1500,
            ..BenchReport::default()
        };
        let expected = json!({
            "calls": 3, "ok": 2, "errors": {"fault": 1}, "duplicates": 0, "late": 0, "unknown": 0,
            "seconds": 0.5, "calls_per_second": 4.0, "p50_us": 1500, "p90_us": 0, "p99_us": 0, "max_us": 0,
        });
        assert_eq!(
            serde_json::from_str::<Value>(&report.to_line()).unwrap(),
            expected
        );
        let text = report.to_text();
        assert_eq!(text.lines().count(), 5);
        assert!(
            text.contains("errors     1 fault\n") && text.contains("p50 1.500 ms"),
            "{text}"
        );
    }
}
