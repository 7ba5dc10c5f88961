//! The answers that were decoded last, token by token, for those who look: kept only if the server was told to, in memory
//! alone, and each client sees its own and no others.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde_json::{Value, json};

use crate::queue::Client;

/// Kept answers, the newest first.
pub(crate) struct Generations {
    most: usize,
    kept: Mutex<VecDeque<(Client, Arc<Value>)>>,
}

impl Generations {
    /// Keeps so many; 0: none.
    pub(crate) fn new(most: usize) -> Generations {
        Generations { most, kept: Mutex::default() }
    }

    pub(crate) fn keeps(&self) -> bool {
        self.most > 0
    }

    fn kept(&self) -> MutexGuard<'_, VecDeque<(Client, Arc<Value>)>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps an answer: `id`, `tokens` and what else is known. The oldest one goes.
    pub(crate) fn keep(&self, client: &Client, answer: Value) {
        let mut kept = self.kept();
        kept.push_front((Arc::clone(client), Arc::new(answer)));
        kept.truncate(self.most);
    }

    /// Those of a client, with counts in place of texts and tokens.
    pub(crate) fn list(&self, client: &Client) -> Vec<Value> {
        let own: Vec<Arc<Value>> =
            self.kept().iter().filter(|(of, _)| of == client).map(|(_, answer)| Arc::clone(answer)).collect();
        own.iter().map(|answer| outline(answer)).collect()
    }

    /// One of a client's.
    pub(crate) fn one(&self, client: &Client, id: &str) -> Option<Arc<Value>> {
        let kept = self.kept();
        let (_, answer) = kept.iter().find(|(of, answer)| of == client && answer["id"] == id)?;
        Some(Arc::clone(answer))
    }
}

/// An answer without what makes it long.
fn outline(answer: &Value) -> Value {
    let mut short = answer.clone();
    let tokens = short["tokens"].take();
    let made = |origin: &str| {
        tokens.as_array().into_iter().flatten().filter(|token| token["origin"] == origin).count()
    };
    short["made"] = json!({
        "draft": made("draft"), "recovered": made("recovered"), "bonus": made("bonus"), "plain": made("plain"),
    });
    if let Some(fields) = short.as_object_mut() {
        for long in ["tokens", "text", "prompt"] {
            fields.remove(long);
        }
    }
    short
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_are_kept_and_each_client_sees_its_own() {
        let generations = Generations::new(3);
        let [a, b]: [Client; 2] = [Arc::from("a"), Arc::from("b")];
        let answer = |id: &str| json!({"id": id, "text": "t", "prompt": "p", "tokens": [{"origin": "draft"}, {"origin": "draft"}, {"origin": "bonus"}]});
        for (client, id) in [(&a, "1"), (&b, "2"), (&a, "3"), (&a, "4")] {
            generations.keep(client, answer(id));
        }
        let ids = |client| generations.list(client).iter().map(|one| one["id"].clone()).collect::<Vec<_>>();
        assert_eq!((ids(&a), ids(&b)), (vec![json!("4"), json!("3")], vec![json!("2")]));
        let made = json!({"draft": 2, "recovered": 0, "bonus": 1, "plain": 0});
        assert_eq!(generations.list(&b), [json!({"id": "2", "made": made})]);
        assert_eq!(generations.one(&a, "3").as_deref(), Some(&answer("3")));
        assert_eq!((generations.one(&b, "3"), generations.one(&a, "1")), (None, None));
        let none = Generations::new(0);
        none.keep(&a, answer("1"));
        assert!(!none.keeps() && none.list(&a).is_empty());
    }
}
