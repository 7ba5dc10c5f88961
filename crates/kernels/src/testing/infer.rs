//! Checks of [`Kernels`].
//!
//! Shape legend: `R` rows, `I`/`O` input and output features, `S` slots.

use super::{CLAMPED, close, host};
use crate::experts::{Expert, Experts, Routing};
use crate::{
    Activation, Buffer, Groups, Kernels, KvDtype, PackMode, RopeScaling, RopeTable, Segment, StepMask, TopK,
    WeightDtype, WeightView, quant, reference,
};

/// A small deterministic generator; the tests need variety, not quality.
pub struct Random(pub u64);

impl Random {
    /// The next number.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        self.0 >> 33
    }
    /// A number below `n`.
    pub fn below(&mut self, n: usize) -> usize {
        self.bits() as usize % n
    }
    /// A number in -1..1.
    pub fn float(&mut self) -> f32 {
        (self.bits() as f32 / (1u64 << 31) as f32 - 0.5) * 2.0
    }
    /// `n` numbers in -1..1.
    pub fn floats(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.float()).collect()
    }
}

/// Every type that a weight can be stored in; of those with groups, some of each kind.
pub const DTYPES: [WeightDtype; 36] = {
    const fn groups(len: u32, single: bool, zeros: bool) -> Groups {
        Groups { len, single, zeros }
    }
    let grouped = [
        WeightDtype::Int4(groups(32, false, true)),
        WeightDtype::Int4(groups(64, false, false)),
        WeightDtype::Int4(groups(128, false, true)),
        WeightDtype::Int4(groups(256, false, false)),
        WeightDtype::Int4(groups(128, true, true)),
        WeightDtype::Int4(groups(64, true, false)),
        WeightDtype::Int8(groups(128, false, true)),
        WeightDtype::Int8(groups(256, true, false)),
        WeightDtype::Fp8(groups(128, true, false)),
        WeightDtype::Fp8(groups(256, true, false)),
    ];
    let mut all = [WeightDtype::F32; 36];
    let mut i = 0;
    while i < all.len() {
        let gguf = WeightDtype::ALL.len();
        all[i] = if i < gguf { WeightDtype::ALL[i] } else { grouped[i - gguf] };
        i += 1;
    }
    all
};

/// Random stored bytes of a weight whose scales are small normal numbers.
pub fn stored(random: &mut Random, dtype: WeightDtype, out: usize, inputs: usize) -> Vec<u8> {
    stored_as(random, dtype, out, inputs, None)
}

/// The same with one byte everywhere but in the scales, for quants at their limits.
pub fn stored_as(
    random: &mut Random,
    dtype: WeightDtype,
    out: usize,
    inputs: usize,
    byte: Option<u8>,
) -> Vec<u8> {
    let (block, bytes) = dtype.block();
    let half = |random: &mut Random| half::f16::from_f32(random.float() * 0.1).to_le_bytes();
    let mut data = Vec::new();
    for _ in 0..out * inputs / block {
        let mut b: Vec<u8> = (0..bytes).map(|_| byte.unwrap_or(random.bits() as u8)).collect();
        match dtype {
            WeightDtype::F32 => b = random.float().to_le_bytes().to_vec(),
            WeightDtype::F16 => b = half::f16::from_f32(random.float()).to_le_bytes().to_vec(),
            WeightDtype::Bf16 => b = half::bf16::from_f32(random.float()).to_le_bytes().to_vec(),
            WeightDtype::Q4_0
            | WeightDtype::Q5_0
            | WeightDtype::Q8_0
            | WeightDtype::Iq4Nl
            | WeightDtype::Iq4Xs
            | WeightDtype::Iq2Xxs
            | WeightDtype::Iq2Xs
            | WeightDtype::Iq2S
            | WeightDtype::Iq3Xxs
            | WeightDtype::Iq3S
            | WeightDtype::Iq1S => b[..2].copy_from_slice(&half(random)),
            WeightDtype::Q4_1 | WeightDtype::Q5_1 | WeightDtype::Q4K | WeightDtype::Q5K => {
                b[..2].copy_from_slice(&half(random));
                b[2..4].copy_from_slice(&half(random));
            }
            WeightDtype::Q2K => {
                b[80..82].copy_from_slice(&half(random));
                b[82..].copy_from_slice(&half(random));
            }
            WeightDtype::Q3K | WeightDtype::Q6K | WeightDtype::Tq1_0 | WeightDtype::Tq2_0 => {
                b[bytes - 2..].copy_from_slice(&half(random));
            }
            WeightDtype::Mxfp4 => b[0] = 118 + b[0] % 8,
            WeightDtype::Nvfp4 => b[..4].iter_mut().for_each(|s| *s %= 0x40),
            WeightDtype::Iq1M => {
                // The f16 in the high nibbles of four words.
                let d = u16::from_le_bytes(half(random));
                for i in 0..4 {
                    let high = &mut b[49 + 2 * i];
                    *high = *high & 15 | ((d >> (4 * i) & 15) << 4) as u8;
                }
            }
            WeightDtype::Int4(g) | WeightDtype::Int8(g) | WeightDtype::Fp8(g) => {
                match g.single {
                    true => b[..4].copy_from_slice(&(random.float() * 0.1).to_le_bytes()),
                    false => b[..2].copy_from_slice(&half(random)),
                }
                let head = g.head_bytes();
                if matches!(dtype, WeightDtype::Int4(_)) && g.zeros {
                    b[head - 1] &= 15;
                }
                if matches!(dtype, WeightDtype::Fp8(_)) {
                    // All bits but the sign are no number.
                    b[head..].iter_mut().for_each(|v| *v -= u8::from(*v & 0x7f == 0x7f));
                }
            }
        }
        data.extend(b);
    }
    data
}

