//! Decoding and capture.

use burn_tensor::ops::IndexingUpdateOp;
use burn_tensor::{Bool, DType, FloatDType, Tensor, TensorData, activation};
use draftsmith_kernels::{
    Activation, Cell, KernelError, Kernels, KvDtype, Memory, PackMode, RopeTable, Segment, StepMask,
    WeightView, quant,
};

use crate::attention::{Heads, join};
use crate::{Buf, Gpu, Packed};

/// Slots that a cache holds at least.
const FIRST_SLOTS: usize = 256;
/// The largest f16.
const F16_MAX: f32 = 65504.0;

/// Keys and values of one layer of one sequence.
#[derive(Debug)]
pub struct KvLayer {
    kv_heads: usize,
    head_dim: usize,
    dtype: FloatDType,
    /// Slots in use.
    len: usize,
    /// `[capacity, nkv hd]` keys and values; none before the first slot.
    rows: Option<[Tensor<2>; 2]>,
}

impl KvLayer {
    fn width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Overwrites slots from `at` on and drops what lay behind them.
    fn write(&mut self, gpu: &Gpu, at: usize, new: [Tensor<2>; 2]) {
        let (width, n) = (self.width(), new[0].dims()[0]);
        let len = at + n;
        assert!(at <= self.len, "rows follow the slots that are there");
        let stored = |x: Tensor<2>| match self.dtype {
            FloatDType::F16 => x.clamp(-F16_MAX, F16_MAX).cast(FloatDType::F16),
            other => x.cast(other),
        };
        let capacity = self.rows.as_ref().map_or(0, |[k, _]| k.dims()[0]);
        let dtype: DType = self.dtype.into();
        let grown = |old: Option<Tensor<2>>| match old {
            Some(old) if len <= capacity => old,
            old => {
                let size = len.next_power_of_two().max(FIRST_SLOTS);
                let fresh = Tensor::zeros([size, width], (&gpu.device, dtype));
                match old {
                    Some(old) => fresh.slice_assign([0..at, 0..width], old.slice([0..at, 0..width])),
                    None => fresh,
                }
            }
        };
        let (k, v) = self.rows.take().map_or((None, None), |[k, v]| (Some(k), Some(v)));
        let [new_k, new_v] = new;
        let put = |old: Option<Tensor<2>>, new: Tensor<2>| {
            grown(old).slice_assign([at..len, 0..width], stored(new))
        };
        self.rows = Some([put(k, new_k), put(v, new_v)]);
        self.len = len;
    }
}

/// Which keys of a step are not seen: `[N, S]` over `S = base + parents.len()` slots.
fn hidden_keys(gpu: &Gpu, mask: &StepMask<'_>) -> Tensor<2, Bool> {
    let (earlier, uncommitted) = (mask.first_slot() - mask.base, mask.parents.len());
    let keys = mask.base + uncommitted;
    if mask.whole_block {
        return gpu.behind(&vec![keys as u32; mask.new_rows], keys);
    }
    let chain = mask.parents.iter().enumerate().all(|(i, p)| p.map_or(0, |p| p as usize + 1) == i);
    let (mut first, mut end, mut own) = (Vec::new(), Vec::new(), Vec::new());
    for row in earlier..uncommitted {
        // Uncommitted slots that this row sees, itself first.
        let mut path = if chain { Vec::new() } else { vec![row] };
        while let Some(p) = path.last().and_then(|at| mask.parents[*at]) {
            path.push(p as usize);
        }
        let depth = if chain { row + 1 } else { path.len() };
        let window = mask.window.unwrap_or(usize::MAX);
        first.push((mask.base + depth).saturating_sub(window) as u32);
        end.push((mask.base + if chain { row + 1 } else { 0 }) as u32);
        if !chain {
            let mut hidden = vec![true; uncommitted];
            path.iter().take(window).for_each(|slot| hidden[*slot] = false);
            own.extend(hidden);
        }
    }
    let before = gpu.behind(&first, keys).bool_not();
    let behind = gpu.behind(&end, keys);
    if chain {
        return before.bool_or(behind);
    }
    // A tree: committed slots from `first` on, and the row's own path.
    let n = mask.new_rows;
    let path = Tensor::<2, Bool>::from_data(TensorData::new(own, [n, uncommitted]), &gpu.device);
    let committed = before.slice([0..n, 0..mask.base]);
    if mask.base == 0 { path } else { Tensor::cat(vec![committed, path], 1) }
}

