//! Decoding over the host shim: the checks that every implementation must pass, rows that do not depend on each other, and
//! draws by the rule of the CPU.

use std::path::Path;

use draftsmith_cuda::shim::Shim;
use draftsmith_cuda::{Cuda, CudaOptions, Operands, source};
use draftsmith_kernels::testing::{host, infer, noise};
use draftsmith_kernels::{
    DrawRow, Kernels, KvDtype, Memory, PackMode, Segment, StepMask, WeightDtype, WeightView, catch_failure,
    quant,
};

/// What a bf16 of 8 significant bits loses in operands of products.
const BF16: f64 = 2e-2;
/// The same on the average of many products.
const BF16_MEAN: f64 = 5e-3;

fn folder() -> &'static Path {
    Path::new(env!("CARGO_TARGET_TMPDIR"))
}

fn device(operands: Operands) -> Cuda<Shim> {
    Cuda::new(Shim::new(folder()).unwrap(), CudaOptions { operands, ..CudaOptions::default() })
}

#[test]
fn products_of_every_stored_type_equal_the_reference() {
    infer::matmuls(&device(Operands::F32), 0.0, 1e-2);
}

#[test]
fn products_in_the_tensor_cores_equal_the_reference_within_their_rounding() {
    let k = device(Operands::Bf16);
    infer::matmuls(&k, BF16_MEAN, 1e-2);
    infer::embedding(&k, BF16);
    infer::biases(&k, BF16);
    infer::ties(&k);
}

#[test]
fn rows_of_tables_are_those_of_the_file() {
    infer::embedding(&device(Operands::F32), 0.0);
}

#[test]
fn row_wise_operations_of_decoding_equal_the_formulas() {
    let k = device(Operands::F32);
    infer::biases(&k, 0.0);
    infer::ties(&k);
    infer::rowwise(&k, 0.0);
    infer::gates(&k, 0.0);
    infer::columns(&k);
    infer::again(&k);
}

#[test]
fn experts_equal_the_reference() {
    infer::experts(&device(Operands::F32), 0.0, 1e-2);
}

#[test]
fn attention_over_pages_equals_the_reference() {
    let k = device(Operands::F32);
    infer::attention(&k, 0.0);
}

#[test]
fn blocks_moved_slots_and_large_numbers_are_as_they_should_be() {
    let k = device(Operands::F32);
    infer::blocks(&k, 0.0);
    infer::compaction(&k, 0.0);
    infer::beyond_f16(&k);
}

/// A row's product is the same bits alone, among few and among many.
#[test]
fn a_row_of_a_product_has_the_same_bits_whatever_else_is_in_the_call() {
    let k = device(Operands::Bf16);
    let (inputs, out, rows) = (256, 70, 67);
    let mut random = infer::Random(9);
    for dtype in [WeightDtype::Q4K, WeightDtype::Q6K, WeightDtype::Q4_0, WeightDtype::Bf16] {
        let data = infer::stored(&mut random, dtype, out, inputs);
        let w = WeightView { dtype, out_features: out, in_features: inputs, data: &data };
        let w = k.pack("w", &w, PackMode::Stored).unwrap();
        let x = noise(3, rows * inputs);
        let product = |x: &[f32]| {
            let rows = x.len() / inputs;
            let mut y = [k.scratch(rows * out)];
            k.matmuls(&k.upload(x), rows, &[(&w, None)], &mut y);
            host(&k, &y[0], rows * out)
        };
        let all = product(&x);
        for (row, count) in [(0, 1), (66, 1), (40, 5), (3, 33)] {
            let some = product(&x[row * inputs..(row + count) * inputs]);
            assert!(some == all[row * out..(row + count) * out], "{dtype:?}, {count} rows from {row}");
        }
    }
}

