//! Stages `regenerate` and `capture` over several servers, of which some are slow, die, come back or are not what they
//! should be.

use std::collections::BTreeSet;
use std::net::TcpListener;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use draftsmith::formats::safetensors_dir::Dtype;

use crate::capture_servers::{LAYERS, arguments as capture_arguments, cache, vllm};
use crate::fake_capture::{FakeCapture, Fault as CaptureFault, Started};
use crate::fake_http::Life;
use crate::fake_openai::{Fake, Fault, Protocol, Said};
use crate::regenerate::{answers, arguments, speak, trouble};
use crate::stages::{bytes, finish, kill_when};
use crate::support::{Ended, Home};

fn local() -> TcpListener {
    TcpListener::bind("127.0.0.1:0").unwrap()
}

/// `regenerate.server.urls` of these addresses.
fn urls(addresses: &[&str]) -> String {
    format!("regenerate.server.urls=[\"{}\"]", addresses.join("\", \""))
}

/// An address that nobody listens at.
fn nowhere() -> String {
    format!("http://{}/v1", local().local_addr().unwrap())
}

fn after(pause: Duration) -> impl Fn(&str) -> Said + Send + Sync {
    move |prompt| {
        std::thread::sleep(pause);
        speak(prompt)
    }
}

/// What is made of the answers, in the order of the data.
fn made(dir: &Path) -> [Vec<u8>; 2] {
    ["train.tokens", "validation.jsonl"].map(|file| bytes(dir.join("regenerate").join(file)))
}

#[test]
fn four_hundred_rows_over_three_servers_of_which_one_dies_and_one_is_slow_lose_and_double_none() {
    let home = Home::new();
    let (alone, together) = (home.path().join("alone"), home.path().join("together"));
    let one = Fake::start(Protocol::default(), speak, |_| None);
    let url = format!("regenerate.server.url={}", one.url());
    finish(home.spawn(&arguments(&alone, &["regenerate.max_rows=400", &url])));

    let well = Fake::start(Protocol::default(), after(Duration::from_millis(20)), |_| None);
    let slow = Fake::start(Protocol::default(), after(Duration::from_millis(150)), |_| None);
    let life = Life::default();
    let end = life.clone();
    // In the middle of an answer, after the held-out rows.
    let dying = Fake::start_at(local(), life.clone(), Protocol::default(), speak, move |nth| {
        (nth >= 70).then(|| {
            end.end();
            Fault::Cut
        })
    });
    let more = [&urls(&[well.url(), slow.url(), dying.url()]), "regenerate.batch_size=4"];
    let said = finish(home.spawn(&arguments(&together, &[&more[..], &["regenerate.max_rows=400"]].concat())));
    assert!(life.is_over(), "it died");
    // 400 rows and the 40 that are held out; `answers` fails where a row is there twice.
    assert_eq!(answers(&together).len(), 440);
    assert_eq!(answers(&together), answers(&alone));
    assert_eq!(made(&together), made(&alone), "who answered is not to be seen");
    let (by_well, by_slow, by_dying) =
        (well.take_prompts().len(), slow.take_prompts().len(), dying.take_prompts().len());
    assert!(by_well > by_slow && by_slow > 0 && by_dying >= 70, "{by_well}, {by_slow}, {by_dying}");
    assert!(said.contains(", 2 of 3 servers"), "{said}");
    assert!(said.contains(&format!("`{}` is left out: ", dying.url())), "{said}");
    for fake in [&well, &slow, &dying] {
        assert!(said.contains(&format!("`{}`: ", fake.url())), "each has its count: {said}");
    }
}

#[test]
fn kills_while_three_servers_answer_under_all_faults_lose_and_double_nothing() {
    let home = Home::new();
    let (alone, dir) = (home.path().join("alone"), home.path().join("run"));
    let one = Fake::start(Protocol::default(), speak, |_| None);
    let url = format!("regenerate.server.url={}", one.url());
    finish(home.spawn(&arguments(&alone, &["regenerate.max_rows=100", &url])));
    let fakes: Vec<Fake> =
        (0..3).map(|seed| Fake::start(Protocol::default(), speak, trouble(20 + seed))).collect();
    let addresses: Vec<&str> = fakes.iter().map(Fake::url).collect();
    let rows = ["regenerate.max_rows=100", "regenerate.server.timeout_s=1", "regenerate.batch_size=3"];
    let several = urls(&addresses);
    let more = [&rows[..], &[&several, "regenerate.server.weights=[1, 2.5, 0.1]"]].concat();
    let lines = || {
        let text = std::fs::read_to_string(dir.join("regenerate/answers.jsonl"));
        text.map_or(0, |text| text.lines().count())
    };
    for wanted in [20, 60, 110] {
        let killed = kill_when(home.spawn(&arguments(&dir, &more)), || lines() >= wanted);
        assert!(killed, "the run ended before it was killed");
    }
    // The rest by one of them: the rows are those of the data, not of the servers.
    let last = format!("regenerate.server.url={}", addresses[0]);
    finish(home.spawn(&arguments(&dir, &[&rows[..], &[&last]].concat())));
    assert_eq!(answers(&dir), answers(&alone));
    assert_eq!(made(&dir), made(&alone));
    fakes.iter().for_each(|fake| drop(fake.take_prompts()));
}

