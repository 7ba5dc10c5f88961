//! Bundles and targets by name: what is here, what belongs together, and what a bundle says to others.

use std::path::Path;

use serde_json::Value;

use crate::bundles::{target, with_bundle};
use crate::stages::finish;
use crate::support::{Ended, Home, repository};

const SHIPPED: &str = "smollm2-135m-instruct-eagle3";

fn of<'v>(list: &'v Value, kind: &str, name: &str) -> &'v Value {
    let found = list[kind].as_array().unwrap().iter().find(|item| item["name"] == name);
    found.unwrap_or_else(|| panic!("{name} in {list}"))
}

/// Every file below a folder.
fn files(folder: &Path) -> Vec<std::path::PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { found.extend(files(&path)) } else { found.push(path) }
    }
    found
}

/// The paths that a run names on this machine, target and prompts among them, are nowhere in its bundle; the bundle is
/// used by the run's folder all the same, wherever it was moved to, with the target that the run had.
#[test]
fn a_bundle_names_no_folder_of_its_maker_and_the_run_still_knows_its_target() {
    let home = Home::new();
    let tiny = repository().join("fixtures/tiny-target");
    let data = std::fs::read(tiny.join("prompts-train.jsonl")).unwrap();
    let secret = home.path().join("secret-place");
    home.write("secret-place/chats.jsonl", data);
    for file in
        ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
    {
        if let Ok(bytes) = std::fs::read(tiny.join(file)) {
            home.write(&format!("secret-place/my-target/{file}"), bytes);
        }
    }
    let eval = std::fs::read(tiny.join("eval.jsonl")).unwrap();
    home.write("secret-place/own.jsonl", eval);
    let place = secret.display();
    let text = format!(
        "[run]\nname = \"a\"\ndir = \"{place}/run\"\n[target]\nsource = \"{place}/my-target\"\n\
         [data]\nsources = [{{ path = \"{place}/chats.jsonl\", max_rows = 30 }}]\nmax_length = 256\nvalidation_rows = 4\n\
         [regenerate]\nmax_new_tokens = 16\n[capture]\nshard_rows = 8\n[draft]\nvocab_size = 64\n\
         [train]\nepochs = 6\nmax_steps = 8\ntokens_per_step = 256\npack_length = 256\n[validate]\nevery = 8\nprompts = 2\n\
         max_new_tokens = 8\n[bundle]\nlicense = \"MIT\"\n[bench]\nworkloads = [\"{place}/own.jsonl\"]\nlimit = 1\nmax_new_tokens = 8\n"
    );
    home.write("secret-place/a.toml", text);
    let file = secret.join("a.toml").display().to_string();
    finish(home.spawn(&["run".to_string(), file]));
    let bundle = secret.join("run/bundle");
    for path in files(&bundle) {
        let bytes = std::fs::read(&path).unwrap();
        let text = String::from_utf8_lossy(&bytes);
        let at =
            text.find("secret-place").map(|at| text[..at + 12].chars().rev().take(90).collect::<String>());
        let at = at.map(|near| near.chars().rev().collect::<String>());
        assert!(at.is_none(), "`{}` says `{}`", path.display(), at.unwrap_or_default());
    }
    let manifest: Value =
        serde_json::from_slice(&std::fs::read(bundle.join("bundle.json")).unwrap()).unwrap();
    assert_eq!(manifest["target"]["references"], serde_json::json!(["my-target"]));
    assert_eq!(manifest["training"]["data"][0]["name"], "chats.jsonl");
    let run = std::fs::read_to_string(bundle.join("run.toml")).unwrap();
    assert!(run.contains("dir = \"run\"") && run.contains("workloads = [\"own.jsonl\"]"), "{run}");
    let hash = draftsmith::formats::hash::sha256_hex(&run);
    assert_eq!(manifest["training"]["run_sha256"], hash);

    // One rule for all verbs: the folder of a run means its bundle, and the bundle's target is taken.
    std::fs::rename(secret.join("run"), home.path().join("moved")).unwrap();
    let eval = secret.join("own.jsonl").display().to_string();
    for args in [
        &["generate", "--bundle", "moved", "--prompt", "a", "--max-new-tokens", "4"][..],
        &["generate", "--bundle", "moved/bundle", "--prompt", "a", "--max-new-tokens", "4"],
        &["bench", "--bundle", "moved", "--workload", &eval, "--limit", "1", "--max-new-tokens", "4"],
        &[
            "bench",
            "identity",
            "--bundle",
            "moved",
            "--workload",
            &eval,
            "--limit",
            "1",
            "--new-tokens",
            "4",
            "--threads",
            "1",
        ],
        &[
            "bench",
            "decode",
            "--bundle",
            "moved",
            "--workload",
            &eval,
            "--limit",
            "1",
            "--new-tokens",
            "4",
            "--prefill-tokens",
            "8",
        ],
        &["bundle", "check", "moved"],
        &["bundle", "export", "moved", "--format", "gguf", "--out", "gguf"],
        &["bundle", "verify-export", "gguf", "--bundle", "moved"],
        &["bundle", "card", "moved"],
        &["doctor", "--draft", "moved", "--max-new-tokens", "8"],
        &["push", "hf:o/n", "--bundle", "moved", "--dry-run"],
    ] {
        let ended = home.run(args);
        let done = ended.code == Some(0) || (args[0] == "doctor" && ended.code == Some(1));
        assert!(done, "{args:?}: {}{}", ended.stdout, ended.stderr);
    }
    // Away from its run a bundle knows a name only, which the message says.
    std::fs::rename(home.path().join("moved/bundle"), home.path().join("alone")).unwrap();
    let lost = home.run(&["generate", "--bundle", "alone", "--prompt", "a"]);
    assert_eq!(lost.code, Some(2));
    assert!(lost.stderr.contains("my-target") && lost.stderr.contains("--target"), "{}", lost.stderr);
    let none = home.run(&["generate", "--bundle", "moved", "--prompt", "a"]);
    assert!(
        none.stderr.contains("has no bundle yet") && none.stderr.contains("draftsmith run "),
        "{}",
        none.stderr
    );
}

