use super::*;
use std::path::Path;

const SMALL: &str = "[target]\nsource = \"m.gguf\"\n[[data.sources]]\npath = \"a.jsonl\"\n";

fn parse(text: &str, overrides: &[&str]) -> Result<RunFile, RunError> {
    let overrides: Vec<String> = overrides.iter().map(|o| o.to_string()).collect();
    RunFile::parse(Path::new("run.toml"), text, &overrides)
}

#[track_caller]
fn check_refused(text: &str, overrides: &[&str], expected: &str, hint: Option<&str>) {
    let err = parse(text, overrides).expect_err("must be refused");
    assert_eq!(err.to_string(), expected);
    assert_eq!(err.hint().as_deref(), hint);
}

#[test]
fn the_smallest_file_gets_all_defaults() {
    let run = parse(SMALL, &[]).unwrap();
    assert_eq!(run.dir(), Path::new("runs/run"));
    assert_eq!(run.bundle_dir(), Path::new("runs/run/bundle"));
    assert_eq!(run.train.seed, Some(42));
    assert_eq!((run.train.eagle3.ttt_length, run.train.eagle3.step_decay), (7, 0.8));
    assert_eq!((run.data.max_length, run.data.sources[0].weight), (2048, 1.0));
    assert_eq!(run.draft.vocab_size, 8192);
}

#[test]
fn the_resolved_copy_loads_to_the_same_run() {
    let text = "[run]\nname = \"x\"\n[regenerate.server]\nurl = \"http://h/v1\"\nextra = { a = 1, b = { c = [2.5] } }\n[target]\nsource = [\"hf:a/b\", \"m.gguf\"]\n[data]\nsystem = \"be\\nbrief\"\n\
        sources = [{ path = \"a\", weight = 0.5 }, { path = \"b\", max_rows = 3 }]\n[capture]\nlayers = [1, 2, 3]\n\
        [validate.domains]\nmath = 0.5\ncode = 1\n[bench]\nworkloads = [\"w.jsonl\"]\n\
        tree = { depth = 4, top_k = 3, nodes = 20 }\n[train]\nlr = 3e-4\nmax_steps = 5\n";
    for text in [text, SMALL] {
        let run = parse(text, &[]).unwrap();
        let again = parse(&run.to_toml(), &[]).unwrap();
        assert_eq!(run, again, "{}", run.to_toml());
        assert_eq!(run.hash(), again.hash());
        assert_eq!(run.to_toml(), again.to_toml());
    }
}

#[test]
fn the_hash_sees_values_and_not_layout() {
    let base = parse(SMALL, &[]).unwrap();
    let spaced = parse(&format!("# note\n\n{SMALL}\n[train]\nlr = 1.0e-4 # the default\n"), &[]).unwrap();
    assert_eq!(base.hash(), spaced.hash());
    let other = parse(SMALL, &["train.lr=2e-4"]).unwrap();
    assert_ne!(base.hash(), other.hash());
    assert_eq!(base.stage_hash(Stage::Capture), other.stage_hash(Stage::Capture));
    assert_ne!(base.stage_hash(Stage::Train), other.stage_hash(Stage::Train));
    assert_eq!(base.differences(&other, None), ["train.lr: 0.0001 → 0.0002"]);
    let logging = parse(
        SMALL,
        &[
            "train.log_every=3",
            "train.shard_optimizer=true",
            "run.threads=1",
            "run.dir=/x",
            "data.strict=false",
        ],
    )
    .unwrap();
    assert!(logging.train.shard_optimizer && !base.train.shard_optimizer);
    for stage in [Stage::Data, Stage::Train, Stage::Bench] {
        assert_eq!(base.stage_hash(stage), logging.stage_hash(stage));
    }
    assert!(base.differences(&logging, Some(Stage::Bench)).is_empty());
    assert_eq!(base.differences(&logging, None).len(), 6);
}

