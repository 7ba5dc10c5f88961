//! `doctor --draft`: a draft that is right is told so in every layout; broken in one way, that way is named and no other.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use draftsmith::bench::Workload;
use draftsmith::doctor::draft::{DraftReport, Patient};
use draftsmith::doctor::texts::{Tap, Text, Texts};
use draftsmith::engine::LoadedTarget;
use draftsmith::formats::gguf::{GgufArray, GgufFile, GgufValue, GgufWriter};
use draftsmith::formats::safetensors_dir::{SafetensorsDir, TensorData, to_bytes};
use draftsmith::measure::first_prompt;
use draftsmith::report::{Silent, Stop};
use serde_json::{Map, Value, json};

use crate::support::{Home, repository, tiny_target};

/// Numbers of a float tensor by name, and the two tables.
type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

/// A draft in SpecForge's layout, taken apart.
struct Parts {
    config: Map<String, Value>,
    tensors: Tensors,
    d2t: Option<Vec<i64>>,
    t2d: Option<Vec<bool>>,
}

fn draft(kind: &str) -> PathBuf {
    repository().join("fixtures/tiny-drafts").join(kind)
}

impl Parts {
    fn of(dir: &Path) -> Parts {
        let config = serde_json::from_slice(&std::fs::read(dir.join("config.json")).unwrap()).unwrap();
        let open = SafetensorsDir::open(dir).unwrap();
        let mut tensors = Tensors::new();
        for name in open.names().filter(|name| !matches!(*name, "d2t" | "t2d")) {
            let tensor = open.get(name).unwrap();
            tensors.insert(name.to_owned(), (tensor.shape.to_vec(), tensor.to_f32().unwrap()));
        }
        let d2t = open.find("d2t").map(|t| t.to_i64().unwrap());
        let t2d = open.find("t2d").map(|t| t.to_bool().unwrap());
        Parts { config, tensors, d2t, t2d }
    }

    fn write(&self, dir: &Path) {
        std::fs::create_dir_all(dir).unwrap();
        let mut list: Vec<TensorData> =
            self.tensors.iter().map(|(name, (shape, v))| TensorData::bf16(name, shape, v)).collect();
        list.extend(self.d2t.as_ref().map(|ids| TensorData::i64("d2t", &[ids.len()], ids)));
        list.extend(self.t2d.as_ref().map(|set| TensorData::bool("t2d", &[set.len()], set)));
        std::fs::write(dir.join("config.json"), Value::Object(self.config.clone()).to_string()).unwrap();
        std::fs::write(dir.join("model.safetensors"), to_bytes(&list, &BTreeMap::new())).unwrap();
    }

    fn each(&mut self, wanted: impl Fn(&str) -> bool, change: impl Fn(&mut Vec<f32>, &[usize])) {
        let mut changed = 0;
        for (name, (shape, values)) in &mut self.tensors {
            if wanted(name) {
                change(values, shape);
                changed += 1;
            }
        }
        assert!(changed > 0);
    }

    fn set(&mut self, key: &str, value: Value) {
        self.config.insert(key.into(), value);
    }
}

/// The tiny target, and what it answers to a few requests.
struct Ward {
    target: LoadedTarget,
    texts: Texts,
    folder: tempfile::TempDir,
}

impl Ward {
    fn new() -> Ward {
        let target = tiny_target();
        let rows = Workload::read(repository().join("fixtures/tiny-target/eval.jsonl"), None).unwrap().rows;
        let prompts: Vec<Vec<u32>> =
            rows.iter().map(|row| first_prompt(&target.text, row).unwrap()).collect();
        let texts = Texts::read(&target, &prompts, 64, &Silent, &Stop::default()).unwrap();
        Ward { target, texts, folder: tempfile::tempdir().unwrap() }
    }

    fn examine(&self, path: &Path) -> DraftReport {
        self.examine_with(path, &self.texts)
    }

    fn examine_with(&self, path: &Path, texts: &Texts) -> DraftReport {
        let patient = Patient::open(path).unwrap();
        patient.examine(&self.target, texts, &Silent, &Stop::default()).unwrap()
    }

    /// Breaks a draft and wants exactly one suspicion.
    #[track_caller]
    fn check(&self, kind: &str, what: &str, breaks: impl FnOnce(&mut Parts), told: (&str, &str, &str)) {
        self.check_with(&self.texts, kind, what, breaks, told);
    }