#[test]
fn a_server_that_comes_back_is_used_again_and_one_that_comes_back_as_another_model_is_not() {
    let home = Home::new();
    for (name, more_prompt_tokens) in [("same", 0), ("another", 1)] {
        let (listener, asked) = (local(), Arc::new(AtomicU64::new(0)));
        let address = format!("http://{}/v1", listener.local_addr().unwrap());
        drop(listener);
        let (well, began) = (Arc::clone(&asked), Instant::now());
        // Once it has answered a while, it waits until the other one was tried.
        let patient = Fake::start(
            Protocol::default(),
            move |prompt| {
                let nth = well.fetch_add(1, Ordering::SeqCst);
                while (100..1 << 32).contains(&nth)
                    && well.load(Ordering::SeqCst) < 1 << 32
                    && began.elapsed() < Duration::from_secs(60)
                {
                    std::thread::sleep(Duration::from_millis(5));
                }
                speak(prompt)
            },
            |_| None,
        );
        let dir = home.path().join(name);
        let more = [&urls(&[patient.url(), &address]), "regenerate.max_rows=100", "regenerate.batch_size=2"];
        let run = home.spawn(&arguments(&dir, &more));
        while asked.load(Ordering::SeqCst) < 100 {
            std::thread::sleep(Duration::from_millis(5));
        }
        let listener = TcpListener::bind(address.trim_start_matches("http://").trim_end_matches("/v1"));
        let tried = Arc::clone(&asked);
        let back = Fake::start_at(
            listener.unwrap(),
            Life::default(),
            Protocol { more_prompt_tokens, ..Protocol::default() },
            move |prompt| {
                tried.fetch_add(1 << 32, Ordering::SeqCst);
                speak(prompt)
            },
            |_| None,
        );
        // One of another model is never asked for an answer, so nobody else can tell that it was tried.
        if more_prompt_tokens > 0 {
            std::thread::sleep(Duration::from_secs(3));
            asked.fetch_add(1 << 32, Ordering::SeqCst);
        }
        let said = finish(run);
        assert_eq!(answers(&dir).len(), 140);
        assert!(said.contains(&format!("`{address}` is left out: no connection")), "{said}");
        assert_eq!(back.take_prompts().is_empty(), more_prompt_tokens > 0, "{said}");
        assert_eq!(said.contains(&format!("`{address}` answers again")), more_prompt_tokens == 0, "{said}");
    }
}

#[test]
fn servers_are_checked_before_the_first_row_and_each_that_is_wrong_is_named() {
    let home = Home::new();
    let dir = home.path().join("run");
    let check = |protocols: [Protocol; 2]| {
        let fakes = protocols.map(|protocol| Fake::start(protocol, speak, |_| None));
        let several = urls(&[fakes[0].url(), fakes[1].url()]);
        let args = arguments(&dir, &["--quiet", &several, "regenerate.max_rows=3"]);
        let ended = Ended::from(home.spawn(&args).wait_with_output().unwrap());
        assert_eq!(ended.code, Some(2), "{}", ended.stderr);
        assert!(fakes.iter().all(|fake| fake.take_prompts().is_empty()), "nothing was answered");
        ended.stderr.replace(fakes[0].url(), "[A]").replace(fakes[1].url(), "[B]")
    };
    let plain = Protocol::default;
    let other = || Protocol { more_prompt_tokens: 1, ..plain() };
    insta::assert_snapshot!(check([plain(), other()]));
    insta::assert_snapshot!(check([other(), other()]));
    insta::assert_snapshot!(check([plain(), Protocol { models: vec!["tiny", "b"], ..plain() }]));
    insta::assert_snapshot!(check([Protocol { models: vec!["large"], ..plain() }, plain()]));
    insta::assert_snapshot!(check([Protocol { key: Some("open"), ..plain() }, plain()]));
    // None is there: at once, and both are named.
    let (a, b) = (nowhere(), nowhere());
    let args = arguments(&dir, &["--quiet", &urls(&[&a, &b])]);
    let ended = Ended::from(home.spawn(&args).wait_with_output().unwrap());
    assert_eq!(ended.code, Some(2));
    insta::assert_snapshot!(ended.stderr.replace(&a, "[A]").replace(&b, "[B]"));
}

