//! SGLang's `/generate` with `return_hidden_states`: the states of the prompt as JSON numbers.
//!
//! A stock server shows one kind of state: with EAGLE-3 speculation the captured layers side by side, as the draft's
//! configuration names them; without speculation the final state after the final norm. So two servers are asked. The
//! states of a prompt whose beginning is in the server's cache would be incomplete; a fresh `extra_key` for every request
//! keeps it from being found there [systems §4.2].

use std::hash::{BuildHasher, RandomState};

use draftsmith_core::LayerId;
use serde::{Deserialize, Deserializer};
use serde_json::json;

use super::states::{RemoteStates, StatesProblem, StatesShape, finite};
use crate::TokenRow;
use crate::http::{Failure, Flow, Http, Patience, read_body};

/// Bytes of a response besides the states.
const RESPONSE_BYTES: u64 = 1 << 20;
/// Bytes of a number and what stands around it.
const VALUE_BYTES: u64 = 32;

/// The servers of the captured layers and of the final state.
pub(super) struct Sglang<'a> {
    pub(super) layers: Http<'a>,
    pub(super) last: Http<'a>,
    pub(super) patience: Patience,
}

/// How to start the first: SGLang counts as we do and adds 1 itself.
pub(super) fn launch(layers: &[LayerId]) -> String {
    let ids: Vec<u32> = layers.iter().map(|l| l.0).collect();
    format!("a draft whose `eagle_config.eagle_aux_hidden_state_layer_ids` = {ids:?}")
}

#[derive(Deserialize)]
struct Generated {
    meta_info: MetaInfo,
}

#[derive(Deserialize)]
struct MetaInfo {
    prompt_tokens: Option<u64>,
    cached_tokens: Option<u64>,
    /// Per pass over a part of the prompt, per token, values.
    hidden_states: Option<Vec<Vec<Vec<Sent>>>>,
}

/// A value as it was sent; one that is too large for f32 is infinite, so that its place can be named.
#[derive(Clone, Copy)]
struct Sent(f32);

impl<'de> Deserialize<'de> for Sent {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Sent, D::Error> {
        f64::deserialize(from).map(|value| Sent(value as f32))
    }
}

impl Sglang<'_> {
    pub(super) fn states(
        &self,
        row: &TokenRow,
        layers: usize,
        width: usize,
        flow: &Flow<'_>,
    ) -> Result<Option<RemoteStates>, Failure> {
        let captured = StatesShape { ids: &row.ids, states: layers, width };
        let Some(features) = ask(&self.layers, self.patience, row.number, captured, flow)? else {
            return Ok(None);
        };
        let end = StatesShape { states: 1, ..captured };
        let Some(last) = ask(&self.last, self.patience, row.number, end, flow)? else { return Ok(None) };
        Ok(Some(RemoteStates { features, last }))
    }
}

fn ask(
    http: &Http<'_>,
    patience: Patience,
    number: u64,
    shape: StatesShape<'_>,
    flow: &Flow<'_>,
) -> Result<Option<Vec<f32>>, Failure> {
    let name = format!("row {number}");
    let limit = RESPONSE_BYTES + VALUE_BYTES * shape.values();
    http.ask(patience, &name, flow, || {
        let body = json!({
            "input_ids": shape.ids,
            "extra_key": format!("{number}-{:016x}", RandomState::new().hash_one(number)),
            "sampling_params": { "temperature": 0, "max_new_tokens": 1 },
            "return_hidden_states": true,
            "stream": false,
        });
        let answer = http.post("generate", &name, &body, "application/json")?;
        let bytes = read_body(answer, limit).map_err(Failure::from)?;
        read_json_states(&bytes, shape).map_err(|problem| problem.of(http.url(), &name))
    })
}

/// Reads and checks the answer to one request.
///
/// # Shapes
/// - `meta_info.hidden_states` in the answer: parts of the prompt that add up to `[S, states * width]`
/// - the result: `[S, states * width]`
///
/// # Errors
/// [`StatesProblem`]: no such JSON, or other counts, widths or values than asked for.
pub fn read_json_states(bytes: &[u8], shape: StatesShape<'_>) -> Result<Vec<f32>, StatesProblem> {
    let generated: Generated =
        serde_json::from_slice(bytes).map_err(|e| StatesProblem::Garbled { reason: e.to_string() })?;
    let meta = generated.meta_info;
    let tokens = shape.ids.len();
    let count = meta.prompt_tokens.map_or("nothing".to_string(), |n| n.to_string());
    if meta.prompt_tokens != Some(tokens as u64) {
        return Err(StatesProblem::field("meta_info.prompt_tokens", count, tokens));
    }
    if let Some(cached) = meta.cached_tokens.filter(|n| *n > 0) {
        return Err(StatesProblem::field("meta_info.cached_tokens", cached, 0));
    }
    let field = "meta_info.hidden_states";
    let Some(parts) = meta.hidden_states else {
        return Err(StatesProblem::field(field, "nothing", "the states of the prompt"));
    };
    let rows: Vec<&Vec<Sent>> = parts.iter().flatten().collect();
    if rows.len() != tokens {
        return Err(StatesProblem::field(field, format!("{} rows", rows.len()), format!("{tokens} rows")));
    }
    let wanted = shape.states * shape.width;
    if let Some((at, row)) = rows.iter().enumerate().find(|(_, row)| row.len() != wanted) {
        let place = format!("{field}, row {at}");
        let wanted = format!("{wanted} ({} states of {})", shape.states, shape.width);
        return Err(StatesProblem::field(place, format!("{} values", row.len()), wanted));
    }
    let values: Vec<f32> = rows.into_iter().flatten().map(|sent| sent.0).collect();
    finite(field, &values, shape.width)?;
    Ok(values)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: StatesShape<'static> = StatesShape { ids: &[5, 6], states: 2, width: 2 };
    const ANSWER: &str =
        r#"{"meta_info":{"prompt_tokens":2,"hidden_states":[[[1,2,3,4]],[[5.5,6,-7,8e1]]]},"text":"x"}"#;

    #[test]
    fn parts_of_a_prompt_add_up() {
        let values = read_json_states(ANSWER.as_bytes(), SHAPE).unwrap();
        assert_eq!(values, [1.0, 2.0, 3.0, 4.0, 5.5, 6.0, -7.0, 80.0]);
    }

    proptest::proptest! {
        #[test]
        fn a_damaged_answer_is_whole_in_shape_or_refused(at in 0..ANSWER.len(), byte: u8) {
            let mut bytes = ANSWER.as_bytes().to_vec();
            bytes[at] = byte;
            if let Ok(values) = read_json_states(&bytes, SHAPE) {
                proptest::prop_assert!(values.len() == 8 && values.iter().all(|v| v.is_finite()));
            }
        }
    }
}
