//! Answers that must follow a grammar. What a grammar is made of is the caller's business.

/// A grammar that answers can be held to; shared by all requests that use it.
pub trait Grammar: Send + Sync + std::fmt::Debug {
    /// The state at the beginning of an answer.
    fn begin(&self) -> Box<dyn GrammarState>;
}

/// Where one answer stands in its grammar.
///
/// The engine asks for the row after each committed token and for no other: [`GrammarState::advance`] sees committed
/// tokens only, in order, so nothing ever has to be taken back, whatever was drafted. Rules that judge a drafted chain as
/// a whole do so on a [`GrammarState::fork`].
pub trait GrammarState: Send {
    /// Sets the logits of all ids that may not come next to negative infinity; at least one id stays.
    ///
    /// # Shapes
    /// - `logits`: `[V]`
    fn mask(&mut self, logits: &mut [f32]);

    /// A state of its own that goes on from here: it sees drafted tokens, and is dropped then.
    fn fork(&self) -> Box<dyn GrammarState>;

    /// Takes in a committed token, one that [`GrammarState::mask`] had left.
    fn advance(&mut self, id: u32);
}