#[test]
fn bundles_and_targets_are_listed_with_what_belongs_together() {
    let home = with_bundle();
    let tiny = target();
    let list = home.run(&["list", ".", &tiny, "--json"]).json();
    let bundle = of(&list, "bundles", "./bundle");
    assert_eq!(
        (&bundle["title"], &bundle["kind"], &bundle["from"]),
        (&"theirs".into(), &"eagle3".into(), &"folder".into())
    );
    assert_eq!(bundle["problem"], Value::Null);
    let size: u64 =
        files(&home.path().join("bundle")).iter().map(|path| path.metadata().unwrap().len()).sum();
    assert_eq!(bundle["bytes"], size);
    let fits = bundle["fits"].as_array().unwrap();
    assert_eq!(fits, &vec![serde_json::json!({ "target": tiny, "by": "weights" })], "{list}");
    assert_eq!(of(&list, "targets", &tiny)["bundles"], serde_json::json!(["./bundle"]));
    // A draft that is no bundle is neither.
    assert!(!list["targets"].to_string().contains("theirs"), "{list}");
    // What ships is known wherever it is.
    let shipped = of(&list, "bundles", SHIPPED);
    assert_eq!(shipped["measured"]["identical"], true);
    assert!(shipped["measured"]["speedup"].as_f64().unwrap() > 1.0);

    let text = home.run(&["list", "bundle"]);
    assert!(
        text.stdout.contains("fits") || text.stdout.contains("its target is not here"),
        "{}",
        text.stdout
    );
    assert!(text.stdout.contains("not measured") && text.stdout.contains(SHIPPED), "{}", text.stdout);
    home.write("bundle/NOTICE", "changed");
    let list = home.run(&["list", "bundle", "--json"]).json();
    assert!(
        of(&list, "bundles", "bundle")["problem"].as_str().unwrap().contains("`NOTICE` has 7 bytes"),
        "{list}"
    );
    let wrong = home.run(&["list", "nowhere"]);
    assert!(wrong.code == Some(2) && wrong.stderr.contains("hint: give folders"), "{}", wrong.stderr);
}

fn in_repository(home: &Home, args: &[&str]) -> Ended {
    home.command(args).current_dir(repository()).output().unwrap().into()
}

#[test]
fn a_name_of_the_catalogue_stands_for_its_folder() {
    let home = Home::new();
    for name in [SHIPPED, "SmolLM2-135M-Instruct-EAGLE3"] {
        let checked = in_repository(&home, &["bundle", "check", name, "--json"]).json();
        assert_eq!(
            (&checked["holds"], &checked["name"]),
            (&true.into(), &"SmolLM2-135M-Instruct-EAGLE3".into())
        );
    }
    let list = in_repository(&home, &["list", "--json"]).json();
    let shipped = of(&list, "bundles", SHIPPED);
    assert!(shipped["path"].as_str().unwrap().ends_with(&format!("bundles/{SHIPPED}")), "{shipped}");
    let all = list["bundles"].as_array().unwrap();
    assert_eq!(all.iter().filter(|b| b["title"] == shipped["title"]).count(), 1, "{list}");
    // A folder that is there wins over a name.
    home.write(&format!("{SHIPPED}/readme.txt"), "x");
    let own = home.run(&["bundle", "check", SHIPPED]);
    assert!(own.stderr.contains("has no `bundle.json`"), "{}", own.stderr);
}

