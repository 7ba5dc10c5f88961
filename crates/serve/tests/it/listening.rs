//! The server before it has a model. What it does with one is tested through the binary, which loads one.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use draftsmith_serve::{Limits, Options, ServeError, Server};

use crate::common;

fn options(address: &str) -> Options {
    let limits = Limits {
        sequences: 1,
        queue: 1,
        connections: 2,
        body_bytes: 1 << 10,
        request_time: Duration::from_secs(5),
        drain_time: Duration::from_secs(5),
        default_max_tokens: 16,
        watch_steps: 1,
    };
    common::options(address, limits)
}

#[test]
fn until_a_model_is_there_everything_is_answered_with_loading() {
    let server = Server::start(options("127.0.0.1:0")).unwrap();
    for (head, body) in [
        ("GET /health", ""),
        ("GET /metrics", ""),
        ("GET /v1/models", ""),
        ("GET /api/state", ""),
        ("POST /v1/chat/completions", "{}"),
        ("POST /tokenize", "{}"),
    ] {
        let mut stream = TcpStream::connect(server.address()).unwrap();
        let length = body.len();
        let rest = "host: localhost\r\nconnection: close\r\n";
        write!(stream, "{head} HTTP/1.1\r\n{rest}content-length: {length}\r\n\r\n{body}").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 503 "), "{head}: {answer}");
        assert!(answer.contains("\"code\":\"loading\"") && answer.contains("retry-after: 1"), "{answer}");
    }
    // A connection that says nothing does not hold up the end.
    let _silent = TcpStream::connect(server.address()).unwrap();
    let began = Instant::now();
    server.drain();
    assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
}

#[test]
fn an_address_that_is_taken_is_named() {
    let server = Server::start(options("127.0.0.1:0")).unwrap();
    let taken = server.address().to_string();
    let error = Server::start(options(&taken)).err().expect("the port is taken");
    assert!(matches!(error, ServeError::Bind { .. }) && error.to_string().contains(&taken), "{error}");
    assert!(error.hint().unwrap().contains("`--port`"), "{:?}", error.hint());
    // Of several addresses the first one that is free.
    let free = Server::start(Options {
        addresses: vec![taken.parse().unwrap(), "127.0.0.1:0".parse().unwrap()],
        ..options(&taken)
    });
    assert_ne!(free.unwrap().address().to_string(), taken);
}
