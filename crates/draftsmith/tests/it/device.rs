//! `run.device`: what a build without GPUs says, and the GPU's code on the CPU.

use std::path::Path;

use crate::support::{Home, repository};

/// `draftsmith VERB` on the smoke recipe, cut down to seconds.
fn stage(home: &Home, verb: &str, dir: &Path, more: &[&str]) -> (Option<i32>, String) {
    let mut args: Vec<String> = vec![verb.into(), "recipes/smoke.toml".into()];
    args.push(format!("run.dir={}", dir.display()));
    for text in [
        "data.sources.0.max_rows=24",
        "target.precision=f32",
        "train.max_steps=6",
        "train.tokens_per_step=512",
        "train.pack_length=256",
        "train.log_every=1",
        "validate.prompts=2",
        "validate.max_new_tokens=8",
    ] {
        args.push(text.into());
    }
    args.extend(more.iter().map(|s| s.to_string()));
    let ended = home.spawn(&args).wait_with_output().unwrap();
    (ended.status.code(), String::from_utf8_lossy(&ended.stderr).into_owned())
}

#[test]
fn a_type_for_a_gpu_is_refused_on_the_cpu() {
    let home = Home::new();
    let (code, stderr) = stage(&home, "train", &home.path().join("run"), &["run.gpu_dtype=bf16"]);
    assert_eq!(code, Some(2), "{stderr}");
    assert!(stderr.contains("error: `run.gpu_dtype` is set, but `run.device` is `cpu`\nhint: "), "{stderr}");
}

#[test]
fn cuda_is_understood_and_refused_before_anything_is_written() {
    let home = Home::new();
    let dir = home.path().join("run");
    for device in ["run.device=cuda", "run.device=cuda:4321"] {
        let (code, stderr) = stage(&home, "train", &dir, &[device]);
        assert_eq!(code, Some(2), "{stderr}");
        let looked_for =
            stderr.contains("error: no NVIDIA driver was found: ") || stderr.contains("`cuda:4321`");
        // (Where tests run on a machine with a card, the first one opens.)
        assert!(looked_for, "{stderr}");
        assert!(stderr.contains("hint: "), "{stderr}");
        assert!(!dir.exists(), "refused before anything is written");
        let (code, stderr) = stage(&home, "train", &dir, &[device, "run.gpu_dtype=bf16"]);
        assert_eq!(code, Some(2), "{stderr}");
        assert!(stderr.contains("hint: leave `run.gpu_dtype` out"), "{stderr}");
    }
    for (device, wanted) in [
        ("run.device=cuda:x", "`cuda:x` has no number of a device"),
        ("run.device=cuda:", "`cuda:` has no number of a device"),
        ("run.device=cuda:+1", "`cuda:+1` has no number of a device"),
        ("run.device=cuda:99999999999", "`cuda:99999999999` has no number of a device"),
        ("run.device=tpu", "expected one of `cpu`, `gpu`, `gpu:flex`"),
    ] {
        let (code, stderr) = stage(&home, "train", &dir, &[device]);
        assert_eq!(code, Some(2), "{stderr}");
        assert!(
            stderr.contains("error: ") && stderr.contains("run.device") && stderr.contains(wanted),
            "{stderr}"
        );
        assert!(stderr.contains("hint: "), "{stderr}");
    }
}