/// `[R, O]` of one packed weight. Checks that the arg-max without the outputs is that of the outputs.
#[track_caller]
pub fn matmul<K: Kernels>(k: &K, x: &[f32], rows: usize, w: &WeightView<'_>, mode: PackMode) -> Vec<f32> {
    let packed = k.pack("w", w, mode).expect("the weight is complete");
    let mut y = [k.scratch(rows * w.out_features)];
    k.matmuls(&k.upload(x), rows, &[(&packed, None)], &mut y);
    let y = host(k, &y[0], rows * w.out_features);
    let best = k.top_k(&k.upload(x), rows, (&packed, w.out_features), 3);
    for (row, found) in y.chunks_exact(w.out_features).zip(best) {
        let wanted = TopK::of(row, 3);
        assert_eq!(found.best, wanted.best, "the best of the outputs themselves");
        assert!((found.log_sum - wanted.log_sum).abs() <= 1e-4 || wanted.log_sum.is_nan());
    }
    for (row, best) in y.chunks_exact(w.out_features).zip(k.argmax(&k.upload(x), rows, &packed)) {
        let first = (0..row.len()).fold(0, |best, i| if row[i] > row[best] { i } else { best });
        // Outputs may be stored more coarsely than they are compared.
        assert!(
            row[best as usize] == row[first],
            "{} at {best}, {} at {first}",
            row[best as usize],
            row[first]
        );
    }
    y
}

/// Everything below. `quantised` is the relative error where block types keep their integer products.
pub fn all<K: Kernels>(k: &K, rounding: f64, quantised: f64) {
    matmuls(k, rounding, quantised);
    biases(k, rounding);
    ties(k);
    embedding(k, rounding);
    rowwise(k, rounding);
    gates(k, rounding);
    experts(k, rounding, quantised);
    columns(k);
    again(k);
    attention(k, rounding);
    blocks(k, rounding);
    compaction(k, rounding);
    beyond_f16(k);
}

/// Products are those of the reference.
pub fn matmuls<K: Kernels>(k: &K, rounding: f64, quantised: f64) {
    let mut random = Random(2);
    for dtype in DTYPES {
        let (inputs, out, rows) = (512, 40, 5);
        let data = stored(&mut random, dtype, out, inputs);
        let w = WeightView { dtype, out_features: out, in_features: inputs, data: &data };
        let x = random.floats(rows * inputs);
        let wanted = reference::matmul(&x, rows, &w);
        let rms = (wanted.iter().map(|v| v * v).sum::<f64>() / wanted.len() as f64).sqrt();
        let check = |mode: PackMode, tolerance: f64| {
            let found = matmul(k, &x, rows, &w, mode);
            let error = (found.iter().zip(&wanted).map(|(f, w)| (f64::from(*f) - w).powi(2)).sum::<f64>()
                / wanted.len() as f64)
                .sqrt();
            assert!(error < tolerance * rms, "{dtype:?} {mode:?}: error {error:e} of {rms:e}");
        };
        let float = rounding.max(1e-6);
        check(PackMode::F32, float);
        check(PackMode::Stored, if dtype.block().0 == 1 { float } else { quantised });
        check(PackMode::Q8, quantised);
    }
}

