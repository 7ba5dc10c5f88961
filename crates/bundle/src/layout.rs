//! The draft folder: `config.json` and `model.safetensors` in the layout that SpecForge, SGLang and vLLM read
//! [formats, draft folder], with every tensor accounted for.
//!
//! The wanted names and shapes come from the network itself ([`draftsmith_model::DraftSpec::tensors`]), so that what is
//! checked is what is run; `d2t` and `t2d` are added here, for kinds that have a map.

use std::path::Path;

use draftsmith_core::VocabMap;
use draftsmith_formats::safetensors_dir::{Dtype, SafetensorsDir, Tensor};
use draftsmith_model::{DraftConfig, DraftSpec, DraftTensors};
use serde_json::{Map, Value};

use crate::Problem;

/// Which element types a place allows for trained weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WeightTypes {
    /// A bundle: BF16 only.
    Bundle,
    /// A training checkpoint: F32, F16 or BF16, to be converted; a copy of the target's embedding is dropped.
    Checkpoint,
}

/// One tensor that a draft must have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// Name in the file.
    pub name: String,
    /// Row-major shape.
    pub shape: Vec<usize>,
    /// Type in a bundle.
    pub dtype: Dtype,
}

/// Every tensor of a bundled draft: no more, no less.
pub fn expected_tensors(config: &dyn DraftSpec) -> Vec<TensorSpec> {
    let trained =
        config.tensors().into_iter().map(|(name, shape)| TensorSpec { name, shape, dtype: Dtype::BF16 });
    let shape = config.shape();
    let map = [
        TensorSpec { name: "d2t".into(), shape: vec![shape.draft_vocab_size], dtype: Dtype::I64 },
        TensorSpec { name: "t2d".into(), shape: vec![shape.vocab_size], dtype: Dtype::BOOL },
    ];
    trained.chain(map.into_iter().filter(|_| shape.has_vocab_map)).collect()
}

fn dtype_name(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::BF16 => "BF16",
        Dtype::I64 => "I64",
        Dtype::BOOL => "BOOL",
        _ => "another type",
    }
}

/// What the numbers of one matrix look like.
struct Spread {
    constant: Option<f32>,
    standard_deviation: f64,
    not_finite: usize,
    first_not_finite: usize,
}

fn spread(values: &[f32]) -> Spread {
    let (mut sum, mut squares, mut not_finite, mut first_not_finite) = (0.0f64, 0.0f64, 0, 0);
    for (i, v) in values.iter().enumerate() {
        if !v.is_finite() {
            if not_finite == 0 {
                first_not_finite = i;
            }
            not_finite += 1;
        }
        sum += f64::from(*v);
        squares += f64::from(*v) * f64::from(*v);
    }
    let n = values.len().max(1) as f64;
    let first = values.first().copied();
    let constant = first.filter(|f| values.iter().all(|v| v == f));
    Spread {
        constant,
        standard_deviation: (squares / n - (sum / n).powi(2)).max(0.0).sqrt(),
        not_finite,
        first_not_finite,
    }
}

/// How close the spread of every matrix must be to the initial one for a draft to look untrained. The standard
/// error of a standard deviation over 10⁵ numbers is 0.2 %; training moves it by several.
const UNTRAINED_SHARE: f64 = 0.01;
/// Smallest matrix whose spread says anything.
const UNTRAINED_NUMBERS_MIN: usize = 4096;

/// What the numbers of a draft's weights say, tensor by tensor.
struct Numbers {
    initial: f64,
    norms_are_one: bool,
    initial_spreads: bool,
    matrices_judged: usize,
}

impl Numbers {
    fn of(config: &DraftConfig) -> Numbers {
        let initial = f64::from(config.shape().initializer_range);
        Numbers { initial, norms_are_one: true, initial_spreads: true, matrices_judged: 0 }
    }

    fn judge(&mut self, name: &str, shape: &[usize], values: &[f32]) -> Option<Problem> {
        let spread = spread(values);
        if spread.not_finite > 0 {
            return Some(Problem::TensorNotFinite {
                name: name.to_owned(),
                count: spread.not_finite,
                first: spread.first_not_finite,
            });
        }
        if shape.len() == 1 {
            self.norms_are_one &= spread.constant == Some(1.0);
        } else if values.len() >= UNTRAINED_NUMBERS_MIN {
            self.matrices_judged += 1;
            self.initial_spreads &= (spread.standard_deviation / self.initial - 1.0).abs() < UNTRAINED_SHARE;
        }
        // A norm may stay at exactly one: near 1 a bf16 step is 0.008.
        let constant =
            spread.constant.filter(|value| values.len() > 1 && !(shape.len() == 1 && *value == 1.0));
        constant.map(|value| Problem::TensorConstant { name: name.to_owned(), value })
    }

