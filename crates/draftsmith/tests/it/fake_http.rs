//! What the fake servers share: connections, requests, whole answers.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Serves on a free port until the process ends; gives the address. An error of `answer` ends the connection.
pub(crate) fn serve(
    answer: impl Fn(&mut Out<'_>, &Request) -> std::io::Result<()> + Send + Sync + 'static,
) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    serve_at(listener, Life::default(), answer);
    address
}

/// Whether a server is there: one that is not takes no connection and answers nothing more.
#[derive(Clone, Default)]
pub(crate) struct Life(Arc<AtomicBool>);

impl Life {
    pub(crate) fn end(&self) {
        self.0.store(true, Ordering::SeqCst);
    }

    pub(crate) fn is_over(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}

/// The same at an address that is taken already, until its life is over.
pub(crate) fn serve_at(
    listener: TcpListener,
    life: Life,
    answer: impl Fn(&mut Out<'_>, &Request) -> std::io::Result<()> + Send + Sync + 'static,
) {
    let answer = Arc::new(answer);
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            // Whoever comes after the end is the last one that is let in, to be turned away.
            if life.is_over() {
                return;
            }
            let (answer, life) = (Arc::clone(&answer), life.clone());
            std::thread::spawn(move || {
                let mut reader = BufReader::new(stream.try_clone().unwrap());
                while let Some(request) = read_request(&mut reader) {
                    if life.is_over() || answer(&mut Out(&stream), &request).is_err() {
                        return;
                    }
                }
            });
        }
    });
}

/// One request as it came.
pub(crate) struct Request {
    /// Method, path and version.
    pub(crate) line: String,
    /// By names in lower case.
    pub(crate) headers: BTreeMap<String, String>,
    pub(crate) body: Vec<u8>,
}

fn read_request(reader: &mut BufReader<TcpStream>) -> Option<Request> {
    let mut line = String::new();
    reader.read_line(&mut line).ok().filter(|n| *n > 0)?;
    let mut headers = BTreeMap::new();
    loop {
        let mut header = String::new();
        reader.read_line(&mut header).ok()?;
        let Some((name, value)) = header.trim().split_once(':') else { break };
        headers.insert(name.to_ascii_lowercase(), value.trim().to_string());
    }
    let length = headers.get("content-length").map_or(0, |n| n.parse().unwrap());
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    Some(Request { line: line.trim().to_string(), headers, body })
}

/// Writes one answer; an error means that the client went away, which ends the connection.
pub(crate) struct Out<'a>(pub(crate) &'a TcpStream);

impl Out<'_> {
    pub(crate) fn whole(&mut self, status: &str, kind: &str, more: &str, body: &str) -> std::io::Result<()> {
        let length = body.len();
        write!(
            self.0,
            "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n{more}\r\n{body}"
        )
    }
}

impl Request {
    pub(crate) fn method(&self) -> &str {
        self.line.split(' ').next().unwrap_or_default()
    }

    pub(crate) fn path(&self) -> &str {
        self.line.split(' ').nth(1).unwrap_or_default()
    }

    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map(String::as_str).unwrap_or_default()
    }
}

/// An error that names the field, unless it is as wanted.
pub(crate) fn same(what: &str, found: &str, wanted: &str) -> Result<(), String> {
    if found == wanted { Ok(()) } else { Err(format!("{what} is `{found}`, not `{wanted}`")) }
}
