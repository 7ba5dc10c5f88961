//! Stage `capture` through servers: the same states as in this process, whatever goes wrong on the way, or an error that
//! names the field.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use draftsmith::capture::{CaptureSource, InProcess, RemoteCapture, RemoteOptions, TokenRow};
use draftsmith::core::LayerId;
use draftsmith::formats::cache::CaptureRow;
use draftsmith::formats::run::CaptureServerTable;
use draftsmith::formats::safetensors_dir::{Dtype, SafetensorsDir, TensorData, to_bytes};
use serde_json::json;

use crate::fake_capture::{FakeCapture, Fault, Started};
use crate::fake_openai::hash;
use crate::stages::{bytes, finish, kill_when};
use crate::support::{Ended, Home, tiny_target};

/// Of the tiny target's 8 layers these are captured by default.
pub(crate) const LAYERS: [u32; 3] = [1, 3, 4];

/// As vLLM must be started: inputs of the next layers, and the output of the last.
pub(crate) fn vllm(dir: &Path, dtype: Dtype) -> Started {
    Started::Vllm { dir: dir.to_path_buf(), layer_ids: vec![2, 4, 5, 8], dtype }
}

fn rows() -> Vec<TokenRow> {
    (0..24u64)
        .map(|number| {
            let length = 3 + (number * 7) % 40;
            let ids = (0..length).map(|i| (hash(&format!("{number} {i}")) % 1024) as u32).collect();
            TokenRow { number, ids, loss_mask: (0..length).map(|i| i % 3 == 0).collect() }
        })
        .collect()
}

fn capture(source: &mut impl CaptureSource) -> Vec<CaptureRow> {
    let mut rows = rows().into_iter();
    let mut captured = Vec::new();
    source
        .capture_rows(&mut || rows.next(), &mut |row| {
            captured.push(row);
            ControlFlow::Continue(())
        })
        .unwrap();
    captured
}

fn through(server: serde_json::Value) -> Vec<CaptureRow> {
    let server: CaptureServerTable = serde_json::from_value(server).unwrap();
    let stop = AtomicBool::new(false);
    let options = RemoteOptions { server: &server, key: None, stop: &stop, note: Arc::new(|_| {}) };
    let target = tiny_target().target;
    capture(&mut RemoteCapture::new(options, target, LAYERS.map(LayerId).to_vec()))
}

fn rounded(values: &[f32], dtype: Dtype) -> Vec<f32> {
    let shape = [values.len()];
    let tensor = match dtype {
        Dtype::BF16 => TensorData::bf16("x", &shape, values),
        Dtype::F16 => TensorData::f16("x", &shape, values),
        _ => TensorData::f32("x", &shape, values),
    };
    let file = SafetensorsDir::from_bytes("x", to_bytes(&[tensor], &BTreeMap::new())).unwrap();
    file.get("x").unwrap().to_f32().unwrap()
}

#[test]
fn states_from_vllm_are_those_of_this_process_rounded_to_the_type_sent() {
    let target = tiny_target().target;
    let layers: Vec<LayerId> = LAYERS.iter().chain(&[7]).map(|l| LayerId(*l)).collect();
    let ours = capture(&mut InProcess::new(Arc::clone(&target), layers));
    let width = target.config().hidden_size;
    for dtype in [Dtype::F32, Dtype::BF16, Dtype::F16] {
        let home = Home::new();
        let fake =
            FakeCapture::start(vllm(home.path(), dtype), None, |nth| (nth % 5 == 2).then_some(Fault::Cut));
        let table = json!({ "kind": "vllm", "url": fake.url(), "shared_dir": home.path(), "concurrency": 5 });
        let theirs = through(table);
        assert_eq!(fake.take_rows().len(), 24 + fake.faults()["Cut"] as usize);
        assert_eq!(theirs.len(), ours.len());
        for (ours, theirs) in ours.iter().zip(&theirs) {
            let mut features = Vec::new();
            let mut last = Vec::new();
            for token in rounded(&ours.features, dtype).chunks(4 * width) {
                features.extend_from_slice(&token[..3 * width]);
                last.extend_from_slice(&token[3 * width..]);
            }
            assert_eq!((&ours.ids, &ours.loss_mask), (&theirs.ids, &theirs.loss_mask));
            assert_eq!(features, theirs.features, "{dtype:?}");
            assert_eq!(target.normed(&last), theirs.last, "{dtype:?}");
            if dtype == Dtype::F32 {
                assert_eq!(ours.last, theirs.last, "the final norm is the target's own");
            }
        }
        let left = std::fs::read_dir(home.path()).unwrap().count();
        // The file of an answer that was cut is never asked for.
        assert_eq!(left, 2 * fake.faults()["Cut"] as usize, "files that were read are removed");
    }
}