    #[track_caller]
    fn check_with(
        &self,
        texts: &Texts,
        kind: &str,
        what: &str,
        breaks: impl FnOnce(&mut Parts),
        told: (&str, &str, &str),
    ) {
        let mut parts = Parts::of(&draft(kind));
        breaks(&mut parts);
        let dir = self.folder.path().join(format!("{kind}-{what}"));
        parts.write(&dir);
        named(what, &self.examine_with(&dir, texts), told);
    }

    /// The same texts of a target whose layers have less in common: all but these write their numbers in other places.
    /// Neighbouring layers of the tiny one are so alike that a draft does nearly as well with either.
    fn apart(&self, right: &[u32]) -> Texts {
        let width = self.texts.width;
        let text = |text: &Arc<Text>| {
            let mut own = text.as_ref().clone();
            for (tap, values) in &mut own.states {
                match tap {
                    Tap::Layer(id) if !right.contains(id) => {
                        values.chunks_mut(width).for_each(|row| row.rotate_left(31 + *id as usize));
                    }
                    _ => {}
                }
            }
            Arc::new(own)
        };
        Texts { width, texts: self.texts.texts.iter().map(text).collect() }
    }
}

/// The report has this suspicion and no other, and where it was measured, the correction helps.
#[track_caller]
fn named(what: &str, found: &DraftReport, (id, key, write): (&str, &str, &str)) {
    let told: Vec<String> = found
        .suspicions
        .iter()
        .map(|s| format!("{} about {}: write {} (as good: {:?})", s.id, s.key, s.write, s.as_good))
        .collect();
    let own = found.own.as_ref().map(|own| own.accept_len);
    let tried: Vec<String> =
        found.tried.iter().map(|t| format!("{} {} {} {:?}", t.round, t.id, t.write, t.accept_len)).collect();
    assert_eq!(told.len(), 1, "{what}: {told:#?}, as it is {own:?}, tried {tried:#?}");
    let suspicion = &found.suspicions[0];
    assert_eq!(suspicion.id, id, "{what}: {told:?}, as it is {own:?}, tried {tried:#?}");
    assert!(suspicion.key.contains(key), "{what}: {told:?}");
    let is_number = !write.is_empty() && write.bytes().all(|b| b.is_ascii_digit());
    let holds = if is_number { suspicion.write == write } else { suspicion.write.contains(write) };
    assert!(holds, "{what}: {told:?}");
    if let (Some(before), Some(after)) = (&suspicion.before, &suspicion.after) {
        assert!(after.accept_len > before.accept_len, "{what}: {before:?} {after:?}");
    }
}

#[track_caller]
fn well(what: &str, found: &DraftReport) {
    let told: Vec<String> = found
        .suspicions
        .iter()
        .map(|s| format!("{}: {} -> {}, {:?}", s.id, s.key, s.write, s.after))
        .collect();
    assert!(found.is_well(), "{what}: {told:#?}, as it is {:?}", found.own);
    let own = found.own.as_ref().unwrap();
    // Chance would be a few percent: the most frequent token.
    assert!(own.accept_len_low > 1.3, "{what}: {own:?}");
    assert!(own.accept_rate_at[0] > 0.3, "{what}: {own:?}");
    assert_eq!(found.corrected.as_ref(), found.own.as_ref());
}

/// The layout of SpecForge and every other one that the kind has.
fn is_well_in_every_layout(kind: &str, layouts: &[&str]) {
    let ward = Ward::new();
    let home = Home::new();
    well(kind, &ward.examine(&draft(kind)));
    let (given, bundle) =
        (draft(kind).display().to_string(), home.path().join("bundle").display().to_string());
    let target = repository().join("fixtures/tiny-target").display().to_string();
    let imported = home.run(&["bundle", "import", &given, "--target", &target, "--out", &bundle]);
    assert_eq!(imported.code, Some(0), "{}", imported.stderr);
    let alone = ward.examine(Path::new(&bundle));
    well("bundle", &alone);
    for layout in layouts {
        let out = home.path().join(layout).display().to_string();
        let args = ["bundle", "export", &bundle, "--format", layout, "--out", &out, "--target", &target];
        let ended = home.run(&args);
        assert_eq!(ended.code, Some(0), "{layout}: {}", ended.stderr);
        let found = ward.examine(Path::new(&out));
        assert_eq!(found.layout, Some(*layout));
        well(layout, &found);
    }
}

