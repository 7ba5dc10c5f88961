//! Captured states that stay on the device: from the layers of a target's step to the rows that training reads.
//!
//! Shape legend: `R` rows of a step, `Ht` target width, `K` captured layers.

use crate::launcher::{Arg, Launcher};
use crate::memory::Buf;
use crate::ops::Cuda;

/// What the target cache keeps of a state. Training reads it as it would come back from there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeptAs {
    /// Values rounded to bf16.
    Bf16,
    /// 8-bit integers; 32 neighbours share a scale in bf16.
    Int8,
}

/// A state that cannot be kept: a value of it is not finite, or about to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnfitState {
    /// Row of the step.
    pub row: usize,
    /// Its number among the states of the row.
    pub state: usize,
}

/// No state.
const NO_STATE: u32 = u32::MAX;

impl<L: Launcher> Cuda<L> {
    /// Keeps the states of a step for training, each rounded as the target cache rounds it, with the same bits. `states` are `K` captured
    /// layers and the final state, `[R, Ht]` each, of `rows` and `width`; they go to `features` `[_, K Ht]` and `last` `[_, Ht]`, from
    /// row `first` on. Four bytes a row come to the host.
    ///
    /// # Errors
    /// The first state of the first row that cannot be kept.
    ///
    /// # Panics
    /// If a buffer is too small, or there is no state.
    pub fn keep_states(
        &self,
        states: &[&Buf<L>],
        (rows, width): (usize, usize),
        kept: KeptAs,
        (features, last): (&mut Buf<L>, &mut Buf<L>),
        first: usize,
    ) -> Result<(), UnfitState> {
        let layers = states.len().checked_sub(1).expect("a final state");
        let joined = layers * width;
        assert!(states.iter().all(|x| x.capacity >= rows * width), "complete states");
        assert!(features.capacity >= (first + rows) * joined, "room for the captured layers");
        assert!(last.capacity >= (first + rows) * width, "room for the final states");
        if rows == 0 || width == 0 {
            return Ok(());
        }
        features.changed();
        last.changed();
        let unfit = self.block(rows * size_of::<u32>());
        for (i, x) in states.iter().enumerate() {
            let (to, stride) = match i < layers {
                true => (features.place(first * joined + i * width), joined),
                false => (last.place(first * width), width),
            };
            let args = [
                Arg::Buffer(x.place(0)),
                Arg::Buffer(to),
                Arg::Buffer(Some(unfit.at(0))),
                Arg::I64(rows as i64),
                Arg::I32(width as i32),
                Arg::I64(stride as i64),
                Arg::U32(i as u32),
                Arg::I32(match kept {
                    KeptAs::Bf16 => 0,
                    KeptAs::Int8 => 1,
                }),
            ];
            self.warps(rows, "keep_state", &args);
        }
        let mut found = vec![NO_STATE; rows];
        self.fetch(unfit.at(0), &mut found);
        match found.iter().position(|state| *state != NO_STATE) {
            Some(row) => Err(UnfitState { row, state: found[row] as usize }),
            None => Ok(()),
        }
    }
}