/// A row's attention is the same bits in one prefill, in pieces, alone, beside other sequences, and as a branch of a tree.
#[test]
fn a_row_of_attention_has_the_same_bits_whatever_else_is_in_the_step() {
    let k = device(Operands::Bf16);
    let (heads, kv_heads, dim, len) = (6, 2, 16, 75);
    let (width, kv_width) = (heads * dim, kv_heads * dim);
    let (q, keys, values) = (noise(1, len * width), noise(2, len * kv_width), noise(3, len * kv_width));
    let chain = |n: usize| -> Vec<Option<u32>> { (0..n as u32).map(|i| i.checked_sub(1)).collect() };
    for window in [None, Some(40)] {
        let run = |pieces: &[usize]| {
            let mut kv = k.kv_new(kv_heads, dim, KvDtype::F16);
            let (mut out, mut base) = (Vec::new(), 0);
            for n in pieces {
                let parents = chain(*n);
                let mask = StepMask::step(base, &parents, window, 0.25);
                let at = base * kv_width..(base + n) * kv_width;
                let mut y = k.zeros(n * width);
                k.attend(
                    &k.upload(&q[base * width..(base + n) * width]),
                    &k.upload(&keys[at.clone()]),
                    &k.upload(&values[at]),
                    heads,
                    &mut [Segment { kv: &mut kv, mask }],
                    &mut y,
                );
                out.extend(host(&k, &y, n * width));
                base += n;
            }
            (out, kv)
        };
        let (whole, _) = run(&[len]);
        for pieces in [&[1usize; 75][..], &[31, 2, 42], &[64, 11]] {
            assert!(run(pieces).0 == whole, "{window:?}: {pieces:?}");
        }
        // The last three rows as a branch of a tree, behind one that is not theirs, and beside another sequence.
        let (base, first) = (len - 3, [None, None, Some(1), Some(2)]);
        let (_, mut kv) = run(&[base]);
        let (_, mut other) = run(&[33]);
        let pick =
            |x: &[f32], width: usize| [&x[..width], &x[base * width..], &x[33 * width..34 * width]].concat();
        let alone = [None];
        let mut segments = [
            Segment { kv: &mut kv, mask: StepMask::step(base, &first, window, 0.25) },
            Segment { kv: &mut other, mask: StepMask::step(33, &alone, window, 0.25) },
        ];
        let mut y = k.zeros(5 * width);
        let (bq, bk, bv) = (
            k.upload(&pick(&q, width)),
            k.upload(&pick(&keys, kv_width)),
            k.upload(&pick(&values, kv_width)),
        );
        k.attend(&bq, &bk, &bv, heads, &mut segments, &mut y);
        let found = host(&k, &y, 5 * width);
        assert!(found[width..4 * width] == whole[base * width..], "{window:?}: a branch");
        assert!(found[4 * width..] == whole[33 * width..34 * width], "{window:?}: another sequence");
    }
}

#[test]
fn heads_that_are_too_wide_are_an_error() {
    let k = device(Operands::Bf16);
    let failure = catch_failure(|| drop(k.kv_new(1, 512, KvDtype::F16))).unwrap_err();
    assert_eq!(failure.message, "heads of 512 values, the kernels for NVIDIA GPUs take 256 at most");
    assert_eq!(failure.hint, "set `run.device=cpu`");
}

#[test]
fn pages_go_back_when_sequences_end() {
    let shim = Shim::of(folder(), &source::text(), 3 << 20).unwrap();
    let k = Cuda::new(shim, CudaOptions::default());
    // A slab of 1 MiB holds 128 pages of this shape: 20 sequences of 6 pages each do not fit twice.
    for round in 0..20 {
        let mut all: Vec<_> = (0..20).map(|_| k.kv_new(2, 32, KvDtype::F16)).collect();
        for kv in &mut all {
            let rows = k.zeros(170 * 64);
            k.kv_write(kv, 0, 170, &rows, &rows);
            k.kv_compact(kv, 100, &[]);
        }
        assert_eq!(all.len(), 20, "round {round}");
    }
}

/// The choice on the device for given outputs: the weight is the outputs, the input is one.
fn chosen(k: &Cuda<Shim>, logits: &[f32], draws: &[Option<DrawRow>]) -> Vec<u32> {
    let w = k.pack("w", &WeightView::f32(logits, logits.len(), 1), PackMode::F32).unwrap();
    k.choose(&k.upload(&vec![1.0; draws.len()]), &w, draws)
}

/// Bits of a draw as `draftsmith_core` takes them.
fn mix(mut x: u64) -> u64 {
    x = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

/// The rule, plainly.
fn wanted(logits: &[f32], d: &DrawRow) -> u32 {
    let mut order: Vec<u32> = (0..logits.len() as u32).filter(|i| !logits[*i as usize].is_nan()).collect();
    order.sort_by(|a, b| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b)));
    let most = logits[order[0] as usize];
    if d.least_share > 0.0 {
        order.retain(|i| logits[*i as usize] >= most + d.temperature * d.least_share.ln());
    }
    if d.top_k > 0 {
        order.truncate(d.top_k as usize);
    }
    if d.top_p < 1.0 {
        let weights: Vec<f64> = order
            .iter()
            .map(|i| (f64::from(logits[*i as usize] - most) * f64::from(d.factor)).exp())
            .collect();
        let (total, mut mass) = (weights.iter().sum::<f64>(), 0.0);
        let cut = weights.iter().position(|w| {
            mass += w;
            mass >= total * f64::from(d.top_p)
        });
        order.truncate(cut.map_or(order.len(), |i| i + 1));
    }
    let score = |i: u32| {
        let bits = mix(d.key ^ mix(u64::from(i) << 1 | 1)) >> 11;
        let uniform = (bits as f64 + 0.5) / (1u64 << 53) as f64;
        logits[i as usize] * d.factor + (-(-uniform.ln()).ln()) as f32
    };
    order.sort_unstable();
    order
        .into_iter()
        .fold((0, f32::NEG_INFINITY), |best, i| if score(i) > best.1 { (i, score(i)) } else { best })
        .0
}