#[test]
fn an_eagle_draft_that_is_right_is_well_in_every_layout() {
    is_well_in_every_layout("eagle3", &["sglang", "vllm", "speculators", "gguf"]);
}

#[test]
fn a_dflash_draft_that_is_right_is_well_in_every_layout() {
    is_well_in_every_layout("dflash", &["sglang", "vllm", "speculators", "gguf"]);
}

#[test]
fn a_dspark_draft_that_is_right_is_well_in_every_layout() {
    is_well_in_every_layout("dspark", &["sglang", "vllm", "speculators", "gguf"]);
}

#[test]
fn a_p_eagle_draft_that_is_right_is_well_in_every_layout() {
    is_well_in_every_layout("p-eagle", &["sglang", "vllm", "speculators"]);
}

const NESTED: &str = "eagle_config.eagle_aux_hidden_state_layer_ids";
const TOP: &str = "eagle_aux_hidden_state_layer_ids";

/// Layers in SpecForge's key alone.
fn layers(parts: &mut Parts, ids: [u32; 3]) {
    parts.set("eagle_config", json!({ TOP: ids }));
    parts.config.remove(TOP);
}

#[test]
fn wrong_layers_of_an_eagle_draft_are_named() {
    let ward = Ward::new();
    let apart = ward.apart(&[1, 3, 4]);
    let check = |what: &str, breaks: &dyn Fn(&mut Parts), told| {
        ward.check_with(&apart, "eagle3", what, |p| breaks(p), told);
    };
    let too_low = ("layers_one_too_low", NESTED, "[1, 3, 4], or import it with `--layers 1,3,4`");
    check("low", &|p| layers(p, [0, 2, 3]), too_low);
    check("high", &|p| layers(p, [2, 4, 5]), ("layers_one_too_high", NESTED, "[1, 3, 4]"));
    check("reversed", &|p| layers(p, [4, 3, 1]), ("layers_out_of_order", NESTED, "[1, 3, 4]"));
    check("others", &|p| layers(p, [0, 4, 7]), ("other_layers", NESTED, "[1, 3, 4]"));
    check("outside", &|p| layers(p, [1, 3, 9]), ("other_layers", NESTED, "[1, 3, 4]"));
    // vLLM's key counts from 1.
    let top = |p: &mut Parts| {
        p.config.remove("eagle_config");
        p.set(TOP, json!([1, 3, 4]));
    };
    check("top", &top, ("layers_one_too_low", TOP, "[2, 4, 5]"));
    let disagree = |p: &mut Parts| {
        layers(p, [0, 2, 3]);
        p.set(TOP, json!([2, 4, 5]));
    };
    check("disagree", &disagree, ("layers_of_the_other_key", NESTED, "[1, 3, 4]"));
    // Where the states are alike, the order still counts.
    let order = ("layers_out_of_order", NESTED, "[1, 3, 4]");
    ward.check("eagle3", "order", |p| layers(p, [4, 3, 1]), order);
}

/// Rows of each head from halves to interleaved pairs, or back.
fn turn(values: &mut Vec<f32>, shape: &[usize], pairs: bool) {
    let (rows, width, dim) = (shape[0], shape[1..].iter().product::<usize>(), 32);
    let from = |r: usize| if pairs { r % 2 * (dim / 2) + r / 2 } else { r % (dim / 2) * 2 + r / (dim / 2) };
    let place = |row: usize| (row / dim * dim + from(row % dim)) * width;
    *values = (0..rows).flat_map(|row| values[place(row)..place(row) + width].to_vec()).collect();
}

fn turns(name: &str) -> bool {
    ["q_proj.weight", "k_proj.weight", "q_norm.weight", "k_norm.weight"].iter().any(|end| name.ends_with(end))
}

fn is_norm(name: &str) -> bool {
    name.contains("norm") && name.ends_with(".weight")
}