/// Every command that decodes, with the arguments that it needs before `--device`.
fn decoding(home: &Home) -> Vec<Vec<String>> {
    let tiny = repository().join("fixtures/tiny-target").display().to_string();
    let draft = repository().join("fixtures/tiny-drafts/eagle3").display().to_string();
    let rows = home.write("rows.jsonl", r#"{"id": "a", "turns": ["Hi."]}"#).display().to_string();
    let with = |verb: &[&str], more: &[&str]| {
        [verb, &["--target", &tiny], more].concat().into_iter().map(str::to_owned).collect()
    };
    let measured = ["--bundle", &draft, "--workload", &rows];
    vec![
        with(&["generate"], &["--prompt", "Hi."]),
        with(&["bench"], &measured),
        with(&["bench", "kernels"], &[]),
        with(&["bench", "decode"], &measured),
        with(&["bench", "identity"], &measured),
        with(&["bench", "tune"], &measured),
        with(&["bench", "compare"], &measured),
        with(&["serve", "--port", "0"], &[]),
        with(&["quickstart"], &["--bundle", &draft]),
        with(&["doctor"], &["--draft", &draft]),
    ]
}

/// `error:` and `hint:` of a command on a device.
#[track_caller]
fn refused(home: &Home, command: &[String], more: &[&str]) -> (String, String) {
    let args: Vec<&str> = command.iter().map(String::as_str).chain(more.iter().copied()).collect();
    let ended = home.run(&args);
    assert_eq!(ended.code, Some(2), "{args:?}: {}{}", ended.stdout, ended.stderr);
    assert_eq!(ended.stdout, "", "{args:?}");
    let lines: Vec<&str> = ended.stderr.lines().collect();
    match lines.as_slice() {
        [.., error, hint] => {
            let part = |line: &str, word: &str| line.strip_prefix(word).map(str::to_owned);
            let both = part(error, "error: ").zip(part(hint, "hint: "));
            both.unwrap_or_else(|| panic!("{args:?}: {}", ended.stderr))
        }
        _ => panic!("{args:?}: {}", ended.stderr),
    }
}

#[test]
fn decoding_on_a_card_that_is_not_there_is_refused_and_never_done_elsewhere() {
    let home = Home::new();
    for command in decoding(&home) {
        // (Where tests run on a machine with a card, it has not so many.)
        let (error, hint) = refused(&home, &command, &["--device", "cuda:4321"]);
        let no_driver = error.starts_with("no NVIDIA driver was found: ");
        assert!(no_driver || error.contains("there is no device `cuda:4321`"), "{error}");
        assert!(hint.contains("--device") && !hint.contains("run.device"), "{hint}");
        if no_driver {
            assert!(
                hint.starts_with("install NVIDIA's driver") && hint.ends_with("the CPU decodes"),
                "{hint}"
            );
        }
        for (written, wanted) in [
            ("gpu", "`--device gpu` answers, captures and trains (`run.device`)"),
            ("gpu:flex", "`--device gpu:flex` answers, captures and trains"),
            ("tpu", "expected `cpu`, `cuda` or `cuda:N`"),
            ("CUDA", "expected `cpu`, `cuda` or `cuda:N`"),
            ("", "'--device <DEVICE>'"),
            ("cuda:x", "`cuda:x` has no number of a device: expected `cuda` or `cuda:N`"),
            ("cuda:", "`cuda:` has no number of a device"),
            ("cuda:-1", "`cuda:-1` has no number of a device"),
            ("cuda:99999999999", "`cuda:99999999999` has no number of a device"),
        ] {
            let (error, _) = refused(&home, &command, &["--device", written]);
            assert!(error.contains(wanted), "{written}: {error}");
        }
        // What the CPU alone has is not passed over in silence.
        let (error, hint) = refused(&home, &command, &["--device", "cuda", "--threads", "2"]);
        assert!(error.contains("`--threads` counts threads of the CPU"), "{error}");
        assert!(hint.contains("leave one of them out"), "{hint}");
    }
    let decode = &decoding(&home)[3];
    let (error, _) = refused(&home, decode, &["--device", "cuda", "--peer", "llama-cpp-python"]);
    assert!(error.contains("`--peer` decodes on the CPU"), "{error}");
}

#[test]
fn the_device_that_is_there_by_default_can_be_named() {
    let home = Home::new();
    let command = &decoding(&home)[0];
    let args: Vec<&str> = command.iter().map(String::as_str).collect();
    let more = ["--max-new-tokens", "6", "--json"];
    let plain = home.run(&[args.as_slice(), &more].concat()).json();
    let named = home.run(&[args.as_slice(), &more, &["--device", "cpu", "--threads", "2"]].concat()).json();
    assert_eq!(plain["token_ids"], named["token_ids"]);
    // Nothing is added where nothing is asked for.
    assert!(plain.get("device").is_none() && named.get("device").is_none(), "{named}");
}

#[cfg(not(feature = "gpu-flex"))]
#[test]
fn a_build_without_gpus_says_how_to_get_one_with() {
    let home = Home::new();
    let dir = home.path().join("run");
    for device in ["run.device=gpu", "run.device=gpu:flex"] {
        let (code, stderr) = stage(&home, "train", &dir, &[device]);
        assert_eq!(code, Some(2), "{stderr}");
        assert!(stderr.contains("but this build has no GPU support\nhint: build with"), "{stderr}");
        assert!(!dir.exists(), "refused before anything is written");
    }
}

#[cfg(feature = "gpu-flex")]
mod flex {
    use serde_json::Value;

    use super::*;

    #[track_caller]
    fn done(home: &Home, verb: &str, dir: &Path, more: &[&str]) {
        let (code, stderr) = stage(home, verb, dir, more);
        assert_eq!(code, Some(0), "{stderr}");
    }

    fn losses(dir: &Path) -> Vec<f64> {
        let log = std::fs::read_to_string(dir.join("train/log.jsonl")).unwrap();
        let lines = log.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        lines.filter(|line| line["event"] == "step").map(|line| line["loss"].as_f64().unwrap()).collect()
    }

    #[test]
    fn training_and_capture_on_the_gpu_code_give_the_losses_of_the_cpu() {
        let home = Home::new();
        let train = |name: &str, more: &[&str]| {
            let dir = home.path().join(name);
            done(&home, "train", &dir, &[&["regenerate.enabled=false"], more].concat());
            losses(&dir)
        };
        let cpu = train("cpu", &[]);
        assert_eq!(cpu.len(), 6);
        let check = |found: &[f64], tolerance: f64| {
            assert_eq!(found.len(), cpu.len());
            for (found, wanted) in found.iter().zip(&cpu) {
                assert!((found - wanted).abs() < tolerance * wanted, "{found:?}, not {cpu:?}");
            }
        };
        check(&train("f32", &["run.device=gpu:flex"]), 2e-3);
        // 8 significant bits, in the target's states as in the draft's.
        check(&train("bf16", &["run.device=gpu:flex", "run.gpu_dtype=bf16"]), 3e-2);
        check(&train("online", &["run.device=gpu:flex", "capture.mode=online"]), 2e-3);
    }

    #[test]
    fn answers_of_the_gpu_code_are_those_of_the_cpu() {
        let home = Home::new();
        let greedy = ["regenerate.temperature=0", "regenerate.max_rows=8", "regenerate.max_new_tokens=24"];
        let tokens = |name: &str, more: &[&str]| {
            let dir = home.path().join(name);
            done(&home, "regenerate", &dir, &[&greedy, more].concat());
            std::fs::read(dir.join("regenerate/train.tokens")).unwrap()
        };
        assert!(tokens("cpu", &[]) == tokens("flex", &["run.device=gpu:flex"]));
    }
}

/// The kernels for NVIDIA GPUs on the host.
#[cfg(feature = "cuda-shim")]
mod shim {
    use serde_json::{Value, json};

    use super::*;
    use crate::serve::Served;

    const SMALL: [&str; 5] = [
        "data.sources.0.max_rows=6",
        "train.max_steps=2",
        "train.tokens_per_step=64",
        "train.pack_length=64",
        "data.max_length=64",
    ];

    /// A home whose kernels run on the host.
    fn home() -> Home {
        let mut home = Home::new();
        // Compiled once for all tests.
        home.set("DRAFTSMITH_CUDA_SHIM", env!("CARGO_TARGET_TMPDIR"));
        home
    }

    fn done(home: &Home, verb: &str, name: &str, more: &[&str]) -> std::path::PathBuf {
        let dir = home.path().join(name);
        let (code, stderr) = stage(home, verb, &dir, &[&SMALL, more].concat());
        assert_eq!(code, Some(0), "{stderr}");
        dir
    }

    fn losses(dir: &Path) -> Vec<f64> {
        let log = std::fs::read_to_string(dir.join("train/log.jsonl")).unwrap();
        let lines = log.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        lines.filter(|line| line["event"] == "step").map(|line| line["loss"].as_f64().unwrap()).collect()
    }

    #[test]
    fn answers_of_the_kernels_for_cuda_are_those_of_the_cpu() {
        let home = home();
        let tokens = |name: &str, more: &[&str]| {
            let greedy = [
                "regenerate.temperature=0",
                "regenerate.max_rows=3",
                "regenerate.max_new_tokens=6",
                "regenerate.batch_size=2",
            ];
            let dir = done(&home, "regenerate", name, &[&greedy, more].concat());
            std::fs::read(dir.join("regenerate/train.tokens")).unwrap()
        };
        assert!(tokens("cpu", &[]) == tokens("cuda", &["run.device=cuda"]));
    }

    #[test]
    fn capture_and_training_on_the_kernels_for_cuda_give_the_losses_of_the_cpu() {
        let home = home();
        let train = |name: &str, more: &[&str]| {
            let off = ["regenerate.enabled=false", "validate.every=0"];
            losses(&done(&home, "train", name, &[&off, more].concat()))
        };
        let cpu = train("cpu", &[]);
        assert_eq!(cpu.len(), 2);
        for mode in ["cache", "online"] {
            let found = train(mode, &["run.device=cuda", &format!("capture.mode={mode}")]);
            assert_eq!(found.len(), cpu.len());
            // Operands of the draft's products are bf16.
            for (found, wanted) in found.iter().zip(&cpu) {
                assert!((found - wanted).abs() < 3e-2 * wanted, "{mode}: {found:?}, not {cpu:?}");
            }
        }
    }
    fn fixture(name: &str) -> String {
        repository().join("fixtures").join(name).display().to_string()
    }

    /// `generate` of a few tokens with these arguments.
    fn generate(home: &Home, more: &[&str]) -> Value {
        let tiny = fixture("tiny-target");
        let prompt = ["generate", "--target", &tiny, "--prompt", "Calculate 22 + 20.", "--json"];
        home.run(&[&prompt, more].concat()).json()
    }

    #[test]
    fn answers_with_drafts_on_the_kernels_for_cuda_are_those_without_and_those_of_the_cpu() {
        let home = home();
        let cuda = ["--device", "cuda", "--max-new-tokens", "6"];
        // Nothing is rounded there, so it is the text of the CPU too.
        let cpu = generate(&home, &["--f32", "--max-new-tokens", "6"]);
        let plain = generate(&home, &[&cuda[..], &["--f32"]].concat());
        assert_eq!(plain["token_ids"], cpu["token_ids"]);
        let device = &plain["device"];
        assert_eq!((&device["name"], &device["row_exact"]), (&json!("cuda"), &json!(true)), "{device}");
        for key in ["card", "driver", "capability"] {
            assert!(device[key].is_string(), "{device}");
        }
        let chain = fixture("tiny-drafts/eagle3");
        let block = fixture("tiny-drafts/dspark");
        let sampled = ["--temperature", "0.8", "--top-p", "0.95", "--seed", "3"];
        let mut drafted = 0.0;
        for (bundle, shape) in [
            (&chain, &["--depth", "3"][..]),
            (&chain, &["--depth", "3", "--tree-top-k", "3", "--tree-nodes", "7"]),
            (&block, &["--depth", "4"]),
        ] {
            for sampling in [&[][..], &sampled] {
                let more = [&cuda[..], shape, sampling, &["--bundle", bundle, "--prove"]].concat();
                let answer = generate(&home, &more);
                assert_eq!(answer["identical"], true, "{more:?}");
                let alone = generate(&home, &[&cuda[..], sampling].concat());
                assert_eq!(answer["token_ids"], alone["token_ids"], "{more:?}");
                drafted += answer["accept_len"].as_f64().unwrap() - 1.0;
            }
        }
        assert!(drafted > 1.0, "the drafts were asked, and some of what they said was kept: {drafted}");
        // The target drafts for itself, on the same card.
        let tiny = fixture("tiny-target");
        let own = [&cuda[..], &["--draft-model", &tiny, "--depth", "2", "--prove"]].concat();
        let own = generate(&home, &own);
        assert_eq!(
            (&own["identical"], own["accept_len"].as_f64() > Some(2.0)),
            (&json!(true), true),
            "{own}"
        );
    }

    #[test]
    fn texts_on_the_kernels_for_cuda_do_not_depend_on_draft_and_batch() {
        let home = home();
        let (tiny, draft) = (fixture("tiny-target"), fixture("tiny-drafts/eagle3"));
        let rows = home.write(
            "rows.jsonl",
            "{\"id\": \"a\", \"turns\": [\"Hi.\"]}\n{\"id\": \"b\", \"turns\": [\"Calculate 2 + 2.\"]}",
        );
        let rows = rows.display().to_string();
        let own = ["--target", &tiny, "--bundle", &draft, "--workload", &rows, "--device", "cuda"];
        let more = ["--new-tokens", "3", "--temperature", "0.7", "--json"];
        let found = home.run(&[&["bench", "identity"][..], &own, &more].concat()).json();
        assert_eq!(found["identical"], true, "{}", found["differences"]);
        let ways = found["ways"].as_array().unwrap();
        assert_eq!(ways.len(), 12, "{ways:?}");
        assert!(ways.iter().all(|way| way.as_str().unwrap().ends_with(", cuda")), "{ways:?}");
        assert_eq!(found["device"]["row_exact"], true, "{found}");
        // The record names what it was measured on.
        let more = ["--depth", "2", "--max-new-tokens", "3", "--limit", "1", "--report", "report", "--json"];
        let contract = home.run(&[&["bench"][..], &own, &more].concat()).json();
        assert_eq!(contract["identical"], true, "{contract}");
        assert_eq!(contract["machine"]["device"]["name"], "cuda", "{contract}");
        let record = std::fs::read_to_string(home.path().join("report/rows.json")).unwrap();
        let record: Value = serde_json::from_str(&record).unwrap();
        assert_eq!(record["machine"]["device"], contract["machine"]["device"]);
        let page = std::fs::read_to_string(home.path().join("report/report.html")).unwrap();
        assert!(page.contains("computed on"), "the page says so");
    }

    #[test]
    fn a_server_on_the_kernels_for_cuda_answers_as_generate_does() {
        let home = home();
        let draft = fixture("tiny-drafts/eagle3");
        let wanted = generate(&home, &["--device", "cuda", "--max-new-tokens", "6"]);
        let served = Served::start(home, &["--device", "cuda", "--bundle", &draft, "--depth", "2"]);
        let ask = json!({
            "messages": [{"role": "user", "content": "Calculate 22 + 20."}], "max_tokens": 6, "temperature": 0,
        });
        assert_eq!(served.text_of(&ask), wanted["text"].as_str().unwrap());
    }

    /// The draft's states and proposals come from the same kernels as its decoding: so do its steps.
    #[test]
    fn doctor_asks_a_draft_on_the_kernels_for_cuda() {
        let home = home();
        let draft = fixture("tiny-drafts/eagle3");
        let tiny = fixture("tiny-target");
        let rows = home.write("rows.jsonl", r#"{"id": "a", "turns": ["Calculate 22 + 20."]}"#);
        let rows = rows.display().to_string();
        let ask = ["doctor", "--draft", &draft, "--target", &tiny, "--workload", &rows];
        let more = ["--max-new-tokens", "8", "--device", "cuda", "--json"];
        let found = home.run(&[&ask[..], &more].concat());
        assert!(matches!(found.code, Some(0 | 1)), "{}", found.stderr);
        let found: Value = serde_json::from_str(&found.stdout).unwrap();
        assert_eq!(found["device"]["name"], "cuda", "{found}");
        let cuda = ["--device", "cuda", "--max-new-tokens", "8"];
        let decoded = generate(&home, &[&cuda[..], &["--bundle", &draft, "--depth", "4"]].concat());
        assert_eq!(found["own"]["accept_len"], decoded["accept_len"], "{found} {decoded}");
        assert!(decoded["accept_len"].as_f64() > Some(1.0), "{decoded}");
        assert!(found["tried"].as_array().unwrap().len() > 10, "{found}");
    }

    #[test]
    fn quickstart_on_the_kernels_for_cuda_proves_its_answers() {
        let home = home();
        let (tiny, draft) = (fixture("tiny-target"), fixture("tiny-drafts/eagle3"));
        let bundle = home.path().join("bundle").display().to_string();
        home.run(&["bundle", "import", &draft, "--target", &tiny, "--out", &bundle, "--json"]).json();
        let ask = ["quickstart", "--target", &tiny, "--bundle", &bundle, "--device", "cuda"];
        let found = home.run(&[&ask[..], &["--max-new-tokens", "4", "--json"]].concat()).json();
        assert_eq!(
            (&found["identical"], &found["device"]["name"]),
            (&json!(true), &json!("cuda")),
            "{found}"
        );
        assert_eq!(found["prompts"].as_array().unwrap().len(), 4, "{found}");
        assert!(found["tokens_compared"].as_u64() > Some(4), "{found}");
    }

    #[test]
    fn too_little_memory_is_one_error_that_names_the_numbers() {
        let mut home = home();
        home.set("DRAFTSMITH_CUDA_SHIM_BYTES", 300_000);
        let command = &decoding(&home)[0];
        let (error, hint) = refused(&home, command, &["--device", "cuda"]);
        assert!(
            error.contains("of memory were asked for on the GPU, ") && error.contains("are free"),
            "{error}"
        );
        assert!(hint.contains("serve --kv-budget") && !hint.contains("run."), "{hint}");
        // The target has room, what the server was to keep has not.
        home.set("DRAFTSMITH_CUDA_SHIM_BYTES", 64 << 20);
        let command = &decoding(&home)[7];
        let (error, _) = refused(&home, command, &["--device", "cuda", "--kv-budget", "1GiB"]);
        assert!(error.contains("1.0 GiB of memory were asked for") || error.contains("1023."), "{error}");
    }
}