#[test]
fn where_a_server_stands_is_no_part_of_what_it_says() {
    let with = |server: &str| parse(SMALL, &[&format!("regenerate.server={{ {server} }}")]).unwrap();
    let base = with("url = \"http://a/v1\"");
    let hash = |run: &RunFile| run.stage_hash(Stage::Regenerate);
    let elsewhere =
        with("url = \"http://b/v1\", key_env = \"K\", retries = 3, timeout_s = 9, compare_prompts = false");
    assert_eq!(hash(&base), hash(&elsewhere));
    assert_ne!(hash(&base), hash(&with("url = \"http://a/v1\", api = \"chat\"")));
    assert_ne!(hash(&base), hash(&with("url = \"http://a/v1\", model = \"m\"")));
    assert_ne!(hash(&base), hash(&with("url = \"http://a/v1\", extra = { top_k = 0 }")));
    assert_ne!(hash(&base), hash(&parse(SMALL, &[]).unwrap()));
    let states = |server: &str| parse(SMALL, &[&format!("capture.server={{ {server} }}")]).unwrap();
    let hash = |run: &RunFile| run.stage_hash(Stage::Capture);
    let base = states("kind = \"vllm\", url = \"http://a/v1\", shared_dir = \"d\"");
    let elsewhere =
        "kind = \"vllm\", url = \"http://b/v1\", shared_dir = \"e\", concurrency = 2, retries = 1";
    assert_eq!(hash(&base), hash(&states(elsewhere)));
    assert_ne!(hash(&base), hash(&states(&format!("{elsewhere}, model = \"m\""))));
    assert_ne!(hash(&base), hash(&parse(SMALL, &[]).unwrap()));
    let sglang = "kind = \"sglang\", url = \"http://a\", final_url = \"http://b\"";
    assert_ne!(hash(&base), hash(&states(sglang)));
    let local = is_local_address;
    for url in ["http://127.0.0.1:80/v1", "http://localhost/v1", "https://[::1]:8000/v1"] {
        assert!(local(url), "{url}");
    }
    for url in ["http://10.0.0.1/v1", "http://localhost.example.org/v1", "http://[2001:db8::1]/v1"] {
        assert!(!local(url), "{url}");
    }
}

#[test]
fn one_address_is_a_list_of_one_and_what_does_not_go_together_is_named() {
    let addresses = |table: &str| {
        let file = parse(SMALL, &[&format!("regenerate.server={{ {table} }}")]).unwrap();
        let server = file.regenerate.server.unwrap();
        (server.addresses().into_iter().map(str::to_string).collect::<Vec<_>>(), server.weights())
    };
    assert_eq!(addresses("url = \"http://a/v1\""), (vec!["http://a/v1".into()], vec![1.0]));
    let both = vec!["http://a/v1".to_string(), "http://b/v1".to_string()];
    assert_eq!(addresses("urls = [\"http://a/v1\", \"http://b/v1\"]"), (both.clone(), vec![1.0, 1.0]));
    assert_eq!(
        addresses("urls = [\"http://a/v1\", \"http://b/v1\"], weights = [2, 0.5]"),
        (both, vec![2.0, 0.5])
    );
    let base = parse(SMALL, &["regenerate.server={ url = \"http://a/v1\" }"]).unwrap();
    let more = parse(SMALL, &["regenerate.server={ urls = [\"http://a/v1\", \"http://b/v1\"] }"]).unwrap();
    assert_eq!(base.stage_hash(Stage::Regenerate), more.stage_hash(Stage::Regenerate));

    let check = |table: &str, lines: &str, says: &str| {
        let text = format!("{SMALL}[{table}.server]\n{lines}\n");
        let error = parse(&text, &[]).unwrap_err();
        let wanted =
            says.replace("LINE", &format!("line {}", SMALL.lines().count() + 1 + lines.lines().count()));
        assert!(error.to_string().contains(&wanted), "{error} should say `{wanted}`");
    };
    let a = "url = \"http://a/v1\"";
    check(
        "regenerate",
        &format!("{a}\nurls = [\"http://b/v1\"]"),
        "LINE: `regenerate.server.urls` is set beside `url`",
    );
    check("regenerate", "urls = []", "LINE: `regenerate.server.urls` is an empty list");
    check("regenerate", "api = \"ids\"", "`regenerate.server.url` is missing");
    check(
        "regenerate",
        "urls = [\"http://a/v1\", \"http://A/v1/\"]",
        "`regenerate.server.urls.1` names `http://A/v1/` again",
    );
    check(
        "regenerate",
        "urls = [\"http://a/v1\", \"b\"]",
        "`regenerate.server.urls.1` is `b`, expected an address",
    );
    check(
        "regenerate",
        &format!("{a}\nweights = [1]"),
        "LINE: `regenerate.server.weights` is set, but there is only one",
    );
    check(
        "regenerate",
        "urls = [\"http://a/v1\"]\nweights = [1, 2]",
        "LINE: `regenerate.server.weights` has 2 entries, but `urls` has 1 entry",
    );
    check(
        "regenerate",
        "urls = [\"http://a/v1\"]\nweights = [0]",
        "`regenerate.server.weights.0` is 0, expected a number above 0",
    );
    let two = "urls = [\"http://a/v1\", \"http://b/v1\"]";
    let vllm = |rest: &str| format!("kind = \"vllm\"\n{rest}");
    check(
        "capture",
        &vllm(&format!("shared_dir = \"d\"\n{a}\n{two}")),
        "LINE: `capture.server.urls` is set beside `url`",
    );
    check(
        "capture",
        &vllm(&format!("{two}\nshared_dirs = [\"d\"]")),
        "LINE: `capture.server.shared_dirs` has 1 entry, but `urls` has 2",
    );
    check(
        "capture",
        &vllm(&format!("{two}\nshared_dir = \"d\"\nshared_dirs = [\"d\", \"e\"]")),
        "`capture.server.shared_dirs` is set beside",
    );
    check(
        "capture",
        &vllm(&format!("{a}\nshared_dirs = [\"d\"]")),
        "`capture.server.shared_dirs` is set, but `url` is one",
    );
    check("capture", &vllm(two), "`capture.server.shared_dir` is missing");
    let sglang = |rest: &str| format!("kind = \"sglang\"\n{rest}");
    check("capture", &sglang(two), "`capture.server.final_urls` is missing");
    check(
        "capture",
        &sglang(&format!("{two}\nfinal_url = \"http://c\"")),
        "LINE: `capture.server.final_url` is set, but `urls` has several",
    );
    check(
        "capture",
        &sglang(&format!("{two}\nfinal_urls = [\"http://c\"]")),
        "LINE: `capture.server.final_urls` has 1 entry",
    );
    check(
        "capture",
        &sglang(&format!("{a}\nfinal_urls = [\"http://c\"]")),
        "`capture.server.final_urls` is set, but `url` is one",
    );
}

