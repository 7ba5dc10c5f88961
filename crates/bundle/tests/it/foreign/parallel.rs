//! The same for drafts that propose several tokens at once: DFlash, DSpark, P-EAGLE.

use super::*;

const ALL: &[Layout] = &LAYOUTS;
const FOLDERS: &[Layout] = &[Layout::Sglang, Layout::Vllm, Layout::Speculators];
const V: usize = 1024;

fn with(base: &Value, more: Value) -> Value {
    let mut value = base.clone();
    for (key, set) in more.as_object().unwrap() {
        value[key] = set.clone();
    }
    value
}

fn dflash() -> Value {
    json!({
        "architectures": ["DFlashDraftModel"], "model_type": "qwen3", "num_hidden_layers": 2, "block_size": 4,
        "draft_vocab_size": V, "dflash_config": {"mask_token_id": 1023, "target_layer_ids": [0, 2, 3]},
    })
}

fn dspark(kind: &str, confidence: bool, with_markov: bool) -> Value {
    with(
        &dflash(),
        json!({"architectures": ["Qwen3DSparkModel"], "dflash_config": {
            "mask_token_id": 1023, "target_layer_ids": [0, 2, 3], "projector_type": "dspark", "markov_rank": 16,
            "markov_head_type": kind, "enable_confidence_head": confidence,
            "confidence_head_with_markov": with_markov}}),
    )
}

fn p_eagle() -> Value {
    json!({
        "architectures": ["PEagleDraftModel"], "num_hidden_layers": 2, "num_depths": 4, "pard_token": 1022,
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 2, 3]},
    })
}

fn bytes(dir: &Path, file: &str) -> Vec<u8> {
    std::fs::read(dir.join(file)).unwrap()
}

fn config_of(dir: &Path) -> Value {
    serde_json::from_slice(&bytes(dir, "config.json")).unwrap()
}

fn set_config(dir: &Path, config: &Value) {
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
}

#[test]
fn every_layout_of_a_block_comes_back_with_identical_weights_and_answers() {
    let sliding = json!({"layer_types": ["sliding_attention", "sliding_attention"], "use_sliding_window": true,
        "sliding_window": 6});
    let mixed = json!({"layer_types": ["sliding_attention", "full_attention"], "use_sliding_window": true,
        "sliding_window": 6});
    let linear = json!({"rope_scaling": {"rope_type": "linear", "factor": 4.0}, "rope_theta": 500000.0});
    let cases: &[(Value, &[Layout])] = &[
        (dflash(), ALL),
        (with(&dflash(), sliding), ALL),
        (with(&dflash(), mixed), &[Layout::Sglang, Layout::Vllm, Layout::Gguf]),
        (with(&dflash(), linear), ALL),
        (dspark("vanilla", true, true), ALL),
        (dspark("vanilla", false, false), ALL),
        (dspark("vanilla", true, false), FOLDERS),
        (dspark("gated", true, true), &[Layout::Sglang]),
        (dspark("rnn", false, false), &[Layout::Sglang]),
        (p_eagle(), FOLDERS),
        (with(&p_eagle(), json!({"norm_before_residual": true})), FOLDERS),
    ];
    for (variant, layouts) in cases {
        let (_root, bundle, target) = made(variant);
        for layout in *layouts {
            let place = format!("{variant} as {}", layout.name());
            let out = export_of(&bundle, *layout, &target).unwrap();
            let report = verified(&out, &bundle, &target);
            assert!(report.holds && report.checks.len() == 3, "{place}:\n{}", report.text());

            let draft = import(&out).unwrap();
            assert_eq!(draft.layout, *layout, "{place}");
            let back = imported_bundle(&draft, &bundle, &target).unwrap();
            assert!(bytes(&back, "model.safetensors") == bytes(&bundle, "model.safetensors"), "{place}");
            assert!(bytes(&back, "probe.safetensors") == bytes(&bundle, "probe.safetensors"), "{place}");
            let (ours, theirs) = (read_draft(&bundle).unwrap().0, read_draft(&back).unwrap().0);
            assert_eq!((ours.shape(), ours.name()), (theirs.shape(), theirs.name()), "{place}");
            assert_eq!(ours.target_layers(), theirs.target_layers(), "{place}");
        }
    }
}

