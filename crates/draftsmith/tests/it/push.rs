//! `push`, and what comes back by `pull`, against a hub of our own that checks every request.

use serde_json::Value;

use crate::bundles::{target, with_bundle};
use crate::fake_hub::{FakeHub, TOKEN, Trouble, commit_of};
use crate::support::{Ended, Home};

const PUSH: [&str; 4] = ["push", "hf:org/draft", "--bundle", "bundle"];

/// A home with a bundle, and a hub that it may write to.
fn with_hub() -> (Home, FakeHub) {
    let mut home = with_bundle();
    let hub = FakeHub::start(home.path().join("bundle"));
    home.set("HF_ENDPOINT", &hub.address).set("HF_TOKEN", TOKEN);
    (home, hub)
}

fn push(home: &Home, more: &[&str]) -> Ended {
    home.run(&[&PUSH, more].concat())
}

fn size(home: &Home, file: &str) -> u64 {
    std::fs::metadata(home.path().join("bundle").join(file)).unwrap().len()
}

#[track_caller]
fn refused(ended: &Ended, message: &str, hint: &str) {
    assert_eq!(ended.code, Some(2), "{}", ended.stderr);
    let last = |line: &&str| line.starts_with("error: ") || line.starts_with("hint: ");
    let lines: Vec<&str> = ended.stderr.lines().filter(last).collect();
    assert_eq!(lines.len(), 2, "{}", ended.stderr);
    assert!(lines[0].starts_with("error: ") && lines[0].contains(message), "{message} in {}", ended.stderr);
    assert!(lines[1].starts_with("hint: ") && lines[1].contains(hint), "{hint} in {}", ended.stderr);
}

#[test]
fn a_bundle_goes_to_a_hub_in_one_commit_and_comes_back_whole() {
    let (home, hub) = with_hub();
    let pushed = push(&home, &["--message", "First draft", "--json"]).json();
    let (weights, probe) = (size(&home, "model.safetensors"), size(&home, "probe.safetensors"));
    assert_eq!(
        hub.take_log(),
        [
            "create".to_string(),
            "preupload".into(),
            "batch".into(),
            format!("put {weights}"),
            "verify".into(),
            format!("put {probe}"),
            "verify".into(),
            "commit".into(),
        ]
    );
    assert_eq!(pushed["commit"], commit_of(1));
    assert_eq!(pushed["created"], true);
    assert_eq!(pushed["url"], format!("{}/org/draft", hub.address));
    assert_eq!(pushed["uploaded"], serde_json::json!(["model.safetensors", "probe.safetensors"]));
    assert_eq!(pushed["bytes_sent"], weights + probe);
    assert_eq!(hub.state().summary, "First draft");
    assert_eq!(hub.state().repo, Some(false));
    for (path, bytes) in &hub.state().files {
        assert_eq!(*bytes, std::fs::read(home.path().join("bundle").join(path)).unwrap(), "{path}");
    }
    let listed = pushed["committed"].as_array().unwrap().len();
    assert_eq!(hub.state().files.len(), listed, "{pushed}");

    // Others have it by its name, whole and checked.
    let target = target();
    let args = [
        "generate",
        "--bundle",
        "hf:org/draft",
        "--target",
        &target,
        "--prompt",
        "Calculate 2 + 3.",
        "--json",
    ];
    let answer =
        home.run(&[args.as_slice(), &["--depth", "2", "--prove", "--max-new-tokens", "8"]].concat()).json();
    assert_eq!(answer["identical"], true);
    let pulled = home.run(&["pull", "hf:org/draft", "--json"]).json();
    assert_eq!(pulled["cached"], true);
    let folder = pulled["path"].as_str().unwrap();
    assert!(folder.contains("/hub/models--org--draft/snapshots/"), "{folder}");
    assert_eq!(home.run(&["bundle", "check", folder, "--json"]).json()["holds"], true);
    hub.take_log();
    let checked = home.run(&["--offline", "bundle", "check", "hf:org/draft", "--json"]).json();
    assert_eq!((checked["holds"].clone(), hub.take_log()), (true.into(), Vec::new()));
    // The cache is shared with other tools: it is not written to.
    let card = home.run(&["bundle", "card", "hf:org/draft"]);
    refused(&card, "lies in the hub's cache", "cp -rL");
}

#[test]
fn pushed_again_nothing_is_sent_twice() {
    let (home, hub) = with_hub();
    push(&home, &["--json"]).json();
    hub.take_log();
    let again = push(&home, &["--json"]).json();
    assert_eq!(hub.take_log(), ["create", "preupload", "revision"], "{again}");
    assert_eq!((&again["commit"], &again["created"]), (&Value::from(commit_of(1)), &Value::from(false)));
    assert_eq!(again["committed"], serde_json::json!([]));
    assert_eq!(again["bytes_sent"], 0);
    assert_eq!(hub.state().commits, 1);
    // One file that differs is one file of a commit.
    hub.state().files.insert("NOTICE".to_string(), b"older".to_vec());
    let third = push(&home, &["--json"]).json();
    assert_eq!(third["committed"], serde_json::json!(["NOTICE"]));
    assert_eq!(hub.take_log(), ["create", "preupload", "commit"]);
    let said = push(&home, &[]);
    assert!(
        said.stdout.contains("0 files committed") && said.stdout.contains("--bundle hf:org/draft"),
        "{}",
        said.stdout
    );
}