/// Several weights of one input, some with a bias.
pub fn biases<K: Kernels>(k: &K, rounding: f64) {
    let mut random = Random(22);
    let (rows, inputs) = (3, 32);
    let x = random.floats(rows * inputs);
    let (a, b, bias) = (random.floats(8 * inputs), random.floats(5 * inputs), random.floats(5));
    let views = [WeightView::f32(&a, 8, inputs), WeightView::f32(&b, 5, inputs)];
    let packed = views.map(|w| k.pack("w", &w, PackMode::F32).expect("the weight is complete"));
    let on_device = k.upload(&bias);
    let mut ys = [k.scratch(rows * 8), k.scratch(rows * 5)];
    k.matmuls(&k.upload(&x), rows, &[(&packed[0], None), (&packed[1], Some(&on_device))], &mut ys);
    for (found, want) in host(k, &ys[0], rows * 8).iter().zip(reference::matmul(&x, rows, &views[0])) {
        close(*found, want, rounding.max(1e-5));
    }
    let wanted = reference::matmul(&x, rows, &views[1]);
    for (i, (found, want)) in host(k, &ys[1], rows * 5).iter().zip(wanted).enumerate() {
        close(*found, want + f64::from(bias[i % 5]), rounding.max(1e-5));
    }
}

/// The lowest of equal outputs wins, and NaN never does.
pub fn ties<K: Kernels>(k: &K) {
    let w = [1.0, 3.0, f32::NAN, 3.0, 2.0];
    let packed = k.pack("w", &WeightView::f32(&w, 5, 1), PackMode::F32).expect("the weight is complete");
    assert_eq!(k.argmax(&k.upload(&[1.0, -1.0]), 2, &packed), [1, 0]);
}

/// Rows of a table are its de-quantised rows.
pub fn embedding<K: Kernels>(k: &K, rounding: f64) {
    let mut random = Random(3);
    for dtype in DTYPES {
        let data = stored(&mut random, dtype, 37, 256);
        let w = WeightView { dtype, out_features: 37, in_features: 256, data: &data };
        let table = k.pack("w", &w, PackMode::Stored).expect("the weight is complete");
        let mut y = k.zeros(3 * 256);
        k.embed(&table, &[0, 36, 17], 2.0, &mut y);
        let all = quant::dequantize(&w);
        for (row, id) in host(k, &y, 3 * 256).chunks_exact(256).zip([0usize, 36, 17]) {
            for (found, want) in row.iter().zip(&all[id * 256..(id + 1) * 256]) {
                close(*found, 2.0 * f64::from(*want), rounding);
            }
        }
    }
}

