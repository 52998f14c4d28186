//! Whatever text comes in, from users or from the wire: a value that keeps it, or a typed error. Never a panic.

use antiphon_core::{
    ContentType, CorrelationId, Error, ErrorKind, Executed, Fault, Headers, Method, ReplyAddress,
    ServiceName,
};
use proptest::prelude::*;

fn invalid<T>(result: Result<T, Error>) -> Option<T> {
    match result {
        Ok(value) => Some(value),
        Err(error) => {
            assert_eq!(
                (error.kind(), error.executed()),
                (ErrorKind::Invalid, Executed::No)
            );
            None
        }
    }
}

/// Mostly short text of the characters that matter, sometimes anything.
fn text() -> impl Strategy<Value = String> {
    prop_oneof!["[A-Za-z0-9_.@{}*-]{0,70}", "[ -~]{0,300}", any::<String>()]
}

proptest! {
    #[test]
    fn names_keep_what_they_take(text in text()) {
        if let Some(name) = invalid(ServiceName::new(&text)) {
            prop_assert_eq!(name.as_str(), &text);
            let node = name.node().map(|node| format!("@{node}")).unwrap_or_default();
            prop_assert_eq!(format!("{}{node}", name.service()), text.clone());
            let safe = text.len() <= 129 && !text.contains(['{', '}', '*', ' ']);
            prop_assert!(safe);
        }
        if let Some(method) = invalid(Method::new(&text)) {
            prop_assert_eq!(method.as_str(), &text);
        }
    }

    #[test]
    fn what_goes_into_a_short_string_fits(text in text()) {
        if let Some(address) = invalid(ReplyAddress::new(&text)) {
            prop_assert_eq!(address.as_str(), &text);
            prop_assert!((1..=255).contains(&text.len()));
        }
        if let Some(content_type) = invalid(ContentType::new(&text)) {
            prop_assert_eq!(content_type.as_str(), &text);
            prop_assert!((1..=255).contains(&text.len()));
        }
        if let Some(id) = invalid(CorrelationId::parse(&text)) {
            prop_assert_eq!(id.to_string(), text);
        }
    }

    #[test]
    fn headers_are_bounded(entries in proptest::collection::vec((text(), text()), 0..80)) {
        let mut headers = Headers::new();
        for (name, value) in &entries {
            let _ = invalid(headers.insert(name, value));
        }
        prop_assert!(headers.iter().count() <= 64);
        prop_assert!(headers.iter().map(|(name, value)| name.len() + value.len()).sum::<usize>() <= 8192);
    }

    #[test]
    fn a_fault_survives_the_wire(message in any::<String>(), body in proptest::collection::vec(any::<u8>(), 0..200)) {
        let fault = Fault::new(antiphon_core::Code::NotFound, message);
        prop_assert_eq!(Fault::from_body(&fault.to_body()), Some(fault));
        let _ = Fault::from_body(&body);
    }
}
