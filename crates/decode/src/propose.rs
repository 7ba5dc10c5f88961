//! Proposals of a step: for every sequence that decodes, whatever they are made of.
//!
//! The step knows trees of tokens alone; which pass of a draft, repetition of the text or plan they come from stays here.

use draftsmith_core::{Sampling, TokenTree};
use draftsmith_kernels::Kernels;

use crate::auto::{Grown, Load, Seed, grow};
use crate::drafter::{Ask, Shape};
use crate::drawn;
use crate::engine::Engine;
use crate::session::Session;

impl<K: Kernels> Engine<K> {
    /// Trees for the sequences `decoding`, ascending, in that order; `rows` is what else is in the pass.
    ///
    /// Plans of fixed shape come first: what is planned by cost counts their rows.
    pub(crate) fn propose(
        &self,
        sessions: &mut [Session<K>],
        decoding: &[usize],
        rows: usize,
    ) -> Vec<TokenTree> {
        let mut trees: Vec<TokenTree> = vec![TokenTree::default(); decoding.len()];
        let place = |index: usize| decoding.binary_search(&index);
        let (mut of, mut asks, mut shapes) = (Vec::new(), Vec::new(), Vec::new());
        let (mut drawn_of, mut drawn_asks, mut depths) = (Vec::new(), Vec::new(), Vec::new());
        // How the drafts of those draw.
        let drawing: Vec<Sampling> =
            sessions.iter().map(|session| drawn::draft_sampling(&session.options.sampling)).collect();
        for (index, session) in sessions.iter_mut().enumerate() {
            // The target adds one token itself, so a proposal may be one shorter than the room.
            let room = session.room(self.max_context).saturating_sub(1);
            let (Ok(at), Some(drafter)) = (place(index), &mut session.drafter) else { continue };
            if let Some(shape) = Shape::of(&session.options.draft, room).filter(|shape| shape.depth > 0) {
                let position = session.tokens.len() as u64 - 1;
                if drawn::is_drawn(&session.options) {
                    let (session, sampling, text) = (drafter.as_mut(), &drawing[index], &session.tokens);
                    drawn_asks.push(Ask { session, sampling, text, position, k: 1, whole: true });
                    depths.push(shape.depth);
                    drawn_of.push((at, index));
                    continue;
                }
                let sampling = &session.options.sampling;
                let text = &session.tokens;
                asks.push(Ask {
                    session: drafter.as_mut(),
                    sampling,
                    text,
                    position,
                    k: shape.top_k,
                    whole: false,
                });
                shapes.push(shape);
                of.push(at);
            }
        }
        if let Some(drafter) = self.drafter.as_deref().filter(|_| !asks.is_empty()) {
            for (at, tree) in of.into_iter().zip(drafter.propose(&mut asks, &shapes)) {
                trees[at] = tree;
            }
        }
        let mut chains = Vec::new();
        if let Some(drafter) = self.drafter.as_deref().filter(|_| !drawn_asks.is_empty()) {
            chains = drawn::propose(drafter, &mut drawn_asks, &depths);
        }
        drop(drawn_asks);
        for ((at, index), chain) in drawn_of.into_iter().zip(chains) {
            trees[at] = TokenTree::chain(chain.tokens.iter().copied());
            sessions[index].drawn = Some(chain);
        }
        let fixed: usize = trees.iter().map(TokenTree::len).sum();
        let load = Load { rows: rows + decoding.len() + fixed, sequences: decoding.len() };
        for (index, grown) in self.grow(sessions, decoding, load) {
            if let Ok(at) = place(index) {
                trees[at].clone_from(&grown.tree);
            }
            if let Some(auto) = &mut sessions[index].auto {
                self.learn_draft(&grown, std::mem::take(&mut auto.fed));
                auto.grown = grown;
            }
        }
        trees
    }

    /// Proposals of the sequences with an automatic plan; `load` is what else is in the pass, their own roots included.
    fn grow(&self, sessions: &mut [Session<K>], decoding: &[usize], load: Load) -> Vec<(usize, Grown)> {
        let (mut of, mut seeds) = (Vec::new(), Vec::new());
        for (index, session) in sessions.iter_mut().enumerate() {
            let room = session.room(self.max_context).saturating_sub(1);
            let (true, Some(auto)) = (decoding.contains(&index), &mut session.auto) else { continue };
            of.push(index);
            let repetition = auto.lookup.find(&session.tokens);
            seeds.push(Seed {
                pacer: &mut auto.pacer,
                session: session.drafter.as_deref_mut(),
                repetition,
                lookup: Some(&auto.lookup),
                text: &session.tokens,
                room,
                sampling: &session.options.sampling,
            });
        }
        if seeds.is_empty() {
            return Vec::new();
        }
        let grown = grow(&self.current_costs(), load, self.drafter.as_deref(), seeds);
        of.into_iter().zip(grown).collect()
    }

    /// Holds the draft's part of a proposal against the costs. `fed` says that its first pass took in one step alone.
    fn learn_draft(&self, grown: &Grown, fed: bool) {
        let (Some(costs), Some(mut ledger)) = (self.costs.get(), self.ledger()) else { return };
        if let Some(ms) = grown.draft_step_ms {
            ledger.draft_step(costs, ms);
        }
        if let (true, Some(root)) = (fed, grown.root_ms) {
            ledger.extend(costs, root);
        }
    }
}
