//! What the tests share: small tokenizers and a reader for GGUF metadata.

use draftsmith_text::{GgufTokenizer, Message, Tokenizer};

/// A byte-level tokenizer of 256 bytes, some merges and the control tokens of the template fixtures. `<s>` is BOS,
/// `eos` the tokens that end generation.
pub(crate) fn byte_level(eos: &[&str]) -> Tokenizer {
    byte_level_with("smollm", eos)
}

/// The same with another way of splitting text.
pub(crate) fn byte_level_with(pre: &str, eos: &[&str]) -> Tokenizer {
    let printable = |byte: u8| match byte {
        0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => char::from(byte),
        0x00..=0x20 => char::from_u32(0x100 + u32::from(byte)).expect("a character"),
        0x7f..=0xa0 => char::from_u32(0x121 + u32::from(byte) - 0x7f).expect("a character"),
        0xad => '\u{143}',
    };
    let mut tokens: Vec<String> = (0..=255).map(|byte| printable(byte).to_string()).collect();
    let merges = ["h e", "l l", "Ġ t", "Ċ Ċ", "i s", "Ġ Ġ", "t h", "Ġt he", "Ã ©"];
    tokens.extend(merges.iter().map(|merge| merge.replace(' ', "")));
    let mut token_types = vec![1; tokens.len()];
    let control = [
        "<s>",
        "</s>",
        "<|im_start|>",
        "<|im_end|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
        "<start_of_turn>",
        "<end_of_turn>",
    ];
    tokens.extend(control.map(String::from));
    token_types.extend(control.map(|_| 3));
    for user_defined in ["<think>", "</think>"] {
        tokens.push(user_defined.into());
        token_types.push(4);
    }
    let id = |name: &str| tokens.iter().position(|t| t == name).expect("a known token") as u32;
    let gguf = GgufTokenizer {
        model: "gpt2".into(),
        pre: Some(pre.into()),
        bos_id: Some(id("<s>")),
        eos_ids: eos.iter().map(|name| id(name)).collect(),
        merges: merges.map(String::from).to_vec(),
        tokens: tokens.clone(),
        token_types,
        ..GgufTokenizer::default()
    };
    gguf.build().expect("the tokenizer builds")
}

/// A template of `tests/templates`, or of the fixtures for reasoning models.
pub(crate) fn template_source(name: &str) -> String {
    let folders = ["tests/templates", "../../fixtures/thinking"];
    let read = |folder| {
        std::fs::read_to_string(format!("{}/{folder}/{name}.jinja", env!("CARGO_MANIFEST_DIR"))).ok()
    };
    folders.into_iter().find_map(read).expect("the template fixture is there")
}

/// A file relative to the crate.
pub(crate) fn read(path: &str) -> String {
    let path = format!("{}/{path}", env!("CARGO_MANIFEST_DIR"));
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"))
}

pub(crate) fn user(text: &str) -> Message {
    Message::new("user", text)
}

pub(crate) fn assistant(text: &str) -> Message {
    Message::new("assistant", text)
}

/// The tokenizer metadata of a GGUF file; a reader for tests only, it trusts the file.
pub(crate) fn gguf_tokenizer(bytes: &[u8]) -> (GgufTokenizer, Option<String>) {
    let mut reader = Reader { bytes, at: 4 };
    assert_eq!(&bytes[..4], b"GGUF");
    let _version = reader.u32();
    let _tensors = reader.u64();
    let count = reader.u64();
    let mut out = GgufTokenizer::default();
    let mut template = None;
    for _ in 0..count {
        let key = reader.string();
        let kind = reader.u32();
        let value = reader.value(kind);
        let id = || value.number.map(|n| n as u32);
        match key.strip_prefix("tokenizer.").unwrap_or_default() {
            "ggml.model" => out.model = value.strings[0].clone(),
            "ggml.pre" => out.pre = value.strings.first().cloned(),
            "ggml.tokens" => out.tokens = value.strings,
            "ggml.merges" => out.merges = value.strings,
            "ggml.token_type" => out.token_types = value.numbers.iter().map(|n| *n as i32).collect(),
            "ggml.bos_token_id" => out.bos_id = id(),
            "ggml.eos_token_id" => out.eos_ids.extend(id()),
            "ggml.unknown_token_id" => out.unk_id = id(),
            "ggml.padding_token_id" => out.pad_id = id(),
            "ggml.add_bos_token" => out.add_bos = value.number.map(|n| n != 0.0),
            "chat_template" => template = value.strings.first().cloned(),
            _ => {}
        }
    }
    (out, template)
}

#[derive(Default)]
struct Field {
    number: Option<f64>,
    numbers: Vec<f64>,
    strings: Vec<String>,
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let out = self.bytes[self.at..self.at + N].try_into().expect("N bytes");
        self.at += N;
        out
    }

    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }

    fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }

    fn string(&mut self) -> String {
        let length = self.u64() as usize;
        let text = std::str::from_utf8(&self.bytes[self.at..self.at + length]).expect("UTF-8").to_owned();
        self.at += length;
        text
    }

    fn value(&mut self, kind: u32) -> Field {
        let number = |n: f64| Field { number: Some(n), ..Field::default() };
        match kind {
            0 | 7 => number(f64::from(self.take::<1>()[0])),
            1 => number(f64::from(self.take::<1>()[0] as i8)),
            2 => number(f64::from(u16::from_le_bytes(self.take()))),
            3 => number(f64::from(i16::from_le_bytes(self.take()))),
            4 => number(f64::from(self.u32())),
            5 => number(f64::from(self.u32() as i32)),
            6 => number(f64::from(f32::from_bits(self.u32()))),
            8 => Field { strings: vec![self.string()], ..Field::default() },
            9 => {
                let inner = self.u32();
                let mut out = Field::default();
                for _ in 0..self.u64() {
                    let item = self.value(inner);
                    out.numbers.extend(item.number);
                    out.strings.extend(item.strings);
                }
                out
            }
            10 => number(self.u64() as f64),
            11 => number(self.u64() as i64 as f64),
            12 => number(f64::from_bits(self.u64())),
            other => panic!("unknown GGUF value type {other}"),
        }
    }
}
