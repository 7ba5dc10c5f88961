//! A draft as named tensors, and its folder on disk in the layout of SpecForge, SGLang and vLLM [formats §2.1].

use std::collections::BTreeMap;
use std::path::Path;

use draftsmith_core::VocabMap;
use draftsmith_formats::atomic::AtomicDir;
use draftsmith_formats::safetensors_dir::{TensorData, to_bytes};
use serde_json::Value;

use crate::TrainError;

/// One trained tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct DraftTensor {
    /// Name in the checkpoint.
    pub name: String,
    /// Row-major shape.
    pub shape: Vec<usize>,
    /// Values.
    pub values: Vec<f32>,
}

/// Everything that decoding needs of a draft; the embedding is the target's.
#[derive(Clone, Debug)]
pub struct DraftWeights {
    /// Method name, as in the run file.
    pub method: &'static str,
    /// `config.json`
    pub config: Value,
    /// Trained tensors.
    pub tensors: Vec<DraftTensor>,
    /// Draft ids to target ids; `None` if it proposes target ids.
    pub vocab_map: Option<VocabMap>,
}

impl DraftWeights {
    /// The same draft with every value rounded to bfloat16: what [`DraftWeights::save`] stores.
    pub fn rounded(mut self) -> DraftWeights {
        for t in &mut self.tensors {
            t.values.iter_mut().for_each(|x| *x = half::bf16::from_f32(*x).to_f32());
        }
        self
    }

    /// Values of a tensor.
    pub fn find(&self, name: &str) -> Option<&DraftTensor> {
        self.tensors.iter().find(|t| t.name == name)
    }

    /// Writes `model.safetensors` (bfloat16, with `t2d` and `d2t`) and `config.json` to a folder, replacing one of
    /// that name, whole or not at all.
    pub fn save(&self, folder: &Path) -> Result<(), TrainError> {
        let mut tensors: Vec<TensorData> =
            self.tensors.iter().map(|t| TensorData::bf16(&t.name, &t.shape, &t.values)).collect();
        if let Some(map) = &self.vocab_map {
            let (d2t, t2d) = (map.d2t(), map.t2d());
            tensors.push(TensorData::i64("d2t", &[d2t.len()], &d2t));
            tensors.push(TensorData::bool("t2d", &[t2d.len()], &t2d));
        }
        let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
        let dir = AtomicDir::create(folder)?;
        dir.write("model.safetensors", to_bytes(&tensors, &metadata))?;
        dir.write("config.json", format!("{:#}\n", self.config))?;
        dir.commit_replacing()?;
        Ok(())
    }
}