/// Norms, RoPE, gates and sums are those of the reference.
pub fn rowwise<K: Kernels>(k: &K, rounding: f64) {
    let mut random = Random(6);
    for width in [16, 24, 64, 576] {
        let rows = 7;
        let (x, weight) = (random.floats(rows * width), random.floats(width));
        let table = RopeTable::new(width, 10_000.0, &RopeScaling::None);
        let (on_device, mut y) = (k.upload(&x), k.zeros(x.len()));
        k.rms_norm(&on_device, &k.upload(&weight), width, 1e-5, &mut y);
        let normed = host(k, &y, x.len());
        for (found, want) in normed.iter().zip(reference::rms_norm(&x, &weight, 1e-5)) {
            close(*found, want, rounding.max(1e-5));
        }
        let positions = [0, 1, 5, 100, 1000, 4000, 8000];
        let mut turned = k.upload(&x);
        k.rope(&mut turned, 1, &table, &positions);
        let turned = host(k, &turned, x.len());
        for (row, position) in positions.into_iter().enumerate() {
            let wanted = reference::rope(&x[row * width..(row + 1) * width], &table, position);
            for (found, want) in turned[row * width..].iter().zip(wanted) {
                close(*found, want, rounding.max(1e-5));
            }
        }
        let mut gate = k.upload(&x);
        k.gated(Activation::Silu, &mut gate, &y);
        for ((g, x), u) in host(k, &gate, x.len()).iter().zip(&x).zip(&normed) {
            let wanted = reference::gated(Activation::Silu, f64::from(*x), f64::from(*u));
            close(*g, wanted, rounding.max(1e-5));
        }
        let mut sum = k.upload(&x);
        k.add(&mut sum, &on_device);
        for (s, x) in host(k, &sum, x.len()).iter().zip(&x) {
            close(*s, 2.0 * f64::from(*x), rounding);
        }
        let mut scaled = k.upload(&x);
        k.scale(&mut scaled, -3.0);
        for (s, x) in host(k, &scaled, x.len()).iter().zip(&x) {
            close(*s, -3.0 * f64::from(*x), rounding.max(1e-6));
        }
        // From where the cap does nothing to where it is all that is left.
        for cap in [0.01, 0.7, 50.0] {
            let mut capped = k.upload(&x);
            k.softcap(&mut capped, cap);
            for (c, x) in host(k, &capped, x.len()).iter().zip(&x) {
                close(*c, reference::softcap(f64::from(*x), f64::from(cap)), rounding.max(1e-5));
            }
        }
    }
}

/// Every activation, beyond its limits too.
pub fn gates<K: Kernels>(k: &K, rounding: f64) {
    let mut random = Random(24);
    for activation in [Activation::Silu, Activation::GeluTanh, CLAMPED] {
        let wide = |random: &mut Random| -> Vec<f32> { (0..200).map(|_| random.float() * 12.0).collect() };
        let (x, up) = (wide(&mut random), wide(&mut random));
        let (mut gate, on_device) = (k.upload(&x), k.upload(&up));
        k.gated(activation, &mut gate, &on_device);
        for ((g, x), u) in host(k, &gate, x.len()).iter().zip(&x).zip(&up) {
            close(*g, reference::gated(activation, f64::from(*x), f64::from(*u)), rounding.max(1e-5));
        }
    }
}

/// Rows and experts of a layer.
pub struct ExpertsCase {
    /// How rows find their experts.
    pub routing: Routing,
    /// Stored type of the experts.
    pub dtype: WeightDtype,
    /// `[R, E]` router logits, some of them equal.
    pub logits: Vec<f32>,
    /// `[R, H]`
    pub x: Vec<f32>,
    /// `H`
    pub hidden: usize,
    /// `I`
    pub width: usize,
    /// Non-linearity.
    pub activation: Activation,
    /// Per expert the bytes of gate, up and down.
    pub weights: Vec<[Vec<u8>; 3]>,
    /// Per expert the biases of gate, up and down.
    pub biases: Option<Vec<[Vec<f32>; 3]>>,
}

impl ExpertsCase {
    /// Few and many experts and rows, with and without biases, by number.
    pub fn numbered(random: &mut Random, i: usize) -> ExpertsCase {
        let dtypes =
            [WeightDtype::F32, WeightDtype::Mxfp4, WeightDtype::Q8_0, WeightDtype::Bf16, WeightDtype::Q4_1];
        let dtype = dtypes[i % dtypes.len()];
        let block = if dtype.block().0 == 1 { 8 } else { 32 };
        let (hidden, width) = (block * (1 + random.below(4)), block * (1 + random.below(3)));
        let experts = 1 + random.below(9);
        let routing = Routing { experts, used: 1 + random.below(experts), normalised: i.is_multiple_of(2) };
        let rows = [1, 2, 5, 40, 150][random.below(5)];
        let shapes = [(width, hidden), (width, hidden), (hidden, width)];
        let weights = (0..experts).map(|_| shapes.map(|(o, i)| stored(random, dtype, o, i))).collect();
        let biases = i
            .is_multiple_of(3)
            .then(|| (0..experts).map(|_| shapes.map(|(o, _)| random.floats(o))).collect());
        let activation = [Activation::Silu, CLAMPED][i / 2 % 2];
        // In steps of a quarter, so that ties are common.
        let logits = (0..rows * experts).map(|_| (random.float() * 8.0).round() / 4.0).collect();
        let x = random.floats(rows * hidden);
        ExpertsCase { routing, dtype, logits, x, hidden, width, activation, weights, biases }
    }