    /// Nothing moved since the start of training.
    fn are_initial(&self) -> bool {
        self.matrices_judged > 0 && self.norms_are_one && self.initial_spreads
    }
}

/// Weights in memory whose numbers no training leaves behind: not finite, all the same, or as they were at the start.
pub fn number_problems(config: &DraftConfig, tensors: &DraftTensors) -> Vec<Problem> {
    let mut numbers = Numbers::of(config);
    let mut problems: Vec<Problem> =
        tensors.iter().filter_map(|(name, (shape, values))| numbers.judge(name, shape, values)).collect();
    if problems.is_empty() && numbers.are_initial() {
        problems.push(Problem::Untrained { initializer_range: config.shape().initializer_range });
    }
    problems
}

/// Compares the weights with what the configuration asks for; problems in a fixed order, tensors named.
pub(crate) fn weight_problems(
    config: &DraftConfig,
    weights: &SafetensorsDir,
    types: WeightTypes,
) -> Vec<Problem> {
    let mut problems = Vec::new();
    let specs = expected_tensors(&**config);
    let mut numbers = Numbers::of(config);
    for spec in &specs {
        let Some(tensor) = weights.find(&spec.name) else {
            problems.push(Problem::TensorMissing {
                name: spec.name.clone(),
                dtype: dtype_name(spec.dtype),
                shape: spec.shape.clone(),
            });
            continue;
        };
        if tensor.shape != spec.shape {
            problems.push(Problem::TensorShape {
                name: spec.name.clone(),
                wanted: spec.shape.clone(),
                found: tensor.shape.to_vec(),
            });
            continue;
        }
        let trained = spec.dtype == Dtype::BF16;
        let allowed = tensor.dtype == spec.dtype
            || (trained
                && types == WeightTypes::Checkpoint
                && matches!(tensor.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16));
        if !allowed {
            problems.push(Problem::TensorDtype {
                name: spec.name.clone(),
                wanted: dtype_name(spec.dtype),
                found: format!("{:?}", tensor.dtype),
            });
            continue;
        }
        if !trained {
            continue;
        }
        let Ok(values) = tensor.to_f32() else { continue }; // the type was checked above
        problems.extend(numbers.judge(&spec.name, &spec.shape, &values));
    }
    for name in weights.names() {
        let copied = !config.shape().has_embedding && name == "embed_tokens.weight";
        let dropped = types == WeightTypes::Checkpoint && copied;
        if !dropped && !specs.iter().any(|s| s.name == name) {
            let shape = weights.find(name).map_or_else(Vec::new, |t| t.shape.to_vec());
            problems.push(Problem::TensorExtra { name: name.to_owned(), shape });
        }
    }
    if problems.is_empty() && numbers.are_initial() {
        problems.push(Problem::Untrained { initializer_range: config.shape().initializer_range });
    }
    problems
}

/// The vocabulary map of the weights, or what contradicts in it. `None` if the kind has none, or a tensor is unusable,
/// which [`weight_problems`] has told.
pub(crate) fn vocab_map(
    config: &dyn DraftSpec,
    weights: &SafetensorsDir,
) -> Option<Result<VocabMap, Problem>> {
    let shape = config.shape();
    if !shape.has_vocab_map {
        return None;
    }
    let usable = |name: &str, dtype: Dtype, len: usize| -> Option<Tensor<'_>> {
        weights.find(name).filter(|t| t.dtype == dtype && t.shape == [len])
    };
    let d2t = usable("d2t", Dtype::I64, shape.draft_vocab_size)?.to_i64().ok()?;
    let t2d = usable("t2d", Dtype::BOOL, shape.vocab_size)?.to_bool().ok()?;
    Some(VocabMap::from_tensors(&d2t, &t2d).map_err(|e| Problem::VocabMap { contradiction: e.to_string() }))
}

/// Reads `config.json` of a folder: the object and the draft's shape.
pub(crate) fn read_config(path: &Path) -> Result<(Map<String, Value>, DraftConfig), Problem> {
    let bad = |message: String, hint: Option<String>| Problem::Config {
        message: format!("`{}`: {message}", path.display()),
        hint,
    };
    const JSON: &str = "correct the file, or take it from the draft's repository again";
    let bytes = draftsmith_formats::atomic::read(path)
        .map_err(|e| Problem::Config { message: e.to_string(), hint: e.hint() })?;
    let value: Value = serde_json::from_slice(&bytes).map_err(|e| bad(e.to_string(), Some(JSON.into())))?;
    let config = DraftConfig::from_value(&value).map_err(|e| bad(e.to_string(), e.hint()))?;
    match value {
        Value::Object(object) => Ok((object, config)),
        _ => Err(bad("it is no object".into(), Some(JSON.into()))),
    }
}