#[test]
fn states_from_two_sglang_servers_are_those_of_this_process() {
    let ours = capture(&mut InProcess::new(tiny_target().target, LAYERS.map(LayerId).to_vec()));
    let layers = FakeCapture::start(Started::SglangLayers(LAYERS.to_vec()), None, |nth| {
        (nth % 6 == 1).then_some(Fault::Cut)
    });
    let end = FakeCapture::start(Started::SglangFinal, None, |nth| (nth % 7 == 3).then_some(Fault::Hangup));
    let table = json!({ "kind": "sglang", "url": layers.url(), "final_url": end.url(), "concurrency": 4 });
    assert_eq!(ours, through(table));
    layers.take_rows();
    end.take_rows();
}

pub(crate) fn arguments(dir: &Path, server: &str, more: &[&str]) -> Vec<String> {
    let mut args: Vec<String> = [
        "capture",
        "recipes/smoke.toml",
        "regenerate.enabled=false",
        "data.sources.0.max_rows=40",
        "capture.shard_rows=5",
    ]
    .map(str::to_string)
    .to_vec();
    args.push(format!("run.dir={}", dir.display()));
    args.extend((!server.is_empty()).then(|| format!("capture.server={{ {server} }}")));
    args.extend(more.iter().map(|s| s.to_string()));
    args
}

/// Files of the finished cache, by name.
pub(crate) fn cache(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let files = std::fs::read_dir(dir.join("capture")).unwrap().flatten();
    files.map(|f| (f.file_name().into_string().unwrap(), bytes(f.path()))).collect()
}

fn of_vllm(fake: &FakeCapture, dir: &Path, more: &str) -> String {
    format!("kind = \"vllm\", url = \"{}\", shared_dir = \"{}\", {more}", fake.url(), dir.display())
}

fn of_sglang(layers: &FakeCapture, end: &FakeCapture, more: &str) -> String {
    format!("kind = \"sglang\", url = \"{}/\", final_url = \"{}\", {more}", layers.url(), end.url())
}

#[test]
fn a_cache_under_all_passing_faults_has_the_bytes_of_one_captured_here() {
    let mut home = Home::new();
    home.set("MY_KEY", "sesame");
    let (here, there) = (home.path().join("here"), home.path().join("there"));
    finish(home.spawn(&arguments(&here, "", &[])));
    let files = home.path().join("files");
    std::fs::create_dir(&files).unwrap();
    let fail = |nth: u64| {
        let faults = [
            Fault::Silence(Duration::from_millis(1500)),
            Fault::Busy,
            Fault::Status(500),
            Fault::Status(503),
            Fault::Hangup,
            Fault::Cut,
            Fault::CutFile,
            Fault::LateFile,
            Fault::NoFile,
        ];
        // Of the 43 rows asked for, each fault meets two.
        (nth % 3 == 1).then(|| faults[(nth / 3) as usize % faults.len()])
    };
    let fake = FakeCapture::start(vllm(&files, Dtype::F32), Some("sesame"), fail);
    let server = of_vllm(&fake, &files, "key_env = \"MY_KEY\", timeout_s = 1, concurrency = 7");
    let said = finish(home.spawn(&arguments(&there, &server, &[])));
    assert_eq!(fake.faults().len(), 9, "{:?}", fake.faults());
    let late = fake.faults()[&format!("{:?}", Fault::LateFile)];
    let faults: u64 = fake.faults().values().sum();
    // 40 rows and 3 that the estimate tries; a file that comes late is waited for.
    assert_eq!(fake.take_rows().len() as u64, 43 + faults - late, "one repetition per fault");
    assert!(said.contains("eagle_aux_hidden_state_layer_ids` = [2, 4, 5, 8]"), "{said}");
    assert!(said.contains("of them failed: "), "{said}");
    assert_eq!(cache(&here), cache(&there));

    let second = home.path().join("sglang");
    let layers = FakeCapture::start(Started::SglangLayers(LAYERS.to_vec()), None, |nth| {
        (nth % 9 == 4).then_some(Fault::Status(429))
    });
    let end = FakeCapture::start(Started::SglangFinal, None, |_| None);
    finish(home.spawn(&arguments(&second, &of_sglang(&layers, &end, ""), &[])));
    assert_eq!((layers.take_rows().len() > 43, end.take_rows().len()), (true, 43));
    assert_eq!(cache(&here), cache(&second));
}

