//! Addresses of stores: `s3://BUCKET/PATH`, `gs://BUCKET/PATH`, `az://CONTAINER/PATH`, `file:///FOLDER/PATH`.

use std::fmt;
use std::str::FromStr;

/// Whose store it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scheme {
    /// Amazon S3, or a server that speaks its protocol.
    S3,
    /// Google Cloud Storage.
    Gs,
    /// Azure Blob Storage.
    Az,
    /// A folder that this machine sees.
    File,
}

impl Scheme {
    const ALL: [Scheme; 4] = [Scheme::S3, Scheme::Gs, Scheme::Az, Scheme::File];

    /// As it is written.
    pub fn name(self) -> &'static str {
        match self {
            Scheme::S3 => "s3",
            Scheme::Gs => "gs",
            Scheme::Az => "az",
            Scheme::File => "file",
        }
    }
}

/// A text that is no address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{address}` {problem}")]
pub struct BadAddress {
    /// As written, without secrets.
    pub address: String,
    /// What is wrong with it.
    pub problem: String,
}

/// A place in a store: an object, or what all objects of a folder begin with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    /// Whose store.
    pub scheme: Scheme,
    /// Bucket or container; empty for [`Scheme::File`].
    pub bucket: String,
    /// Parts with `/` between them, none empty. Of [`Scheme::File`] it starts at the root.
    pub path: String,
}

impl Address {
    /// The address of a name inside.
    #[must_use]
    pub fn join(&self, name: &str) -> Address {
        let path = if self.path.is_empty() { name.to_string() } else { format!("{}/{name}", self.path) };
        Address { path, ..self.clone() }
    }

    /// The folder that it lies in, and its name there; `None` of a whole bucket.
    pub fn split(&self) -> Option<(Address, &str)> {
        let (folder, name) = self.path.rsplit_once('/').unwrap_or(("", &self.path));
        (!name.is_empty()).then(|| (Address { path: folder.to_string(), ..self.clone() }, name))
    }

    /// The path on this machine; `None` of what is elsewhere.
    pub fn folder(&self) -> Option<std::path::PathBuf> {
        self.is_local().then(|| std::path::Path::new("/").join(&self.path))
    }

    /// True where no network is needed.
    pub fn is_local(&self) -> bool {
        self.scheme == Scheme::File
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let slash = if self.path.is_empty() && !self.is_local() { "" } else { "/" };
        write!(f, "{}://{}{slash}{}", self.scheme.name(), self.bucket, self.path)
    }
}

/// `%20` and the like, as addresses of files have them; anything else stays.
fn decoded(path: &str) -> Option<String> {
    let bytes = path.as_bytes();
    let (mut out, mut at) = (Vec::with_capacity(bytes.len()), 0);
    while at < bytes.len() {
        let hex = (bytes[at] == b'%')
            .then(|| path.get(at + 1..at + 3).and_then(|hex| u8::from_str_radix(hex, 16).ok()))
            .flatten();
        out.push(hex.unwrap_or(bytes[at]));
        at += if hex.is_some() { 3 } else { 1 };
    }
    String::from_utf8(out).ok()
}

impl FromStr for Address {
    type Err = BadAddress;

    fn from_str(text: &str) -> Result<Address, BadAddress> {
        let bad = |problem: String| BadAddress { address: without_secret(text), problem };
        let Some((scheme, rest)) = text.split_once("://") else {
            let problem = match text.starts_with('/') {
                true => format!("has no scheme; a folder is written `file://{}`", text.trim_end_matches('/')),
                false => "has no scheme".to_string(),
            };
            return Err(bad(problem));
        };
        let known = Scheme::ALL.into_iter().find(|known| known.name() == scheme);
        let Some(scheme) = known else {
            return Err(bad(format!(
                "has the scheme `{scheme}`, which is none of `s3`, `gs`, `az` and `file`"
            )));
        };
        let (bucket, path) = rest.split_once('/').unwrap_or((rest, ""));
        let path = match scheme {
            Scheme::File => decoded(path).ok_or_else(|| bad("is not UTF-8".to_string()))?,
            _ => path.to_string(),
        };
        let path = path.trim_end_matches('/');
        match (scheme, bucket) {
            (Scheme::File, "") if path.is_empty() => {
                return Err(bad("names no folder".to_string()));
            }
            (Scheme::File, "") => {}
            (Scheme::File, host) => {
                return Err(bad(format!(
                    "names the machine `{host}`; a folder has three slashes: `file:///{host}/{path}`"
                )));
            }
            (Scheme::Az, "") => return Err(bad("names no container".to_string())),
            (_, "") => return Err(bad("names no bucket".to_string())),
            (_, bucket) => {
                if bucket.contains('@') {
                    return Err(bad("holds a user name or password".to_string()));
                }
                let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
                if !bucket.chars().all(plain) {
                    return Err(bad(format!(
                        "has the bucket `{bucket}`, expected letters, digits, `-`, `_` and `.`"
                    )));
                }
            }
        }
        if !path.is_empty() && path.split('/').any(|part| matches!(part, "" | "." | "..")) {
            return Err(bad("has an empty part, `.` or `..` in its path".to_string()));
        }
        if path.chars().any(char::is_control) {
            return Err(bad("has a control character in its path".to_string()));
        }
        Ok(Address { scheme, bucket: bucket.to_string(), path: path.to_string() })
    }
}