/// [`try_export`] for layouts without an engine, too.
fn export_of(bundle: &Path, layout: Layout, target: &Target<Cpu>) -> Result<PathBuf, BundleError> {
    let out = bundle.with_file_name(layout.name());
    let tokenizer = tokenizer();
    let facts = TargetFacts { config: target.config(), tokenizer: &tokenizer };
    export(&ExportInput { bundle, layout, out: &out, existing: Existing::Replace, target: Some(facts) })?;
    Ok(out)
}

#[test]
fn a_part_of_the_vocabulary_is_put_back_to_the_whole() {
    for variant in [dflash(), dspark("vanilla", true, true)] {
        let (_root, bundle, target) = made(&with(&variant, json!({"draft_vocab_size": VD})));
        let (_, ours, map) = read_draft(&bundle).unwrap();
        let map = map.unwrap();
        for layout in LAYOUTS {
            let out = export_of(&bundle, layout, &target).unwrap();
            let report = verified(&out, &bundle, &target);
            assert!(report.holds, "{}:\n{}", layout.name(), report.text());
            assert!(parts(&out, layout).iter().all(|part| !matches!(part.name.as_str(), "d2t" | "t2d")));
            let draft = import(&out).unwrap();
            assert_eq!((draft.config.shape().draft_vocab_size, &draft.vocab_map), (V, &None));
            for (name, (shape, values)) in &ours {
                let (whole, found) = &draft.tensors[name];
                if name != "markov_head.markov_w2.weight" {
                    assert!((whole, found) == (shape, values), "{name}");
                    continue;
                }
                assert_eq!(*whole, [V, 16]);
                let mut wanted = vec![0.0; V * 16];
                for (id, row) in map.target_ids().iter().zip(values.chunks_exact(16)) {
                    wanted[*id as usize * 16..][..16].copy_from_slice(row);
                }
                assert!(*found == wanted, "{name}");
            }
        }
    }
}

#[test]
fn configurations_are_those_that_the_engines_read() {
    let (_root, bundle, target) = made(&dspark("vanilla", true, true));
    let folder = |bundle: &Path, layout| config_of(&export_of(bundle, layout, &target).unwrap());
    let sglang = folder(&bundle, Layout::Sglang);
    assert_eq!(sglang["architectures"], json!(["Qwen3DSparkModel"]));
    assert_eq!((&sglang["block_size"], &sglang["markov_rank"]), (&json!(4), &json!(16)));
    assert_eq!(sglang["dflash_config"]["target_layer_ids"], json!([0, 2, 3]));
    assert!(sglang.get("draft_vocab_size").is_none() && sglang.get("auto_map").is_none());
    let vllm = folder(&bundle, Layout::Vllm);
    assert_eq!((&vllm["target_layer_ids"], &vllm["mask_token_id"]), (&json!([0, 2, 3]), &json!(1023)));
    assert_eq!(vllm["sample_from_anchor"], true);
    // vLLM 0.32.0 ends with an error if the nested table says it, too.
    assert!(vllm["dflash_config"].get("sample_from_anchor").is_none());
    let speculators = folder(&bundle, Layout::Speculators);
    assert_eq!(speculators["aux_hidden_state_layer_ids"], json!([1, 3, 4]));
    assert_eq!(speculators["speculators_model_type"], "dspark");
    assert_eq!(
        (&speculators["sample_from_anchor"], &speculators["draft_vocab_size"]),
        (&json!(true), &json!(V))
    );
    assert_eq!(speculators["sliding_window_non_causal"], true);
    assert_eq!(speculators["speculators_config"]["proposal_methods"][0]["speculative_tokens"], 4);
    for config in [&sglang, &vllm] {
        assert!(!config.as_object().unwrap().values().any(Value::is_null), "{config}");
    }
    let file = GgufFile::open(export_of(&bundle, Layout::Gguf, &target).unwrap().join(GGUF_FILE)).unwrap();
    assert_eq!(file.get_str("general.architecture").unwrap(), "dflash");
    assert_eq!(file.get_i64_array("dflash.target_layers").unwrap(), [1, 3, 4]);
    assert_eq!(file.get_u32("dflash.block_size").unwrap(), 4);
    assert_eq!(file.get_u32("tokenizer.ggml.mask_token_id").unwrap(), 1023);
    assert_eq!(file.find_bool("dflash.attention.causal").unwrap(), Some(false));
    assert_eq!(file.find_bool("dflash.sample_from_anchor").unwrap(), Some(true));
    drop(file);

    let (_root, bundle, _) = made(&dflash());
    let vllm = folder(&bundle, Layout::Vllm);
    assert_eq!(vllm["dflash_config"]["sample_from_anchor"], false);
    assert_eq!(folder(&bundle, Layout::Speculators)["sample_from_anchor"], false);
    let file = GgufFile::open(export_of(&bundle, Layout::Gguf, &target).unwrap().join(GGUF_FILE)).unwrap();
    assert_eq!(file.find_bool("dflash.sample_from_anchor").unwrap(), Some(false));
    drop(file);

    let (_root, bundle, _) = made(&p_eagle());
    let vllm = folder(&bundle, Layout::Vllm);
    assert_eq!(
        (&vllm["pard_token"], &vllm["eagle_aux_hidden_state_layer_ids"]),
        (&json!(1022), &json!([1, 3, 4]))
    );
    assert!(vllm.get("eagle_config").is_none());
    // By any name but EAGLE-3's, vLLM 0.32.0 looks for a network that it does not have.
    assert_eq!(vllm["architectures"], json!(["Eagle3LlamaForCausalLM"]));
    let sglang = folder(&bundle, Layout::Sglang);
    assert!(sglang.get("eagle_aux_hidden_state_layer_ids").is_none());
    let speculators = folder(&bundle, Layout::Speculators);
    assert_eq!((&speculators["mask_token_id"], &speculators["draft_vocab_size"]), (&json!(1022), &json!(VD)));
}