#[test]
fn the_stage_hash_of_version_one_never_changes() {
    // Finished work of old run folders is recognised by this hash.
    let hash = |more: &[&str]| parse(SMALL, more).unwrap().stage_hash_v1(Stage::Train);
    let first = "d38dacd6e214f3d7b71bd8f742c6c080d1e8874ba2475d9eef22a9d8131077b9";
    assert_eq!(hash(&[]).as_deref(), Some(first));
    assert_eq!(hash(&["train.log_every=3", "train.lr=1e-4"]).as_deref(), Some(first));
    assert_ne!(hash(&["train.lr=2e-4"]).as_deref(), Some(first));
}

#[test]
fn a_key_at_its_default_is_no_input_of_a_stage() {
    let inputs = |more: &[&str], stage| -> Vec<String> {
        let file = parse(SMALL, more).unwrap();
        file.stage_inputs(stage).into_iter().map(|(key, value)| format!("{key}={value}")).collect()
    };
    let base = inputs(&[], Stage::Bench);
    assert!(
        base.iter().all(|i| i.starts_with("target.source=") || i.starts_with("data.sources.0.path=")),
        "{base:?}"
    );
    for written in ["train.lr=1e-4", "data.sources.0.weight=1.0", "run.seed=42", "validate.every=200"] {
        assert_eq!(inputs(&[written], Stage::Bench), base, "{written}");
    }
    let set = inputs(&["train.lr=2e-4", "capture.dtype=bf16", "bench.depth=2"], Stage::Train);
    assert_eq!(set.len(), base.len() + 2, "{set:?}");
    assert!(
        set.contains(&"train.lr=0.0002".to_string()) && set.contains(&"capture.dtype=\"bf16\"".to_string())
    );
    // A server with nothing but an address is not the same as none.
    assert_ne!(inputs(&["regenerate.server={ url = \"http://a/v1\" }"], Stage::Regenerate).len(), 2);
}

