//! The folder of a run: what an edit of the run file, an upgrade or a move of the folder does to finished work.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::stages::{bytes, finish};
use crate::support::{Ended, Home, repository};

/// The smoke recipe, cut down to the least that passes through all stages.
const LEAST: [&str; 15] = [
    "data.sources.0.max_rows=6",
    "regenerate.max_new_tokens=8",
    "capture.shard_rows=6",
    "draft.vocab_size=64",
    "draft.intermediate=16",
    "draft.init=random",
    "train.epochs=1",
    "train.max_steps=2",
    "train.tokens_per_step=256",
    "train.pack_length=256",
    "validate.every=2",
    "validate.prompts=2",
    "validate.max_new_tokens=8",
    "bench.limit=1",
    "bench.max_new_tokens=8",
];

/// The arguments of a verb that works on the run in `dir`.
fn arguments(verb: &str, dir: &Path, more: &[&str]) -> Vec<String> {
    let mut args: Vec<String> =
        vec![verb.into(), "recipes/smoke.toml".into(), format!("run.dir={}", dir.display())];
    args.extend(LEAST.iter().chain(more).map(|s| (*s).to_string()));
    args
}

/// What a run that ends well says.
#[track_caller]
fn run(home: &Home, dir: &Path, more: &[&str]) -> String {
    finish(home.spawn(&arguments("run", dir, more)))
}

/// Any command, in the repository.
fn here(home: &Home, args: &[&str]) -> Ended {
    home.command(args).current_dir(repository()).output().unwrap().into()
}

/// Every file below a folder with its bytes; what processes leave for each other is not among them.
pub(crate) fn files(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut folders = vec![dir.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display())) {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => folders.push(path),
                false => drop(found.insert(path.strip_prefix(dir).unwrap().to_path_buf(), bytes(path))),
            }
        }
    }
    found
}

/// Folders beside `dir/STAGE` that hold what it made from other inputs.
fn aside(dir: &Path, stage: &str) -> Vec<PathBuf> {
    let start = format!("{stage}.old-");
    let entries = std::fs::read_dir(dir).unwrap().flatten();
    let mut found: Vec<PathBuf> =
        entries.filter(|e| e.file_name().to_string_lossy().starts_with(&start)).map(|e| e.path()).collect();
    found.sort();
    found
}

#[test]
fn a_run_file_that_is_edited_and_edited_back_finds_its_old_stages() {
    let home = Home::new();
    let dir = home.path().join("run");
    // In the middle of a run: trained, but not bundled.
    finish(home.spawn(&arguments("train", &dir, &[])));
    let cache = files(&dir.join("capture"));
    let trained = files(&dir.join("train"));
    let answers = bytes(dir.join("regenerate/answers.jsonl"));

    let said = run(&home, &dir, &["capture.dtype=bf16"]);
    assert!(said.contains("regenerate: done before"), "{said}");
    for stage in ["capture", "train"] {
        let old = aside(&dir, stage);
        assert_eq!(old.len(), 1, "{stage}: {old:?} after {said}");
        let old = old[0].display();
        let line =
            said.lines().find(|l| l.starts_with(&format!("{stage}: inputs changed"))).unwrap_or_default();
        assert!(line.contains("capture.dtype: the default → \"bf16\""), "{line}");
        assert!(
            line.contains(&format!("`{old}`")) && line.contains(&format!("`rm -r {old}` frees ")),
            "{line}"
        );
    }
    assert_eq!(files(&aside(&dir, "capture")[0]), cache, "nothing of the cache is lost");
    let status = home.run(&["status", "run", "--json"]).json();
    let shown: Vec<&str> =
        status["aside"].as_array().unwrap().iter().map(|a| a["stage"].as_str().unwrap()).collect();
    assert_eq!(shown, ["capture", "train"], "{status}");
    assert!(home.run(&["status", "run"]).stdout.contains("set aside"));

    // Back, written in another way: a default is a default.
    let back = run(&home, &dir, &["capture.dtype=int8"]);
    for stage in ["capture", "train"] {
        assert!(back.contains(&format!("{stage}: found again in")), "{back}");
        assert!(back.contains(&format!("{stage}: done before")), "{back}");
    }
    assert_eq!(files(&dir.join("capture")), cache);
    assert_eq!(files(&dir.join("train")), trained);
    assert_eq!(bytes(dir.join("regenerate/answers.jsonl")), answers);

    // And once more to the other one, now whole: nothing is done, the bundle has its results.
    let bundle = files(&dir.join("bundle"));
    let other = run(&home, &dir, &["capture.dtype=bf16"]);
    for stage in ["capture", "train", "bundle", "bench"] {
        assert!(other.contains(&format!("{stage}: done before")), "{stage}: {other}");
    }
    run(&home, &dir, &[]);
    assert_eq!(files(&dir.join("bundle")), bundle, "the bundle and its measured results");
    assert!(bundle.contains_key(Path::new("results/eval.json")));
}

