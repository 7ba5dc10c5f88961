//! Tests of the crate from outside, in one binary.

mod load;
mod prepare;
mod recipes;
mod shapes;
mod source;

use std::path::{Path, PathBuf};

use draftsmith_text::{ChatTemplate, GgufTokenizer, Tokenizer};

/// A byte-level tokenizer without merges; `<|im_end|>` ends a turn.
fn tokenizer() -> Tokenizer {
    let printable = |byte: u8| match byte {
        0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => char::from(byte),
        0x00..=0x20 => char::from_u32(0x100 + u32::from(byte)).expect("a character"),
        0x7f..=0xa0 => char::from_u32(0x121 + u32::from(byte) - 0x7f).expect("a character"),
        0xad => '\u{143}',
    };
    let mut tokens: Vec<String> = (0..=255).map(|byte| printable(byte).to_string()).collect();
    tokens.extend(["<|im_start|>", "<|im_end|>"].map(String::from));
    let mut token_types = vec![1; 256];
    token_types.extend([3, 3]);
    let gguf = GgufTokenizer {
        model: "gpt2".into(),
        pre: Some("gpt-2".into()),
        tokens,
        token_types,
        eos_ids: vec![257],
        ..GgufTokenizer::default()
    };
    gguf.build().expect("the tokenizer builds")
}

fn chatml() -> ChatTemplate {
    let source = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}\
                  {% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";
    ChatTemplate::parse(source).expect("it parses")
}

fn write(folder: &Path, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
    let path = folder.join(name);
    std::fs::write(&path, bytes).expect("the file is written");
    path
}

fn chat(question: &str, answer: &str) -> String {
    format!(
        "{}\n",
        serde_json::json!({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})
    )
}