#[test]
fn a_capture_that_loses_its_server_or_is_killed_goes_on_without_losing_or_doubling_a_row() {
    let home = Home::new();
    let (here, there) = (home.path().join("here"), home.path().join("there"));
    finish(home.spawn(&arguments(&here, "", &[])));
    let files = home.path().join("files");
    std::fs::create_dir(&files).unwrap();
    let dying =
        FakeCapture::start(vllm(&files, Dtype::F32), None, |nth| (nth >= 20).then_some(Fault::Status(500)));
    let ended = home.spawn(&arguments(&there, &of_vllm(&dying, &files, "retries = 1, concurrency = 3"), &[]));
    let ended = Ended::from(ended.wait_with_output().unwrap());
    assert_eq!(ended.code, Some(2), "{}", ended.stderr);
    assert!(ended.stderr.contains("(attempts: 2)"), "{}", ended.stderr);
    let shards = || {
        let text = std::fs::read_to_string(there.join("capture/manifest.json")).unwrap_or_default();
        text.matches("dscache").count()
    };
    assert!((2..8).contains(&shards()), "{} shards", shards());

    // Another address and another concurrency: what was captured is kept.
    let fake = FakeCapture::start(vllm(&files, Dtype::F32), None, |_| None);
    let server = of_vllm(&fake, &files, "concurrency = 2");
    let before = shards();
    let killed = kill_when(home.spawn(&arguments(&there, &server, &[])), || shards() > before + 1);
    assert!(killed, "the run ended before it was killed");
    let done = 5 * shards();
    fake.take_rows();
    finish(home.spawn(&arguments(&there, &server, &[])));
    assert_eq!(fake.take_rows().len(), 40 - done, "only what is missing is asked for");
    assert_eq!(cache(&here), cache(&there));
}

#[test]
fn training_online_through_a_server_gives_the_same_weights() {
    let home = Home::new();
    let files = home.path().join("files");
    std::fs::create_dir(&files).unwrap();
    let fake = FakeCapture::start(vllm(&files, Dtype::F32), None, |nth| (nth % 8 == 3).then_some(Fault::Cut));
    let more = [
        "capture.mode=online",
        "train.max_steps=3",
        "train.tokens_per_step=512",
        "validate.every=0",
        "bench.workloads=[]",
    ];
    let train = |name: &str, server: &str| {
        let mut args = arguments(&home.path().join(name), server, &more);
        args[0] = "train".to_string();
        finish(home.spawn(&args));
        bytes(home.path().join(name).join("train/last/model.safetensors"))
    };
    assert_eq!(train("here", ""), train("there", &of_vllm(&fake, &files, "")));
    assert!(!fake.take_rows().is_empty());
}

