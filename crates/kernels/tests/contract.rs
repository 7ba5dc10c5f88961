//! The kernel contract: no row's bits depend on the number of rows, the threads, or the instruction set; and the
//! values are those of the double-precision reference within the rounding of their format.

use draftsmith_kernels::{
    Cpu, Kernels, KvDtype, PackMode, RopeScaling, RopeTable, Segment, StepMask, WeightDtype, WeightView,
    reference,
};

/// A small deterministic generator; the tests need variety, not quality.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        self.0 >> 33
    }
    fn below(&mut self, n: usize) -> usize {
        self.next() as usize % n
    }
    fn float(&mut self) -> f32 {
        (self.next() as f32 / (1u64 << 31) as f32 - 0.5) * 2.0
    }
    fn floats(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.float()).collect()
    }
}

const DTYPES: [WeightDtype; 8] = [
    WeightDtype::F32,
    WeightDtype::F16,
    WeightDtype::Bf16,
    WeightDtype::Q4_0,
    WeightDtype::Q4_1,
    WeightDtype::Q8_0,
    WeightDtype::Q4K,
    WeightDtype::Q6K,
];

/// Random stored bytes of a weight whose scales are small normal numbers.
fn stored(random: &mut Random, dtype: WeightDtype, out: usize, inputs: usize) -> Vec<u8> {
    let (block, bytes) = dtype.block();
    let half = |random: &mut Random| half::f16::from_f32(random.float() * 0.1).to_le_bytes();
    let mut data = Vec::new();
    for _ in 0..out * inputs / block {
        let mut b: Vec<u8> = (0..bytes).map(|_| random.next() as u8).collect();
        match dtype {
            WeightDtype::F32 => b = random.float().to_le_bytes().to_vec(),
            WeightDtype::F16 => b = half::f16::from_f32(random.float()).to_le_bytes().to_vec(),
            WeightDtype::Bf16 => b = half::bf16::from_f32(random.float()).to_le_bytes().to_vec(),
            WeightDtype::Q4_0 | WeightDtype::Q8_0 => b[..2].copy_from_slice(&half(random)),
            WeightDtype::Q4_1 | WeightDtype::Q4K => {
                b[..2].copy_from_slice(&half(random));
                b[2..4].copy_from_slice(&half(random));
            }
            WeightDtype::Q6K => b[208..].copy_from_slice(&half(random)),
        }
        data.extend(b);
    }
    data
}

fn matmul(cpu: &Cpu, x: &[f32], rows: usize, w: &WeightView<'_>, mode: PackMode) -> Vec<f32> {
    let packed = cpu.pack("w", w, mode).unwrap();
    let mut y = [cpu.scratch(rows * w.out_features)];
    cpu.matmuls(&cpu.upload(x), rows, &[(&packed, None)], &mut y);
    let [y] = y;
    // The arg-max of every row without its outputs is that of its outputs.
    let best: Vec<u32> = y
        .chunks_exact(w.out_features)
        .map(|row| (0..row.len()).fold(0, |best, i| if row[i] > row[best] { i } else { best }) as u32)
        .collect();
    assert_eq!(cpu.argmax(&cpu.upload(x), rows, &packed), best);
    y
}

#[test]
fn several_products_of_one_input_are_each_the_product_alone() {
    let mut random = Random(21);
    for rows in [1, 3, 9, 40] {
        let inputs = 288;
        let x = random.floats(rows * inputs);
        let shapes = [(WeightDtype::Q4_1, 40), (WeightDtype::F32, 7), (WeightDtype::Q8_0, 100)];
        let data: Vec<Vec<u8>> =
            shapes.iter().map(|(d, out)| stored(&mut random, *d, *out, inputs)).collect();
        let views: Vec<WeightView<'_>> = shapes
            .iter()
            .zip(&data)
            .map(|((dtype, out), data)| WeightView {
                dtype: *dtype,
                out_features: *out,
                in_features: inputs,
                data,
            })
            .collect();
        for cpu in [1, 2, 5].into_iter().flat_map(Cpu::all_paths) {
            let packed: Vec<_> = views.iter().map(|w| cpu.pack("w", w, PackMode::Stored).unwrap()).collect();
            let weights: Vec<_> = packed.iter().map(|p| (p, None)).collect();
            let mut ys: Vec<_> = views.iter().map(|w| cpu.scratch(rows * w.out_features)).collect();
            cpu.matmuls(&cpu.upload(&x), rows, &weights, &mut ys);
            for (view, y) in views.iter().zip(ys) {
                assert_eq!(y, matmul(&cpu, &x, rows, view, PackMode::Stored), "{:?} {rows} rows", view.dtype);
            }
        }
    }
}