#[test]
fn what_has_no_place_in_a_layout_is_refused_before_anything_is_written() {
    let mixed = json!({"layer_types": ["sliding_attention", "full_attention"], "use_sliding_window": true,
        "sliding_window": 6});
    let cases: &[(Value, Layout, &str)] = &[
        (dspark("gated", false, false), Layout::Gguf, "`gated`"),
        (dspark("rnn", false, false), Layout::Vllm, "`rnn`"),
        (dspark("rnn", false, false), Layout::Speculators, "`rnn`"),
        (dspark("vanilla", true, false), Layout::Gguf, "`confidence_head_with_markov`"),
        (with(&dflash(), mixed), Layout::Speculators, "causally"),
        (p_eagle(), Layout::Gguf, "`p-eagle` has no place in the layout `gguf`"),
    ];
    for (variant, layout, word) in cases {
        let (_root, bundle, target) = made(variant);
        let error = export_of(&bundle, *layout, &target).unwrap_err();
        assert!(error.to_string().contains(word) && error.hint().is_some(), "{error}");
        assert!(!bundle.with_file_name(layout.name()).exists());
    }
    let (_root, bundle, _) = made(&dflash());
    let (layout, out) = (Layout::Gguf, bundle.with_file_name("nothing"));
    let input = ExportInput { bundle: &bundle, layout, out: &out, existing: Existing::Refuse, target: None };
    assert!(matches!(export(&input), Err(BundleError::NoTokenizer)));
}