impl Gpu {
    /// `act(gate) * up`
    pub(crate) fn gate_value(&self, activation: Activation, gate: Tensor<1>, up: Tensor<1>) -> Tensor<1> {
        let (gate, up) = self.gate_inputs(activation, gate, up);
        let sigmoid = self.gate_sigmoid(activation, gate.clone());
        gate * sigmoid * up
    }

    /// What an activation takes of both inputs.
    pub(crate) fn gate_inputs(
        &self,
        activation: Activation,
        gate: Tensor<1>,
        up: Tensor<1>,
    ) -> (Tensor<1>, Tensor<1>) {
        match activation {
            Activation::Silu | Activation::GeluTanh => (gate, up),
            Activation::ClampedSwiglu { limit, .. } => {
                (gate.clamp_max(limit), up.clamp(-limit, limit).add_scalar(1.0))
            }
        }
    }

    /// The factor `s` of an activation `x · s(x)`: both are sigmoids.
    pub(crate) fn gate_sigmoid(&self, activation: Activation, x: Tensor<1>) -> Tensor<1> {
        match activation {
            Activation::Silu => activation::sigmoid(x),
            Activation::ClampedSwiglu { alpha, .. } => activation::sigmoid(x.mul_scalar(alpha)),
            // 0.5 x (1 + tanh(u)) = x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x³)
            Activation::GeluTanh => {
                let cube = x.clone() * x.clone() * x.clone();
                activation::sigmoid((x + cube.mul_scalar(0.044_715)).mul_scalar(GELU))
            }
        }
    }

    /// RoPE of `[R, heads hd]`; turned back if `inverse`.
    pub(crate) fn turned(
        &self,
        x: Tensor<2>,
        table: &RopeTable,
        positions: &[u32],
        heads: usize,
        inverse: bool,
    ) -> Tensor<2> {
        let (rows, half) = (positions.len(), table.head_dim() / 2);
        let (mut cos, mut sin) = (Vec::with_capacity(rows * half), Vec::with_capacity(rows * half));
        for position in positions {
            let (c, s) = table.angles(*position);
            cos.extend_from_slice(c);
            sin.extend(s.iter().map(|s| if inverse { -s } else { *s }));
        }
        let angle = |values: &[f32]| self.floats(values).reshape([rows, 1, half]);
        let (cos, sin) = (angle(&cos), angle(&sin));
        let x = x.reshape([rows, heads, 2 * half]);
        let a = x.clone().narrow(2, 0, half);
        let b = x.narrow(2, half, half);
        let first = a.clone() * cos.clone() - b.clone() * sin.clone();
        let second = b * cos + a * sin;
        Tensor::cat(vec![first, second], 2).reshape([rows, heads * 2 * half])
    }

    /// `1 / sqrt(mean(x²) + eps)` of each row: `[R, 1]`.
    pub(crate) fn inverse_rms(&self, x: &Tensor<2>, eps: f32) -> Tensor<2> {
        x.clone().square().mean_dim(1).add_scalar(eps).sqrt().recip()
    }

    /// RMS norm of rows.
    pub(crate) fn normed(&self, x: Tensor<2>, weight: Tensor<2>, eps: f32) -> Tensor<2> {
        let inverse = self.inverse_rms(&x, eps);
        x * inverse * weight
    }
}

/// `2 sqrt(2 / pi)`, as the CPU implementation rounds it.
pub(crate) const GELU: f32 = 1.595_769_2;

impl Memory for Gpu {
    type Buf = Buf;

    fn zeros(&self, len: usize) -> Buf {
        Buf::zeros(len)
    }

    fn scratch(&self, len: usize) -> Buf {
        Buf::zeros(len)
    }

    fn upload(&self, data: &[f32]) -> Buf {
        let mut buf = Buf::zeros(data.len());
        if !data.is_empty() {
            buf.set(self.floats(data));
        }
        buf
    }

    fn download(&self, buf: &Buf, offset: usize, out: &mut [f32]) {
        if out.is_empty() {
            return;
        }
        let values = self.read(buf, 1, offset + out.len()).slice([0..1, offset..offset + out.len()]);
        out.copy_from_slice(&self.host(values));
    }
}

impl Kernels for Gpu {
    type Packed = Packed;
    type Kv = KvLayer;
    // burn chooses the product by its shape.
    const ROW_EXACT: bool = false;