#[test]
fn large_files_go_in_the_pieces_that_the_hub_asks_for() {
    let (home, hub) = with_hub();
    hub.state().piece = Some(40_000);
    push(&home, &["--json"]).json();
    let weights = size(&home, "model.safetensors") as usize;
    let log = hub.take_log();
    let sent: usize = log
        .iter()
        .take_while(|step| *step != "complete")
        .filter_map(|step| step.strip_prefix("put ")?.parse::<usize>().ok())
        .sum();
    assert!(weights > 80_000 && sent == weights, "{weights} bytes, {log:?}");
    assert!(log.contains(&"put 40000".to_string()) && log.contains(&"complete".to_string()), "{log:?}");
    assert_eq!(hub.state().commits, 1);
}

#[test]
fn what_goes_wrong_is_told_nothing_is_claimed_and_the_same_command_ends_it() {
    let cases = [
        (
            "create",
            Trouble::Status(401),
            "answered 401 when it was to create the repository `org/draft`: no, said the hub",
            "set HF_TOKEN",
        ),
        ("create", Trouble::Status(403), "answered 403", "may not write to `org/draft`"),
        ("create", Trouble::Status(404), "answered 404", "HF_ENDPOINT must be"),
        (
            "preupload",
            Trouble::Status(404),
            "answered 404 when it was to say how the files",
            "check that `org/draft`",
        ),
        ("preupload", Trouble::Empty, "makes no sense", "HF_ENDPOINT"),
        ("batch", Trouble::Status(500), "answered 500", "run the same command again later"),
        ("put", Trouble::Status(413), "answered 413 when it was to take `model.safetensors`", "too large"),
        ("put", Trouble::Cut, "failed while it was to take `model.safetensors`", "nothing was committed"),
        ("verify", Trouble::Status(500), "verify `model.safetensors`", "not sent again"),
        ("commit", Trouble::Status(409), "answered 409 when it was to commit", "changed at the same time"),
        ("commit", Trouble::Status(413), "answered 413", "too large"),
        ("commit", Trouble::Status(429), "answered 429", "wait some minutes"),
        ("commit", Trouble::Cut, "failed while it was to commit", "whether the commit was made is not known"),
        ("commit", Trouble::Empty, "it names no commit", "run the same command again"),
    ];
    let (home, hub) = with_hub();
    for (step, trouble, message, hint) in cases {
        hub.state().trouble = Some((step, trouble.clone()));
        let ended = push(&home, &[]);
        refused(&ended, message, hint);
        assert_eq!(ended.stdout, "", "{step} {trouble:?}");
        let state = hub.state();
        assert_eq!((state.commits, state.files.len()), (0, 0), "{step} {trouble:?}");
        assert!(state.trouble.is_none(), "{step} was not reached");
    }
    // Both large files came whole before: neither is sent again.
    hub.take_log();
    assert_eq!(push(&home, &["--json"]).json()["uploaded"], serde_json::json!([]));
    assert_eq!(hub.take_log(), ["create", "preupload", "batch", "commit"]);
}

#[test]
fn a_dry_run_asks_nobody_and_names_every_file() {
    let (mut home, hub) = with_hub();
    let plan = push(&home, &["--dry-run", "--private", "--json"]).json();
    assert_eq!(hub.take_log(), [""; 0]);
    assert_eq!((&plan["private"], &plan["revision"]), (&Value::from(true), &Value::from("main")));
    let files = plan["files"].as_array().unwrap();
    assert_eq!(files.last().unwrap()["path"], "bundle.json");
    let on_disk: u64 = files.iter().map(|file| size(&home, file["path"].as_str().unwrap())).sum();
    assert_eq!(plan["bytes"], on_disk);
    home.set("HF_TOKEN", "").set("HF_HUB_OFFLINE", "1");
    let said = push(&home, &["--dry-run"]);
    assert_eq!(said.code, Some(0), "{}", said.stderr);
    assert!(
        said.stdout.contains("model.safetensors") && said.stdout.contains("nothing was sent"),
        "{}",
        said.stdout
    );
    // Nobody else can fetch a target that lies on this machine.
    assert!(said.stderr.contains("warning: the bundle names its target as `tiny-target`"), "{}", said.stderr);
}