    /// The stored weights of an expert.
    pub fn views(&self, expert: usize) -> [WeightView<'_>; 3] {
        let (h, i) = (self.hidden, self.width);
        let mut shapes = [(i, h), (i, h), (h, i)].into_iter();
        self.weights[expert].each_ref().map(|data| {
            let (out_features, in_features) = shapes.next().unwrap_or_default();
            WeightView { dtype: self.dtype, out_features, in_features, data }
        })
    }

    /// The layer on a backend.
    pub fn layer<K: Kernels>(&self, k: &K, mode: PackMode) -> Experts<K::Packed, K::Buf> {
        let each = (0..self.routing.experts)
            .map(|e| {
                let [gate, up, down] =
                    self.views(e).map(|w| k.pack("w", &w, mode).expect("the weight is complete"));
                let bias = self.biases.as_ref().map(|all| all[e].each_ref().map(|b| k.upload(b)));
                Expert { gate, up, down, bias }
            })
            .collect();
        Experts { each, hidden: self.hidden, width: self.width, activation: self.activation }
    }

    /// What the reference gives.
    pub fn wanted(&self) -> Vec<f64> {
        let all: Vec<_> = (0..self.routing.experts)
            .map(|e| {
                let bias = self.biases.as_ref().map(|all| all[e].each_ref().map(Vec::as_slice));
                (self.views(e), bias)
            })
            .collect();
        reference::experts(&self.x, &self.logits, self.routing, self.activation, &all)
    }
}

/// Experts give what the reference gives.
pub fn experts<K: Kernels>(k: &K, rounding: f64, quantised: f64) {
    let mut random = Random(25);
    for i in 0..30 {
        let case = ExpertsCase::numbered(&mut random, i);
        let routes = case.routing.choose(&case.logits);
        let wanted = case.wanted();
        let size: f64 = wanted.iter().map(|w| w * w).sum();
        // Two products one after the other; with rounded activations, in between the bends of the clamped one, where an
        // error of a large gate decides between a value and nothing.
        let float = 2.0 * rounding.max(1e-5);
        let stored = if case.dtype.block().0 == 1 { float } else { 10.0 * quantised.max(float) };
        for (mode, tolerance) in [(PackMode::F32, float), (PackMode::Stored, stored)] {
            let layer = case.layer(k, mode);
            let mut y = k.scratch(case.x.len());
            k.experts(&k.upload(&case.x), &routes, &layer, &mut y);
            let found = host(k, &y, case.x.len());
            let error: f64 = found.iter().zip(&wanted).map(|(f, w)| (f64::from(*f) - w).powi(2)).sum();
            let (error, size) = (error.sqrt(), size.sqrt());
            assert!(error <= tolerance * size, "case {i}, {mode:?}: {error:e} of {size:e}");
        }
    }
}

/// Columns and rows go where they should. Small integers: exact in every storage.
pub fn columns<K: Kernels>(k: &K) {
    let x = k.upload(&(0..12).map(|i| i as f32).collect::<Vec<_>>()); // [3, 4]
    let mut y = k.zeros(6);
    k.slice_cols(&x, 4, 1, 2, 3, &mut y);
    assert_eq!(host(k, &y, 6), [1.0, 2.0, 5.0, 6.0, 9.0, 10.0]);
    let mut both = k.zeros(18);
    k.concat_cols(&[(&y, 2), (&x, 4)], 3, &mut both);
    assert_eq!(host(k, &both, 18)[6..12], [5.0, 6.0, 4.0, 5.0, 6.0, 7.0]);
    let mut rows = k.zeros(8);
    k.gather_rows(&x, 4, &[2, 0], &mut rows);
    assert_eq!(host(k, &rows, 8), [8.0, 9.0, 10.0, 11.0, 0.0, 1.0, 2.0, 3.0]);
    let mut part = [0.0; 2];
    k.download(&x, 5, &mut part);
    assert_eq!(part, [5.0, 6.0]);
}