#[test]
fn wrong_rope_and_norms_of_an_eagle_draft_are_named() {
    let ward = Ward::new();
    ward.check("eagle3", "theta", |p| p.set("rope_theta", json!(3)), ("rope_theta", "rope_theta", "10000"));
    let scaling = json!({ "rope_type": "linear", "factor": 16.0 });
    ward.check(
        "eagle3",
        "scaling",
        |p| p.set("rope_scaling", scaling),
        ("rope_scaling", "rope_scaling", "null"),
    );
    let pairs = |p: &mut Parts| p.each(turns, |values, shape| turn(values, shape, true));
    ward.check("eagle3", "pairs", pairs, ("rope_pairs", "q_proj", "halves"));
    let twice = |p: &mut Parts| p.each(turns, |values, shape| turn(values, shape, false));
    ward.check("eagle3", "twice", twice, ("rope_halves_twice", "q_proj", "before the conversion"));
    for (what, by, write) in [("gemma", -1.0, "plus 1"), ("added", 1.0, "less 1")] {
        let shift = |p: &mut Parts| p.each(is_norm, |values, _| values.iter_mut().for_each(|v| *v += by));
        ward.check("eagle3", what, shift, ("norm_offset", "norm weights", write));
    }
    ward.check(
        "eagle3",
        "eps",
        |p| p.set("rms_norm_eps", json!(2)),
        ("rms_norm_eps", "rms_norm_eps", "0.00001"),
    );
    let residual = ("norm_before_residual", "norm_before_residual", "false");
    ward.check("eagle3", "residual", |p| p.set("norm_before_residual", json!(true)), residual);
    ward.check(
        "eagle3",
        "output",
        |p| p.set("norm_output", json!(true)),
        ("norm_output", "norm_output", "false"),
    );
    ward.check("eagle3", "fc_norm", |p| p.set("fc_norm", json!(true)), ("fc_norm", "fc_norm", "false"));
    ward.check(
        "eagle3",
        "before_fc",
        |p| p.set("norm_before_fc", json!(true)),
        ("norm_before_fc", "norm_before_fc", "false"),
    );
}

#[test]
fn wrong_vocabularies_of_an_eagle_draft_are_named() {
    let ward = Ward::new();
    let absolute = |p: &mut Parts| {
        p.d2t.as_mut().unwrap().iter_mut().zip(0..).for_each(|(entry, draft)| *entry += draft);
    };
    ward.check("eagle3", "absolute", absolute, ("absolute_d2t", "d2t", "offsets: "));
    let cleared = |p: &mut Parts| {
        let set = p.t2d.as_mut().unwrap();
        let marked: Vec<usize> = (0..set.len()).filter(|id| set[*id]).take(9).collect();
        marked.into_iter().for_each(|id| set[id] = false);
    };
    ward.check("eagle3", "t2d", cleared, ("t2d_disagrees", "t2d", "true exactly where"));
    let shuffled = |p: &mut Parts| p.d2t.as_mut().unwrap().iter_mut().for_each(|entry| *entry += 7);
    ward.check("eagle3", "d2t", shuffled, ("d2t_disagrees", "d2t", "offsets to the marked ids"));
    let padded = |p: &mut Parts| {
        p.set("vocab_size", json!(1088));
        p.t2d.as_mut().unwrap().resize(1088, false);
    };
    ward.check("eagle3", "padded", padded, ("vocab_size", "vocab_size", "1024"));
    let copied = |p: &mut Parts| {
        let rows = (0..1024 * 128).map(|i| ((i * 37 % 101) as f32 - 50.0) / 500.0).collect();
        p.tensors.insert("embed_tokens.weight".into(), (vec![1024, 128], rows));
    };
    ward.check("eagle3", "copied", copied, ("own_embedding", "embed_tokens.weight", "leave it out"));
    // A tokenizer that came along.
    let dir = ward.folder.path().join("tokenizer");
    Parts::of(&draft("eagle3")).write(&dir);
    let own = repository().join("fixtures/tiny-target");
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(own.join(file), dir.join(file)).unwrap();
    }
    well("the same tokenizer", &ward.examine(&dir));
    let mut json: Value =
        serde_json::from_slice(&std::fs::read(own.join("tokenizer.json")).unwrap()).unwrap();
    let vocab = json["model"]["vocab"].as_object_mut().unwrap();
    let of = |id: u64, vocab: &Map<String, Value>| vocab.iter().find(|(_, v)| **v == id).unwrap().0.clone();
    let (a, b) = (of(900, vocab), of(901, vocab));
    vocab.insert(a, json!(901));
    vocab.insert(b, json!(900));
    std::fs::write(dir.join("tokenizer.json"), json.to_string()).unwrap();
    named("another tokenizer", &ward.examine(&dir), ("tokenizer", "tokenizer", "another target"));
}