#[test]
fn matmul_rows_are_the_same_bits_alone_in_a_batch_on_any_path_and_thread_count() {
    let mut random = Random(1);
    for dtype in DTYPES {
        for mode in [PackMode::Stored, PackMode::F32, PackMode::Q8] {
            for _ in 0..4 {
                let inputs = 256 * (1 + random.below(3));
                let out = 1 + random.below(150);
                let rows = 1 + random.below(if mode == PackMode::F32 { 10 } else { 70 });
                let data = stored(&mut random, dtype, out, inputs);
                let w = WeightView { dtype, out_features: out, in_features: inputs, data: &data };
                let x = random.floats(rows * inputs);
                let plain = matmul(&Cpu::all_paths(1)[0], &x, rows, &w, mode);
                for threads in [1, 2, 5] {
                    for cpu in Cpu::all_paths(threads) {
                        assert_eq!(
                            plain,
                            matmul(&cpu, &x, rows, &w, mode),
                            "{dtype:?} {mode:?} {rows} x {inputs} -> {out} on {:?}, {threads} threads",
                            cpu.features().path
                        );
                    }
                }
                let cpu = Cpu::new(2);
                for row in [0, rows / 2, rows - 1] {
                    let alone = matmul(&cpu, &x[row * inputs..(row + 1) * inputs], 1, &w, mode);
                    assert_eq!(
                        alone,
                        plain[row * out..(row + 1) * out],
                        "{dtype:?} {mode:?} row {row} of {rows}"
                    );
                }
            }
        }
    }
}

#[test]
fn matmul_is_close_to_the_reference() {
    let mut random = Random(2);
    for dtype in DTYPES {
        let (inputs, out, rows) = (512, 40, 5);
        let data = stored(&mut random, dtype, out, inputs);
        let w = WeightView { dtype, out_features: out, in_features: inputs, data: &data };
        let x = random.floats(rows * inputs);
        let wanted = reference::matmul(&x, rows, &w);
        let rms = (wanted.iter().map(|v| v * v).sum::<f64>() / wanted.len() as f64).sqrt();
        let check = |mode: PackMode, tolerance: f64| {
            let found = matmul(&Cpu::new(2), &x, rows, &w, mode);
            let error = (found.iter().zip(&wanted).map(|(f, w)| (f64::from(*f) - w).powi(2)).sum::<f64>()
                / wanted.len() as f64)
                .sqrt();
            assert!(error < tolerance * rms, "{dtype:?} {mode:?}: error {error:e} of {rms:e}");
        };
        check(PackMode::F32, 1e-6);
        // Activations rounded to 8 bits in blocks of 32: about 0.3 % of a block's largest value.
        check(PackMode::Stored, if dtype.block().0 == 1 { 1e-6 } else { 8e-3 });
        check(PackMode::Q8, 8e-3);
    }
}

#[test]
fn embedding_rows_are_the_dequantised_rows() {
    let mut random = Random(3);
    for dtype in DTYPES {
        let data = stored(&mut random, dtype, 37, 256);
        let w = WeightView { dtype, out_features: 37, in_features: 256, data: &data };
        let cpu = Cpu::new(1);
        let table = cpu.pack("w", &w, PackMode::Stored).unwrap();
        let mut y = cpu.zeros(3 * 256);
        cpu.embed(&table, &[0, 36, 17], 1.0, &mut y);
        let all = draftsmith_kernels::quant::dequantize(&w);
        for (row, id) in [0usize, 36, 17].iter().enumerate() {
            assert_eq!(y[row * 256..(row + 1) * 256], all[id * 256..(id + 1) * 256], "{dtype:?} row {id}");
        }
    }
}

struct Case {
    heads: usize,
    kv_heads: usize,
    dim: usize,
    base: usize,
    parents: Vec<Option<u32>>,
    window: Option<usize>,
    kv_dtype: KvDtype,
}

/// A cache with the committed slots of the case.
fn filled(cpu: &Cpu, case: &Case, k: &[f32], v: &[f32]) -> <Cpu as Kernels>::Kv {
    let mut kv = cpu.kv_new(case.kv_heads, case.dim, case.kv_dtype);
    append(cpu, &mut kv, case.kv_heads * case.dim, 0, &k[..case.base * case.kv_heads * case.dim], v);
    kv
}