#[test]
fn what_is_no_bundle_is_told_with_what_could_be_meant() {
    let home = Home::new();
    for (written, hint) in [
        ("smollm2", format!("write `{SHIPPED}`; a bundle is")),
        ("org/draft", "write `hf:org/draft` if it is a repository".to_string()),
        ("runs/none/bundle", "`draftsmith list` shows".to_string()),
    ] {
        for args in [
            &["bundle", "check", written][..],
            &["generate", "--bundle", written, "--prompt", "a"],
            &["serve", "--bundle", written],
            &["push", "hf:o/n", "--bundle", written],
            &["bench", "tune", "--bundle", written, "--workload", "w"],
            &["bench", "compare", "--bundle", written, "--workload", "w"],
            &["quickstart", "--bundle", written],
        ] {
            let ended = home.run(args);
            assert_eq!(ended.code, Some(2), "{args:?}");
            assert!(
                ended.stderr.starts_with(&format!("error: bundle `{written}` does not exist\nhint: ")),
                "{args:?}: {}",
                ended.stderr
            );
            assert!(ended.stderr.contains(&hint), "{args:?}: {}", ended.stderr);
        }
    }
    // A model's name on its page is no path.
    for args in [
        &["generate", "--target", "Qwen/Qwen2.5-0.5B", "--prompt", "a"][..],
        &["pull", "Qwen/Qwen2.5-0.5B"],
        &["serve", "--target", "Qwen/Qwen2.5-0.5B"],
        &["bench", "kernels", "--target", "Qwen/Qwen2.5-0.5B"],
        &["make", "Qwen/Qwen2.5-0.5B", "--plan"],
        &["init", "Qwen/Qwen2.5-0.5B"],
        &["bundle", "import", "Qwen/Qwen2.5-0.5B", "--target", "x", "--out", "y"],
        &["doctor", "--draft", "Qwen/Qwen2.5-0.5B", "--target", "x"],
        &["inspect", "Qwen/Qwen2.5-0.5B"],
    ] {
        let ended = home.run(args);
        assert_eq!(ended.code, Some(2), "{args:?}: {}", ended.stderr);
        assert!(ended.stderr.contains("hf:Qwen/Qwen2.5-0.5B"), "{args:?}: {}", ended.stderr);
    }
}

#[test]
fn paths_of_a_run_file_count_from_its_folder_wherever_it_is_called_from() {
    let home = Home::new();
    home.write("sub/chats.jsonl", "{\"messages\": []}\n");
    home.write("here.jsonl", "{\"messages\": []}\n");
    home.write("here.gguf", "x");
    let run = |target: &str, data: &str, overrides: &[&str]| {
        let text = format!(
            "[run]\nname = \"a\"\n[target]\nsource = \"{target}\"\n[data]\nsources = [{{ path = \"{data}\" }}]\nmax_length = 256\n[bundle]\nlicense = \"MIT\"\n"
        );
        home.write("sub/a.toml", text);
        let ended = home.run(&[&["run", "sub/a.toml"], overrides].concat());
        assert_eq!(ended.code, Some(2));
        ended.stderr
    };
    let has = |told: String, parts: &[&str]| {
        parts.iter().for_each(|part| assert!(told.contains(part), "{part} in {told}"));
    };
    // It is found, and empty.
    has(run(&target(), "chats.jsonl", &[]), &["`sub/chats.jsonl`, line 1: the conversation is empty"]);
    has(
        run(&target(), "none.jsonl", &["data.sources.0.path=here.jsonl"]),
        &["here.jsonl`, line 1: the conversation is empty"],
    );
    has(
        run(&target(), "here.jsonl", &[]),
        &[
            "error: `data.sources.0.path` names `sub/here.jsonl`, which does not exist\n",
            "hint: relative paths in this run file count from `sub`; for what is in the working directory write \
             `../here.jsonl`\n",
        ],
    );
    has(
        run("here.gguf", "chats.jsonl", &[]),
        &["error: `target.source` names `sub/here.gguf`, which does not exist\n", "write `../here.gguf`\n"],
    );
    has(
        run(&target(), "none.jsonl", &[]),
        &["hint: check the path; relative paths in this run file count from `sub`\n"],
    );
    has(run("Qwen/Qwen2.5-0.5B", "chats.jsonl", &[]), &["hf:Qwen/Qwen2.5-0.5B"]);
}
