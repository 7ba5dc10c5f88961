//! Two encodings that the hub's commits want: base64 `[rfc4648, §4]`, and the id that git gives a file's content.

use base64::prelude::{BASE64_STANDARD, Engine as _};
use sha1::{Digest, Sha1};

/// Bytes in base64, padded.
pub(crate) fn base64(bytes: &[u8]) -> String {
    BASE64_STANDARD.encode(bytes)
}

/// The id of a file in a git repository: SHA-1 over a header and its bytes. It only tells whether a file is there already;
/// nothing is trusted on its word.
pub fn git_blob_id(content: &[u8]) -> String {
    let mut bytes = format!("blob {}\0", content.len()).into_bytes();
    bytes.extend_from_slice(content);
    sha1_hex(&bytes)
}

/// SHA-1 `[fips180-4, §6.1]`, in hexadecimal digits.
fn sha1_hex(message: &[u8]) -> String {
    Sha1::digest(message).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_that_of_the_standard() {
        let cases = ["", "Zg==", "Zm8=", "Zm9v", "Zm9vYg==", "Zm9vYmE=", "Zm9vYmFy"];
        for (length, expected) in cases.iter().enumerate() {
            assert_eq!(base64(&b"foobar"[..length]), *expected);
        }
        assert_eq!(base64(&[0xff, 0xef, 0xbe]), "/+++");
    }

    #[test]
    fn ids_are_those_of_git() {
        // `git hash-object` of an empty file, of "hello\n", and of 200 times "a".
        assert_eq!(git_blob_id(b""), "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391");
        assert_eq!(git_blob_id(b"hello\n"), "ce013625030ba8dba906f756967f9e9ca394464a");
        assert_eq!(git_blob_id(&[b'a'; 200]), "1d33d17ad3abab24046a78cf5a4abc31e69865b3");
        assert_eq!(sha1_hex(b"abc"), "a9993e364706816aba3e25717850c26c9cd0d89d");
        // Lengths around a block's end, against one long message's known sum.
        assert_eq!(sha1_hex(&[b'a'; 1_000_000]), "34aa973cd4c4daa4f61eeb2bdbad27316534016f");
    }
}