/// Writes keys and values through an attention step whose result is not looked at.
fn append(cpu: &Cpu, kv: &mut <Cpu as Kernels>::Kv, width: usize, base: usize, k: &[f32], v: &[f32]) {
    let rows = k.len() / width;
    if rows == 0 {
        return;
    }
    let parents: Vec<Option<u32>> = (0..rows).map(|i| i.checked_sub(1).map(|p| p as u32)).collect();
    let mask = StepMask::step(base, &parents, None, 1.0);
    let (k, v) = (k.to_vec(), v[..k.len()].to_vec());
    let mut y = cpu.zeros(k.len());
    cpu.attend(&k, &k, &v, kv.kv_heads(), &mut [Segment { kv, mask }], &mut y);
}

/// Rows of a step decoded together, and each row's path decoded alone as a chain, one token at a time.
fn check_attention(random: &mut Random, case: &Case) {
    let rows = case.parents.len();
    let (kv_width, width) = (case.kv_heads * case.dim, case.heads * case.dim);
    let slots = case.base + rows;
    let (k, v) = (random.floats(slots * kv_width), random.floats(slots * kv_width));
    let q = random.floats(rows * width);
    let scale = 1.0 / (case.dim as f32).sqrt();
    let run = |cpu: &Cpu| {
        let mut kv = filled(cpu, case, &k, &v);
        let mut y = cpu.zeros(rows * width);
        let mask = StepMask::step(case.base, &case.parents, case.window, scale);
        let tail = case.base * kv_width..;
        let (k, v) = (k[tail.clone()].to_vec(), v[tail].to_vec());
        cpu.attend(&q, &k, &v, case.heads, &mut [Segment { kv: &mut kv, mask }], &mut y);
        y
    };
    let plain = run(&Cpu::all_paths(1)[0]);
    for threads in [1, 3] {
        for cpu in Cpu::all_paths(threads) {
            assert_eq!(plain, run(&cpu), "path {}", cpu.features().path);
        }
    }
    let mask = StepMask::step(case.base, &case.parents, case.window, scale);
    let wanted = reference::attention(&q, case.heads, case.kv_heads, case.dim, &k, &v, &mask);
    for (found, wanted) in plain.iter().zip(&wanted) {
        // Rounding to f16 moves every value by up to 2^-11 of itself.
        let tolerance = if case.kv_dtype == KvDtype::F32 { 2e-5 } else { 5e-3 };
        assert!((f64::from(*found) - wanted).abs() < tolerance, "{found} against {wanted}");
    }
    // In two calls, as a draft tree grows: the same bits.
    let cpu = Cpu::new(2);
    let first = rows / 2;
    if first > 0 {
        let mut kv = filled(&cpu, case, &k, &v);
        for (from, to) in [(0, first), (first, rows)] {
            let mask = StepMask {
                new_rows: to - from,
                ..StepMask::step(case.base, &case.parents[..to], case.window, scale)
            };
            let at = (case.base + from) * kv_width..(case.base + to) * kv_width;
            let (k, v) = (k[at.clone()].to_vec(), v[at].to_vec());
            let q = q[from * width..to * width].to_vec();
            let mut y = cpu.zeros((to - from) * width);
            cpu.attend(&q, &k, &v, case.heads, &mut [Segment { kv: &mut kv, mask }], &mut y);
            assert_eq!(y, plain[from * width..to * width], "rows {from}..{to} of {rows}");
        }
    }
    for row in 0..rows {
        let mut path = vec![row];
        while let Some(p) = case.parents[path[path.len() - 1]] {
            path.push(p as usize);
        }
        path.reverse();
        let mut kv = filled(&cpu, case, &k, &v);
        let mut y = cpu.zeros(width);
        for (i, node) in path.iter().enumerate() {
            let slot = case.base + node;
            let at = slot * kv_width..(slot + 1) * kv_width;
            let mask = StepMask::step(case.base + i, &[None], case.window, scale);
            let segment = Segment { kv: &mut kv, mask };
            let q = q[node * width..(node + 1) * width].to_vec();
            cpu.attend(&q, &k[at.clone()].to_vec(), &v[at].to_vec(), case.heads, &mut [segment], &mut y);
        }
        assert_eq!(y, plain[row * width..(row + 1) * width], "row {row} of {rows}, base {}", case.base);
    }
}