#[test]
fn a_bundle_that_is_made_again_gets_its_results_back() {
    let home = Home::new();
    let dir = home.path().join("run");
    run(&home, &dir, &[]);
    let record = bytes(dir.join("bundle/results/eval.json"));
    std::fs::remove_dir_all(dir.join("bundle")).unwrap();
    let said = run(&home, &dir, &[]);
    assert!(said.contains("train: done before") && said.contains("bench: goes on"), "{said}");
    assert_eq!(bytes(dir.join("bundle/results/eval.json")), record, "nothing is measured again");
}

#[test]
fn answers_are_taken_over_when_their_stage_is_made_anew() {
    let home = Home::new();
    let dir = home.path().join("run");
    finish(home.spawn(&arguments("regenerate", &dir, &[])));
    let lines = |dir: &Path| std::fs::read_to_string(dir.join("answers.jsonl")).unwrap().lines().count();
    let before = lines(&dir.join("regenerate"));
    let said = finish(home.spawn(&arguments("regenerate", &dir, &["regenerate.max_rows=3"])));
    assert!(
        said.contains("regenerate: inputs changed (regenerate.max_rows: the default → 3), made anew"),
        "{said}"
    );
    assert!(said.contains("3 of 3 answers are there already"), "{said}");
    assert_eq!(lines(&aside(&dir, "regenerate")[0]), before);
    // A kill between setting aside and making anew loses no answer either.
    std::fs::remove_dir_all(dir.join("regenerate")).unwrap();
    std::fs::remove_file(dir.join("state/regenerate.json")).unwrap();
    let said = finish(home.spawn(&arguments("regenerate", &dir, &["regenerate.max_rows=2"])));
    assert!(said.contains("2 of 2 answers are there already"), "{said}");
}

/// The folder of a run that the version before keys of changed values made; see its README.
fn first_version(home: &Home) -> PathBuf {
    let (from, to) = (repository().join("fixtures/run-folder-v1"), home.path().join("v1"));
    for (name, bytes) in files(&from) {
        home.write(&format!("v1/{}", name.display()), bytes);
    }
    to
}

#[test]
fn a_run_folder_of_the_first_version_is_recognised_stage_by_stage() {
    let home = Home::new();
    let dir = first_version(&home);
    let before = files(&dir);
    let file = dir.join("run.toml").display().to_string();
    let status = here(&home, &["status", &dir.display().to_string(), "--json"]).json();
    assert!(status["stages"].as_array().unwrap().iter().all(|s| s["state"] == "done"), "{status}");

    // The stages whose results this version would make in the same way are done; the others are set aside, with the
    // reason, and nothing of them is lost.
    let ended = here(&home, &["data", "prepare", &file, "--json"]);
    assert_eq!(ended.json()["stages"][0]["before"], true, "{}", ended.stderr);
    let ended = here(&home, &["run", &file]);
    let mut stale = false;
    for stage in ["data", "regenerate", "capture", "train", "bundle", "bench"] {
        if ended.stderr.contains(&format!("{stage}: done before")) {
            assert!(!stale, "{stage} depends on a stage that is stale: {}", ended.stderr);
            continue;
        }
        let reason =
            ended.stderr.lines().find(|l| l.starts_with(&format!("{stage}: inputs changed (stage `")));
        // Only a stage that this version makes differently may be stale.
        assert!(stale || reason.is_some(), "{stage}: {}", ended.stderr);
        stale = true;
        if reason.is_some() {
            assert_eq!(aside(&dir, stage).len(), 1, "{stage}: {}", ended.stderr);
        }
    }
    let now: Vec<Vec<u8>> = files(&dir).into_values().collect();
    for (name, bytes) in
        before.iter().filter(|(name, _)| name.starts_with("train") || name.starts_with("data"))
    {
        assert!(now.contains(bytes), "{} is lost", name.display());
    }
}