#[test]
fn what_another_kind_of_draft_has_is_no_input_but_the_layers_that_a_block_reads_are() {
    let inputs = |more: &[&str], stage| parse(SMALL, more).unwrap().stage_inputs(stage);
    for (method, own, other) in [
        ("eagle3", "train.eagle3.ttt_length=3", "train.dflash.gamma=2.0"),
        ("dflash", "train.dflash.gamma=2.0", "train.eagle3.ttt_length=3"),
        ("dspark", "draft.dspark.markov_rank=8", "draft.p-eagle.depths=3"),
        ("p-eagle", "draft.p-eagle.depths=3", "draft.dspark.markov_rank=8"),
    ] {
        let method = format!("draft.method={method}");
        let base = inputs(&[&method], Stage::Train);
        assert_eq!(inputs(&[&method, other], Stage::Train), base, "{method} {other}");
        assert_ne!(inputs(&[&method, own], Stage::Train), base, "{method} {own}");
    }
    // States of the same layers serve every kind.
    let capture = |more: &[&str]| parse(SMALL, more).unwrap().stage_hash(Stage::Capture);
    let eagle = capture(&[]);
    assert_eq!(capture(&["draft.method=p-eagle"]), eagle);
    assert_ne!(capture(&["draft.method=dflash"]), eagle);
    assert_eq!(capture(&["draft.method=dflash"]), capture(&["draft.method=dspark", "draft.dflash.layers=9"]));
    assert_ne!(capture(&["draft.method=dflash"]), capture(&["draft.method=dflash", "draft.dflash.layers=3"]));
    let named = "capture.layers=[1,2,3]";
    assert_eq!(capture(&["draft.method=dflash", named]), capture(&[named]));
    let file = parse(SMALL, &["draft.method=dflash"]).unwrap();
    assert!(file.stage_hash_v1(Stage::Capture).is_none(), "no older work is of such layers");
}

/// Keys of `eagle3` stood beside the others once: files that have them there mean the same, and work done under either
/// spelling is recognised.
#[test]
fn keys_at_their_older_places_mean_the_same() {
    let with = |tail: &str| format!("{SMALL}{tail}");
    let old = "[draft]\nfc_norm = true\n[train]\nttt_length = 3\nloss = \"lk_alpha\"\n";
    let new = "[draft.eagle3]\nfc_norm = true\n[train.eagle3]\nttt_length = 3\nloss = \"lk_alpha\"\n";
    let (old, new) = (parse(&with(old), &[]).unwrap(), parse(&with(new), &[]).unwrap());
    assert_eq!(old, new);
    assert_eq!((old.train.eagle3.ttt_length, old.draft.eagle3.fc_norm), (3, true));
    assert!(old.to_toml().contains("[train.eagle3]\nttt_length = 3\n"), "{}", old.to_toml());
    for stage in Stage::ALL {
        assert_eq!(old.stage_inputs(stage), new.stage_inputs(stage));
        assert_eq!(old.stage_hash_v1(stage), new.stage_hash_v1(stage));
    }
    assert_eq!(old.stage_inputs(Stage::Train)["train.ttt_length"], "3");
    // The last override holds, whatever the file calls the key.
    for (file, over) in [("[train]", "train.eagle3"), ("[train.eagle3]", "train")] {
        let run =
            parse(&with(&format!("{file}\nttt_length = 3\n")), &[&format!("{over}.ttt_length=5")]).unwrap();
        assert_eq!(run.train.eagle3.ttt_length, 5, "{file} and {over}");
    }
    check_refused(
        &with("[train]\nstep_decay = 0.9\n[train.eagle3]\nstep_decay = 0.8\n"),
        &[],
        "run file `run.toml`, line 6: `train.step_decay` is given beside `train.eagle3.step_decay`, its newer name",
        Some("remove `train.step_decay`"),
    );
    check_refused(
        &with("[train]\nttt_length = 0\n"),
        &[],
        "run file `run.toml`, line 6: `train.eagle3.ttt_length` is 0, expected at least 1",
        None,
    );
}

#[test]
fn overrides_are_toml_values_or_bare_words() {
    let run = parse(
        SMALL,
        &[
            "train.lr=5e-5",
            "run.name = night",
            "target.source=hf:org/name@main:file.gguf",
            "capture.layers=[0, 1, 2]",
            "bench.tree={ depth = 2, top_k = 2, nodes = 6 }",
            "data.sources.0.weight=2",
            "regenerate.enabled=false",
            "bundle.name=1.5",
            "data.system=\"say = no\"",
            "validate.domains.math=0.25",
            "train.schedule=constant",
        ],
    )
    .unwrap();
    assert_eq!(run.train.lr, 5e-5);
    assert_eq!(run.dir(), Path::new("runs/night"));
    assert_eq!(run.target.source.0, ["hf:org/name@main:file.gguf"]);
    assert_eq!(run.capture.layers, Some(vec![0, 1, 2]));
    assert_eq!(run.bench.tree, Some(TreeTable { depth: 2, top_k: 2, nodes: 6 }));
    assert_eq!(run.data.sources[0].weight, 2.0);
    assert!(!run.regenerate.enabled);
    assert_eq!(run.bundle.name.as_deref(), Some("1.5"));
    assert_eq!(run.data.system.as_deref(), Some("say = no"));
    assert_eq!(run.validate.domains["math"], 0.25);
    assert_eq!(run.train.schedule, Schedule::Constant);
    // The last one wins, and overrides may supply what the file lacks.
    assert_eq!(parse(SMALL, &["train.epochs=2", "train.epochs=3"]).unwrap().train.epochs, 3);
    let run = parse("", &["target.source=m", "data.sources=[{ path = \"p\" }]"]).unwrap();
    assert_eq!(run.data.sources[0].path, "p");
}

