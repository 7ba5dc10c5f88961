//! `pull hf:` against a hub of our own on this machine.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use draftsmith::formats::hash::sha256_hex;

use crate::support::{Home, repository};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// What the hub does with requests for bytes.
#[derive(Clone, Copy, PartialEq)]
enum Mood {
    Good,
    /// Closes the connection after this many bytes of every answer.
    Cuts(usize),
    /// Announces one file and sends another of the same size.
    Lies,
    /// Ignores ranges.
    WholeOnly,
}

struct Hub {
    address: String,
    /// First line and `Range` of each request.
    log: Arc<Mutex<Vec<String>>>,
    mood: Arc<Mutex<Mood>>,
}

struct Request {
    line: String,
    range: Option<usize>,
    token: Option<String>,
}

fn read_request(stream: &TcpStream) -> Option<Request> {
    let mut reader = BufReader::new(stream.try_clone().ok()?);
    let mut line = String::new();
    reader.read_line(&mut line).ok().filter(|n| *n > 0)?;
    let mut request = Request { line: line.trim().to_string(), range: None, token: None };
    loop {
        let mut header = String::new();
        reader.read_line(&mut header).ok()?;
        let header = header.trim().to_string();
        if header.is_empty() {
            return Some(request);
        }
        let (name, value) = header.split_once(':')?;
        match name.to_ascii_lowercase().as_str() {
            "range" => request.range = value.trim().strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok(),
            "authorization" => request.token = Some(value.trim().to_string()),
            _ => {}
        }
    }
}

impl Hub {
    /// A hub with one repository `o/n` of `config.json`, `model.safetensors` and `sub/w.gguf`; `secret/n` wants a
    /// token.
    fn start(body: Vec<u8>) -> Hub {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let log = Arc::new(Mutex::new(Vec::new()));
        let mood = Arc::new(Mutex::new(Mood::Good));
        let (shared_log, shared_mood) = (Arc::clone(&log), Arc::clone(&mood));
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let Some(request) = read_request(&stream) else { continue };
                let range = request.range.map(|r| format!(" from {r}")).unwrap_or_default();
                shared_log.lock().unwrap().push(format!("{}{range}", request.line));
                let mood = *shared_mood.lock().unwrap();
                answer(stream, &request, &body, mood);
            }
        });
        Hub { address, log, mood }
    }

    fn requests(&self) -> Vec<String> {
        std::mem::take(&mut *self.log.lock().unwrap())
    }

    fn be(&self, mood: Mood) {
        *self.mood.lock().unwrap() = mood;
    }
}

