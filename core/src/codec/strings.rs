//! serde_json, but for the strings.

use std::cell::RefCell;
use std::fmt::Display;
use std::io;

use serde::Serialize;
use serde::ser::{
    SerializeMap, SerializeSeq, SerializeStruct, SerializeStructVariant, SerializeTuple,
    SerializeTupleStruct, SerializeTupleVariant, Serializer,
};

use super::escape;

/// Names of structs that are instructions to serde_json start so: their fields do not become what they are elsewhere.
const INSTRUCTION: &str = "$serde_json::private::";

/// Appends the JSON form of the value.
pub(super) fn write(
    out: Vec<u8>,
    value: &(impl Serialize + ?Sized),
) -> (Vec<u8>, Result<(), serde_json::Error>) {
    let out = Out(RefCell::new(out));
    let written = value.serialize(Strings {
        json: &mut serde_json::Serializer::new(&out),
        out: Some(&out),
    });
    (out.0.into_inner(), written)
}

/// Where all of it goes. Nobody holds the borrow while another's code runs, so that there are never two.
struct Out(RefCell<Vec<u8>>);

impl io::Write for &Out {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_all(bytes).map(|()| bytes.len())
    }

    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0.borrow_mut().extend_from_slice(bytes);
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Hands everything to serde_json, which looks at strings byte by byte: of a string it writes the quotes alone, and what
/// belongs between them is written here.
struct Strings<'a, S> {
    json: S,
    /// None where strings are serde_json's own matter.
    out: Option<&'a Out>,
}

/// Hands `serialize_*` of one value on as they are.
macro_rules! as_they_are {
    ($($method:ident: $value:ty),* $(,)?) => {
        $(fn $method(self, value: $value) -> Result<S::Ok, S::Error> {
            self.json.$method(value)
        })*
    };
}

/// Opens what has parts.
macro_rules! parts {
    ($($method:ident -> $parts:ident($($argument:ident: $type:ty),*);)*) => {
        $(fn $method(self, $($argument: $type),*) -> Result<Self::$parts, S::Error> {
            let json = self.json.$method($($argument),*)?;
            Ok(Strings { json, out: self.out })
        })*
    };
}

impl<'a, S: Serializer> Serializer for Strings<'a, S> {
    type Ok = S::Ok;
    type Error = S::Error;
    type SerializeSeq = Strings<'a, S::SerializeSeq>;
    type SerializeTuple = Strings<'a, S::SerializeTuple>;
    type SerializeTupleStruct = Strings<'a, S::SerializeTupleStruct>;
    type SerializeTupleVariant = Strings<'a, S::SerializeTupleVariant>;
    type SerializeMap = Strings<'a, S::SerializeMap>;
    type SerializeStruct = Strings<'a, S::SerializeStruct>;
    type SerializeStructVariant = Strings<'a, S::SerializeStructVariant>;

    fn serialize_str(self, text: &str) -> Result<S::Ok, S::Error> {
        let Some(out) = self.out else {
            return self.json.serialize_str(text);
        };
        let written = self.json.serialize_str("")?;
        let mut out = out.0.borrow_mut();
        // The closing quote comes after the text.
        out.pop();
        out.reserve(text.len() + 1);
        escape::write(&mut out, text);
        out.push(b'"');
        Ok(written)
    }

    as_they_are! {
        serialize_bool: bool,
        serialize_i8: i8,
        serialize_i16: i16,
        serialize_i32: i32,
        serialize_i64: i64,
        serialize_i128: i128,
        serialize_u8: u8,
        serialize_u16: u16,
        serialize_u32: u32,
        serialize_u64: u64,
        serialize_u128: u128,
        serialize_f32: f32,
        serialize_f64: f64,
        serialize_char: char,
        serialize_bytes: &[u8],
        serialize_unit_struct: &'static str,
    }

    fn collect_str<T: ?Sized + Display>(self, value: &T) -> Result<S::Ok, S::Error> {
        self.json.collect_str(value)
    }

