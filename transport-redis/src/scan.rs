//! Reads the line of a frame as we write it: one flat object, no spaces, no escapes. It says nothing about any other line.

use std::str;

/// What a line says, borrowed from it.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Flat<'a> {
    pub(crate) version: Option<u64>,
    pub(crate) id: Option<&'a str>,
    pub(crate) to: Option<&'a str>,
    pub(crate) exp: Option<u64>,
    pub(crate) ttl: Option<u64>,
    pub(crate) method: Option<&'a str>,
    pub(crate) content_type: Option<&'a str>,
    pub(crate) apart: Option<&'a str>,
}

/// Reads a line; `None` for what has other members, is spelled in another way, or is no JSON at all: whoever asks must then
/// read it by all the rules.
pub(crate) fn scan(line: &[u8]) -> Option<Flat<'_>> {
    let mut flat = Flat::default();
    // At once: each piece by itself would cost more.
    let mut rest = str::from_utf8(line).ok()?.strip_prefix('{')?;
    loop {
        let (name, after) = text(rest)?;
        let after = after.strip_prefix(':')?;
        rest = match name {
            "v" => number_into(&mut flat.version, after)?,
            "id" => text_into(&mut flat.id, after)?,
            "to" => text_into(&mut flat.to, after)?,
            "exp" => number_into(&mut flat.exp, after)?,
            "ttl" => number_into(&mut flat.ttl, after)?,
            "m" => text_into(&mut flat.method, after)?,
            "ct" => text_into(&mut flat.content_type, after)?,
            "at" => text_into(&mut flat.apart, after)?,
            _ => return None,
        };
        match rest.strip_prefix(',') {
            Some(after) => rest = after,
            None => return (rest == "}").then_some(flat),
        }
    }
}

/// Each name stands once.
fn set<T>(slot: &mut Option<T>, value: T) -> Option<()> {
    slot.replace(value).is_none().then_some(())
}

fn text_into<'a>(slot: &mut Option<&'a str>, rest: &'a str) -> Option<&'a str> {
    let (value, rest) = text(rest)?;
    set(slot, value)?;
    Some(rest)
}

fn number_into<'a>(slot: &mut Option<u64>, rest: &'a str) -> Option<&'a str> {
    let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
    let (number, rest) = rest.split_at_checked(digits)?;
    // JSON has no leading zeros.
    if number.len() > 1 && number.starts_with('0') {
        return None;
    }
    set(slot, number.parse().ok()?)?;
    Some(rest)
}

fn text(rest: &str) -> Option<(&str, &str)> {
    let rest = rest.strip_prefix('"')?;
    let plain = |byte: &u8| (b' '..0x7f).contains(byte) && !matches!(byte, b'"' | b'\\');
    let end = rest.bytes().take_while(plain).count();
    let (value, rest) = rest.split_at_checked(end)?;
    Some((value, rest.strip_prefix('"')?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_own_lines_are_read() {
        let line = br#"{"v":1,"id":"7","to":"{c}:i","exp":1764000000000,"ttl":0,"m":"add","ct":"a/b","at":"0f"}"#;
        let flat = Flat {
            version: Some(1),
            id: Some("7"),
            to: Some("{c}:i"),
            exp: Some(1_764_000_000_000),
            ttl: Some(0),
            method: Some("add"),
            content_type: Some("a/b"),
            apart: Some("0f"),
        };
        assert_eq!(scan(line), Some(flat));
    }

    /// What is not read here is read by serde, which must never be told of a line that it would read otherwise.
    #[test]
    fn all_others_are_left_to_serde() {
        for line in [
            "",
            "{",
            "{}",
            "{\"id\":\"7\"",
            "{\"id\":\"7\"}x",
            "{\"id\":\"7\",}",
            "{\"id\": \"7\"}",
            "{ \"id\":\"7\"}",
            "{\"id\":7}",
            "{\"id\":\"7\",\"id\":\"8\"}",
            "{\"id\":\"\\u0037\"}",
            "{\"id\":\"\u{1}\"}",
            "{\"id\":\"\u{e9}\"}",
            "{\"v\":01,\"id\":\"7\"}",
            "{\"v\":,\"id\":\"7\"}",
            "{\"v\":-1,\"id\":\"7\"}",
            "{\"v\":1.5,\"id\":\"7\"}",
            "{\"v\":99999999999999999999,\"id\":\"7\"}",
            "{\"id\":\"7\",\"h\":{\"a\":\"b\"}}",
            "{\"id\":\"7\",\"later\":1}",
            "[\"id\"]",
        ] {
            assert_eq!(scan(line.as_bytes()), None, "{line}");
        }
    }
}