/// Work that comes again with other numbers, and with other rows of them: a device that knows it by heart must not give what it gave
/// before.
pub fn again<K: Kernels>(k: &K) {
    const WIDTH: usize = 24;
    for round in 0..6u32 {
        // Small integers: exact in every storage.
        let x: Vec<f32> = (0..10 * WIDTH as u32).map(|i| ((i * (round + 3)) % 16) as f32).collect();
        let on_device = k.upload(&x);
        let (mut sum, mut wanted) = (k.zeros(3 * WIDTH), vec![0.0f32; 3 * WIDTH]);
        for i in 0..16 {
            let rows = [(i + round) % 10, (3 * i + 1) % 10, (7 * i + 2 * round) % 10];
            let mut chosen = k.scratch(3 * WIDTH);
            k.gather_rows(&on_device, WIDTH, &rows, &mut chosen);
            k.add(&mut sum, &chosen);
            chosen.give_back();
            for (row, wanted) in rows.iter().zip(wanted.chunks_exact_mut(WIDTH)) {
                wanted.iter_mut().zip(&x[*row as usize * WIDTH..]).for_each(|(sum, x)| *sum += x);
            }
        }
        k.scale(&mut sum, 0.5);
        let wanted: Vec<f32> = wanted.iter().map(|x| x * 0.5).collect();
        assert_eq!(host(k, &sum, 3 * WIDTH), wanted, "round {round}");
    }
}

/// A step of attention over a filled cache.
pub struct AttentionCase {
    /// Query heads.
    pub heads: usize,
    /// Key heads.
    pub kv_heads: usize,
    /// Values per head.
    pub dim: usize,
    /// Committed slots.
    pub base: usize,
    /// See [`StepMask`].
    pub parents: Vec<Option<u32>>,
    /// See [`StepMask`].
    pub window: Option<usize>,
    /// How keys and values are stored.
    pub kv_dtype: KvDtype,
    /// See [`StepMask`].
    pub sinks: Option<Vec<f32>>,
    /// See [`StepMask`].
    pub softcap: Option<f32>,
}

impl AttentionCase {
    /// Chains and trees of all kinds, by number.
    pub fn numbered(random: &mut Random, i: usize) -> AttentionCase {
        let kv_heads = 1 + random.below(3);
        let rows = 1 + random.below(12);
        let parents = (0..rows)
            .map(|r| {
                if i.is_multiple_of(2) { r.checked_sub(1) } else { random.below(r + 1).checked_sub(1) }
                    .map(|p| p as u32)
            })
            .collect();
        let heads = kv_heads * (1 + random.below(3));
        AttentionCase {
            heads,
            kv_heads,
            dim: [8, 16, 64, 40][random.below(4)],
            base: random.below(150),
            parents,
            window: i.is_multiple_of(3).then(|| 1 + random.below(60)),
            kv_dtype: if i % 4 < 2 { KvDtype::F32 } else { KvDtype::F16 },
            sinks: (i % 5 < 2).then(|| (0..heads).map(|_| random.float() * 6.0).collect()),
            softcap: (i % 5 == 4).then_some(0.3),
        }
    }

    /// Values of a key or value row.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.dim
    }

    /// Logit scale.
    pub fn scale(&self) -> f32 {
        1.0 / (self.dim as f32).sqrt()
    }

    /// All uncommitted rows at once.
    pub fn mask(&self) -> StepMask<'_> {
        self.step(self.base, &self.parents)
    }

    /// Other rows.
    pub fn step<'a>(&'a self, base: usize, parents: &'a [Option<u32>]) -> StepMask<'a> {
        let sinks = self.sinks.as_deref();
        StepMask { sinks, ..StepMask::step(base, parents, self.window, self.scale()).capped(self.softcap) }
    }

    /// A cache with the committed slots, from the keys and values of all.
    pub fn filled<K: Kernels>(&self, kernels: &K, k: &[f32], v: &[f32]) -> K::Kv {
        let mut kv = kernels.kv_new(self.kv_heads, self.dim, self.kv_dtype);
        let committed = ..self.base * self.kv_width();
        append(kernels, &mut kv, self.kv_heads, self.dim, 0, (&k[committed], &v[committed]));
        kv
    }

    /// One call: the rows `q` of a mask, with their keys and values.
    pub fn attend<K: Kernels>(
        &self,
        kernels: &K,
        kv: &mut K::Kv,
        mask: StepMask<'_>,
        (q, k, v): (&[f32], &[f32], &[f32]),
    ) -> Vec<f32> {
        let mut y = kernels.zeros(q.len());
        let (bq, bk, bv) = (kernels.upload(q), kernels.upload(k), kernels.upload(v));
        kernels.attend(&bq, &bk, &bv, self.heads, &mut [Segment { kv, mask }], &mut y);
        host(kernels, &y, q.len())
    }
}