#[test]
fn tokens_come_from_the_usual_places_and_a_push_without_one_is_refused() {
    let (mut home, hub) = with_hub();
    home.set("HF_TOKEN", "");
    refused(&push(&home, &[]), "needs an access token", "/settings/tokens and set HF_TOKEN");
    home.write("secret", format!("{TOKEN}\n"));
    let path = home.path().join("secret").display().to_string();
    home.set("HF_TOKEN_PATH", path);
    assert_eq!(push(&home, &[]).code, Some(0));
    home.set("HF_TOKEN_PATH", "");
    home.write(".cache/huggingface/token", TOKEN);
    assert_eq!(push(&home, &[]).code, Some(0));
    hub.take_log();
    let offline = home.run(&[&["--offline"], &PUSH[..]].concat());
    refused(&offline, "needs the network", "--dry-run");
    for (reference, message, hint) in [
        ("org/draft", "is a path", "write `hf:org/draft`"),
        ("hf:org/draft:a.gguf", "is no repository", "hf:ORG/NAME"),
        ("pip:a==1:b", "is no repository", "hf:ORG/NAME"),
        ("hf:draft", "expected `ORG/NAME`", "hf:ORG/NAME"),
    ] {
        refused(&home.run(&["push", reference, "--bundle", "bundle"]), message, hint);
    }
    refused(
        &home.run(&["push", "hf:org/draft", "--bundle", "theirs"]),
        "has no `bundle.json`",
        "bundle.json",
    );
    home.write("bundle/NOTICE", "changed");
    refused(&push(&home, &[]), "NOTICE` has ", "bundle check");
    assert_eq!(hub.take_log(), [""; 0], "nobody is asked about what is wrong here");
}

#[test]
fn a_repository_that_stands_open_is_not_taken_for_a_private_one() {
    let (home, hub) = with_hub();
    assert_eq!(push(&home, &["--private", "--json"]).json()["created"], true);
    assert_eq!(hub.state().repo, Some(true));
    assert_eq!(hub.take_log()[..3], ["create", "show", "preupload"], "it is seen to be private first");
    push(&home, &["--private"]);
    assert_eq!(hub.take_log(), ["create", "show", "preupload", "revision"]);
    hub.state().repo = Some(false);
    refused(
        &push(&home, &["--private"]),
        "everybody may read repository `org/draft`",
        "leave `--private` out",
    );
    assert_eq!(hub.take_log(), ["create", "show"]);
    // A token that may write to this repository alone cannot make one, and need not.
    hub.state().may_not_create = true;
    assert_eq!(push(&home, &[]).code, Some(0));
    assert_eq!(hub.take_log(), ["create", "show", "preupload", "revision"]);
    hub.state().ignored = Some("NOTICE");
    refused(&push(&home, &[]), "ignores `NOTICE`", ".gitignore");
}

#[test]
fn a_pull_takes_nothing_that_the_bundle_does_not_list_as_it_is() {
    let (home, hub) = with_hub();
    push(&home, &["--json"]).json();
    let all = hub.state().files.clone();
    let pull = || home.run(&["pull", "hf:org/draft", "--json"]);
    let snapshot = home.path().join(".cache/huggingface/hub/models--org--draft/snapshots").join(commit_of(1));

    // Small files are checked by the list alone: the hub does not name their sha256.
    let mut other = all["NOTICE"].clone();
    other[0] ^= 1;
    hub.state().files.insert("NOTICE".to_string(), other);
    refused(&pull(), "file `NOTICE` of bundle `hf:org/draft` has sha256", "push it again");
    assert!(!snapshot.join("NOTICE").exists() && !snapshot.join("model.safetensors").exists());
    refused(&home.run(&["--offline", "bundle", "check", "hf:org/draft"]), "not there", "with the network");
    // Large ones are found wrong before a byte comes.
    hub.state().files.insert("NOTICE".to_string(), all["NOTICE"].clone());
    let mut other = all["model.safetensors"].clone();
    other[9] ^= 1;
    hub.state().files.insert("model.safetensors".to_string(), other);
    hub.take_log();
    refused(&pull(), "file `model.safetensors` of bundle `hf:org/draft` has sha256", "push it again");
    hub.state().files.insert("model.safetensors".to_string(), b"short".to_vec());
    refused(&pull(), "has 5 bytes, but `bundle.json` lists", "push it again");
    hub.state().files.remove("model.safetensors");
    refused(&pull(), "the repository lacks it", "push it again");

    hub.state().files.clone_from(&all);
    assert_eq!(pull().json()["cached"], false);
    hub.take_log();
    assert_eq!(pull().json()["cached"], true);
    assert_eq!(hub.take_log(), ["revision", "file"], "the list alone is asked for");
    // A file that the disk lost or damaged comes again.
    let blob = snapshot.join("model.safetensors").canonicalize().unwrap();
    let mut bytes = std::fs::read(&blob).unwrap();
    bytes[100] ^= 1;
    std::fs::write(&blob, bytes).unwrap();
    pull().json();
    assert_eq!(std::fs::read(&blob).unwrap(), all["model.safetensors"]);

    // A repository of something else is no bundle, and nothing of it is fetched for one.
    hub.state().files.remove("bundle.json");
    hub.state().commits += 1;
    let ended = home.run(&["bundle", "check", "hf:org/draft"]);
    refused(&ended, "`hf:org/draft` holds no bundle", "bundle import hf:org/draft");
    let file = home.run(&["bundle", "check", "hf:org/draft:model.safetensors"]);
    refused(&file, "a bundle is a whole repository", "hf:ORG/NAME");
}