#[test]
fn an_edit_of_a_first_version_folder_names_the_keys_from_the_run_file_that_was_saved() {
    let home = Home::new();
    let dir = first_version(&home);
    let file = dir.join("run.toml").display().to_string();
    let ended = here(&home, &["data", "prepare", &file, "data.max_length=200"]);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert!(
        ended.stderr.contains("data: inputs changed (data.max_length: 256 → 200), made anew"),
        "{}",
        ended.stderr
    );
    assert!(aside(&dir, "data")[0].join("conversations.jsonl").is_file());
    let back = here(&home, &["data", "prepare", &file, "data.max_length=256"]);
    assert!(back.stderr.contains("data: found again in"), "{}", back.stderr);
}

#[test]
fn a_run_folder_that_was_moved_goes_on_where_it_is() {
    let home = Home::new();
    let (old, new) = (home.path().join("old"), home.path().join("else/where"));
    run(&home, &old, &[]);
    std::fs::create_dir_all(new.parent().unwrap()).unwrap();
    std::fs::rename(&old, &new).unwrap();
    for (name, bytes) in files(&new.join("state")) {
        let text = String::from_utf8_lossy(&bytes);
        assert!(!text.contains(&*home.path().to_string_lossy()), "{} names a place: {text}", name.display());
    }
    let gone = old.display().to_string();
    let file = new.join("run.toml").display().to_string();
    let status = here(&home, &["status", &new.display().to_string(), "--json"]);
    assert!(!status.stdout.contains(&gone), "{}", status.stdout);
    let by_file = here(&home, &["status", &file, "--json"]).json();
    assert_eq!(by_file["run"].as_str(), new.to_str());

    let again = here(&home, &["run", &file, "--json"]);
    let done = again.json();
    assert!(
        !again.stdout.contains(&gone) && !again.stderr.contains(&gone),
        "{} {}",
        again.stdout,
        again.stderr
    );
    assert!(done["stages"].as_array().unwrap().iter().all(|s| s["before"] == true), "{done}");
    for (stage, key) in [(4, "path"), (5, "report")] {
        let path = done["stages"][stage]["summary"][key].as_str().unwrap();
        assert!(path.starts_with(new.to_str().unwrap()) && Path::new(path).exists(), "{path}");
    }
    assert!(!old.exists(), "nothing is made at the old place");

    // What is changed from here on happens here, too.
    let changed = here(&home, &["run", &file, "train.lr=4e-3"]);
    assert_eq!(changed.code, Some(0), "{}", changed.stderr);
    assert!(changed.stderr.contains("capture: done before") && !old.exists(), "{}", changed.stderr);
    let (bundle, workload) = (new.join("bundle"), repository().join("fixtures/tiny-target/eval.jsonl"));
    let measured = here(
        &home,
        &[
            "bench",
            "--bundle",
            bundle.to_str().unwrap(),
            "--workload",
            workload.to_str().unwrap(),
            "--limit",
            "1",
            "--max-new-tokens",
            "4",
        ],
    );
    assert_eq!(measured.code, Some(0), "{}", measured.stderr);
}

#[test]
fn every_file_that_a_run_writes_can_be_inspected() {
    let home = Home::new();
    let dir = home.path().join("run");
    run(&home, &dir, &[]);
    run(&home, &dir, &["train.lr=4e-3"]);
    let mut paths = vec![dir.clone(), dir.join("state"), dir.join("state/bundle.json")];
    paths.extend(aside(&dir, "train"));
    paths.extend(aside(&dir, "bundle"));
    for path in &paths {
        let ended = home.run(&["inspect", path.to_str().unwrap()]);
        assert_eq!(ended.code, Some(0), "{}: {}", path.display(), ended.stderr);
    }
    let tree = home.run(&["inspect", "run", "--json"]).json();
    fn names(node: &Value, prefix: &str, out: &mut Vec<String>) {
        for child in node["children"].as_array().into_iter().flatten() {
            let name = format!("{prefix}{}", child["name"].as_str().unwrap());
            if child["kind"].as_str().is_some_and(|kind| !kind.starts_with("tensor")) {
                names(child, &format!("{name}/"), out);
                out.push(name);
            }
        }
    }
    let mut shown = Vec::new();
    names(&tree, "", &mut shown);
    for file in files(&dir).keys() {
        assert!(shown.contains(&file.display().to_string()), "{} is not shown", file.display());
    }
    // A workload may be called like the manifest of a bundle.
    home.write("records/bundle.json", "{\"format\": \"other\"}");
    assert_eq!(home.run(&["inspect", "records"]).code, Some(0));
    home.write("torn/bundle.json", "{\"format\":");
    home.write("torn/model.safetensors", "");
    assert_eq!(home.run(&["inspect", "torn"]).code, Some(2), "a damaged bundle is told");
}