/// Writes keys and values through an attention step whose result is not looked at.
pub fn append<K: Kernels>(
    kernels: &K,
    kv: &mut K::Kv,
    kv_heads: usize,
    dim: usize,
    base: usize,
    (k, v): (&[f32], &[f32]),
) {
    let rows = k.len() / (kv_heads * dim);
    if rows > 0 {
        let parents: Vec<Option<u32>> = (0..rows).map(|i| i.checked_sub(1).map(|p| p as u32)).collect();
        let mask = StepMask::step(base, &parents, None, 1.0);
        let (k, v, mut y) = (kernels.upload(k), kernels.upload(v), kernels.zeros(k.len()));
        kernels.attend(&k, &k, &v, kv_heads, &mut [Segment { kv, mask }], &mut y);
    }
}

/// Attention is that of the reference, at once and in two calls as a draft tree grows; two sequences in one call are
/// each the sequence alone.
pub fn attention<K: Kernels>(kernels: &K, rounding: f64) {
    let mut random = Random(4);
    for i in 0..60 {
        let case = AttentionCase::numbered(&mut random, i);
        let (rows, width, kv_width) = (case.parents.len(), case.heads * case.dim, case.kv_width());
        let slots = case.base + rows;
        let (k, v) = (random.floats(slots * kv_width), random.floats(slots * kv_width));
        let q = random.floats(rows * width);
        let wanted = reference::attention(&q, case.heads, case.kv_heads, case.dim, &k, &v, &case.mask());
        // Rounding to f16 moves every value by up to 2^-11 of itself.
        let tolerance = rounding.max(if case.kv_dtype == KvDtype::F32 { 2e-5 } else { 5e-3 });
        for first in [0, rows / 2] {
            let mut kv = case.filled(kernels, &k, &v);
            let mut found = Vec::new();
            for (from, to) in [(0, first), (first, rows)].into_iter().filter(|(from, to)| from < to) {
                let mask = StepMask { new_rows: to - from, ..case.step(case.base, &case.parents[..to]) };
                let at = (case.base + from) * kv_width..(case.base + to) * kv_width;
                let operands = (&q[from * width..to * width], &k[at.clone()], &v[at]);
                found.extend(case.attend(kernels, &mut kv, mask, operands));
            }
            for (found, wanted) in found.iter().zip(&wanted) {
                close(*found, *wanted, tolerance);
            }
        }
        let (mut one, mut two) = (case.filled(kernels, &k, &v), case.filled(kernels, &k, &v));
        let tail = case.base * kv_width..;
        let twice = |x: &[f32]| kernels.upload(&[x, x].concat());
        let mut y = kernels.zeros(2 * rows * width);
        let mut segments =
            [Segment { kv: &mut one, mask: case.mask() }, Segment { kv: &mut two, mask: case.mask() }];
        kernels.attend(
            &twice(&q),
            &twice(&k[tail.clone()]),
            &twice(&v[tail]),
            case.heads,
            &mut segments,
            &mut y,
        );
        for (found, wanted) in host(kernels, &y, 2 * rows * width).iter().zip(wanted.iter().cycle()) {
            close(*found, *wanted, tolerance);
        }
    }
}

