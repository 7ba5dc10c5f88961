//! Weights by name into the tape, and out of it again.

use std::collections::HashMap;
use std::convert::Infallible;

use draftsmith_core::VocabMap;
use draftsmith_kernels::TrainKernels;
use draftsmith_model::BuildWeights;
use draftsmith_model::tape::{ParamId, Tape};

use crate::{DraftTensor, TrainError};

/// Takes weights that [`check_tensors`] has seen.
pub(crate) struct ToTape<'a, K: TrainKernels> {
    tape: &'a mut Tape<K>,
    values: HashMap<&'a str, &'a [f32]>,
}

impl<'a, K: TrainKernels> ToTape<'a, K> {
    pub(crate) fn new(tape: &'a mut Tape<K>, weights: &'a [DraftTensor]) -> ToTape<'a, K> {
        ToTape { tape, values: weights.iter().map(|w| (w.name.as_str(), w.values.as_slice())).collect() }
    }

    fn add(&mut self, name: &str, shape: &[usize]) -> Result<ParamId, Infallible> {
        Ok(self.tape.add_param(name, shape, self.values[name], true))
    }
}

impl<K: TrainKernels> BuildWeights for ToTape<'_, K> {
    type W = ParamId;
    type N = ParamId;
    type Error = Infallible;
    fn linear(&mut self, name: &str, out: usize, inp: usize) -> Result<ParamId, Infallible> {
        self.add(name, &[out, inp])
    }
    fn norm(&mut self, name: &str, width: usize) -> Result<ParamId, Infallible> {
        self.add(name, &[width])
    }
}

/// A tensor has as many values as it should.
pub(crate) fn expect_len(name: &str, found: usize, wanted: usize) -> Result<(), TrainError> {
    match found == wanted {
        true => Ok(()),
        false => Err(TrainError::Tensor { name: name.to_owned(), found, wanted }),
    }
}

/// Every tensor of a list is there in its size.
pub(crate) fn check_tensors(
    wanted: Vec<(String, Vec<usize>)>,
    weights: &[DraftTensor],
) -> Result<(), TrainError> {
    for (name, shape) in wanted {
        let found = weights.iter().find(|w| w.name == name);
        let found = found.ok_or_else(|| TrainError::MissingTensor { name: name.clone() })?;
        expect_len(&name, found.values.len(), shape.iter().product())?;
    }
    Ok(())
}

/// All trained parameters, in the shapes that a file has them in.
pub(crate) fn trained_tensors<K: TrainKernels>(
    tape: &Tape<K>,
    shapes: Vec<(String, Vec<usize>)>,
) -> Vec<DraftTensor> {
    let tensor = |(id, (name, shape)): (ParamId, (String, Vec<usize>))| {
        assert_eq!(
            tape.param(id).name,
            name,
            "a configuration names its tensors in the order of its network"
        );
        DraftTensor { name, shape, values: tape.param_values(id) }
    };
    tape.trained().into_iter().zip(shapes).map(tensor).collect()
}

/// Rows of a head `[V, width]` that belong to a draft vocabulary.
pub(crate) fn head_rows(head: &[f32], width: usize, map: &VocabMap) -> Vec<f32> {
    let row = |id: &u32| &head[*id as usize * width..(*id as usize + 1) * width];
    map.target_ids().iter().map(row).collect::<Vec<_>>().concat()
}