#[test]
fn misspelt_keys_name_line_and_suggestion() {
    let with = |tail: &str| format!("{SMALL}{tail}");
    check_refused(
        &with("[train]\nlr = 1e-4\nttt_lenght = 5\n"),
        &[],
        "run file `run.toml`, line 7: unknown key `train.ttt_lenght`",
        Some("did you mean `train.eagle3.ttt_length`?"),
    );
    check_refused(
        &with("wieght = 2.0\n"),
        &[],
        "run file `run.toml`, line 5: unknown key `data.sources.0.wieght`",
        Some("did you mean `data.sources.0.weight`?"),
    );
    check_refused(
        &with("[trian]\nlr = 1\n"),
        &[],
        "run file `run.toml`, line 5: unknown key `trian`",
        Some("did you mean `train`?"),
    );
    check_refused(
        &with("[draft]\nttt_length = 5\n"),
        &[],
        "run file `run.toml`, line 6: unknown key `draft.ttt_length`",
        Some("did you mean `train.eagle3.ttt_length`?"),
    );
    check_refused(
        &with("[bench]\ntree = { depth = 1, width = 2, nodes = 3 }\n"),
        &[],
        "run file `run.toml`, line 6: unknown key `bench.tree.width`",
        Some("known keys here: depth, top_k, nodes"),
    );
    check_refused(
        SMALL,
        &["train.lrr=1"],
        "override `train.lrr=1`: unknown key `train.lrr`",
        Some("did you mean `train.lr`?"),
    );
    check_refused(
        SMALL,
        &["tarin.lr=1"],
        "override `tarin.lr=1`: unknown key `tarin`",
        Some("did you mean `train`?"),
    );
}

#[test]
fn wrong_types_name_line_and_key() {
    let with = |tail: &str| format!("{SMALL}{tail}");
    check_refused(
        &with("[train]\nlr = \"fast\"\n"),
        &[],
        "run file `run.toml`, line 6: `train.lr` is string \"fast\", expected a number",
        None,
    );
    check_refused(
        &with("[train]\n\nepochs = -1\n"),
        &[],
        "run file `run.toml`, line 7: `train.epochs` is integer `-1`, expected a whole number of at least 0",
        None,
    );
    check_refused(
        &with("[train]\nschedule = \"cosin\"\n"),
        &[],
        "run file `run.toml`, line 6: `train.schedule` is `cosin`, expected `cosine` or `constant`",
        Some("did you mean `cosine`?"),
    );
    check_refused(
        &with("[bench]\nworkloads = 3\n"),
        &[],
        "run file `run.toml`, line 6: `bench.workloads` is integer `3`, expected a list",
        None,
    );
    check_refused(
        "data = 3\n[target]\nsource = \"m\"\n",
        &[],
        "run file `run.toml`, line 1: `data` is integer `3`, expected a table",
        None,
    );
    check_refused(
        SMALL,
        &["train.epochs=many"],
        "override `train.epochs=many`: `train.epochs` is string \"many\", expected a whole number of at least 0",
        None,
    );
    check_refused(
        "[target]\nsource = 3\n[[data.sources]]\npath = \"a\"\n",
        &[],
        "run file `run.toml`, line 2: `target.source` is integer `3`, expected a model reference or a list of model \
         references",
        None,
    );
}