/// A block's rows see each other and the slots that were written before, and what they leave can be dropped.
pub fn blocks<K: Kernels>(kernels: &K, rounding: f64) {
    let mut random = Random(6);
    for i in 0..20 {
        let mut case = AttentionCase::numbered(&mut random, 2 * i);
        case.window = None;
        let (rows, width, kv_width) = (case.parents.len(), case.heads * case.dim, case.kv_width());
        let slots = case.base + rows;
        let (k, v) = (random.floats(slots * kv_width), random.floats(slots * kv_width));
        let q = random.floats(rows * width);
        let mask = StepMask::block(case.base, &case.parents, case.scale());
        let wanted = reference::attention(&q, case.heads, case.kv_heads, case.dim, &k, &v, &mask);
        let tolerance = rounding.max(if case.kv_dtype == KvDtype::F32 { 2e-5 } else { 5e-3 });
        let mut kv = kernels.kv_new(case.kv_heads, case.dim, case.kv_dtype);
        let split = case.base / 3;
        for (from, to) in [(0, split), (split, case.base)] {
            let at = from * kv_width..to * kv_width;
            kernels.kv_write(
                &mut kv,
                from,
                to - from,
                &kernels.upload(&k[at.clone()]),
                &kernels.upload(&v[at]),
            );
        }
        let behind = case.base * kv_width..;
        let first = case.attend(kernels, &mut kv, mask.clone(), (&q, &k[behind.clone()], &v[behind.clone()]));
        for (found, wanted) in first.iter().zip(&wanted) {
            close(*found, *wanted, tolerance);
        }
        // The next block writes over this one.
        kernels.kv_compact(&mut kv, case.base, &[]);
        let again = case.attend(kernels, &mut kv, mask, (&q, &k[behind.clone()], &v[behind]));
        assert_eq!(first, again);
    }
}

/// Compaction keeps the accepted path and forgets the rest.
pub fn compaction<K: Kernels>(kernels: &K, rounding: f64) {
    for kv_dtype in [KvDtype::F32, KvDtype::F16] {
        let mut random = Random(5);
        let (heads, kv_heads, dim) = (4, 2, 16);
        let (k, v) = (random.floats(30 * 32), random.floats(30 * 32));
        let mut kept = kernels.kv_new(kv_heads, dim, kv_dtype);
        append(kernels, &mut kept, kv_heads, dim, 0, (&k, &v));
        kernels.kv_compact(&mut kept, 20, &[21, 24, 29]);
        let pick = |x: &[f32]| {
            [&x[..20 * 32], &x[21 * 32..22 * 32], &x[24 * 32..25 * 32], &x[29 * 32..30 * 32]].concat()
        };
        let (q, new_k, new_v) = (random.floats(64), random.floats(32), random.floats(32));
        let all = |x: &[f32], new: &[f32]| [pick(x), new.to_vec()].concat();
        let mask = StepMask::step(23, &[None], None, 0.25);
        let wanted =
            reference::attention(&q, heads, kv_heads, dim, &all(&k, &new_k), &all(&v, &new_v), &mask);
        let mut y = kernels.zeros(64);
        let (bq, bk, bv) = (kernels.upload(&q), kernels.upload(&new_k), kernels.upload(&new_v));
        kernels.attend(&bq, &bk, &bv, heads, &mut [Segment { kv: &mut kept, mask }], &mut y);
        let tolerance = rounding.max(if kv_dtype == KvDtype::F32 { 2e-5 } else { 5e-3 });
        for (found, wanted) in host(kernels, &y, 64).iter().zip(&wanted) {
            close(*found, *wanted, tolerance);
        }
    }
}

/// A number beyond the range of f16 does not spoil the cache.
pub fn beyond_f16<K: Kernels>(kernels: &K) {
    let mut kv = kernels.kv_new(1, 16, KvDtype::F16);
    let k = vec![1e6; 16];
    append(kernels, &mut kv, 1, 16, 0, (&k, &k));
    let mut y = kernels.zeros(16);
    let mask = StepMask::step(1, &[None], None, 1e-6);
    let (q, k, v) = (kernels.upload(&[-1.0; 16]), kernels.upload(&[-1e6; 16]), kernels.upload(&[0.0; 16]));
    kernels.attend(&q, &k, &v, 1, &mut [Segment { kv: &mut kv, mask }], &mut y);
    let y = host(kernels, &y, 16);
    assert!(y.iter().all(|v| v.is_finite() && *v > 0.0), "{y:?}");
}
