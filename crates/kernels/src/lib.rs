//! The only seam to compute: coarse operations, each a hot path that a backend may fuse.
//!
//! [`Kernels`] is what decoding and capture need, [`TrainKernels`] what training needs; a backend may have the one without
//! the other, and both stand on [`Memory`]. [`Cpu`] implements all; [`mod@reference`] holds naive double-precision twins for the tests.
//!
//! # The contract
//! Every row of every [`Kernels`] operation depends on that row's input and the weights alone, in one fixed
//! reduction order: never on how many rows are in the call, on the thread count, on tiles, or on the other rows.
//! So the logits of a token in a verify pass equal those of the same token decoded alone, bit for bit.
//!
//! Shape legend: `R` rows (tokens) of a call, `I`/`O` input and output features, `S` sequence slots.

pub mod cell;
mod courier;
mod cpu;
mod deferred;
pub mod experts;
mod failure;
mod peers;
mod pool;
pub mod quant;
pub mod reference;
mod rope;
mod scratch;
pub mod testing;
#[cfg(target_arch = "x86_64")]
mod tiles;
mod top_k;
pub mod train;
mod weight;

pub use cell::Cell;
pub use courier::{Coming, Courier};
pub use cpu::{Cpu, CpuFeatures, KeptPanels, KvLayer, PANEL_VERSION, PackedWeight, SharedBytes};
pub use deferred::Deferred;
pub use failure::{DeviceFailure, catch_failure};
pub use peers::{Part, Peers};
pub use pool::Pool;
pub use rope::{RopeScaling, RopeTable};
pub use top_k::TopK;
pub use train::TrainKernels;
pub use weight::{Groups, KernelError, KvDtype, PackMode, WeightDtype, WeightView};

/// Checks a weight and that `order` names every input once.
pub(crate) fn check_order(name: &str, weight: &WeightView<'_>, order: &[u32]) -> Result<(), KernelError> {
    weight.check(name)?;
    let mut seen = vec![false; weight.in_features];
    let fresh =
        |input: &u32| seen.get_mut(*input as usize).is_some_and(|seen| !std::mem::replace(seen, true));
    if order.len() == weight.in_features && order.iter().all(fresh) {
        return Ok(());
    }
    Err(KernelError::WeightOrder { name: name.into(), in_features: weight.in_features })
}

/// The non-linearity of a gated MLP.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Activation {
    /// `x * sigmoid(x)`: Llama, Qwen.
    Silu,
    /// The tanh approximation of GELU: Gemma.
    GeluTanh,
    /// `x * sigmoid(alpha * x) * (up + 1)`, where `x` is cut at `limit` above and `up` on both sides: gpt-oss.
    ClampedSwiglu {
        /// Steepness.
        alpha: f32,
        /// Largest size.
        limit: f32,
    },
}

/// What each query row may see, beside the committed part of the cache.
///
/// Uncommitted row `i` stands in slot `base + i`. It sees slots `0..base` (or the last `window` of its positions)
/// and, in this order, the slots of its path: its uncommitted ancestors, then itself. The last `new_rows` of the
/// uncommitted rows are the queries of this call; earlier ones came in calls before (levels of a draft tree).
#[derive(Clone, Debug)]
pub struct StepMask<'a> {
    /// Committed slots.
    pub base: usize,
    /// Parent of every uncommitted row, `None` for rows that follow the committed text directly. A plain prefill
    /// or chain is `None, 0, 1, 2, …`.
    pub parents: &'a [Option<u32>],
    /// `R`: rows of this call, the last of `parents`.
    pub new_rows: usize,
    /// Sliding window in positions, the query's own included; `None` sees everything.
    pub window: Option<usize>,
    /// Every row sees all uncommitted rows, those behind it too, instead of its path: a block that is drafted at once.
    pub whole_block: bool,
    /// Logit scale, normally `1 / sqrt(head_dim)`.
    pub scale: f32,
    /// `[heads]`: a logit of each head that takes its share of the softmax and mixes nothing in (gpt-oss).
    pub sinks: Option<&'a [f32]>,
    /// Scaled logits `x` become `cap tanh(x / cap)` (Gemma 2).
    pub softcap: Option<f32>,
}

impl<'a> StepMask<'a> {
    /// All uncommitted rows are new.
    pub fn step(base: usize, parents: &'a [Option<u32>], window: Option<usize>, scale: f32) -> StepMask<'a> {
        StepMask {
            base,
            parents,
            new_rows: parents.len(),
            window,
            whole_block: false,
            scale,
            sinks: None,
            softcap: None,
        }
    }

    /// The same with capped logits.
    pub fn capped(self, softcap: Option<f32>) -> StepMask<'a> {
        StepMask { softcap, ..self }
    }

