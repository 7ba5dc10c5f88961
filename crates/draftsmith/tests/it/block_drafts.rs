//! Drafts that propose a block, from the run file to text.

use crate::stages::finish;
use crate::support::{Home, repository};

/// The smoke recipe, cut down to the least that passes through all stages with a block of four.
fn arguments(dir: &str, method: &str) -> Vec<String> {
    let size = match method {
        "p-eagle" => ["draft.p-eagle.layers=1".to_owned(), "draft.p-eagle.depths=4".to_owned()],
        _ => [format!("draft.{method}.layers=2"), format!("draft.{method}.block_size=4")],
    };
    let own = [
        "data.sources.0.max_rows=6",
        "regenerate.max_new_tokens=12",
        "capture.shard_rows=6",
        "draft.vocab_size=64",
        "draft.intermediate=16",
        "draft.init=random",
        "train.epochs=1",
        "train.max_steps=3",
        "train.tokens_per_step=256",
        "train.pack_length=256",
        "validate.every=3",
        "validate.prompts=2",
        "validate.max_new_tokens=8",
        "validate.depth=3",
        "bench.limit=1",
        "bench.max_new_tokens=8",
        "bench.depth=3",
    ];
    let start = ["run".to_owned(), "recipes/smoke.toml".to_owned(), format!("run.dir={dir}")];
    let method = format!("draft.method={method}");
    start.into_iter().chain([method]).chain(size).chain(own.map(str::to_owned)).collect()
}

/// A run, its bundle's check, and the same text with the draft as without.
fn from_run_file_to_text(method: &str) {
    let home = Home::new();
    let dir = home.path().join("run");
    finish(home.spawn(&arguments(&dir.display().to_string(), method)));
    let bundle = dir.join("bundle").display().to_string();
    let target = repository().join("fixtures/tiny-target").display().to_string();
    let checked = home.run(&["bundle", "check", &bundle, "--target", &target, "--json"]);
    assert_eq!(checked.code, Some(0), "{}", checked.stderr);
    for depth in ["1", "3"] {
        let prompt =
            ["generate", "--target", &target, "--prompt", "Calculate 22 + 20.", "--max-new-tokens", "24"];
        let plain = home.run(&[prompt.as_slice(), &["--json"]].concat()).json();
        let with = [prompt.as_slice(), &["--bundle", &bundle, "--depth", depth, "--json"]].concat();
        assert_eq!(home.run(&with).json()["text"], plain["text"], "{method}, depth {depth}");
        let prove = [prompt.as_slice(), &["--bundle", &bundle, "--depth", depth, "--prove"]].concat();
        let proved = home.run(&prove);
        assert_eq!(proved.code, Some(0), "{}", proved.stderr);
    }
    let workload = repository().join("fixtures/tiny-target/eval.jsonl").display().to_string();
    let identity = ["bench", "identity", "--target", &target, "--bundle", &bundle, "--workload", &workload];
    let found = home.run(&[identity.as_slice(), &["--limit", "9", "--new-tokens", "16", "--json"]].concat());
    let found = found.json();
    assert_eq!(found["identical"], true, "{method}: {}", found["differences"]);
    let ways = found["ways"].as_array().unwrap();
    let with_draft = |way: &str| ways.iter().filter(|w| w.as_str().unwrap().starts_with(way)).count();
    assert_eq!(["chain 3", "chain 7", "tree 16", "automatic"].map(with_draft), [4; 4], "{ways:?}");
    let bench = ["bench", "--bundle", &bundle, "--target", &target, "--workload", &workload, "--limit", "2"];
    let measured = home.run(&[bench.as_slice(), &["--depth", "3", "--max-new-tokens", "8"]].concat());
    assert_eq!(measured.code, Some(0), "{}", measured.stderr);
    // Out to the layouts of others, compared by a reader of its own, and back: the text stays.
    for format in ["vllm", "sglang", "specforge", "speculators", "gguf"] {
        let out = home.path().join(format).display().to_string();
        let args = ["bundle", "export", &bundle, "--format", format, "--out", &out, "--target", &target];
        let ended = home.run(&args);
        if (method, format) == ("p-eagle", "gguf") {
            let wanted = "error: a draft of the kind `p-eagle` has no place in the layout `gguf`\nhint: ";
            assert!(ended.code == Some(2) && ended.stderr.contains(wanted), "{}", ended.stderr);
            assert!(!home.path().join(format).exists());
            continue;
        }
        assert_eq!(ended.code, Some(0), "{method} {format}: {}", ended.stderr);
        let verified = home.run(&["bundle", "verify-export", &out, "--bundle", &bundle]);
        assert_eq!(verified.code, Some(0), "{method} {format}: {}{}", verified.stdout, verified.stderr);
        let back = home.path().join(format!("{format}-back")).display().to_string();
        let import = ["bundle", "import", &out, "--target", &target, "--out", &back];
        let imported = home.run(&import);
        assert_eq!(imported.code, Some(0), "{method} {format}: {}", imported.stderr);
        let prompt =
            ["generate", "--target", &target, "--prompt", "Calculate 22 + 20.", "--max-new-tokens", "24"];
        let plain = home.run(&[prompt.as_slice(), &["--json"]].concat()).json();
        let with = [prompt.as_slice(), &["--bundle", &back, "--depth", "3", "--json"]].concat();
        assert_eq!(home.run(&with).json()["text"], plain["text"], "{method} {format}");
    }
}

#[test]
fn dflash_goes_from_run_file_to_text() {
    from_run_file_to_text("dflash");
}

#[test]
fn dspark_goes_from_run_file_to_text() {
    from_run_file_to_text("dspark");
}

#[test]
fn p_eagle_goes_from_run_file_to_text() {
    from_run_file_to_text("p-eagle");
}