#[test]
fn missing_keys_are_explained() {
    let err = parse("[[data.sources]]\npath = \"a\"\n", &[]).unwrap_err();
    assert_eq!(err.to_string(), "run file `run.toml`: key `target` is missing");
    assert_eq!(err.hint().as_deref(), Some("`target`: The model to be made faster."));
    let err = parse("[target]\nsha256 = \"a\"\n[[data.sources]]\npath = \"a\"\n", &[]).unwrap_err();
    assert_eq!(err.to_string(), "run file `run.toml`, line 1: key `target.source` is missing");
    let err = parse("[target]\nsource = \"m\"\n[data]\ndedupe = true\n", &["train.epochs=2"]).unwrap_err();
    assert_eq!(err.to_string(), "run file `run.toml`: key `data.sources` is missing");
    let err = parse("[target]\nsource = \"m\"\n[data]\ndedupe = true\n", &[]).unwrap_err();
    assert_eq!(err.to_string(), "run file `run.toml`, line 3: key `data.sources` is missing");
    let err = parse("[target]\nsource = \"m\"\n[[data.sources]]\npath = \"a\"\n[[data.sources]]\n", &[]);
    let err = err.unwrap_err().to_string();
    assert_eq!(err, "run file `run.toml`, line 5: key `data.sources.1.path` is missing");
    let required = reference(&[]).into_iter().filter(|k| k.required && k.kind == "table").map(|k| k.key);
    assert_eq!(required.collect::<Vec<_>>(), ["target", "data"]);
}

#[test]
fn broken_toml_names_its_line() {
    let err = parse("[target]\nsource = \"m\n", &[]).unwrap_err();
    assert!(err.to_string().starts_with("run file `run.toml`, line 2: "), "{err}");
    let err = parse("[target]\nsource = 1\nsource = 2\n", &[]).unwrap_err();
    assert!(err.to_string().starts_with("run file `run.toml`, line 3: duplicate key"), "{err}");
}

#[test]
fn broken_overrides_are_refused() {
    let hint = Some("write overrides as `table.key=value`, for example `train.lr=5e-5`");
    check_refused(SMALL, &["train.lr"], "override `train.lr`: no `=`", hint);
    check_refused(SMALL, &["train.lr="], "override `train.lr=`: `` is not a TOML value", hint);
    check_refused(
        SMALL,
        &["bench.workloads=[1,"],
        "override `bench.workloads=[1,`: `[1,` is not a TOML value",
        hint,
    );
    check_refused(SMALL, &[".lr=1"], "override `.lr=1`: the key is empty or has an empty part", hint);
    check_refused(
        SMALL,
        &["data.sources.4.weight=1"],
        "override `data.sources.4.weight=1`: `4` is not an index into a list of 1",
        hint,
    );
    check_refused(
        SMALL,
        &["target.source.x=1"],
        "override `target.source.x=1`: `x` is below a plain value",
        hint,
    );
}

#[test]
fn a_replay_fits_a_pack_and_is_no_input_where_it_is_off() {
    let more = |more: &[&str]| parse(SMALL, more).unwrap().stage_hash(Stage::Train);
    assert_ne!(more(&[]), more(&["train.replay.share=0.3"]));
    assert_eq!(more(&[]), more(&["train.replay.share=0.0", "train.replay.every=9"]));
    let on = "train.replay.share=0.3";
    assert_ne!(more(&[on]), more(&[on, "train.replay.every=9"]));
    check_refused(
        SMALL,
        &["train.replay.share=0.3", "train.replay.tokens=4096"],
        "override `train.replay.tokens=4096`: `train.replay.tokens` is 4096, more than `train.pack_length` = 2048",
        Some("set `train.replay.tokens` to 2048 at most"),
    );
    parse(SMALL, &["train.replay.tokens=4096"]).unwrap();
}

