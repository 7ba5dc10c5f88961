//! Targets with experts on the command line: what a token reads of them, and counts that lie.

use std::path::PathBuf;

use crate::support::{Home, repository};

fn fixture(name: &str) -> PathBuf {
    repository().join("fixtures/experts").join(name)
}

#[test]
fn inspect_says_what_a_token_reads() {
    let home = Home::new();
    let path = fixture("qwen3_moe/model.gguf");
    let shown = home.run(&["inspect", "--json", &path.display().to_string()]).json();
    // Two layers of eight experts with three weights of 20 x 32 in 16 bits; two of the eight compute a token.
    let (all, idle) = (2 * 8 * 3 * 20 * 32 * 2, 2 * 6 * 3 * 20 * 32 * 2);
    let read = shown["facts"]["bytes_per_token"].as_u64().unwrap();
    let embedding = 64 * 32 * 2;
    let of_layers = 2 * ((32 * 32 * 2 + 16 * 32 * 2) * 2 + (2 * 8 + 2 * 32) * 4 + 8 * 32 * 4);
    assert_eq!(read, (of_layers + all - idle + embedding + 32 * 4) as u64);
    let dense = repository().join("fixtures/gguf/llama-f32.gguf");
    let shown = home.run(&["inspect", "--json", &dense.display().to_string()]).json();
    assert!(shown["facts"]["bytes_per_token"].is_null(), "every token reads everything");
}

#[test]
fn counts_of_experts_that_lie_are_refused() {
    let generate = |home: &Home, target: &str| {
        let text = home.snapshot(&["generate", "--target", target, "--prompt-ids", "5"]);
        assert!(text.contains("exit: 2"), "{text}");
        assert_eq!(text.matches("error: ").count(), 1, "{text}");
        assert_eq!(text.matches("hint: ").count(), 1, "{text}");
        text
    };
    for (key, value, wanted) in [
        (
            "qwen3moe.expert_count",
            9u32,
            "tensor `blk.0.ffn_gate_inp.weight` of `m.gguf` has shape [8, 32], expected [9, 32]",
        ),
        ("qwen3moe.expert_count", 0, "`m.gguf` has impossible shapes: 0 experts"),
        ("qwen3moe.expert_used_count", 9, "`m.gguf` has impossible shapes: 9 of 8 experts compute a token"),
        ("qwen3moe.expert_used_count", 0, "`m.gguf` has impossible shapes: 0 of 8 experts compute a token"),
    ] {
        let mut bytes = std::fs::read(fixture("qwen3_moe/model.gguf")).unwrap();
        // Behind the key stand its type and the number.
        let at = bytes.windows(key.len()).position(|w| w == key.as_bytes()).unwrap() + key.len() + 4;
        bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        let home = Home::new();
        home.write("m.gguf", bytes);
        let text = generate(&home, "m.gguf");
        assert!(text.contains(wanted), "{text}");
    }
    let config = std::fs::read_to_string(fixture("qwen3_moe/config.json")).unwrap();
    for (from, to, wanted) in [
        (r#""num_experts_per_tok": 2"#, r#""num_experts_per_tok": 9"#, "9 of 8 experts compute a token"),
        (r#""num_local_experts": 8"#, r#""num_local_experts": 16"#, "expected [16, 32]"),
        ("{", r#"{ "n_shared_experts": 1,"#, "shared experts (`n_shared_experts`)"),
        ("{", r#"{ "scoring_func": "sigmoid","#, "scores by `sigmoid` (`scoring_func`)"),
    ] {
        let home = Home::new();
        std::fs::create_dir_all(home.path().join("m")).unwrap();
        home.write("m/config.json", config.replacen(from, to, 1));
        home.write("m/model.safetensors", std::fs::read(fixture("qwen3_moe/model.safetensors")).unwrap());
        let text = generate(&home, "m");
        assert!(text.contains(wanted), "{text}");
    }
}