#[test]
fn draws_on_the_device_follow_the_rule() {
    let k = device(Operands::F32);
    let mut logits: Vec<f32> = noise(5, 700).iter().map(|x| x * 9.0).collect();
    // Ties and what is no number.
    (logits[3], logits[90], logits[91], logits[400]) = (8.5, f32::NAN, 8.5, f32::NEG_INFINITY);
    let mut draws = Vec::new();
    for (n, temperature) in [0.3f32, 0.8, 1.0, 2.5].into_iter().enumerate() {
        for (least_share, top_k, top_p) in [
            (0.0, 0, 1.0),
            (1e-12, 0, 0.9),
            (1e-12, 5, 1.0),
            (1e-12, 40, 0.7),
            (0.05, 0, 1.0),
            (1e-12, 2, 0.999),
        ] {
            for key in 0..6u64 {
                let key = mix(key + 100 * n as u64);
                draws.push(DrawRow {
                    factor: 1.0 / temperature,
                    temperature,
                    least_share,
                    top_k,
                    top_p,
                    key,
                });
            }
        }
    }
    let rows: Vec<Option<DrawRow>> = draws.iter().copied().map(Some).collect();
    let found = chosen(&k, &logits, &rows);
    let all: Vec<u32> = draws.iter().map(|d| wanted(&logits, d)).collect();
    assert_eq!(found, all);
    assert!(all.iter().collect::<std::collections::BTreeSet<_>>().len() > 10, "draws differ: {all:?}");
    // Greedy rows beside drawn ones take the largest, of equals the lower id.
    assert_eq!(chosen(&k, &logits, &[None, rows[0], None]), [greedy(&logits), all[0], greedy(&logits)]);
    let nothing = [f32::NEG_INFINITY; 3];
    assert_eq!(chosen(&k, &nothing, &[rows[0]]), [0]);
}

fn greedy(logits: &[f32]) -> u32 {
    (0..logits.len()).fold(0, |best, i| if logits[i] > logits[best] { i } else { best }) as u32
}

#[test]
fn eight_bits_made_of_floats_are_near_them() {
    let k = device(Operands::F32);
    let values = noise(7, 64 * 3);
    let w = WeightView::f32(&values, 3, 64);
    let packed = k.pack("w", &w, PackMode::Q8).unwrap();
    let mut y = k.zeros(3 * 64);
    k.embed(&packed, &[0, 1, 2], 1.0, &mut y);
    for (found, wanted) in host(&k, &y, 3 * 64).iter().zip(quant::dequantize(&w)) {
        assert!((found - wanted).abs() <= 1.0 / 127.0, "{found}, not {wanted}");
    }
}

#[test]
fn a_type_that_the_kernels_do_not_read_is_told_with_what_it_takes() {
    let k = device(Operands::Bf16);
    // Zeros are a block of every type.
    let blocks = |dtype: WeightDtype| vec![0u8; 2 * dtype.block().1];
    let pack = |dtype| {
        let data = blocks(dtype);
        let weight = WeightView { data: &data, dtype, out_features: 2, in_features: dtype.block().0 };
        k.pack("w", &weight, PackMode::Stored).unwrap();
    };
    [WeightDtype::Q4_0, WeightDtype::Q6K, WeightDtype::Bf16].into_iter().for_each(pack);
    assert!(k.take_expanded().is_empty());
    [WeightDtype::Iq4Xs, WeightDtype::Q2K, WeightDtype::Q2K, WeightDtype::Mxfp4].into_iter().for_each(pack);
    let found: Vec<(String, usize, u64, u64)> =
        k.take_expanded().into_iter().map(|(name, e)| (name, e.weights, e.file_bytes, e.bytes)).collect();
    let wanted = [("IQ4_XS", 1, 2 * 136, 1024), ("MXFP4", 1, 2 * 17, 128), ("Q2_K", 2, 4 * 84, 2048)];
    assert_eq!(found, wanted.map(|(name, count, file, bytes)| (name.to_owned(), count, file, bytes)));
    assert!(k.take_expanded().is_empty(), "told once");
}