#[test]
fn attention_rows_are_the_same_bits_alone_and_in_any_tree() {
    let mut random = Random(4);
    for i in 0..60 {
        let kv_heads = 1 + random.below(3);
        let rows = 1 + random.below(12);
        let parents = (0..rows)
            .map(|r| {
                if i % 2 == 0 { r.checked_sub(1) } else { random.below(r + 1).checked_sub(1) }
                    .map(|p| p as u32)
            })
            .collect();
        let case = Case {
            heads: kv_heads * (1 + random.below(3)),
            kv_heads,
            dim: [8, 16, 64, 40][random.below(4)],
            base: random.below(150),
            parents,
            window: (i % 3 == 0).then(|| 1 + random.below(60)),
            kv_dtype: if i % 4 < 2 { KvDtype::F32 } else { KvDtype::F16 },
        };
        check_attention(&mut random, &case);
    }
}

#[test]
fn compaction_keeps_the_accepted_path_and_rollback_forgets_the_rest() {
    for kv_dtype in [KvDtype::F32, KvDtype::F16] {
        check_compaction(kv_dtype);
    }
}

fn check_compaction(kv_dtype: KvDtype) {
    let mut random = Random(5);
    let cpu = Cpu::new(1);
    let (k, v) = (random.floats(30 * 32), random.floats(30 * 32));
    let mut kept = cpu.kv_new(2, 16, kv_dtype);
    append(&cpu, &mut kept, 32, 0, &k, &v);
    cpu.kv_compact(&mut kept, 20, &[21, 24, 29]);
    let pick = |x: &[f32]| {
        [&x[..20 * 32], &x[21 * 32..22 * 32], &x[24 * 32..25 * 32], &x[29 * 32..30 * 32]].concat()
    };
    let mut fresh = cpu.kv_new(2, 16, kv_dtype);
    append(&cpu, &mut fresh, 32, 0, &pick(&k), &pick(&v));
    assert_eq!(kept.len(), 23);
    let (q, k, v) = (random.floats(64), random.floats(32), random.floats(32));
    let mut outputs = Vec::new();
    for kv in [&mut kept, &mut fresh] {
        let mut y = cpu.zeros(64);
        let mask = StepMask::step(23, &[None], None, 0.25);
        cpu.attend(&q, &k, &v, 4, &mut [Segment { kv, mask }], &mut y);
        outputs.push(y);
    }
    assert_eq!(outputs[0], outputs[1]);
}

#[test]
fn a_number_beyond_the_range_of_f16_does_not_spoil_the_cache() {
    let cpu = Cpu::new(1);
    let mut kv = cpu.kv_new(1, 16, KvDtype::F16);
    let k = vec![1e6; 16];
    append(&cpu, &mut kv, 16, 0, &k, &k);
    let mut y = cpu.zeros(16);
    let mask = StepMask::step(1, &[None], None, 1e-6);
    cpu.attend(
        &vec![-1.0; 16],
        &vec![-1e6; 16],
        &vec![0.0; 16],
        1,
        &mut [Segment { kv: &mut kv, mask }],
        &mut y,
    );
    assert!(y.iter().all(|v| v.is_finite() && *v > 0.0), "{y:?}");
}

#[test]
fn norms_rope_and_gates_agree_across_paths_and_with_the_reference() {
    let mut random = Random(6);
    for width in [16, 24, 64, 576] {
        let (x, weight) = (random.floats(7 * width), random.floats(width));
        let table = RopeTable::new(width, 10_000.0, &RopeScaling::None);
        let run = |cpu: &Cpu| {
            let mut y = cpu.zeros(x.len());
            cpu.rms_norm(&x, &weight, width, 1e-5, &mut y);
            let mut r = x.clone();
            cpu.rope(&mut r, 1, &table, &[0, 1, 5, 100, 1000, 4000, 8000]);
            let mut gate = x.clone();
            cpu.gated(draftsmith_kernels::Activation::Silu, &mut gate, &y);
            (y, r, gate)
        };
        let plain = run(&Cpu::all_paths(1)[0]);
        for cpu in Cpu::all_paths(2) {
            assert_eq!(plain, run(&cpu));
        }
        let wanted = reference::rms_norm(&x, &weight, 1e-5);
        assert!(plain.0.iter().zip(&wanted).all(|(f, w)| (f64::from(*f) - w).abs() < 1e-5));
        let wanted = reference::rope(&x[5 * width..6 * width], &table, 4000);
        assert!(plain.1[5 * width..].iter().zip(&wanted).all(|(f, w)| (f64::from(*f) - w).abs() < 1e-5));
        for ((g, x), u) in plain.2.iter().zip(&x).zip(&plain.0) {
            let (x, u) = (f64::from(*x), f64::from(*u));
            assert!((f64::from(*g) - x / (1.0 + (-x).exp()) * u).abs() < 1e-5);
        }
    }
}
