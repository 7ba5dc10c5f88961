//! The real draft network beside the tiny target: what the probe asks is what decoding runs.

use std::collections::BTreeMap;

use draftsmith_bundle::{
    ProbeInput, Problem, Status, TargetInfo, answer_beside, check_alone, check_with_target, run_draft,
};
use draftsmith_core::{LayerId, Sampling};
use draftsmith_decode::{Ask, Committed, Features, Shape, drafter};
use draftsmith_formats::safetensors_dir::{SafetensorsDir, TensorData, write};
use draftsmith_kernels::PackMode;
use draftsmith_model::{Draft, Infer, StepItem};
use serde_json::{Value, json};

use crate::support::{VD, facts, made};

#[test]
fn the_probe_sees_what_the_drafter_proposes() {
    for variant in [json!({}), json!({"fc_norm": true, "norm_output": true})] {
        let (_root, dir, target) = made(&variant);
        let load = || Draft::load(target.kernels().as_ref(), &dir, PackMode::F32).unwrap();
        let (draft, drafter) = (load(), drafter(&target, load()).unwrap());
        let layers: Vec<LayerId> = drafter.target_layers().to_vec();
        for prompt in [vec![1, 300, 17, 42, 42, 901], vec![5], (0..40).map(|i| i * 23 % 1024).collect()] {
            let (context, next) = (&prompt[..], [&prompt[1..], &[77]].concat());
            let parents: Vec<Option<u32>> = (0..context.len() as u32).map(|i| i.checked_sub(1)).collect();
            let mut kv = target.new_kv();
            let mut items = [StepItem { kv: &mut kv, tokens: context, parents: &parents }];
            let output = target.forward(&mut items, &layers);
            let rows: Vec<u32> = (0..context.len() as u32).collect();
            let features = Features { output: &output, rows: &rows };

            let mut session = drafter.begin();
            drafter.take_in(&mut [Committed { session: session.as_mut(), features, next_tokens: &next }]);
            let (sampling, position) = (&Sampling::GREEDY, context.len() as u64);
            let mut asks =
                [Ask { session: session.as_mut(), sampling, text: &[], position, k: 1, whole: false }];
            let tree = drafter.propose(&mut asks, &[Shape { depth: 5, top_k: 1, nodes: 5 }]).remove(0);
            let proposed: Vec<u32> = tree.tokens.iter().map(|t| t.0).collect();

            let kernels = target.kernels().as_ref();
            let values = Infer::new(kernels).values(&features.concat(kernels));
            let asked: Vec<u32> = (0..5)
                .map(|depth| {
                    let question = ProbeInput {
                        token_ids: next.clone(),
                        features: values.clone(),
                        depth,
                        embeddings: vec![],
                    };
                    let answer = answer_beside(&target, &draft, &question).unwrap();
                    // Completed with what was fed, the question has the same answer without the target.
                    assert_eq!(answer.input.token_ids.len(), next.len() + depth as usize);
                    assert_eq!(run_draft(kernels, &draft, &answer.input).unwrap(), answer.logits);
                    let logits = answer.logits;
                    let best = (0..VD).fold(0, |b, i| if logits[i] > logits[b] { i } else { b });
                    100 + 2 * best as u32
                })
                .collect();
            assert_eq!(asked, proposed);
        }
    }
}

#[test]
fn a_bundle_made_beside_a_target_holds_beside_it() {
    let (_root, dir, target) = made(&json!({}));
    let report = check_with_target(&dir, &facts(&target), &target).unwrap();
    assert!(report.holds, "{}", report.text());
    let probe = &report.checks[5];
    assert_eq!((probe.name, probe.status), ("probe", Status::Held));
    assert!(
        probe.detail.contains("difference 0.0e0"),
        "the same machine gives the same bits: {}",
        probe.detail
    );

    // Another quantisation of the target is no reason against the draft.
    let other = TargetInfo { weights_sha256: "bb".repeat(32), ..facts(&target) };
    let report = check_with_target(&dir, &other, &target).unwrap();
    assert!(report.holds);
    assert_eq!((report.checks[4].status, report.checks[5].status), (Status::Warned, Status::Held));

    // Without any target the numbers are compared all the same.
    let report = check_alone(&dir, target.kernels().as_ref()).unwrap();
    assert!(report.holds, "{}", report.text());
    assert_eq!((report.checks[4].status, report.checks[5].status), (Status::Skipped, Status::Held));
}