#[test]
fn the_bill_needs_no_stage_and_says_what_it_is_estimated_from() {
    let home = Home::new();
    let dir = home.path().join("run");
    let plan = |more: &[&str]| {
        let mut args = arguments("capture", &dir, more);
        args.extend(["--plan".to_string(), "--json".to_string()]);
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        here(&home, &args)
    };
    let guess = plan(&[]).json();
    assert!(!dir.exists(), "a plan writes nothing");
    let from = guess["estimated_from"].as_str().unwrap();
    assert!(
        from.contains("6 of 6 conversations") && from.contains("`regenerate.max_new_tokens` = 8"),
        "{from}"
    );
    assert_eq!(guess["rows"], 6, "{guess}");
    finish(home.spawn(&arguments("regenerate", &dir, &[])));
    let before = files(&dir);
    let exact = plan(&[]).json();
    assert_eq!(files(&dir), before, "a plan writes nothing");
    assert!(exact["estimated_from"].is_null(), "{exact}");
    let tokens = |bill: &Value| bill["tokens"].as_f64().unwrap();
    // Answers may be shorter than their limit, never longer.
    assert!(tokens(&guess) >= tokens(&exact) && tokens(&guess) <= 1.5 * tokens(&exact), "{guess} {exact}");
    // A plan for other answers knows that there are none.
    let other = plan(&["regenerate.temperature=0.5"]).json();
    assert!(other["estimated_from"].is_string(), "{other}");
    // Without regeneration the answers are known.
    let plain = plan(&["regenerate.enabled=false"]).json();
    let off = home.path().join("off");
    let mut args = arguments("data", &off, &["regenerate.enabled=false", "--json"]);
    args.insert(1, "prepare".to_string());
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let as_is = here(&home, &args).json();
    let real = as_is["stages"][0]["summary"]["tokens"].as_f64().unwrap();
    assert!((tokens(&plain) / real - 1.0).abs() < 0.2, "{plain} against {real}");
}