    fn serialize_unit(self) -> Result<S::Ok, S::Error> {
        self.json.serialize_unit()
    }

    fn serialize_none(self) -> Result<S::Ok, S::Error> {
        self.json.serialize_none()
    }

    fn serialize_some<T: ?Sized + Serialize>(self, value: &T) -> Result<S::Ok, S::Error> {
        self.json.serialize_some(&Part::of(value, self.out))
    }

    fn serialize_unit_variant(
        self,
        name: &'static str,
        index: u32,
        variant: &'static str,
    ) -> Result<S::Ok, S::Error> {
        self.json.serialize_unit_variant(name, index, variant)
    }

    fn serialize_newtype_struct<T: ?Sized + Serialize>(
        self,
        name: &'static str,
        value: &T,
    ) -> Result<S::Ok, S::Error> {
        let value = Part::of(value, self.out);
        self.json.serialize_newtype_struct(name, &value)
    }

    fn serialize_newtype_variant<T: ?Sized + Serialize>(
        self,
        name: &'static str,
        index: u32,
        variant: &'static str,
        value: &T,
    ) -> Result<S::Ok, S::Error> {
        let value = Part::of(value, self.out);
        self.json
            .serialize_newtype_variant(name, index, variant, &value)
    }

    parts! {
        serialize_seq -> SerializeSeq(length: Option<usize>);
        serialize_tuple -> SerializeTuple(length: usize);
        serialize_tuple_struct -> SerializeTupleStruct(name: &'static str, length: usize);
        serialize_tuple_variant -> SerializeTupleVariant(
            name: &'static str, index: u32, variant: &'static str, length: usize
        );
        serialize_map -> SerializeMap(length: Option<usize>);
        serialize_struct_variant -> SerializeStructVariant(
            name: &'static str, index: u32, variant: &'static str, length: usize
        );
    }

    fn serialize_struct(
        self,
        name: &'static str,
        length: usize,
    ) -> Result<Self::SerializeStruct, S::Error> {
        let json = self.json.serialize_struct(name, length)?;
        let out = self.out.filter(|_| !name.starts_with(INSTRUCTION));
        Ok(Strings { json, out })
    }

    fn is_human_readable(&self) -> bool {
        self.json.is_human_readable()
    }
}

/// Part of a value: its strings are written so as well.
struct Part<'a, T: ?Sized> {
    value: &'a T,
    out: Option<&'a Out>,
}

impl<'a, T: ?Sized> Part<'a, T> {
    fn of(value: &'a T, out: Option<&'a Out>) -> Self {
        Self { value, out }
    }
}

impl<T: ?Sized + Serialize> Serialize for Part<'_, T> {
    fn serialize<S: Serializer>(&self, json: S) -> Result<S::Ok, S::Error> {
        let out = self.out;
        self.value.serialize(Strings { json, out })
    }
}

/// Something whose parts are written one by one.
macro_rules! one_by_one {
    ($($parts:ident::$method:ident),*) => {
        $(impl<S: $parts> $parts for Strings<'_, S> {
            type Ok = S::Ok;
            type Error = S::Error;

            fn $method<T: ?Sized + Serialize>(&mut self, value: &T) -> Result<(), S::Error> {
                self.json.$method(&Part::of(value, self.out))
            }

            fn end(self) -> Result<S::Ok, S::Error> {
                self.json.end()
            }
        })*
    };
}

one_by_one! {
    SerializeSeq::serialize_element,
    SerializeTuple::serialize_element,
    SerializeTupleStruct::serialize_field,
    SerializeTupleVariant::serialize_field
}

/// The same with names.
macro_rules! by_name {
    ($($parts:ident),*) => {
        $(impl<S: $parts> $parts for Strings<'_, S> {
            type Ok = S::Ok;
            type Error = S::Error;

            fn serialize_field<T: ?Sized + Serialize>(
                &mut self,
                name: &'static str,
                value: &T,
            ) -> Result<(), S::Error> {
                self.json.serialize_field(name, &Part::of(value, self.out))
            }

            fn skip_field(&mut self, name: &'static str) -> Result<(), S::Error> {
                self.json.skip_field(name)
            }

            fn end(self) -> Result<S::Ok, S::Error> {
                self.json.end()
            }
        })*
    };
}