#[test]
fn wrong_tensors_are_named() {
    let ward = Ward::new();
    let nan = |p: &mut Parts| p.each(|name| name == "norm.weight", |values, _| values[3] = f32::NAN);
    ward.check("eagle3", "nan", nan, ("tensor_not_finite", "norm.weight", ""));
    let zero = |p: &mut Parts| p.each(|name| name.ends_with("up_proj.weight"), |values, _| values.fill(0.0));
    ward.check("eagle3", "zero", zero, ("tensor_constant", "midlayer.mlp.up_proj.weight", ""));
    let extra = |p: &mut Parts| {
        p.tensors.insert("midlayer.extra.weight".into(), (vec![4], vec![0.5, 1.0, 2.0, 3.0]));
    };
    ward.check("eagle3", "extra", extra, ("tensor_extra", "midlayer.extra.weight", ""));
    let lacking = |p: &mut Parts| drop(p.tensors.remove("midlayer.mlp.up_proj.weight"));
    ward.check("eagle3", "lacking", lacking, ("tensor_missing", "midlayer.mlp.up_proj.weight", ""));
    ward.check(
        "eagle3",
        "width",
        |p| p.set("intermediate_size", json!(320)),
        ("shape", "intermediate_size", "128"),
    );
    ward.check(
        "eagle3",
        "heads",
        |p| p.set("num_key_value_heads", json!(4)),
        ("shape", "num_key_value_heads", "2"),
    );
    ward.check(
        "eagle3",
        "vocab",
        |p| p.set("draft_vocab_size", json!(1000)),
        ("shape", "draft_vocab_size", "512"),
    );
    // A draft of noise fits, and nothing is accepted.
    let noise = |p: &mut Parts| {
        p.each(
            |name| !is_norm(name),
            |values, _| {
                let mut state = 7u32;
                values.iter_mut().for_each(|v| {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    *v = (state >> 8) as f32 / (1 << 24) as f32 - 0.5;
                });
            },
        );
    };
    ward.check("eagle3", "noise", noise, ("accepts_nothing", "as a whole", "trained"));
}

/// The texts with states moved by so many positions: what a draft sees that was trained on states beside other tokens.
fn moved(texts: &Texts, by: isize) -> Texts {
    let width = texts.width;
    let shift = |values: &Vec<f32>| -> Vec<f32> {
        let rows = values.len() / width;
        (0..rows)
            .flat_map(|row| {
                let from = row.saturating_add_signed(by).min(rows - 1) * width;
                values[from..from + width].to_vec()
            })
            .collect()
    };
    let text = |text: &Arc<Text>| {
        let states = text.states.iter().map(|(tap, values)| (*tap, shift(values))).collect();
        Arc::new(Text { states, ..text.as_ref().clone() })
    };
    Texts { width, texts: texts.texts.iter().map(text).collect() }
}

#[test]
fn states_beside_other_tokens_and_behind_other_norms_are_named() {
    let ward = Ward::new();
    // The DSpark draft does nearly as well with states one position off.
    for kind in ["eagle3", "p-eagle", "dflash"] {
        let found = ward.examine_with(&draft(kind), &moved(&ward.texts, 1));
        named(kind, &found, ("state_before", "order of states", "no key says it"));
    }
    for kind in ["eagle3", "p-eagle"] {
        let found = ward.examine_with(&draft(kind), &moved(&ward.texts, -1));
        named(kind, &found, ("own_token", "order of states", "no key says it"));
    }
    // As if the draft had been trained on the normed state of the last layer: what it knows is put there.
    let mut texts = ward.texts.clone();
    for text in &mut texts.texts {
        let mut own = text.as_ref().clone();
        let known = own.states.insert(Tap::Layer(4), vec![0.0; own.tokens.len() * ward.texts.width]).unwrap();
        own.states.insert(Tap::Final, known);
        *text = Arc::new(own);
    }
    let mut parts = Parts::of(&draft("eagle3"));
    layers(&mut parts, [1, 3, 7]);
    let dir = ward.folder.path().join("final");
    parts.write(&dir);
    named(
        "final",
        &ward.examine_with(&dir, &texts),
        ("final_norm", NESTED, "the state behind the final norm"),
    );
}

const TABLE: &str = "dflash_config";