fn answer(mut stream: TcpStream, request: &Request, body: &[u8], mood: Mood) {
    let mut words = request.line.split(' ');
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let mut send = |status: &str, headers: &str, bytes: &[u8]| {
        let cut = match mood {
            Mood::Cuts(n) if !path.starts_with("/api") => n.min(bytes.len()),
            _ => bytes.len(),
        };
        let head = format!(
            "HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {}\r\n{headers}\r\n",
            bytes.len()
        );
        let _ = stream.write_all(head.as_bytes());
        if method != "HEAD" {
            let _ = stream.write_all(&bytes[..cut]);
        }
    };
    let common = format!("X-Repo-Commit: {COMMIT}\r\n");
    if path.starts_with("/secret/") && request.token.as_deref() != Some("Bearer open-sesame") {
        return send("401 Unauthorized", "", b"no");
    }
    if path == "/api/models/o/n/revision/main" {
        let list = format!(
            r#"{{"sha":"{COMMIT}","siblings":[{{"rfilename":"config.json"}},{{"rfilename":"model.safetensors"}},
               {{"rfilename":"../evil.json"}},{{"rfilename":"sub/w.gguf"}},{{"rfilename":"README.md"}}]}}"#
        );
        return send("200 OK", "", list.as_bytes());
    }
    if path == "/api/models/o/split/revision/main" {
        let parts: Vec<String> =
            (1..=3).map(|no| format!(r#"{{"rfilename":"llama-f32-0000{no}-of-00003.gguf"}}"#)).collect();
        let list =
            format!(r#"{{"sha":"{COMMIT}","siblings":[{},{{"rfilename":"README.md"}}]}}"#, parts.join(","));
        return send("200 OK", "", list.as_bytes());
    }
    let file = path.rsplit_once("/main/").map(|(_, f)| f);
    if let Some(part) = file.filter(|f| f.starts_with("llama-f32-")) {
        let Ok(bytes) = std::fs::read(repository().join("fixtures/gguf-split").join(part)) else {
            return send("404 Not Found", "", b"none");
        };
        let tag = sha256_hex(&bytes);
        let size = bytes.len();
        let headers = format!("{common}ETag: \"x\"\r\nX-Linked-Etag: \"{tag}\"\r\nX-Linked-Size: {size}\r\n");
        return send("200 OK", &headers, &bytes);
    }
    match file {
        Some("config.json") => send("200 OK", &format!("{common}ETag: \"{}\"\r\n", "c".repeat(40)), b"{}"),
        Some("model.safetensors" | "sub/w.gguf" | "w.gguf") => {
            let tag = sha256_hex(body);
            let mut bytes = body.to_vec();
            if mood == Mood::Lies {
                bytes[0] ^= 1;
            }
            let headers = format!(
                "{common}ETag: \"x\"\r\nX-Linked-Etag: \"{tag}\"\r\nX-Linked-Size: {}\r\n",
                body.len()
            );
            match request.range.filter(|r| *r < bytes.len() && mood != Mood::WholeOnly) {
                Some(from) => {
                    let range =
                        format!("Content-Range: bytes {from}-{}/{}\r\n", bytes.len() - 1, bytes.len());
                    send("206 Partial Content", &format!("{headers}{range}"), &bytes[from..]);
                }
                None => send("200 OK", &headers, &bytes),
            }
        }
        _ => send("404 Not Found", "", b"none"),
    }
}

fn home(hub: &Hub) -> Home {
    let mut home = Home::new();
    home.set("HF_ENDPOINT", &hub.address);
    home
}

fn body() -> Vec<u8> {
    (0..300_000u32).map(|i| (i * 7 % 251) as u8).collect()
}

#[test]
fn a_file_lands_in_the_shared_cache_layout_and_the_second_pull_fetches_nothing() {
    let hub = Hub::start(body());
    let home = home(&hub);
    let first = home.run(&["pull", "--json", "hf:o/n:sub/w.gguf"]).json();
    let root = home.path().join(".cache/huggingface/hub/models--o--n");
    let file = root.join("snapshots").join(COMMIT).join("sub/w.gguf");
    assert_eq!(first["path"], file.display().to_string());
    assert_eq!(first["sha256"], sha256_hex(body()));
    assert_eq!(first["cached"], false);
    assert_eq!(std::fs::read(&file).unwrap(), body());
    assert!(file.is_symlink(), "the snapshot links to the blob");
    assert!(root.join("blobs").join(sha256_hex(body())).is_file());
    assert_eq!(std::fs::read_to_string(root.join("refs/main")).unwrap(), COMMIT);

    hub.requests();
    let second = home.run(&["pull", "--json", "hf:o/n:sub/w.gguf"]).json();
    assert_eq!(second["cached"], true);
    assert_eq!(hub.requests(), ["HEAD /o/n/resolve/main/sub/w.gguf HTTP/1.1"]);

    let pinned = home.run(&["pull", "--json", "--sha256", &sha256_hex(body()), "hf:o/n:sub/w.gguf"]).json();
    assert_eq!(pinned["cached"], true);
    let offline = home.run(&["--offline", "pull", "--json", "hf:o/n:sub/w.gguf"]).json();
    assert_eq!(offline["path"], first["path"]);
    assert_eq!(hub.requests(), [""; 0], "what is pinned or offline asks nobody");
}

#[test]
fn a_whole_repository_gives_its_weights_and_text_files() {
    let hub = Hub::start(body());
    let home = home(&hub);
    let pulled = home.run(&["pull", "--json", "hf:o/n"]).json();
    let folder = std::path::PathBuf::from(pulled["path"].as_str().unwrap());
    let mut names: Vec<_> =
        std::fs::read_dir(&folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    assert_eq!(names, ["config.json", "model.safetensors"]);
    let offline = home.run(&["--offline", "pull", "--json", "hf:o/n"]).json();
    assert_eq!(offline["path"], pulled["path"]);
}

#[test]
fn a_download_that_stopped_goes_on_where_it_was() {
    let hub = Hub::start(body());
    let home = home(&hub);
    hub.be(Mood::Cuts(100_000));
    let cut = home.run(&["pull", "hf:o/n:w.gguf"]);
    assert_eq!(cut.code, Some(2), "{}", cut.stderr);
    assert!(cut.stderr.contains("stopped at 100000 of 300000 bytes"), "{}", cut.stderr);
    assert!(cut.stderr.contains("hint: run the same command again"), "{}", cut.stderr);
    hub.be(Mood::Good);
    hub.requests();
    let whole = home.run(&["pull", "--json", "hf:o/n:w.gguf"]).json();
    assert_eq!(whole["sha256"], sha256_hex(body()));
    assert_eq!(hub.requests()[1], "GET /o/n/resolve/main/w.gguf HTTP/1.1 from 100000");
}

#[test]
fn a_server_without_ranges_starts_over() {
    let hub = Hub::start(body());
    let home = home(&hub);
    hub.be(Mood::Cuts(1000));
    assert_eq!(home.run(&["pull", "hf:o/n:w.gguf"]).code, Some(2));
    hub.be(Mood::WholeOnly);
    assert_eq!(home.run(&["pull", "--json", "hf:o/n:w.gguf"]).json()["sha256"], sha256_hex(body()));
}

#[test]
fn bytes_with_another_hash_are_not_kept() {
    let hub = Hub::start(body());
    let home = home(&hub);
    hub.be(Mood::Lies);
    let wrong = home.run(&["pull", "hf:o/n:w.gguf"]);
    assert_eq!(wrong.code, Some(2));
    assert!(
        wrong.stderr.starts_with("pull w.gguf") && wrong.stderr.contains("was expected"),
        "{}",
        wrong.stderr
    );
    let blobs = home.path().join(".cache/huggingface/hub/models--o--n/blobs");
    assert_eq!(std::fs::read_dir(blobs).unwrap().count(), 0);

    hub.be(Mood::Good);
    hub.requests();
    let other = home.run(&["pull", "--sha256", &"0".repeat(64), "hf:o/n:w.gguf"]);
    assert_eq!(other.code, Some(2));
    assert!(!hub.requests().iter().any(|r| r.starts_with("GET")), "the hub's tag already says no");
}

#[test]
fn a_missing_file_and_a_closed_door_are_told_apart() {
    let hub = Hub::start(body());
    let mut home = home(&hub);
    let missing = home.run(&["pull", "hf:o/n:no.gguf"]);
    assert_eq!(missing.code, Some(2));
    assert_eq!(
        missing.stderr,
        "error: `hf:o/n:no.gguf` does not exist: the server answered 404\n\
         hint: check the spelling of repository, revision and file\n"
    );
    let closed = home.run(&["pull", "hf:secret/n:w.gguf"]);
    assert_eq!(
        closed.stderr,
        "error: no access to `hf:secret/n:w.gguf`: the server answered 401\n\
         hint: set HF_TOKEN to a token that may read it (or check the spelling)\n"
    );
    home.set("HF_TOKEN", "open-sesame");
    assert_eq!(home.run(&["pull", "--json", "hf:secret/n:w.gguf"]).json()["cached"], false);
}

#[test]
fn the_first_source_that_answers_wins_and_an_unreachable_hub_falls_back_to_the_cache() {
    let hub = Hub::start(body());
    let mut home = home(&hub);
    let local = home.write("here.gguf", "abc");
    let found = home.run(&["pull", "--json", "gone.gguf", "hf:o/n:no.gguf", "here.gguf"]).json();
    assert_eq!(found["reference"], "here.gguf");
    assert_eq!(found["sha256"], sha256_hex(std::fs::read(local).unwrap()));

    home.run(&["pull", "--json", "hf:o/n:w.gguf"]).json();
    home.set("HF_ENDPOINT", "http://127.0.0.1:9"); // the discard port: nobody listens
    let cached = home.run(&["pull", "--json", "hf:o/n:w.gguf"]);
    assert_eq!(cached.json()["cached"], true);
    assert!(cached.stderr.contains("using the cached copy"), "{}", cached.stderr);
    let none = home.run(&["pull", "hf:o/n:other.gguf"]);
    assert_eq!(none.code, Some(2));
    assert!(none.stderr.contains("cannot reach `http://127.0.0.1:9`"), "{}", none.stderr);
}

#[test]
fn all_parts_of_a_split_come_whichever_is_named() {
    let hub = Hub::start(Vec::new());
    let first = repository().join("fixtures/gguf-split/llama-f32-00001-of-00003.gguf");
    let sha256 = draftsmith::formats::gguf::content_sha256(&first).unwrap();
    for reference in ["hf:o/split:llama-f32-00002-of-00003.gguf", "hf:o/split"] {
        let mut home = Home::new();
        home.set("HF_ENDPOINT", &hub.address);
        let pulled = home.run(&["pull", "--json", reference]).json();
        assert_eq!(
            (pulled["sha256"].as_str(), pulled["cached"].as_bool()),
            (Some(sha256.as_str()), Some(false))
        );
        let path = std::path::PathBuf::from(pulled["path"].as_str().unwrap());
        assert!(path.ends_with("llama-f32-00001-of-00003.gguf"), "{pulled}");
        for no in 1..=3 {
            assert!(path.with_file_name(format!("llama-f32-0000{no}-of-00003.gguf")).is_file());
        }
        let shown = home.run(&["inspect", "--json", &path.display().to_string()]).json();
        assert_eq!(shown["sha256"], sha256);
        // Without the network, and pinned by the hash over all parts.
        assert_eq!(home.run(&["--offline", "pull", "--json", reference]).json()["sha256"], sha256);
        if reference.contains(':') && reference.ends_with(".gguf") {
            let args = ["pull", "--json", "--sha256", &sha256, reference];
            assert_eq!(home.run(&args).json()["cached"], true);
            let wrong = home.run(&["pull", "--sha256", &"0".repeat(64), reference]);
            assert_eq!(wrong.code, Some(2), "{}", wrong.stderr);
        }
    }
    let mut home = Home::new();
    home.set("HF_ENDPOINT", &hub.address);
    let missing = home.run(&["pull", "hf:o/split:llama-f32-00001-of-00004.gguf"]);
    assert_eq!(missing.code, Some(2));
    assert!(missing.stderr.contains("hint: "), "{}", missing.stderr);
}