    /// A block behind `base` slots whose rows (`parents` gives their number) all see each other.
    pub fn block(base: usize, parents: &'a [Option<u32>], scale: f32) -> StepMask<'a> {
        StepMask { whole_block: true, ..StepMask::step(base, parents, None, scale) }
    }

    /// Slot of the first new row.
    pub fn first_slot(&self) -> usize {
        self.base + self.parents.len() - self.new_rows
    }
}

/// Device memory of activations.
pub trait Buffer: Send + Sync + Default + 'static {
    /// Gives the memory up for a later [`Kernels::scratch`]; what is left is empty.
    fn give_back(&mut self);
}

/// Memory of a device: what decoding and training share.
pub trait Memory: Send + Sync + 'static {
    /// A device array of f32.
    type Buf: Buffer;

    /// A buffer of `len` zeros.
    fn zeros(&self, len: usize) -> Self::Buf;
    /// A buffer of `len` values with unspecified content, to be written in full.
    fn scratch(&self, len: usize) -> Self::Buf;
    /// Copies host data to a new buffer.
    fn upload(&self, data: &[f32]) -> Self::Buf;
    /// Copies `out.len()` values from `offset` on to the host.
    fn download(&self, buf: &Self::Buf, offset: usize, out: &mut [f32]);
}

/// Operations for decoding and capture. See the contract at the top of the crate.
pub trait Kernels: Memory {
    /// A weight in the backend's own layout.
    type Packed: Send + Sync;
    /// Keys and values of one layer of one sequence.
    type Kv: Send;
    /// Rows of prompts that one step takes: what keeps the device busy, and bounds its memory. Changes no bit.
    const STEP_ROWS: usize = 256;
    /// Whether the contract at the top of the crate holds: a row's bits depend on nothing else in the call. What promises the
    /// same text with and without a draft asks for it; without it equal texts are an observation.
    const ROW_EXACT: bool;
    /// Whether [`Kernels::choose`] is there.
    const DRAWS: bool = false;