fn in_table(parts: &mut Parts, key: &str, value: Value) {
    parts.config[TABLE][key] = value;
}

#[test]
fn wrong_settings_of_block_drafts_are_named() {
    let ward = Ward::new();
    for kind in ["dflash", "dspark"] {
        let own = Parts::of(&draft(kind));
        let mask = own.config[TABLE]["mask_token_id"].clone();
        let ids: Vec<u64> = own.config[TABLE]["target_layer_ids"]
            .as_array()
            .unwrap()
            .iter()
            .map(|v| v.as_u64().unwrap())
            .collect();
        let off = |by: i64| json!(ids.iter().map(|id| *id as i64 + by).collect::<Vec<i64>>());
        let written = format!("[{}]", ids.iter().map(u64::to_string).collect::<Vec<String>>().join(", "));
        let key = "dflash_config.target_layer_ids";
        let low = ("layers_one_too_low", key, written.as_str());
        let apart = ward.apart(&ids.iter().map(|id| *id as u32).collect::<Vec<u32>>());
        ward.check_with(&apart, kind, "low", |p| in_table(p, "target_layer_ids", off(-1)), low);
        let high = ("layers_one_too_high", key, written.as_str());
        ward.check_with(&apart, kind, "high", |p| in_table(p, "target_layer_ids", off(1)), high);
        let reversed = json!(ids.iter().rev().collect::<Vec<&u64>>());
        let order = ("layers_out_of_order", key, written.as_str());
        ward.check_with(&apart, kind, "reversed", |p| in_table(p, "target_layer_ids", reversed), order);
        let wanted = mask.to_string();
        let told = ("mask_token", "dflash_config.mask_token_id", wanted.as_str());
        ward.check(kind, "mask", |p| in_table(p, "mask_token_id", json!(2)), told);
        ward.check(kind, "theta", |p| p.set("rope_theta", json!(3)), ("rope_theta", "rope_theta", "10000"));
        let pairs = |p: &mut Parts| p.each(turns, |values, shape| turn(values, shape, true));
        ward.check(kind, "pairs", pairs, ("rope_pairs", "q_proj", "halves"));
        let shift = |p: &mut Parts| p.each(is_norm, |values, _| values.iter_mut().for_each(|v| *v -= 1.0));
        ward.check(kind, "gemma", shift, ("norm_offset", "norm weights", "plus 1"));
        ward.check(
            kind,
            "eps",
            |p| p.set("rms_norm_eps", json!(2)),
            ("rms_norm_eps", "rms_norm_eps", "0.00001"),
        );
        let layers = ("target_layers", "num_target_layers", "8");
        ward.check(kind, "target", |p| p.set("num_target_layers", json!(12)), layers);
    }
    let causal = |p: &mut Parts| {
        let layers = p.config["num_hidden_layers"].as_u64().unwrap() as usize;
        p.set("layer_types", json!(vec!["sliding_attention"; layers]));
        p.set("use_sliding_window", json!(true));
        p.set("sliding_window", json!(1024));
    };
    // The blocks of the DFlash draft hardly look at themselves.
    ward.check("dspark", "causal", causal, ("causal_block", "layer_types", "full attention"));
    // A DFlash draft under DSpark's name proposes from one slot too early on.
    let spark = |p: &mut Parts| {
        p.set("architectures", json!(["DSparkDraftModel"]));
        in_table(p, "projector_type", json!("dspark"));
        in_table(p, "markov_rank", json!(0));
    };
    ward.check("dflash", "spark", spark, ("sample_from_anchor", "projector_type", "false"));
    let rank = |p: &mut Parts| {
        p.set("markov_rank", json!(64));
        in_table(p, "markov_rank", json!(64));
    };
    ward.check("dspark", "rank", rank, ("shape", "markov_rank", "32"));
}