#[test]
fn a_target_that_embeds_in_another_way_is_found() {
    let (_root, dir, target) = made(&json!({}));
    let path = dir.join("probe.safetensors");
    let open = SafetensorsDir::open(&path).unwrap();
    let tensors: Vec<TensorData> = open
        .names()
        .map(|name| {
            let t = open.get(name).unwrap();
            let mut values = t.to_f32().unwrap_or_default();
            match name {
                // The sixth token's row.
                "0.embeddings" => {
                    values[5 * t.shape[1] + 3] += 1.0;
                    TensorData::f32(name, t.shape, &values)
                }
                _ => TensorData {
                    name: name.into(),
                    dtype: t.dtype,
                    shape: t.shape.to_vec(),
                    bytes: t.bytes.to_vec(),
                },
            }
        })
        .collect();
    let sixth = open.get("0.token_ids").unwrap().to_i64().unwrap()[5] as u32;
    drop(open);
    write(&path, &tensors, &BTreeMap::new()).unwrap();
    let report = check_with_target(&dir, &facts(&target), &target).unwrap();
    assert!(
        report.failures().any(|p| *p == Problem::EmbeddingDiffers { token_id: sixth }),
        "{}",
        report.text()
    );
}

#[test]
fn a_network_with_another_configuration_than_trained_is_found() {
    // The weights stay what they are; only what the network does with them changes.
    for (key, value) in
        [("rope_theta", json!(20000.0)), ("norm_output", json!(true)), ("rms_norm_eps", json!(0.1))]
    {
        let (_root, dir, target) = made(&json!({}));
        let path = dir.join("config.json");
        let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        config[key] = value;
        std::fs::write(&path, config.to_string()).unwrap();
        let report = check_with_target(&dir, &facts(&target), &target).unwrap();
        let probe = &report.checks[5];
        assert_eq!(probe.status, Status::Failed, "{key}: {}", report.text());
        assert!(matches!(probe.problems[0], Problem::ProbeDiffers { .. }), "{key}");
    }
}

#[test]
fn a_transposed_square_matrix_is_found_by_the_probe_alone() {
    let (_root, dir, target) = made(&json!({}));
    let open = SafetensorsDir::open(&dir).unwrap();
    let tensors: Vec<TensorData> = open
        .names()
        .map(|name| {
            let t = open.get(name).unwrap();
            let mut bytes = t.bytes.to_vec();
            if name == "midlayer.self_attn.o_proj.weight" {
                let n = t.shape[0];
                assert_eq!(t.shape, [n, n]);
                for r in 0..n {
                    for c in 0..n {
                        let (to, from) = ((r * n + c) * 2, (c * n + r) * 2);
                        bytes[to..to + 2].copy_from_slice(&t.bytes[from..from + 2]);
                    }
                }
            }
            TensorData { name: name.into(), dtype: t.dtype, shape: t.shape.to_vec(), bytes }
        })
        .collect();
    drop(open);
    write(dir.join("model.safetensors"), &tensors, &BTreeMap::new()).unwrap();
    let report = check_with_target(&dir, &facts(&target), &target).unwrap();
    assert_eq!(report.checks[2].status, Status::Held, "shapes cannot tell");
    assert_eq!(report.checks[5].status, Status::Failed);
}

#[test]
fn a_question_that_does_not_fit_is_an_error_not_a_panic() {
    let (_root, dir, target) = made(&json!({}));
    let draft = Draft::load(target.kernels().as_ref(), &dir, PackMode::F32).unwrap();
    let width = draft.config().shape().features_width();
    let ask = |token_ids: Vec<u32>, features: usize| {
        let input = ProbeInput { token_ids, features: vec![0.1; features], depth: 0, embeddings: vec![] };
        answer_beside(&target, &draft, &input).map(|answer| answer.logits)
    };
    assert!(ask(vec![], 0).is_err());
    assert!(ask(vec![1, 2], width).is_err());
    assert!(ask(vec![9999], width).unwrap_err().to_string().contains("9999"));
    assert_eq!(ask(vec![1], width).unwrap().len(), VD);
    let alone = ProbeInput { token_ids: vec![1], features: vec![0.1; width], depth: 0, embeddings: vec![] };
    assert!(run_draft(target.kernels().as_ref(), &draft, &alone).is_err());
    let short = ProbeInput { embeddings: vec![0.1; 7], ..alone };
    assert!(run_draft(target.kernels().as_ref(), &draft, &short).is_err());
}