#[test]
fn when_all_servers_are_lost_one_error_names_each_and_the_next_call_goes_on() {
    let home = Home::new();
    let dir = home.path().join("run");
    let life = Life::default();
    let end = life.clone();
    let failing = Fake::start(Protocol::default(), speak, |nth| (nth >= 40).then_some(Fault::Status(500)));
    let dying = Fake::start_at(local(), life, Protocol::default(), speak, move |nth| {
        (nth >= 30).then(|| {
            end.end();
            Fault::Hangup
        })
    });
    let rows = ["regenerate.max_rows=60", "regenerate.batch_size=3", "regenerate.server.retries=2"];
    let several = urls(&[failing.url(), dying.url()]);
    let ended = home.spawn(&arguments(&dir, &[&rows[..], &["--quiet", &several]].concat()));
    let ended = Ended::from(ended.wait_with_output().unwrap());
    assert_eq!(ended.code, Some(2), "{}", ended.stderr);
    let error = ended.stderr.lines().find(|line| line.starts_with("error: ")).unwrap();
    for part in [failing.url(), dying.url(), "no server is left for `", "status 500"] {
        assert!(error.contains(part), "{error}");
    }
    assert!(ended.stderr.contains("\nhint: ") && ended.stderr.contains("goes on where this stopped"));
    let there = answers(&dir).len();
    assert!((40..100).contains(&there), "{there}");
    let well = Fake::start(Protocol::default(), speak, |_| None);
    let url = format!("regenerate.server.url={}", well.url());
    finish(home.spawn(&arguments(&dir, &[&rows[..], &[&url]].concat())));
    assert_eq!(answers(&dir).len(), 100);
    let rows: BTreeSet<String> = well.take_prompts().into_iter().collect();
    assert!(rows.len() >= 100 - there && rows.len() < 100, "{} of {there}", rows.len());
}

#[test]
fn a_cache_by_three_servers_of_which_one_dies_and_one_is_slow_has_the_bytes_of_one_captured_here() {
    let home = Home::new();
    let (here, there) = (home.path().join("here"), home.path().join("there"));
    finish(home.spawn(&capture_arguments(&here, "", &[])));
    let folders = ["a", "b", "c"].map(|name| home.path().join(name));
    folders.iter().for_each(|folder| std::fs::create_dir(folder).unwrap());
    let [a, b, c] = folders.each_ref().map(|folder| vllm(folder, Dtype::F32));
    let well = FakeCapture::start(a, None, |_| None);
    let slow = FakeCapture::start(b, None, |_| {
        std::thread::sleep(Duration::from_millis(60));
        None
    });
    let dying = FakeCapture::start(c, None, |nth| (nth >= 12).then_some(CaptureFault::Hangup));
    let server = |more: &str| {
        format!(
            "kind = \"vllm\", urls = [\"{}\", \"{}\", \"{}\"], shared_dirs = [\"{}\", \"{}\", \"{}\"], {more}",
            well.url(),
            slow.url(),
            dying.url(),
            folders[0].display(),
            folders[1].display(),
            folders[2].display()
        )
    };
    let shards = || {
        let text = std::fs::read_to_string(there.join("capture/manifest.json")).unwrap_or_default();
        text.matches("dscache").count()
    };
    let killed =
        kill_when(home.spawn(&capture_arguments(&there, &server("concurrency = 2"), &[])), || shards() > 2);
    assert!(killed, "the run ended before it was killed");
    let said = finish(home.spawn(&capture_arguments(&there, &server("concurrency = 3"), &[])));
    assert_eq!(cache(&here), cache(&there));
    assert!(said.contains(" of 3 servers"), "{said}");
    let (by_well, by_slow) = (well.take_rows().len(), slow.take_rows().len());
    assert!(by_well > by_slow && by_slow > 0, "{by_well}, {by_slow}");

    // Pairs of SGLang's, and states of other layers by one of two.
    let pairs = home.path().join("pairs");
    let layers = [0, 1].map(|_| FakeCapture::start(Started::SglangLayers(LAYERS.to_vec()), None, |_| None));
    let ends = [0, 1].map(|_| FakeCapture::start(Started::SglangFinal, None, |_| None));
    let both = |fakes: &[FakeCapture; 2]| format!("[\"{}\", \"{}\"]", fakes[0].url(), fakes[1].url());
    let server = format!("kind = \"sglang\", urls = {}, final_urls = {}", both(&layers), both(&ends));
    finish(home.spawn(&capture_arguments(&pairs, &server, &[])));
    assert_eq!(cache(&here), cache(&pairs));
    assert!(layers.iter().chain(&ends).all(|fake| !fake.take_rows().is_empty()));
    let odd = FakeCapture::start(Started::SglangLayers(vec![0, 2, 3]), None, |_| None);
    let server = format!(
        "kind = \"sglang\", urls = [\"{}\", \"{}\"], final_urls = {}",
        layers[0].url(),
        odd.url(),
        both(&ends)
    );
    let args = capture_arguments(&home.path().join("odd"), &server, &["--quiet"]);
    let ended = Ended::from(home.spawn(&args).wait_with_output().unwrap());
    assert_eq!(ended.code, Some(2), "{}", ended.stderr);
    let names = format!("`{}` gave states of `row 0` that are nearest to the output of layer 0", odd.url());
    assert!(ended.stderr.contains(&names), "{}", ended.stderr);
}
