//! How a network names its weights, once: for loading, for training and for lists of what a file must hold.

/// Where weights come from, by the tensor names of a checkpoint.
pub trait BuildWeights {
    /// Linear weight.
    type W;
    /// Norm weight.
    type N;
    /// Failure.
    type Error;
    /// A linear weight `[out, inp]`.
    fn linear(&mut self, name: &str, out: usize, inp: usize) -> Result<Self::W, Self::Error>;
    /// A norm weight `[width]`.
    fn norm(&mut self, name: &str, width: usize) -> Result<Self::N, Self::Error>;
}

/// Names and shapes (`[O, I]` or `[width]`) alone, in the order in which a network asks.
#[derive(Default)]
pub(crate) struct TensorList(pub(crate) Vec<(String, Vec<usize>)>);

impl BuildWeights for TensorList {
    type W = ();
    type N = ();
    type Error = std::convert::Infallible;

    fn linear(&mut self, name: &str, out: usize, inp: usize) -> Result<(), Self::Error> {
        self.0.push((name.to_owned(), vec![out, inp]));
        Ok(())
    }

    fn norm(&mut self, name: &str, width: usize) -> Result<(), Self::Error> {
        self.0.push((name.to_owned(), vec![width]));
        Ok(())
    }
}