/// Settings of late stages that cannot be, and what is said of them before anything is done.
#[test]
fn settings_of_late_stages_are_checked_before_the_first_one() {
    let home = Home::new();
    home.write("bad.jsonl", "{\"id\": \"a\"}\n");
    home.write("one/eval.jsonl", "{\"id\": \"a\", \"turns\": [\"x\"]}\n");
    home.write("two/eval.jsonl", "{\"id\": \"a\", \"turns\": [\"x\"]}\n");
    home.write("file", "");
    home.write("full/notes.txt", "");
    let root = home.path().display().to_string();
    let check = |overrides: &[&str], wanted: &[&str]| {
        let dir = home.path().join("run");
        let overrides: Vec<String> = overrides.iter().map(|o| o.replace("HOME", &root)).collect();
        let overrides: Vec<&str> = overrides.iter().map(String::as_str).collect();
        let args = arguments("run", &dir, &overrides);
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let ended = here(&home, &args);
        assert_eq!(ended.code, Some(2), "{overrides:?}: {}", ended.stderr);
        let lines: Vec<&str> = ended.stderr.trim_end().lines().collect();
        for text in wanted {
            assert!(ended.stderr.contains(text), "{overrides:?} without `{text}`: {}", ended.stderr);
        }
        // Two lines for each thing that is wrong.
        let told = lines.chunks(2).all(
            |two| matches!(two, [error, hint] if error.starts_with("error: ") && hint.starts_with("hint: ")),
        );
        assert!(told && lines.len() / 2 <= overrides.len(), "{}", ended.stderr);
        assert!(!dir.exists(), "{overrides:?}: nothing may be begun");
    };
    for (overrides, wanted) in [
        (&["draft.heads=3"][..], &["override `draft.heads=3`: `draft.heads` is 3, which"][..]),
        (&["draft.kv_heads=3"], &["`draft.kv_heads` is 3, which does not divide the target's"]),
        (
            &["draft.hidden=32"],
            &["`draft.hidden` is 32, but the draft shares the target's embedding of width"],
        ),
        (
            &["draft.init=target"],
            &["`draft.intermediate` is 16, but a draft that starts from the target has its"],
        ),
        (&["capture.layers=[0, 1, 90]"], &["`capture.layers` names layer 90, but the target has"]),
        (
            &["data.max_length=100000", "train.pack_length=100000"],
            &["`data.max_length` is 100000, but the target's context ends at"],
        ),
        (&["validate.max_new_tokens=100000"], &["`validate.max_new_tokens` is 100000, which leaves no room"]),
        (&["bench.max_new_tokens=100000"], &["`bench.max_new_tokens` is 100000, which leaves no room"]),
        (&["bench.workloads=[\"HOME/bad.jsonl\"]"], &["`bench.workloads.0` cannot be used", "bad.jsonl"]),
        (&["bench.workloads=[\"HOME/none.jsonl\"]"], &["`bench.workloads.0` names", "which does not exist"]),
        (
            &["bench.workloads=[\"HOME/one/eval.jsonl\", \"HOME/two/eval.jsonl\"]"],
            &["`bench.workloads.1` names", "is called `eval` in records"],
        ),
        (&["bundle.license=\"\""], &["`bundle.license` is missing"]),
        (&["bundle.name=\"\""], &["`bundle.name` is empty"]),
        (&["bundle.base_model=hf:a/b"], &["`bundle.base_model` base model `hf:a/b` is no repository"]),
        (&["bundle.dir=HOME/full"], &["`bundle.dir` is `", "which exists and is not a bundle"]),
        (&["bundle.dir=HOME/run/train"], &["a folder that the run itself needs"]),
        (&["bundle.dir=HOME"], &["a folder that the run itself needs"]),
        (&["bundle.dir=HOME/file/x"], &["`bundle.dir` is `", "file` is no folder"]),
        (
            &["regenerate.server={ url = \"http://127.0.0.1:1/v1\", key_env = \"NO_SUCH_KEY\" }"],
            &["the variable `NO_SUCH_KEY`, which is not set"],
        ),
        // All at once.
        (
            &["draft.heads=3", "capture.layers=[0, 1, 90]", "validate.max_new_tokens=100000"],
            &["`draft.heads` is 3", "names layer 90", "\nerror: override `validate.max_new_tokens=100000`"],
        ),
        (
            &["bundle.license=\"\"", "bench.workloads=[\"HOME/none.jsonl\"]"],
            &["`bundle.license`", "none.jsonl"],
        ),
    ] {
        if overrides.iter().any(|o| o.starts_with("regenerate.server")) {
            // Asked only for stages that are still to be done, so after the folder was taken.
            let dir = home.path().join("server");
            let args = arguments("run", &dir, overrides);
            let ended = here(&home, &args.iter().map(String::as_str).collect::<Vec<_>>());
            assert!(ended.code == Some(2) && ended.stderr.contains(wanted[0]), "{}", ended.stderr);
            assert!(!dir.join("data").exists(), "before the first stage");
            continue;
        }
        check(overrides, wanted);
    }
    // A line of the file is named where the key stands in the file.
    let tiny = repository().join("fixtures/tiny-target");
    let prompts = tiny.join("prompts-train.jsonl");
    home.write(
        "run.toml",
        format!(
            "[target]\nsource = \"{}\"\n[data]\nsources = [{{ path = \"{}\" }}]\n[draft]\nheads = 3\n[bundle]\nlicense = \"MIT\"\n",
            tiny.display(),
            prompts.display()
        ),
    );
    let ended = home.run(&["run", "run.toml"]);
    assert!(ended.stderr.contains("run file `run.toml`, line 6: `draft.heads` is 3"), "{}", ended.stderr);
}