#[test]
fn answers_that_are_not_what_was_asked_are_errors_that_name_the_field() {
    let home = Home::new();
    let files = home.path().join("files");
    std::fs::create_dir(&files).unwrap();
    let end = |server: &str| {
        let dir = home.path().join("run");
        let ended = home.spawn(&arguments(&dir, server, &["--quiet"]));
        Ended::from(ended.wait_with_output().unwrap())
    };
    let check = |started: &Started, fault: Fault, names: &str| {
        let fake = FakeCapture::start(started.clone(), None, move |_| Some(fault));
        let calm = |started| FakeCapture::start(started, None, |_| None);
        let ended = match started {
            Started::Vllm { .. } => end(&of_vllm(&fake, &files, "retries = 0, timeout_s = 2")),
            Started::SglangLayers(_) => end(&of_sglang(&fake, &calm(Started::SglangFinal), "retries = 0")),
            Started::SglangFinal => {
                end(&of_sglang(&calm(Started::SglangLayers(LAYERS.to_vec())), &fake, "retries = 0"))
            }
        };
        fake.take_rows();
        let stderr = ended.stderr.replace(fake.url(), "[URL]");
        assert_eq!(ended.code, Some(2), "{fault:?}: {stderr}");
        assert!(stderr.contains(names), "{fault:?} should name `{names}`: {stderr}");
        assert!(stderr.contains("row ") && stderr.contains("\nhint: "), "{stderr}");
    };
    let started = vllm(&files, Dtype::BF16);
    for (fault, names) in [
        (Fault::EchoedIds, "another `choices[0].prompt_token_ids[0]`"),
        (Fault::NoEcho, "another `choices[0].prompt_token_ids`"),
        (Fault::IdsInFile, "another `token_ids[0]`"),
        (Fault::NoPath, "another `kv_transfer_params.hidden_states_path` than asked: nothing"),
        (Fault::PathOutside, "`kv_transfer_params.hidden_states_path` than asked: `/elsewhere/secret`"),
        (Fault::Short, "another `hidden_states` than asked: shape ["),
        (Fault::Narrow, "another `hidden_states` than asked: shape ["),
        (Fault::MissingLayer, ", 3, 128] instead of ["),
        (Fault::Whole, "another `hidden_states` than asked: type I64 instead of [F32, BF16, F16]"),
        (Fault::NotFinite, "`hidden_states, state 1 value 3` than asked: inf"),
        (Fault::NoStates, "another `tensors` than asked: [\"token_ids\"]"),
        (Fault::NoFile, "the file `"),
        (Fault::Status(404), "refused `row 0` with status 404"),
    ] {
        check(&started, fault, names);
    }
    for started in [Started::SglangLayers(LAYERS.to_vec()), Started::SglangFinal] {
        for (fault, names) in [
            (Fault::Counted, "another `meta_info.prompt_tokens`"),
            (Fault::Cached, "another `meta_info.cached_tokens` than asked: 3 instead of 0"),
            (Fault::Short, "another `meta_info.hidden_states` than asked: "),
            (Fault::Narrow, "another `meta_info.hidden_states, row 0` than asked: "),
            (Fault::MissingLayer, "another `meta_info.hidden_states, row 0` than asked: "),
            (Fault::NoStates, "another `meta_info.hidden_states` than asked: nothing"),
            (Fault::Whole, "cannot be read: invalid type: string"),
            (Fault::NotFinite, "another `meta_info.hidden_states, state 0 value 0` than asked: inf"),
        ] {
            check(&started, fault, names);
        }
    }
}

#[test]
fn other_layers_and_other_models_are_found_by_the_first_row() {
    let home = Home::new();
    let files = home.path().join("files");
    std::fs::create_dir(&files).unwrap();
    let end = |started: Started, more: &str| {
        let fake = FakeCapture::start(started, None, |_| None);
        let args = arguments(&home.path().join("run"), &of_vllm(&fake, &files, more), &["--quiet"]);
        let ended = Ended::from(home.spawn(&args).wait_with_output().unwrap());
        fake.take_rows();
        (ended.code, ended.stderr.replace(fake.url(), "[URL]"))
    };
    let started = |layer_ids: [u32; 4]| Started::Vllm {
        dir: files.clone(),
        layer_ids: layer_ids.to_vec(),
        dtype: Dtype::BF16,
    };
    // Numbers of outputs where numbers of inputs belong: every layer is the one before.
    let (code, stderr) = end(started([1, 3, 4, 8]), "");
    assert_eq!(code, Some(2), "{stderr}");
    insta::assert_snapshot!(stderr);
    // The last layer is missing and another one stands for it.
    let (code, stderr) = end(started([2, 4, 5, 3]), "");
    assert_eq!(code, Some(2), "{stderr}");
    insta::assert_snapshot!(stderr);
    let (code, stderr) = end(started([1, 3, 4, 8]), "compare_states = false");
    assert_eq!(code, Some(0), "{stderr}");
}

#[test]
fn keys_of_the_table_that_cannot_be_are_named() {
    let home = Home::new();
    let check = |server: &str| {
        let args = arguments(&home.path().join("run"), server, &["--quiet"]);
        let ended = Ended::from(home.spawn(&args).wait_with_output().unwrap());
        assert_eq!(ended.code, Some(2), "{}", ended.stderr);
        ended.stderr
    };
    insta::assert_snapshot!(check("kind = \"vllm\", url = \"http://127.0.0.1:9/v1\""));
    insta::assert_snapshot!(check("kind = \"sglang\", url = \"http://127.0.0.1:9\""));
    insta::assert_snapshot!(check(
        "kind = \"sglang\", url = \"http://127.0.0.1:9\", final_url = \"http://127.0.0.1:9\", shared_dir = \"x\""
    ));
    let vllm = "kind = \"vllm\", url = \"http://127.0.0.1:9/v1\", model = \"m\", shared_dir = \"x\"";
    insta::assert_snapshot!(check(&format!("{vllm}, concurrency = 0")));
    insta::assert_snapshot!(check(&format!("{vllm}, retries = 0")));
    insta::assert_snapshot!(check(&format!("{vllm}, key_env = \"NO_SUCH_KEY\"")));
}