    /// Repacks a weight once at load.
    fn pack(&self, name: &str, weight: &WeightView<'_>, mode: PackMode) -> Result<Self::Packed, KernelError>;
    /// Like [`Kernels::pack`] for a weight whose column `k` belongs to input `order[k]`. Values are kept; a backend that
    /// cannot take the inputs in another order widens them to f32.
    fn pack_ordered(
        &self,
        name: &str,
        weight: &WeightView<'_>,
        order: &[u32],
        mode: PackMode,
    ) -> Result<Self::Packed, KernelError> {
        check_order(name, weight, order)?;
        let mut values = vec![0.0; weight.out_features * weight.in_features];
        let mut columns = vec![0.0; weight.in_features];
        for (o, row) in values.chunks_exact_mut(weight.in_features.max(1)).enumerate() {
            quant::dequantize_row(weight, o, &mut columns);
            order.iter().zip(&columns).for_each(|(input, v)| row[*input as usize] = *v);
        }
        self.pack(name, &WeightView::f32(&values, weight.out_features, weight.in_features), mode)
    }
    /// Several linear layers of one input: `ys[i][R, Oᵢ] = x[R, I] · Wᵢᵀ`, plus `bias[Oᵢ]` if given.
    fn matmuls(
        &self,
        x: &Self::Buf,
        rows: usize,
        weights: &[(&Self::Packed, Option<&Self::Buf>)],
        ys: &mut [Self::Buf],
    );
    /// Per row the output of `x[R, I] · Wᵀ` with the largest value, the lowest among equals, without the outputs
    /// being written anywhere; NaN never wins.
    fn argmax(&self, x: &Self::Buf, rows: usize, w: &Self::Packed) -> Vec<u32>;
    /// [`Kernels::argmax`] of rows of `width` values, and of the rows `whole` the outputs as well: `y[whole.len(), O]`.
    /// What the two calls give, from one pass over the weight where a backend can.
    fn argmax_and_outputs(
        &self,
        x: &Self::Buf,
        (rows, width): (usize, usize),
        w: &Self::Packed,
        whole: &[u32],
        y: &mut Self::Buf,
    ) -> Vec<u32> {
        let mut chosen = self.scratch(whole.len() * width);
        self.gather_rows(x, width, whole, &mut chosen);
        self.matmuls(&chosen, whole.len(), &[(w, None)], std::slice::from_mut(y));
        chosen.give_back();
        self.argmax(x, rows, w)
    }

    /// Per row the `k` best outputs of `x[R, I] · Wᵀ`, of which there are `outputs`, and what all of them come to: what a
    /// draft is asked for, without the outputs leaving the device.
    fn top_k(&self, x: &Self::Buf, rows: usize, (w, outputs): (&Self::Packed, usize), k: usize) -> Vec<TopK> {
        let mut y = [self.scratch(rows * outputs)];
        self.matmuls(x, rows, &[(w, None)], &mut y);
        let mut values = vec![0.0; rows * outputs];
        self.download(&y[0], 0, &mut values);
        y[0].give_back();
        values.chunks_exact(outputs).map(|row| TopK::of(row, k)).collect()
    }
    /// Per row of `x` a token from the outputs of `x[R, I] · Wᵀ`: the largest, or a draw. The outputs do not leave the device.
    /// A backend that has it says so ([`Kernels::DRAWS`]); others leave draws to who asks.
    fn choose(&self, _x: &Self::Buf, _w: &Self::Packed, _draws: &[Option<DrawRow>]) -> Vec<u32> {
        unreachable!("asked only where `DRAWS` says so")
    }
    /// Rows of an embedding table: `y[R, O] = table[ids] * scale`.
    fn embed(&self, table: &Self::Packed, ids: &[u32], scale: f32, y: &mut Self::Buf);
    /// `y = x * rsqrt(mean(x²) + eps) * weight`, over groups of `width` values: whole rows, or heads for q/k norms.
    fn rms_norm(&self, x: &Self::Buf, weight: &Self::Buf, width: usize, eps: f32, y: &mut Self::Buf);
    /// Half-rotation RoPE in place on `x[R, heads * head_dim]` at `positions[R]`.
    fn rope(&self, x: &mut Self::Buf, heads: usize, table: &RopeTable, positions: &[u32]);
    /// `gate = act(gate) * up`, or what the activation makes of both.
    fn gated(&self, activation: Activation, gate: &mut Self::Buf, up: &Self::Buf);
    /// `a += b`.
    fn add(&self, a: &mut Self::Buf, b: &Self::Buf);
    /// `x *= factor`.
    fn scale(&self, x: &mut Self::Buf, factor: f32);
    /// `x = cap tanh(x / cap)`.
    fn softcap(&self, x: &mut Self::Buf, cap: f32);
    /// Concatenates columns: `y[R, Σ widths]` from `parts[i][R, widths[i]]`.
    fn concat_cols(&self, parts: &[(&Self::Buf, usize)], rows: usize, y: &mut Self::Buf);
    /// Columns `from..from + width` of `x[rows, x_width]`.
    fn slice_cols(
        &self,
        x: &Self::Buf,
        x_width: usize,
        from: usize,
        width: usize,
        rows: usize,
        y: &mut Self::Buf,
    );
    /// Copies chosen rows of `x[_, width]`.
    fn gather_rows(&self, x: &Self::Buf, width: usize, rows: &[u32], y: &mut Self::Buf);
    /// `y[R, H]`: the weighted sum of what each row's experts make of `x[R, H]`. See [`mod@experts`] for the order.
    /// Experts without rows are not read.
    fn experts(
        &self,
        x: &Self::Buf,
        routes: &experts::Routes,
        experts: &experts::Experts<Self::Packed, Self::Buf>,
        y: &mut Self::Buf,
    ) {
        experts::grouped(self, x, routes, experts, y);
    }

    /// The gate of a Markov head over rows of `width`: `y[R, _]`, see [`Cell`].
    fn cell(
        &self,
        cell: Cell,
        inputs: (&Self::Buf, &Self::Buf),
        rows: usize,
        width: usize,
        y: &mut Self::Buf,
    );

    /// Writes keys and values of `rows` committed positions without asking anything, from slot `at` on, and drops what
    /// lay behind it.
    fn kv_write(&self, kv: &mut Self::Kv, at: usize, rows: usize, k: &Self::Buf, v: &Self::Buf);
    /// An empty cache for one layer.
    fn kv_new(&self, kv_heads: usize, head_dim: usize, dtype: KvDtype) -> Self::Kv;
    /// Moves slots `from[i]` (ascending, all at or after `base`) to `base + i` and drops the rest.
    fn kv_compact(&self, kv: &mut Self::Kv, base: usize, from: &[usize]);
    /// Attention of a step: appends `k`, `v` of `[R, kv_heads * head_dim]` to the caches (each at its mask's first slot,
    /// dropping anything after), then `y[R, heads * head_dim]` = the queries over them. The rows of the segments
    /// stand one after the other.
    fn attend(
        &self,
        q: &Self::Buf,
        k: &Self::Buf,
        v: &Self::Buf,
        heads: usize,
        segments: &mut [Segment<'_, Self::Kv>],
        y: &mut Self::Buf,
    );
}

/// How a row's token is drawn: the arg-max of `output * factor` plus noise of `key` and the token, among the tokens that
/// survive in this order a least share, top-k and top-p.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DrawRow {
    /// Factor of the outputs, above 0: one over the temperature.
    pub factor: f32,
    /// The temperature.
    pub temperature: f32,
    /// Share of the largest output's probability that a token needs; 0 keeps all.
    pub least_share: f32,
    /// Tokens kept, the largest first; 0 keeps all.
    pub top_k: u32,
    /// Mass that the kept ones reach, the largest first; 1 keeps all.
    pub top_p: f32,
    /// What the noise is drawn from: seed and position, mixed.
    pub key: u64,
}

/// One sequence's rows in a step of several sequences.
pub struct Segment<'a, Kv> {
    /// The cache of this sequence and layer.
    pub kv: &'a mut Kv,
    /// What its rows see.
    pub mask: StepMask<'a>,
}