#[test]
fn a_tensor_of_a_block_dropped_renamed_transposed_or_retyped_is_named_in_every_layout() {
    for (variant, layouts) in [(dspark("vanilla", true, true), ALL), (p_eagle(), FOLDERS)] {
        let (_root, bundle, target) = made(&variant);
        for &layout in layouts {
            let dir = export_of(&bundle, layout, &target).unwrap();
            let all = parts(&dir, layout);
            for (i, part) in all.iter().enumerate() {
                let with = |changed| replace_one(&dir, layout, &all, i, changed);
                let name = part.name.as_str();
                with(None);
                if name == "t2d" {
                    // It follows from `d2t`.
                    assert!(import(&dir).is_ok());
                } else {
                    check_named(&dir, layout, &bundle, &target, &[name], "dropped");
                }
                let renamed = format!("{name}.old");
                with(Some(Part { name: renamed.clone(), ..part.clone() }));
                check_named(&dir, layout, &bundle, &target, &[name, &renamed], "renamed");
                with(Some(retyped(part)));
                check_named(&dir, layout, &bundle, &target, &[name], "retyped");
                if let Some(other) = transposed(part).filter(|other| other.shape != part.shape) {
                    with(Some(other));
                    check_named(&dir, layout, &bundle, &target, &[name], "transposed");
                }
                let mut other = part.clone();
                *other.bytes.last_mut().unwrap() ^= 1;
                with(Some(other));
                let report = verified(&dir, &bundle, &target);
                let told = |p: &Problem| matches!(p, Problem::TensorDiffers { name: n, .. } if n == name);
                assert!(report.failures().any(told), "{} {name}:\n{}", layout.name(), report.text());
            }
            replace(&dir, layout, &all);
            assert!(verified(&dir, &bundle, &target).holds);
        }
    }
}

/// Where the keys of a layout stand, as paths of its `config.json`.
fn paths(value: &Value, before: &str, found: &mut Vec<String>) {
    for (key, value) in value.as_object().into_iter().flatten() {
        let path = if before.is_empty() { key.clone() } else { format!("{before}/{key}") };
        match value.is_object() {
            true => paths(value, &path, found),
            false => found.push(path),
        }
    }
}

#[test]
fn a_key_of_another_type_is_named_or_is_none_that_the_draft_depends_on() {
    // Facts of others, which no network here reads.
    const UNREAD: [&str; 14] = [
        "attention_dropout",
        "torch_dtype",
        "use_cache",
        "speculators_version",
        "verifier",
        "proposal_methods",
        "algorithm",
        "default_proposal_method",
        "attention_mode",
        "embed_requires_grad",
        "use_aux_hidden_state",
        "max_window_layers",
        "sliding_window_non_causal",
        "eagle_aux_hidden_state_layer_ids",
    ];
    for variant in [dflash(), dspark("vanilla", true, true), p_eagle()] {
        let (_root, bundle, target) = made(&variant);
        for &layout in FOLDERS {
            let dir = export_of(&bundle, layout, &target).unwrap();
            let config = config_of(&dir);
            let draft = import(&dir).unwrap();
            let mut all = Vec::new();
            paths(&config, "", &mut all);
            for path in all {
                let pointer = format!("/{path}");
                let key = path.rsplit('/').next().unwrap();
                let mut changed = config.clone();
                *changed.pointer_mut(&pointer).unwrap() = json!({"not": "this"});
                set_config(&dir, &changed);
                let place = format!("{} {path}", layout.name());
                match import(&dir) {
                    Err(error) => {
                        let text = error.to_string();
                        // The kind of draft itself cannot be told then, nor the class whose defaults hold.
                        let kind = matches!(key, "architectures" | "speculators_model_type" | "model_type");
                        assert!(kind || text.contains(key), "{place}: {text}");
                        assert!(error.hint().is_some(), "{place}: {text}");
                    }
                    Ok(found) => {
                        let unread = UNREAD.iter().any(|word| path.contains(word));
                        let same = found.config == draft.config && found.tensors == draft.tensors;
                        assert!(unread || same, "{place}: {:?}", found.config);
                    }
                }
                changed = config.clone();
                let (parent, _) = pointer.rsplit_once('/').unwrap();
                changed.pointer_mut(parent).unwrap().as_object_mut().unwrap().remove(key);
                set_config(&dir, &changed);
                // A default is taken or the lack is told; never a panic.
                if let Err(error) = import(&dir) {
                    assert!(error.hint().is_some(), "{place}: {error}");
                }
            }
            set_config(&dir, &config);
        }
    }
}

