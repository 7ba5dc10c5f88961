//! `run.device`: what a build without GPUs says, and the GPU's code on the CPU.

use std::path::Path;

use crate::support::Home;

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
    use serde_json::Value;

    use super::*;

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
        let folder = home.path().display().to_string();
        home.set("DRAFTSMITH_CUDA_SHIM", folder);
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
}
