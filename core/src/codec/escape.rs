//! JSON strings, byte for byte as serde_json writes them, but many bytes at a time.

/// So many bytes are looked at before it is asked if one of them needs an escape: that is a few wide instructions. With
/// more of them, lines of a text would leave too few blocks without an escape.
const BLOCK: usize = 16;

const HEX: &[u8; 16] = b"0123456789abcdef";

/// Appends what belongs between the quotes.
pub(super) fn write(out: &mut Vec<u8>, text: &str) {
    let (blocks, rest) = text.as_bytes().as_chunks::<BLOCK>();
    for block in blocks {
        if is_plain(block) {
            out.extend_from_slice(block);
        } else {
            write_escaped(out, block);
        }
    }
    write_escaped(out, rest);
}

/// If no byte needs an escape. It looks at all of them, as that takes no branch.
fn is_plain(block: &[u8; BLOCK]) -> bool {
    !block
        .iter()
        .fold(false, |found, &byte| found | needs_escape(byte))
}

fn needs_escape(byte: u8) -> bool {
    (byte < b' ') | (byte == b'"') | (byte == b'\\')
}

fn write_escaped(out: &mut Vec<u8>, text: &[u8]) {
    for &byte in text {
        if needs_escape(byte) {
            write_escape(out, byte);
        } else {
            out.push(byte);
        }
    }
}

fn write_escape(out: &mut Vec<u8>, byte: u8) {
    let short = match byte {
        b'"' | b'\\' => byte,
        b'\n' => b'n',
        b'\r' => b'r',
        b'\t' => b't',
        0x08 => b'b',
        0x0C => b'f',
        _ => {
            let [high, low] = [byte >> 4, byte & 0xF].map(|digit| HEX[usize::from(digit)]);
            return out.extend_from_slice(&[b'\\', b'u', b'0', b'0', high, low]);
        }
    };
    out.extend_from_slice(&[b'\\', short]);
}