#[test]
fn a_gguf_key_missing_or_of_another_type_is_named() {
    let optional = [
        "attention.causal",
        "sample_from_anchor",
        "rope.dimension_count",
        "attention.value_length",
        "target_hidden_size",
        "rope.freq_base",
        "attention.key_length",
        "attention.head_count_kv",
    ];
    for variant in [dflash(), dspark("vanilla", true, true)] {
        let (_root, bundle, target) = made(&variant);
        let dir = export_of(&bundle, Layout::Gguf, &target).unwrap();
        let path = dir.join(GGUF_FILE);
        let whole = std::fs::read(&path).unwrap();
        let keys: Vec<String> = {
            let file = GgufFile::open(&path).unwrap();
            let own = |key: &&String| key.starts_with("dflash.") || key.ends_with("mask_token_id");
            file.metadata().iter().map(|(key, _)| key).filter(own).cloned().collect()
        };
        assert!(keys.len() > 15);
        for key in keys {
            for replaced in [None, Some(GgufValue::Str("x".into()))] {
                std::fs::write(&path, &whole).unwrap();
                let file = GgufFile::open(&path).unwrap();
                let mut writer = GgufWriter::new();
                for (name, value) in file.metadata() {
                    match (&replaced, *name == key) {
                        (_, false) => writer.set(name.clone(), value.clone()),
                        (Some(value), true) => writer.set(name.clone(), value.clone()),
                        (None, true) => continue,
                    };
                }
                for info in file.tensors() {
                    writer.tensor(info.name.clone(), &info.dims, info.ggml_type, file.data(info));
                }
                let bytes = writer.to_bytes();
                drop(file);
                std::fs::write(&path, bytes).unwrap();
                let without = replaced.is_none() && optional.iter().any(|name| key.ends_with(name));
                // The vocabulary can be counted, too, and so it is where the key is missing.
                let counted = replaced.is_none() && key.ends_with("vocab_size");
                match import(&dir) {
                    Ok(_) => assert!(without || counted, "{key} {replaced:?}"),
                    Err(error) => assert!(error.to_string().contains(&key) || without, "{key}: {error}"),
                }
            }
        }
    }
}