#[test]
fn wrong_settings_of_a_p_eagle_draft_are_named() {
    let ward = Ward::new();
    let own = Parts::of(&draft("p-eagle"));
    let mask = own.config["pard_token"].to_string();
    let other = |p: &mut Parts| {
        p.set("pard_token", json!(2));
        p.set("ptd_token_id", json!(2));
    };
    ward.check("p-eagle", "mask", other, ("mask_token", "pard_token", &mask));
    let apart = ward.apart(&[1, 3, 4]);
    ward.check_with(
        &apart,
        "p-eagle",
        "low",
        |p| layers(p, [0, 2, 3]),
        ("layers_one_too_low", NESTED, "[1, 3, 4]"),
    );
    ward.check("p-eagle", "theta", |p| p.set("rope_theta", json!(3)), ("rope_theta", "rope_theta", "10000"));
    let residual = ("norm_before_residual", "norm_before_residual", "false");
    ward.check("p-eagle", "residual", |p| p.set("norm_before_residual", json!(true)), residual);
    let embedding = |p: &mut Parts| {
        p.each(|name| name == "embed_tokens.weight", |values, _| values.reverse());
    };
    ward.check(
        "p-eagle",
        "embedding",
        embedding,
        ("target_embedding", "embed_tokens.weight", "the target's"),
    );
}

#[test]
fn a_gguf_draft_whose_layers_count_from_0_is_named_with_its_key() {
    let ward = Ward::new();
    let home = Home::new();
    let (given, bundle) =
        (draft("eagle3").display().to_string(), home.path().join("bundle").display().to_string());
    let target = repository().join("fixtures/tiny-target").display().to_string();
    let out = home.path().join("gguf").display().to_string();
    for args in [
        ["bundle", "import", &given, "--target", &target, "--out", &bundle].as_slice(),
        &["bundle", "export", &bundle, "--format", "gguf", "--out", &out, "--target", &target],
    ] {
        let ended = home.run(args);
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    }
    let file = Path::new(&out).join("draft.gguf");
    let broken = home.path().join("broken.gguf");
    {
        let open = GgufFile::open(&file).unwrap();
        let mut writer = GgufWriter::new();
        for (key, value) in open.metadata() {
            let value = match key.as_str() {
                "eagle3.target_layers" => GgufValue::Array(GgufArray::I32(vec![1, 3, 4])),
                _ => value.clone(),
            };
            writer.set(key.clone(), value);
        }
        for info in open.tensors() {
            writer.tensor(info.name.clone(), &info.dims, info.ggml_type, open.data(info));
        }
        writer.write(&broken).unwrap();
    }
    let told = ("layers_one_too_low", "eagle3.target_layers", "[2, 4, 5]");
    named("gguf", &ward.examine_with(&broken, &ward.apart(&[1, 3, 4])), told);
}

#[test]
fn the_verb_tells_people_and_scripts_and_ends_with_1() {
    let home = Home::new();
    let mut parts = Parts::of(&draft("eagle3"));
    layers(&mut parts, [4, 3, 1]);
    let dir = home.path().join("broken");
    parts.write(&dir);
    let broken = dir.display().to_string();
    let target = repository().join("fixtures/tiny-target").display().to_string();
    let workload = repository().join("fixtures/tiny-target/eval.jsonl").display().to_string();
    let ask = |draft: &str, more: &[&str]| {
        home.run(
            &[&["doctor", "--draft", draft, "--target", &target, "--workload", &workload], more].concat(),
        )
    };
    let told = ask(&broken, &[]);
    assert_eq!(told.code, Some(1), "{}", told.stderr);
    for line in [
        "suspicion: the captured layers are not in ascending order",
        "  about    eagle_config.eagle_aux_hidden_state_layer_ids, now [4,3,1]",
        "  write    [1, 3, 4], or import it with `--layers 1,3,4`",
        "  before   accept length ",
        "  after    accept length ",
    ] {
        assert!(told.stdout.contains(line), "{line} in {}", told.stdout);
    }
    let machine = ask(&broken, &["--json"]);
    assert_eq!(machine.code, Some(1));
    let json: Value = serde_json::from_str(&machine.stdout).unwrap();
    assert_eq!(json["suspicions"][0]["id"], "layers_out_of_order");
    assert!(json["own"]["accept_len"].as_f64() < json["corrected"]["accept_len"].as_f64());
    let healthy = ask(&draft("eagle3").display().to_string(), &[]);
    assert_eq!(healthy.code, Some(0), "{}{}", healthy.stdout, healthy.stderr);
    assert!(healthy.stdout.ends_with("Nothing about this draft is suspected.\n"), "{}", healthy.stdout);
    // What is no draft is bad input.
    let none = ask(&target, &[]);
    assert_eq!(none.code, Some(2), "{}", none.stdout);
    assert!(none.stderr.starts_with("error: ") && none.stderr.contains("\nhint: "), "{}", none.stderr);
}