#[test]
fn values_are_checked_against_each_other() {
    let cases: &[(&str, &str)] = &[
        ("train.lr=0", "is 0, expected a number above 0"),
        ("train.lr=nan", "is NaN, expected a number above 0"),
        ("train.beta2=1", "is 1, expected a number from 0 to below 1"),
        ("train.warmup_ratio=1.5", "is 1.5, expected a number from 0 to 1"),
        ("train.eagle3.ttt_length=0", "is 0, expected at least 1"),
        ("train.pack_length=512", "is 512, but rows can be as long as `data.max_length` = 2048"),
        ("train.max_steps=0", "is 0, expected at least 1"),
        ("train.replay.share=1", "is 1, expected a number from 0 to below 1"),
        ("train.replay.share=-0.1", "is -0.1, expected a number from 0 to below 1"),
        ("train.replay.share=nan", "is NaN, expected a number from 0 to below 1"),
        ("train.replay.every=0", "is 0, expected at least 1"),
        ("train.replay.buffer=0", "is 0, expected at least 1"),
        ("train.replay.tokens=0", "is 0, expected at least 1"),
        ("regenerate.top_p=0", "is 0, expected a number above 0 and at most 1"),
        ("regenerate.temperature=inf", "is inf, expected a number of at least 0"),
        ("regenerate.max_loop_share=1.5", "is 1.5, expected a number from 0 to 1"),
        ("regenerate.max_cut_share=-1", "is -1, expected a number from 0 to 1"),
        (
            "regenerate.server.url=localhost:8000",
            "is `localhost:8000`, expected an address like `http://127.0.0.1:8000/v1`",
        ),
        (
            "regenerate.server.url=http:///v1",
            "is `http:///v1`, expected an address like `http://127.0.0.1:8000/v1`",
        ),
        ("regenerate.server.url=http://me:secret@host/v1", "holds a user name or password"),
        ("regenerate.server={ url = \"http://h/v1\", timeout_s = 0 }", ""),
        ("regenerate.server={ url = \"http://h/v1\", retries = 1000 }", ""),
        ("regenerate.server={ url = \"http://h/v1\", extra = { stream = false } }", ""),
        ("data.validation_rows=0", ""),
        ("capture.layers=[3, 2, 1]", "is [3, 2, 1], expected 3 layers in ascending order"),
        ("capture.layers=[1, 2]", "is [1, 2], expected 3 layers in ascending order"),
        ("data.sources=[]", "is an empty list"),
        ("target.source=[]", "is an empty list"),
        ("target.sha256=ABC", "is `ABC`, expected 64 lower-case hex digits"),
        ("target.max_context=1024", ""),
        ("run.name=../x", "is `../x`, expected letters, digits, `-`, `_` and `.`"),
        ("run.threads=0", "is 0, expected at least 1"),
        ("validate.prompts=100", "is 100, but `data.validation_rows` holds back only 48"),
        ("bench.depth=65", "is 65, expected at most 64"),
        ("bench.tree={ depth = 5, top_k = 2, nodes = 3 }", ""),
    ];
    for (text, problem) in cases {
        let err = parse(SMALL, &[text]).expect_err(text);
        assert!(matches!(err, RunError::Value { .. }), "{text}: {err}");
        let key = text.split('=').next().unwrap();
        if !problem.is_empty() {
            assert_eq!(err.to_string(), format!("override `{text}`: `{key}` {problem}"));
        }
    }
    check_refused(
        &format!("{SMALL}weight = 0\n"),
        &[],
        "run file `run.toml`, line 5: `data.sources.0.weight` is 0, expected a number above 0",
        None,
    );
}

#[test]
fn integers_that_toml_cannot_write_are_refused() {
    // TOML integers are signed; a larger one could be read into a `u64`, but the resolved copy could not be written.
    assert_eq!(parse(SMALL, &["run.seed=9223372036854775807"]).unwrap().run.seed, i64::MAX as u64);
    for text in ["9223372036854775808", "18446744073709551615"] {
        assert!(parse(&format!("{SMALL}[run]\nseed = {text}\n"), &[]).is_err());
        assert!(parse(SMALL, &[&format!("run.seed={text}")]).is_err());
    }
}

#[test]
fn every_key_is_documented() {
    let keys = reference(&[]);
    for key in &keys {
        assert!(!key.description.is_empty() && !key.kind.is_empty(), "{key:?}");
    }
    let find = |name: &str| keys.iter().find(|k| k.key == name).unwrap_or_else(|| panic!("{name}"));
    assert_eq!(find("train.lr").default.as_deref(), Some("0.0001"));
    assert_eq!(find("train.eagle3.loss").kind, "\"kl\" or \"lk_alpha\" or \"lk_lambda\"");
    assert_eq!(find("data.max_length").default.as_deref(), Some("2048"));
    assert_eq!(find("data.sources").kind, "list of tables");
    assert!(find("data.sources.N.path").required && !find("data.sources.N.weight").required);
    assert_eq!(find("bench.tree.top_k").kind, "whole number");
    assert_eq!(find("target.source").kind, "string or list of strings");
    assert!(json_schema(&[])["additionalProperties"] == false);
}