#[test]
fn spellings_of_other_tools_are_read_and_contradictions_told() {
    let (_root, bundle, target) = made(&dspark("vanilla", true, true));
    let dir = export_of(&bundle, Layout::Sglang, &target).unwrap();
    let config = config_of(&dir);
    let ours = import(&dir).unwrap();
    let edit = |change: &dyn Fn(&mut Value)| {
        let mut changed = config.clone();
        change(&mut changed);
        set_config(&dir, &changed);
        import(&dir)
    };
    let remove = |value: &mut Value, key: &str| value.as_object_mut().unwrap().remove(key).unwrap();
    // Trained under another name of the architecture; all facts at the top; facts with a prefix.
    let same: [&dyn Fn(&mut Value); 4] = [
        &|c| c["architectures"] = json!(["DSparkDraftModel"]),
        &|c| {
            let table = remove(c, "dflash_config");
            c.as_object_mut().unwrap().extend(table.as_object().unwrap().clone());
        },
        &|c| {
            let table = remove(c, "dflash_config");
            c["dspark_config"] = table;
        },
        &|c| {
            let ids = remove(&mut c["dflash_config"], "target_layer_ids");
            c["dspark_target_layer_ids"] = ids;
        },
    ];
    for change in same {
        let draft = edit(change).unwrap();
        assert!(draft.config == ours.config && draft.tensors == ours.tensors, "{:?}", draft.config);
    }
    type Change<'a> = &'a dyn Fn(&mut Value);
    let told: [(Change<'_>, &str); 7] = [
        (&|c| c["sample_from_anchor"] = json!(false), "sample_from_anchor"),
        (&|c| c["dflash_config"]["causal"] = json!(true), "causal"),
        (&|c| c["mask_token_id"] = json!(7), "mask_token_id"),
        (&|c| c["markov_rank"] = json!(8), "markov_rank"),
        (&|c| c["dflash_config"]["use_swa"] = json!(true), "use_swa"),
        (&|c| c["num_hidden_layers"] = json!(200_000_000), "num_hidden_layers"),
        (&|c| c["architectures"] = json!(["DFlash2DraftModel"]), "architectures"),
    ];
    for (change, word) in told {
        let error = edit(change).unwrap_err();
        assert!(error.to_string().contains(word) && error.hint().is_some(), "{error}");
    }
    // Two numberings that disagree wait for a decision.
    let mut draft = edit(&|c| c["eagle_aux_hidden_state_layer_ids"] = json!([1, 2, 3])).unwrap();
    let error = imported_bundle(&draft, &bundle, &target).unwrap_err();
    assert!(error.to_string().contains("[1, 2, 3]") && error.to_string().contains("[0, 2, 3]"), "{error}");
    draft.set_layers(&[0, 1, 2]).unwrap();
    assert!(imported_bundle(&draft, &bundle, &target).is_ok());
}

#[test]
fn embedding_and_head_that_come_along_must_be_the_targets() {
    let (_root, bundle, target) = made(&dflash());
    let dir = export_of(&bundle, Layout::Speculators, &target).unwrap();
    let all = parts(&dir, Layout::Speculators);
    let ids: Vec<u32> = (0..V as u32).collect();
    for (name, table) in [("embed_tokens.weight", target.embedding()), ("lm_head.weight", target.head())] {
        let mut ops = Infer::new(target.kernels().as_ref());
        let rows = ops.embed(table, &ids, 1.0);
        let mut values = ops.values(&rows);
        for right in [true, false] {
            if !right {
                values.reverse();
            }
            let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            let kind = Kind::Safetensors(Dtype::F32);
            let part = Part { name: name.into(), shape: vec![V, 128], kind, bytes };
            replace(&dir, Layout::Speculators, &[all.clone(), vec![part]].concat());
            let made = imported_bundle(&import(&dir).unwrap(), &bundle, &target);
            assert_eq!(made.is_ok(), right, "{name}");
            if let Err(error) = made {
                assert!(error.to_string().contains(&format!("`{name}` is not the target's")), "{error}");
            }
        }
    }
}

#[test]
fn damaged_block_files_are_errors_and_never_panics() {
    let (_root, bundle, target) = made(&dspark("vanilla", true, true));
    let dir = export_of(&bundle, Layout::Gguf, &target).unwrap();
    damage(&dir.join(GGUF_FILE), 17, 500);
}

#[test]
fn the_gguf_package_reads_the_same_block_where_it_is_installed() {
    let part = json!({"draft_vocab_size": VD});
    for variant in [dflash(), dspark("vanilla", true, true), with(&dspark("vanilla", false, false), part)] {
        let (_root, bundle, target) = made(&variant);
        let file = export_of(&bundle, Layout::Gguf, &target).unwrap().join(GGUF_FILE);
        let said = peer("DRAFTSMITH_PYTHON", "gguf", "check_gguf_block.py", &[&file, &bundle]);
        assert!(said.is_none_or(|said| said.starts_with("equal: ")));
    }
}

#[test]
fn the_speculators_library_has_a_place_for_every_tensor_where_it_is_installed() {
    for variant in [dflash(), dspark("vanilla", true, true), p_eagle()] {
        let (_root, bundle, target) = made(&variant);
        let dir = export_of(&bundle, Layout::Speculators, &target).unwrap();
        let said = peer("DRAFTSMITH_SPECULATORS_PYTHON", "speculators", "check_speculators.py", &[&dir]);
        assert!(said.is_none_or(|said| said.contains("every one has its place")));
    }
}

/// The folder that SpecForge trains on, and what was said about it.
fn specforge(bundle: &Path, target: &Target<Cpu>) -> PathBuf {
    let out = bundle.with_file_name(SPECFORGE);
    let facts = TargetFacts { config: target.config(), tokenizer: &[] };
    let input = ExportInput {
        bundle,
        layout: Layout::Gguf,
        out: &out,
        existing: Existing::Replace,
        target: Some(facts),
    };
    let exported = export_specforge(input).unwrap();
    assert!(exported.launch.is_empty());
    assert!(!exported.warnings.iter().any(|p| p.to_string().contains("SGLang")), "{:?}", exported.warnings);
    let readme = String::from_utf8(bytes(&out, "README.md")).unwrap();
    assert!(readme.contains("SpecForge loads this folder") && !readme.contains("sglang"), "{readme}");
    out
}

#[test]
fn specforges_folder_has_its_names_and_comes_back_with_identical_weights_and_answers() {
    let part = json!({"draft_vocab_size": VD});
    for variant in [
        json!({}),
        dflash(),
        with(&dflash(), part.clone()),
        dspark("vanilla", true, true),
        with(&dspark("gated", true, false), part),
        dspark("rnn", false, false),
        p_eagle(),
    ] {
        let (_root, bundle, target) = made(&variant);
        let dir = specforge(&bundle, &target);
        let sglang = export_of(&bundle, Layout::Sglang, &target).unwrap();
        assert_eq!(bytes(&dir, "model.safetensors"), bytes(&sglang, "model.safetensors"));
        let (own, theirs) = (config_of(&dir), config_of(&sglang));
        let name = theirs["architectures"][0].as_str().unwrap();
        let (wanted, module) = match name {
            "Qwen3DSparkModel" => ("DSparkDraftModel", json!({"AutoModel": "dspark.DSparkDraftModel"})),
            "DFlashDraftModel" => (name, json!({"AutoModel": "dflash.DFlashDraftModel"})),
            _ => (name, Value::Null),
        };
        assert_eq!((&own["architectures"], &own["auto_map"]), (&json!([wanted]), &module));
        assert_eq!(own["dflash_config"], theirs["dflash_config"]);
        assert_eq!(own["eagle_config"], theirs["eagle_config"]);
        assert!(own.get("markov_rank").is_none() && own.get("sample_from_anchor").is_none());
        let report = verified(&dir, &bundle, &target);
        assert!(report.holds, "{}", report.text());
        let back = imported_bundle(&import(&dir).unwrap(), &bundle, &target).unwrap();
        let report = verified(&dir, &back, &target);
        assert!(report.holds, "{}", report.text());
    }
}

#[test]
fn a_changed_tensor_of_specforges_folder_is_named() {
    for variant in [dspark("gated", true, true), dflash(), p_eagle()] {
        let (_root, bundle, target) = made(&variant);
        let dir = specforge(&bundle, &target);
        let layout = Layout::Sglang;
        let all = parts(&dir, layout);
        for (i, part) in all.iter().enumerate().filter(|(_, part)| part.name != "t2d") {
            let name = part.name.as_str();
            let mut less = all.clone();
            less.remove(i);
            replace(&dir, layout, &less);
            check_named(&dir, layout, &bundle, &target, &[name], "dropped");
            let mut other = all.clone();
            other[i] = retyped(part);
            replace(&dir, layout, &other);
            check_named(&dir, layout, &bundle, &target, &[name], "retyped");
            let mut other = all.clone();
            *other[i].bytes.last_mut().unwrap() ^= 1;
            replace(&dir, layout, &other);
            let report = verified(&dir, &bundle, &target);
            let told = |p: &Problem| matches!(p, Problem::TensorDiffers { name: n, .. } if n == name);
            assert!(report.failures().any(told), "{name}:\n{}", report.text());
        }
        replace(&dir, layout, &all);
        // Facts of the draft, each changed: told by name, or another network.
        for (pointer, wrong) in [
            ("/hidden_size", json!(64)),
            ("/num_hidden_layers", json!(3)),
            ("/block_size", json!(0)),
            ("/dflash_config/mask_token_id", json!("eos")),
            ("/dflash_config/target_layer_ids", json!([0, 2])),
            ("/dflash_config/markov_head_type", json!("lstm")),
            ("/architectures", json!(["DFlash2DraftModel"])),
        ] {
            let mut config = config_of(&dir);
            let whole = config.clone();
            let Some(place) = config.pointer_mut(pointer) else { continue };
            *place = wrong;
            set_config(&dir, &config);
            let error = import(&dir).expect_err(pointer);
            assert!(matches!(error, BundleError::Draft { .. }), "{pointer}: {error}");
            set_config(&dir, &whole);
        }
        assert!(verified(&dir, &bundle, &target).holds);
    }
}

#[test]
fn the_speculators_library_answers_the_probe_alike_where_it_is_installed() {
    for variant in [dflash(), dspark("vanilla", true, true), p_eagle()] {
        let (_root, bundle, target) = made(&variant);
        let dir = export_of(&bundle, Layout::Speculators, &target).unwrap();
        let script = "check_speculators_forward.py";
        let said = peer("DRAFTSMITH_SPECULATORS_PYTHON", "speculators", script, &[&dir, &bundle]);
        assert!(said.is_none_or(|said| said.contains("the same answers")));
    }
}