/// What somebody put before an `@` is not repeated.
fn without_secret(text: &str) -> String {
    let Some((scheme, rest)) = text.split_once("://") else { return text.to_string() };
    let (bucket, path) = rest.split_once('/').map_or((rest, None), |(bucket, path)| (bucket, Some(path)));
    let bucket = bucket.rsplit_once('@').map_or(bucket.to_string(), |(_, bucket)| format!("***@{bucket}"));
    match path {
        Some(path) => format!("{scheme}://{bucket}/{path}"),
        None => format!("{scheme}://{bucket}"),
    }
}

#[cfg(test)]
mod tests {
    use draftsmith_formats::bundle_files::is_address;

    use super::*;

    #[track_caller]
    fn check(text: &str, expected: &str) {
        let found = match text.parse::<Address>() {
            Ok(address) => format!("{:?} {} {}", address.scheme, address.bucket, address.path),
            Err(error) => error.to_string(),
        };
        assert!(found.contains(expected), "`{text}` gave {found}, expected {expected}");
    }

    #[test]
    fn addresses_are_told_apart_and_bad_ones_say_why() {
        check("s3://b/a/c.jsonl", "S3 b a/c.jsonl");
        check("s3://b/a b/ü%20.jsonl", "S3 b a b/ü%20.jsonl");
        check("gs://b.c-d", "Gs b.c-d ");
        check("az://c/x/", "Az c x");
        check("file:///mnt/a%20b/c", "File  mnt/a b/c");
        check("file:///100%", "File  100%");
        check("s3:///x", "names no bucket");
        check("az://", "names no container");
        check("file:///", "names no folder");
        check("file://host/x", "`file:///host/x`");
        check("/mnt/x/", "`file:///mnt/x`");
        check("data/x", "has no scheme");
        check("http://h/x", "scheme `http`");
        check("s3a://b/x", "none of `s3`, `gs`, `az` and `file`");
        check("s3://b/../x", "`..`");
        check("s3://b//x", "an empty part");
        check("s3://b c/x", "has the bucket `b c`");
        check("s3://b/a\u{7}", "control character");
        let secret = "s3://KEY:SECRET@b/x".parse::<Address>().unwrap_err().to_string();
        assert!(secret.contains("s3://***@b/x") && !secret.contains("SECRET"), "{secret}");
    }

    #[test]
    fn what_is_printed_reads_back_the_same() {
        for text in ["s3://b", "s3://b/x/y", "gs://b/x", "az://c/x", "file:///a/b"] {
            let address: Address = text.parse().unwrap();
            assert_eq!(address.to_string(), text);
            assert!(is_address(text));
        }
        for path in ["data/x.jsonl", "hf:a/b:c", "C:\\x", "a b://x", "://x"] {
            assert!(!is_address(path), "{path}");
        }
        let address: Address = "s3://b/x/y".parse().unwrap();
        let (folder, name) = address.split().unwrap();
        assert_eq!((folder.to_string().as_str(), name), ("s3://b/x", "y"));
        assert_eq!(folder.join(name), address);
        let top: Address = "s3://b/x".parse().unwrap();
        assert_eq!(top.split().unwrap().0.to_string(), "s3://b");
        assert!("s3://b".parse::<Address>().unwrap().split().is_none());
    }
}