    fn pack(&self, name: &str, weight: &WeightView<'_>, _mode: PackMode) -> Result<Packed, KernelError> {
        weight.check(name)?;
        let values = self.floats(&quant::dequantize(weight));
        Ok(Packed(values.reshape([weight.out_features, weight.in_features]).cast(self.storage)))
    }

    fn matmuls(&self, x: &Buf, rows: usize, weights: &[(&Packed, Option<&Buf>)], ys: &mut [Buf]) {
        for ((w, bias), y) in weights.iter().zip(ys) {
            let [out, inp] = w.0.dims();
            let product = self.product(self.stored(x, rows, inp), w.0.clone().transpose());
            match bias {
                Some(bias) => self.keep(y, product + self.read(bias, 1, out)),
                None => self.keep(y, product),
            }
        }
    }

    fn argmax(&self, x: &Buf, rows: usize, w: &Packed) -> Vec<u32> {
        let inp = w.0.dims()[1];
        let logits = self.product(self.stored(x, rows, inp), w.0.clone().transpose());
        self.host_ids(self.first_largest(logits).1)
    }

    fn embed(&self, table: &Packed, ids: &[u32], scale: f32, y: &mut Buf) {
        let rows = table.0.clone().select(0, self.indices(ids)).cast(FloatDType::F32);
        self.keep(y, rows.mul_scalar(scale));
    }

    fn rms_norm(&self, x: &Buf, weight: &Buf, width: usize, eps: f32, y: &mut Buf) {
        let groups = x.capacity() / width;
        self.keep(y, self.normed(self.read(x, groups, width), self.read(weight, 1, width), eps));
    }

    fn rope(&self, x: &mut Buf, heads: usize, table: &RopeTable, positions: &[u32]) {
        let rows = self.take(x, positions.len(), heads * table.head_dim()).cast(FloatDType::F32);
        self.keep(x, self.turned(rows, table, positions, heads, false));
    }

    fn gated(&self, activation: Activation, gate: &mut Buf, up: &Buf) {
        let len = gate.capacity();
        let flat = |x: &Buf| self.read(x, 1, len).reshape([len]);
        let value = self.gate_value(activation, flat(gate), flat(up));
        self.keep(gate, value);
    }

    fn add(&self, a: &mut Buf, b: &Buf) {
        let len = a.capacity();
        let sum = self.take(a, 1, len).cast(FloatDType::F32) + self.read(b, 1, len);
        self.keep(a, sum);
    }

    fn scale(&self, x: &mut Buf, factor: f32) {
        let len = x.capacity();
        let scaled = self.take(x, 1, len).cast(FloatDType::F32).mul_scalar(factor);
        self.keep(x, scaled);
    }

    fn softcap(&self, x: &mut Buf, cap: f32) {
        let len = x.capacity();
        let capped = self.take(x, 1, len).cast(FloatDType::F32).div_scalar(cap).tanh().mul_scalar(cap);
        self.keep(x, capped);
    }

    fn concat_cols(&self, parts: &[(&Buf, usize)], rows: usize, y: &mut Buf) {
        let parts = parts.iter().map(|(part, width)| self.read(part, rows, *width)).collect();
        self.keep(y, Tensor::cat(parts, 1));
    }

    fn slice_cols(&self, x: &Buf, x_width: usize, from: usize, width: usize, rows: usize, y: &mut Buf) {
        y.set(self.stored(x, rows, x_width).slice([0..rows, from..from + width]));
    }

    fn gather_rows(&self, x: &Buf, width: usize, rows: &[u32], y: &mut Buf) {
        y.set(self.stored(x, x.capacity() / width, width).select(0, self.indices(rows)));
    }

    fn cell(&self, cell: Cell, (a, b): (&Buf, &Buf), rows: usize, width: usize, y: &mut Buf) {
        let (a, b) = (self.read(a, rows, cell.input_width(width)), self.read(b, rows, width));
        match cell {
            Cell::Gate => self.keep(y, activation::sigmoid(a) * b),
            Cell::Recurrent => {
                let part = |i: usize| a.clone().slice([0..rows, i * width..(i + 1) * width]);
                let candidate = part(1).tanh();
                let state = candidate.clone() + activation::sigmoid(part(0)) * (b - candidate);
                self.keep(y, Tensor::cat(vec![state, part(2).tanh()], 1));
            }
        }
    }