proptest::proptest! {
    #[test]
    fn any_text_never_panics(text in ".{0,200}", over in ".{0,40}") {
        let _ = parse(&text, &[]);
        let _ = parse(SMALL, &[&over]);
    }

    #[test]
    fn damaged_files_never_panic(at in 0usize..400, byte in 0u8..128) {
        let mut bytes = parse(SMALL, &[]).unwrap().to_toml().into_bytes();
        let at = at % bytes.len();
        bytes[at] = byte;
        let text = String::from_utf8(bytes).unwrap();
        if let Err(e) = parse(&text, &[]) {
            let _ = (e.to_string(), e.hint());
        }
    }
}

#[test]
fn a_size_that_is_decided_is_not_written_too() {
    let base = "[target]\nsource = \"-\"\n[data]\nsources = [{ path = \"-\" }]\n[draft]\nsize = \"auto\"\n";
    let load = |more: &str| RunFile::parse(Path::new("run.toml"), &format!("{base}{more}"), &[]);
    assert_eq!(load("").unwrap().draft.size, DraftSize::Auto);
    assert_eq!(load("init = \"random\"\n").unwrap().draft.size, DraftSize::Auto);
    for (more, key) in [
        ("vocab_size = 4096\n", "draft.vocab_size"),
        ("intermediate = 64\n", "draft.intermediate"),
        ("init = \"target\"\n", "draft.init"),
        ("method = \"dspark\"\ndspark.layers = 2\n", "draft.dspark.layers"),
    ] {
        let error = load(more).unwrap_err();
        let told = error.to_string();
        assert!(told.contains(&format!("`{key}`")) && told.contains("line"), "{told}");
        assert!(error.hint().unwrap().contains(key));
    }
    // Another kind's layers are not in the way.
    assert!(load("method = \"eagle3\"\ndspark.layers = 2\n").is_ok());
}

/// The faults of a run file behind a good beginning, each with its place, and whether the rest could be looked at.
fn faults(more: &str, overrides: &[&str]) -> (Vec<String>, bool) {
    let text = format!("[target]\nsource = \"-\"\n[data]\nsources = [{{ path = \"-\" }}]\n{more}");
    let overrides: Vec<String> = overrides.iter().map(|s| s.to_string()).collect();
    let faulty = RunFile::parse_all(Path::new("run.toml"), &text, &overrides).unwrap_err();
    (faulty.faults.iter().map(ToString::to_string).collect(), faulty.mended.is_some())
}

#[test]
fn all_faults_are_told_at_once() {
    let (told, mended) = faults(
        "max_length = 1\n[trian]\nlr = 1\n[train]\nlrr = 2\nepochs = -1\nbeta1 = 2\nlr = \"fast\"\n[bench]\ndepth = 0\n",
        &["validate.prompts=0", "draft.vocab_sice=3"],
    );
    let wanted = [
        "run file `run.toml`, line 6: unknown key `trian`",
        "run file `run.toml`, line 9: unknown key `train.lrr`",
        "run file `run.toml`, line 10: `train.epochs` is ",
        "run file `run.toml`, line 12: `train.lr` is string \"fast\", expected ",
        "override `draft.vocab_sice=3`: unknown key `draft.vocab_sice`",
        "run file `run.toml`, line 5: `data.max_length` is 1, expected at least 2",
        "run file `run.toml`, line 11: `train.beta1` is 2, expected a number from 0 to below 1",
        "override `validate.prompts=0`: `validate.prompts` is 0, expected at least 1",
        "run file `run.toml`, line 14: `bench.depth` is 0, expected at least 1",
    ];
    assert_eq!(told.len(), wanted.len(), "{told:#?}");
    for (told, wanted) in told.iter().zip(wanted) {
        assert!(told.starts_with(wanted), "{told}");
    }
    assert!(mended);
}

#[test]
fn what_follows_from_a_fault_alone_is_not_told() {
    // With its default of 2048 the length of a row would not fit the pack.
    assert_eq!(faults("max_length = 1\n[train]\npack_length = 512\n", &[]).0.len(), 1);
    // A list that cannot be read is not missing.
    let text = "[target]\nsource = \"m\"\n[data]\nsources = [{ path = 7 }]\n";
    let faulty = RunFile::parse_all(Path::new("run.toml"), text, &[]).unwrap_err();
    let told: Vec<String> = faulty.faults.iter().map(ToString::to_string).collect();
    assert!(told.len() == 1 && told[0].contains("line 4: `data.sources.0.path` is "), "{told:?}");
    assert!(faulty.mended.is_none());
}