#[test]
fn domains_without_a_held_out_row_are_told_before_anything_is_answered() {
    let home = Home::new();
    let dir = home.path().join("run");
    let args = arguments("run", &dir, &["validate.domains.none=1.0"]);
    let ended = here(&home, &args.iter().map(String::as_str).collect::<Vec<_>>());
    assert_eq!(ended.code, Some(2), "{}", ended.stderr);
    assert!(ended.stderr.contains("no validation prompt is left"), "{}", ended.stderr);
    assert!(!dir.join("regenerate").exists());
}

#[test]
fn quickstart_runs_a_bundle_whose_target_is_a_folder() {
    let home = Home::new();
    let dir = home.path().join("run");
    run(&home, &dir, &["bench.workloads=[]"]);
    let bundle = dir.join("bundle").display().to_string();
    let args = ["quickstart", "--bundle", &bundle, "--max-new-tokens", "4", "--json"];
    assert_eq!(here(&home, &args).json()["identical"], true);
    // Other weights are told.
    let manifest = dir.join("bundle/bundle.json");
    let mut value: Value = serde_json::from_slice(&bytes(manifest.clone())).unwrap();
    value["target"]["weights_sha256"] = "0".repeat(64).into();
    std::fs::write(manifest, value.to_string()).unwrap();
    let other = here(&home, &args);
    assert_eq!(other.code, Some(2), "{}", other.stderr);
    assert!(other.stderr.contains("but the draft was trained for"), "{}", other.stderr);
}

#[test]
fn an_export_onto_a_folder_names_the_way_to_replace_it() {
    let home = Home::new();
    let dir = home.path().join("run");
    run(&home, &dir, &["bench.workloads=[]"]);
    home.write("out/x", "");
    let bundle = dir.join("bundle").display().to_string();
    let ended = home.run(&["bundle", "export", &bundle, "--format", "vllm", "--out", "out"]);
    assert_eq!(ended.code, Some(2));
    assert!(ended.stderr.contains("hint: add `--replace`"), "{}", ended.stderr);
    let ended = home.run(&["bundle", "export", &bundle, "--format", "vllm", "--out", "out", "--replace"]);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
}

#[test]
fn a_dead_port_is_told_at_once() {
    let home = Home::new();
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let url = format!("http://127.0.0.1:{port}/v1");
    let tiny = repository().join("fixtures/tiny-target");
    let (target, workload) = (tiny.display().to_string(), tiny.join("eval.jsonl").display().to_string());
    let ended = home.run(&[
        "doctor",
        "serve-gap",
        &url,
        "--target",
        &target,
        "--workload",
        &workload,
        "--limit",
        "1",
    ]);
    assert_eq!(ended.code, Some(2));
    assert!(ended.stderr.contains("(attempts: 1)"), "{}", ended.stderr);
    assert!(ended.stderr.contains("hint: start the server, or correct its address"), "{}", ended.stderr);
    // The same for a run that wants answers from it.
    let dir = home.path().join("run");
    let args = arguments("run", &dir, &[&format!("regenerate.server={{ url = \"{url}\" }}")]);
    let ended = here(&home, &args.iter().map(String::as_str).collect::<Vec<_>>());
    assert!(ended.code == Some(2) && ended.stderr.contains("(attempts: 1)"), "{}", ended.stderr);
}

/// A wrong command line is told with what to write instead.
#[test]
fn no_hint_says_help_alone() {
    let home = Home::new();
    home.write("w.jsonl", "");
    for (args, wanted) in [
        (&["bundle", "export", "x"][..], "write it as `draftsmith bundle export"),
        (&["bench", "--bundle", "x", "--workload", "w.jsonl", "--limit", "some"], "`--limit"),
        (&["bundle", "export", "x", "--format", "none", "--out", "y"], "`--format"),
        (
            &["doctor", "serve-gap", "nowhere", "--target", "x", "--workload", "w.jsonl"],
            "http://127.0.0.1:8000/v1",
        ),
        (&["run", "none.toml"], "recipes/smoke.toml"),
        (&["nothing"], "draftsmith"),
    ] {
        let ended = home.run(args);
        let hint = ended.stderr.lines().find_map(|l| l.strip_prefix("hint: ")).unwrap_or_default();
        assert_eq!(ended.code, Some(2), "{args:?}: {}", ended.stderr);
        assert!(hint.contains(wanted), "{args:?}: {}", ended.stderr);
        assert!(!hint.starts_with("`draftsmith --help`"), "{args:?}: {hint}");
    }
}