    fn kv_write(&self, kv: &mut KvLayer, at: usize, rows: usize, k: &Buf, v: &Buf) {
        if rows > 0 {
            let width = kv.width();
            kv.write(self, at, [k, v].map(|x| self.read(x, rows, width)));
        }
    }

    fn kv_new(&self, kv_heads: usize, head_dim: usize, dtype: KvDtype) -> KvLayer {
        let dtype = match dtype {
            KvDtype::F32 => FloatDType::F32,
            KvDtype::F16 => FloatDType::F16,
        };
        KvLayer { kv_heads, head_dim, dtype, len: 0, rows: None }
    }

    fn kv_compact(&self, kv: &mut KvLayer, base: usize, from: &[usize]) {
        let len = base + from.len();
        let width = kv.width();
        assert!(base <= kv.len && from.iter().all(|slot| *slot < kv.len), "slots are there");
        let slots: Vec<u32> = from.iter().map(|slot| *slot as u32).collect();
        if !from.iter().copied().eq(base..len)
            && let Some(rows) = kv.rows.take()
        {
            kv.rows = Some(rows.map(|rows| {
                let kept = rows.clone().select(0, self.indices(&slots));
                rows.slice_assign([base..len, 0..width], kept)
            }));
        }
        kv.len = len;
    }

    fn attend(
        &self,
        q: &Buf,
        k: &Buf,
        v: &Buf,
        heads: usize,
        segments: &mut [Segment<'_, KvLayer>],
        y: &mut Buf,
    ) {
        let total: usize = segments.iter().map(|s| s.mask.new_rows).sum();
        let Some(first) = segments.first().filter(|_| total > 0) else { return };
        let (kv_width, width) = (first.kv.width(), heads * first.kv.head_dim);
        let q = self.stored(q, total, width);
        let (k, v) = (self.stored(k, total, kv_width), self.stored(v, total, kv_width));
        let mut outputs = Vec::new();
        let mut row = 0;
        for Segment { kv, mask } in segments.iter_mut() {
            let n = mask.new_rows;
            if n == 0 {
                continue;
            }
            kv.write(self, mask.first_slot(), [self.rows(&k, row, n), self.rows(&v, row, n)]);
            let by_heads = Heads { kv: kv.kv_heads, group: heads / kv.kv_heads };
            let [keys, values] = kv.rows.as_ref().expect("rows were just written");
            let [keys, values] = [keys, values].map(|x| by_heads.keys(self.rows(x, 0, kv.len)));
            let hidden = hidden_keys(self, mask);
            let panel = by_heads.panel(kv.len);
            for from in (0..n).step_by(panel) {
                let part = panel.min(n - from);
                let queries = by_heads.queries(self.rows(&q, row + from, part));
                let hidden = hidden.clone().slice([from..from + part, 0..kv.len]);
                let logits = self.logits(&queries, &keys, &hidden, mask.scale, mask.softcap);
                let mut top = logits.clone().max_dim(3);
                let sinks =
                    mask.sinks.map(|sinks| self.floats(sinks).reshape([by_heads.kv, by_heads.group, 1, 1]));
                if let Some(sinks) = &sinks {
                    top = top.clone().max_pair(sinks.clone().expand(top.shape()));
                }
                let weights = (logits - top.clone()).exp();
                let mut sum = weights.clone().sum_dim(3);
                if let Some(sinks) = sinks {
                    sum = sum + (sinks - top).exp();
                }
                outputs.push(join(self.mix(&weights, &values) / sum));
            }
            row += n;
        }
        self.keep(y, Tensor::cat(outputs, 0));
    }
}

impl Gpu {
    /// Adds rows of `y` to distinct rows of `x`.
    pub(crate) fn add_rows(&self, x: Tensor<2>, rows: &[u32], y: Tensor<2>) -> Tensor<2> {
        x.select_assign(0, self.indices(rows), y, IndexingUpdateOp::Add)
    }

    /// All values on the host.
    pub(crate) fn host<const D: usize>(&self, values: Tensor<D>) -> Vec<f32> {
        values.try_into_vec_as::<f32>().expect("the device answers")
    }

    pub(crate) fn host_ids(&self, ids: Tensor<2, burn_tensor::Int>) -> Vec<u32> {
        let ids = ids.try_into_vec_as::<i64>().expect("the device answers");
        ids.into_iter().map(|id| id as u32).collect()
    }
}
