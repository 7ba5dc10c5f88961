//! The tensors of a foreign file while they are handed out: each is taken once, and what is missing, left over,
//! misshapen or of another type is told by the file's own name.

use std::collections::BTreeMap;

use draftsmith_core::VocabMap;
use draftsmith_formats::safetensors_dir::{Dtype, SafetensorsDir};
use draftsmith_model::DraftTensors;

use crate::{BundleError, Problem};

/// Types of trained weights that are read.
pub(crate) const FLOATS: &str = "F32, F16 or BF16";
/// Largest target vocabulary that is believed: `t2d`, which would prove it, may be missing. Four times that of any
/// published model.
const VOCAB_MAX: usize = 1 << 20;

/// A tensor of a foreign file under its internal name.
pub(crate) struct Found {
    /// As the file calls it.
    pub(crate) name: String,
    /// Row-major.
    pub(crate) shape: Vec<usize>,
    /// Its type as the file calls it.
    pub(crate) dtype: String,
    /// Its numbers.
    pub(crate) values: Values,
}

/// Numbers of a tensor.
pub(crate) enum Values {
    Floats(Vec<f32>),
    Integers(Vec<i64>),
    Flags(Vec<bool>),
    /// Of a type that no draft has.
    Other,
}

/// Tensors by internal name, and what was found wrong so far.
#[derive(Default)]
pub(crate) struct Stock {
    pub(crate) found: BTreeMap<String, Found>,
    pub(crate) problems: Vec<Problem>,
}

impl Stock {
    /// All tensors of a safetensors file or folder; `internal` names them, given the name without `model.`.
    pub(crate) fn of_safetensors(
        open: &SafetensorsDir,
        internal: impl Fn(&str) -> String,
    ) -> Result<Stock, BundleError> {
        let mut stock = Stock::default();
        for name in open.names() {
            let tensor = open.get(name)?;
            let plain = name.strip_prefix("model.").unwrap_or(name);
            let values = match tensor.dtype {
                Dtype::F32 | Dtype::F16 | Dtype::BF16 => Values::Floats(tensor.to_f32()?),
                Dtype::I64 | Dtype::I32 => Values::Integers(tensor.to_i64()?),
                Dtype::BOOL | Dtype::U8 => Values::Flags(tensor.to_bool()?),
                _ => Values::Other,
            };
            let entry = Found {
                name: name.to_owned(),
                shape: tensor.shape.to_vec(),
                dtype: format!("{:?}", tensor.dtype),
                values,
            };
            if let Some(before) = stock.found.insert(internal(plain), entry) {
                stock.problems.push(Problem::TensorTwice { name: name.to_owned(), before: before.name });
            }
        }
        Ok(stock)
    }

    /// One tensor in the wanted shape and kind; `None` is told unless the tensor is `optional` and not there.
    pub(crate) fn take<T>(
        &mut self,
        name: &str,
        stored: &str,
        shape: &[usize],
        dtype: &'static str,
        values: impl Fn(Values) -> Option<T>,
        optional: bool,
    ) -> Option<T> {
        let Some(found) = self.found.remove(name) else {
            if !optional {
                let name = stored.to_owned();
                self.problems.push(Problem::TensorMissing { name, dtype, shape: shape.to_vec() });
            }
            return None;
        };
        if found.shape != shape {
            let (name, found) = (found.name, found.shape);
            self.problems.push(Problem::TensorShape { name, wanted: shape.to_vec(), found });
            return None;
        }
        let taken = values(found.values);
        if taken.is_none() {
            self.problems.push(Problem::TensorDtype { name: found.name, wanted: dtype, found: found.dtype });
        }
        taken
    }

    /// `d2t` as it is stored and `t2d`, where the file has them.
    pub(crate) fn take_map(
        &mut self,
        draft_vocab_size: usize,
        vocab_size: usize,
        optional: bool,
    ) -> (Option<Vec<i64>>, Option<Vec<bool>>) {
        let integers = |values| match values {
            Values::Integers(ids) => Some(ids),
            _ => None,
        };
        let flags = |values| match values {
            Values::Flags(flags) => Some(flags),
            _ => None,
        };
        let ids = self.take("d2t", "d2t", &[draft_vocab_size], "I64", integers, optional);
        // Not every layout has it, and it follows from `d2t`.
        (ids, self.take("t2d", "t2d", &[vocab_size], "BOOL", flags, true))
    }

    /// Tells every tensor that nobody took, and a vocabulary that is beyond belief.
    pub(crate) fn close(&mut self, vocab_size: usize) {
        for (_, left) in std::mem::take(&mut self.found) {
            self.problems.push(Problem::TensorExtra { name: left.name, shape: left.shape });
        }
        if vocab_size > VOCAB_MAX {
            let message = format!("a vocabulary of {vocab_size} ids is more than {VOCAB_MAX}");
            let hint = "take `config.json` and weights from the same repository and revision";
            self.problems.push(Problem::Config { message, hint: Some(hint.into()) });
        }
    }

    /// The map of target ids; rows of the tensors that have one for each draft id are put in ascending order of the
    /// target ids if they were in another.
    pub(crate) fn vocab_map(
        &mut self,
        targets: Vec<i64>,
        covered: Option<Vec<bool>>,
        vocab_size: usize,
        by_draft_id: &[&str],
        tensors: &mut DraftTensors,
    ) -> Option<VocabMap> {
        let mut order: Vec<usize> = (0..targets.len()).collect();
        order.sort_by_key(|draft| targets[*draft]);
        let offsets: Vec<i64> = order
            .iter()
            .enumerate()
            .map(|(draft, from)| targets[*from].saturating_sub(draft as i64))
            .collect();
        let map = match covered {
            Some(flags) => VocabMap::from_tensors(&offsets, &flags),
            None => VocabMap::from_offsets(&offsets, vocab_size),
        };
        if order.iter().enumerate().any(|(to, from)| to != *from) {
            for name in by_draft_id {
                let Some((_, rows)) = tensors.get_mut(*name) else { continue };
                let width = rows.len() / order.len();
                *rows =
                    order.iter().flat_map(|from| rows[from * width..(from + 1) * width].to_vec()).collect();
            }
        }
        map.map_err(|e| self.problems.push(Problem::VocabMap { contradiction: e.to_string() })).ok()
    }
}

/// Numbers of a trained weight.
pub(crate) fn floats(values: Values) -> Option<Vec<f32>> {
    match values {
        Values::Floats(values) => Some(values),
        Values::Integers(_) | Values::Flags(_) | Values::Other => None,
    }
}

/// Integers of a GGUF tensor.
pub(crate) fn integers<const N: usize>(data: &[u8], from: impl Fn([u8; N]) -> i64) -> Vec<i64> {
    data.chunks_exact(N).map(|c| from(c.try_into().expect("chunks have N bytes"))).collect()
}
