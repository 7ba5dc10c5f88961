//! A draft that panics, over real HTTP: one request, at most, is answered with 500.

use std::any::Any;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use draftsmith_core::{LayerId, TargetTokenId, TokenTree};
use draftsmith_decode::{Ask, Children, Committed, DraftPlan, Drafter, DrafterSession, Engine, Node, Shape};
use draftsmith_kernels::Cpu;
use draftsmith_model::{Precision, Target};
use draftsmith_serve::{DraftInfo, Drafts, Limits, Loaded, Model, Refused, Server};
use draftsmith_text::{SpecialIds, Tokenizer};

use crate::common;

/// Faults still to come: when a sequence is begun, and while it is decoded.
#[derive(Default)]
struct Shaky {
    begins: AtomicU32,
    steps: AtomicU32,
}

struct ShakySession;

fn due(faults: &AtomicU32) -> bool {
    faults.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1)).is_ok()
}

impl Drafter<Cpu> for Shaky {
    fn target_layers(&self) -> &[LayerId] {
        &[]
    }
    fn begin(&self) -> Box<dyn DrafterSession<Cpu>> {
        assert!(!due(&self.begins), "a fault at the begin");
        Box::new(ShakySession)
    }
    fn take_in(&self, _: &mut [Committed<'_, Cpu>]) {}
    fn roots(&self, asks: &mut [Ask<'_, Cpu>]) -> Vec<Children> {
        vec![Vec::new(); asks.len()]
    }
    fn expand(&self, _: &mut [Ask<'_, Cpu>], nodes: &[Node]) -> Vec<(u32, Children)> {
        nodes.iter().map(|_| (0, Vec::new())).collect()
    }
    fn propose(&self, asks: &mut [Ask<'_, Cpu>], shapes: &[Shape]) -> Vec<TokenTree> {
        let one = |(ask, shape): (&Ask<'_, Cpu>, &Shape)| {
            assert!(ask.position < 10 || !due(&self.steps), "a fault in the middle");
            TokenTree::chain((0..shape.depth.min(2) as u32).map(|i| TargetTokenId(300 + i)))
        };
        asks.iter().zip(shapes).map(one).collect()
    }
}

impl DrafterSession<Cpu> for ShakySession {
    fn as_any_mut(&mut self) -> &mut dyn Any {
        self
    }
}

struct NoDrafts;

impl Drafts<Cpu> for NoDrafts {
    fn load(&self, _: &Path) -> Result<Loaded<Cpu>, Refused> {
        Err(Refused { message: "none".into(), hint: None })
    }
}

fn server(drafter: Arc<Shaky>) -> Server {
    let fixture = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/tiny-target");
    let target = Arc::new(Target::load(Arc::new(Cpu::new(2)), &fixture, Precision::Stored).unwrap());
    let json = std::fs::read(fixture.join("tokenizer.json")).unwrap();
    let limits = Limits {
        sequences: 4,
        queue: 16,
        connections: 16,
        body_bytes: 1 << 16,
        request_time: Duration::from_secs(60),
        drain_time: Duration::from_secs(5),
        default_max_tokens: 16,
        watch_steps: 100,
    };
    let mut server = Server::start(common::options("127.0.0.1:0", limits)).unwrap();
    server
        .open(Model {
            name: "tiny".into(),
            sha256: "0123456789".into(),
            engine: Engine::new(target, Some(drafter)),
            draft: Some(DraftInfo {
                name: "shaky".into(),
                kind: "eagle3".into(),
                bundle: "nowhere".into(),
                sha256: None,
                plan: DraftPlan::Auto,
            }),
            tokenizer: Arc::new(Tokenizer::from_json(&json, SpecialIds::default()).unwrap()),
            template: None,
            cache_slots: 4096,
            drafts: Arc::new(NoDrafts),
        })
        .unwrap();
    server
}

/// Status and body.
fn ask(address: SocketAddr, body: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(address).unwrap();
    let (head, length) =
        ("POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close", body.len());
    write!(stream, "{head}\r\ncontent-length: {length}\r\n\r\n{body}").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head[9..12].parse().unwrap(), body.to_string())
}

/// The text of an answer.
fn text(body: &str) -> String {
    let body: serde_json::Value = serde_json::from_str(body).unwrap();
    body["choices"][0]["text"].as_str().unwrap().to_string()
}

#[test]
fn a_draft_that_panics_costs_one_request_at_most() {
    let shaky = Arc::new(Shaky::default());
    let server = server(Arc::clone(&shaky));
    let address = server.address();
    let body = r#"{"prompt": [1, 87, 85, 289, 201, 74], "max_tokens": 24, "ignore_eos": true, "seed": 3,
                   "draftsmith": {"draft": PLAN}}"#;
    let plain = body.replace("PLAN", r#""none""#);
    let drafted = body.replace("PLAN", r#"{"chain": 2}"#);
    let (status, wanted) = ask(address, &plain);
    assert_eq!(status, 200, "{wanted}");
    // Begun with a fault: status 500, in OpenAI's shape; the same request is answered the next time.
    shaky.begins.store(1, Ordering::SeqCst);
    let (status, failed) = ask(address, &drafted);
    assert!(status == 500 && failed.contains("\"code\":\"internal_error\""), "{failed}");
    // A fault in the middle of several: nobody pays.
    shaky.steps.store(1, Ordering::SeqCst);
    let askers: Vec<_> = (0..4)
        .map(|_| {
            let drafted = drafted.clone();
            std::thread::spawn(move || ask(address, &drafted))
        })
        .collect();
    for asker in askers {
        let (status, found) = asker.join().unwrap();
        assert_eq!((status, text(&found)), (200, text(&wanted)), "{found}");
    }
    assert_eq!(shaky.steps.load(Ordering::SeqCst), 0, "the fault came");
    let (status, found) = ask(address, &drafted);
    assert_eq!((status, text(&found)), (200, text(&wanted)));
    server.drain();
}