by_name!(SerializeStruct, SerializeStructVariant);

impl<S: SerializeMap> SerializeMap for Strings<'_, S> {
    type Ok = S::Ok;
    type Error = S::Error;

    /// serde_json makes strings of numbers here, and an error of all else.
    fn serialize_key<T: ?Sized + Serialize>(&mut self, key: &T) -> Result<(), S::Error> {
        self.json.serialize_key(key)
    }

    fn serialize_value<T: ?Sized + Serialize>(&mut self, value: &T) -> Result<(), S::Error> {
        self.json.serialize_value(&Part::of(value, self.out))
    }

    fn end(self) -> Result<S::Ok, S::Error> {
        self.json.end()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;
    use serde_json::value::RawValue;
    use serde_json::{Value, json};

    use super::*;

    fn written(value: &(impl Serialize + ?Sized)) -> String {
        let (out, written) = write(Vec::new(), value);
        written.unwrap();
        String::from_utf8(out).unwrap()
    }

    #[derive(Serialize)]
    enum Kind {
        Unit,
        Newtype(String),
        Tuple(u8, String),
        Struct { text: String },
    }

    #[derive(Serialize)]
    struct Newtype(Option<String>);

    #[derive(Serialize)]
    struct Pair(char, String);

    #[derive(Serialize)]
    struct Whole<'a> {
        kinds: [Kind; 4],
        newtype: Newtype,
        pair: Pair,
        tuple: (i128, f64, &'a str),
        map: BTreeMap<u64, &'a str>,
        nothing: (),
        raw: &'a RawValue,
        #[serde(flatten)]
        rest: BTreeMap<&'a str, Value>,
        address: std::net::IpAddr,
        #[serde(skip_serializing_if = "str::is_empty")]
        absent: &'a str,
    }

    fn whole<'a>(text: &'a str, raw: &'a RawValue) -> Whole<'a> {
        let again = || text.to_owned();
        Whole {
            kinds: [
                Kind::Unit,
                Kind::Newtype(again()),
                Kind::Tuple(1, again()),
                Kind::Struct { text: again() },
            ],
            newtype: Newtype(Some(again())),
            pair: Pair('"', again()),
            tuple: (i128::MIN, 0.1, text),
            map: BTreeMap::from([(7, text)]),
            nothing: (),
            raw,
            rest: BTreeMap::from([(text, json!([text, { text: text }, null, 1.5]))]),
            address: [127, 0, 0, 1].into(),
            absent: "",
        }
    }

    proptest! {
        #[test]
        fn a_value_is_written_as_serde_json_writes_it(
            text in r#"[a-zé"\\\x00-\x1f\x7f]{0,9}[ -~]{0,70}\PC{0,40}\n?"#,
        ) {
            let raw = RawValue::from_string(format!(" [ {} ] ", json!(text))).unwrap();
            let value = whole(&text, &raw);
            prop_assert_eq!(written(&value), serde_json::to_string(&value).unwrap());
            prop_assert_eq!(written(&text), serde_json::to_string(&text).unwrap());
        }
    }

    /// Wherever it is, beside whatever it is.
    #[test]
    fn each_character_is_written_as_serde_json_writes_it() {
        for character in (0..=0x7F_u8).map(char::from).chain(['é', '\u{2028}', '𝄞']) {
            for before in [0, 1, 15, 16, 17, 40] {
                let text = format!("{}{character}{}", "x".repeat(before), "y".repeat(20));
                assert_eq!(written(&text), serde_json::to_string(&text).unwrap());
            }
        }
    }

    #[test]
    fn what_has_no_json_form_is_an_error() {
        let (_, written) = write(Vec::new(), &BTreeMap::from([((1, 2), "x")]));
        assert!(written.unwrap_err().to_string().contains("string"));
    }
}
