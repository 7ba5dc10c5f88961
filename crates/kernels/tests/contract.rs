//! The kernel contract: no row's bits depend on the number of rows, the threads, or the instruction set; and the
//! values are those of the double-precision reference within the rounding of their format.

use draftsmith_kernels::experts::{Routes, grouped};
use draftsmith_kernels::testing::infer::{
    AttentionCase, DTYPES, ExpertsCase, Random, append, matmul, stored, stored_as,
};
use draftsmith_kernels::{
    Cpu, Groups, KeptPanels, Kernels, KvDtype, Memory, PackMode, PackedWeight, RopeScaling, RopeTable,
    Segment, StepMask, WeightDtype, WeightView, quant, reference, testing,
};

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
fn quants_and_activations_at_their_limits_are_exact_on_every_path() {
    let inputs = 512;
    let x: Vec<f32> = (0..3 * inputs)
        .map(|i: usize| if i < inputs || i < 2 * inputs && (i / 3).is_multiple_of(2) { 1.0 } else { -1.0 })
        .collect();
    for dtype in DTYPES {
        for byte in [0xff, 0x00, 0x80, 0x7f] {
            let data = stored_as(&mut Random(31), dtype, 33, inputs, Some(byte));
            let w = WeightView { dtype, out_features: 33, in_features: inputs, data: &data };
            let run = |cpu: &Cpu| -> Vec<u32> {
                matmul(cpu, &x, 3, &w, PackMode::Stored).into_iter().map(f32::to_bits).collect()
            };
            let plain = run(&Cpu::all_paths(1)[0]);
            for cpu in Cpu::all_paths(1) {
                assert_eq!(plain, run(&cpu), "{dtype:?} of {byte:#x} on {:?}", cpu.features().path);
            }
            // The activations are exact in 8 bits, so products are sums of values up to rounding.
            let wanted = reference::matmul(&x, 3, &w);
            for (found, want) in plain.iter().zip(wanted) {
                let found = f64::from(f32::from_bits(*found));
                assert!((found - want).abs() <= 1e-4 * want.abs().max(1.0), "{dtype:?}: {found}, not {want}");
            }
        }
    }
}

/// A vocabulary is stored in two planes, and its largest output is found in the first as far as that goes.
#[test]
fn the_largest_output_of_a_vocabulary_is_that_of_the_products() {
    let mut random = Random(41);
    let (inputs, out) = (320, 16384 + 7);
    let plain = stored(&mut random, WeightDtype::Q8_0, out, inputs);
    let row_bytes = inputs / 32 * 34;
    // Scales are never negative in files, as they are the largest value over 127.
    let positive = |data: &mut Vec<u8>| data.chunks_exact_mut(34).for_each(|b| b[1] &= 0x7f);
    let mut some = plain.clone();
    positive(&mut some);
    // Rows that differ in one low bit, and equal ones far apart.
    let mut near = some.clone();
    for o in 0..out {
        let first: Vec<u8> = near[..row_bytes].to_vec();
        if o % 3 != 0 {
            near[o * row_bytes..(o + 1) * row_bytes].copy_from_slice(&first);
            near[o * row_bytes + 2 + o % 32] ^= (o % 2) as u8;
        }
    }
    // One row that wins by far, and its twin.
    let mut clear = some.clone();
    for o in [9000, 16390] {
        for b in clear[o * row_bytes..(o + 1) * row_bytes].chunks_exact_mut(34) {
            b[..2].copy_from_slice(&half::f16::from_f32(0.5).to_le_bytes());
            b[2..].fill(100);
        }
    }
    let zeros = vec![0u8; some.len()];
    for (name, data) in [("plain", plain), ("some", some), ("near", near), ("clear", clear), ("zeros", zeros)]
    {
        let w = WeightView { dtype: WeightDtype::Q8_0, out_features: out, in_features: inputs, data: &data };
        for cpu in Cpu::all_paths(2) {
            let pack = || cpu.pack("w", &w, PackMode::Stored).unwrap();
            let packed = pack();
            assert!(packed.bytes() as f64 <= 1.03 * data.len() as f64 + 64.0 * row_bytes as f64);
            for rows in [1, 2, 3, 4, 5, 9] {
                let mut x = random.floats(rows * inputs);
                x[..inputs].iter_mut().for_each(|v| *v = v.abs());
                if rows == 3 {
                    x[inputs] = f32::INFINITY;
                    x[2 * inputs..].fill(0.0);
                }
                // A fresh one each time: what was found in doubt is not tried again for a while.
                let packed = pack();
                let mut y = [cpu.scratch(rows * out)];
                cpu.matmuls(&x, rows, &[(&packed, None)], &mut y);
                let wanted: Vec<u32> = y[0]
                    .chunks_exact(out)
                    .map(|row| {
                        let mut best = (f32::NEG_INFINITY, 0);
                        for (i, v) in row.iter().enumerate() {
                            if *v > best.0 {
                                best = (*v, i as u32);
                            }
                        }
                        best.1
                    })
                    .collect();
                assert_eq!(
                    cpu.argmax(&x, rows, &packed),
                    wanted,
                    "{name}, {rows} rows, {:?}",
                    cpu.features().path
                );
            }
            let mut values = cpu.zeros(2 * inputs);
            cpu.embed(&packed, &[0, out as u32 - 1], 1.0, &mut values);
            let all = quant::dequantize(&w);
            assert_eq!(values, [&all[..inputs], &all[(out - 1) * inputs..]].concat());
        }
    }
}

/// A weight with the columns of `w` in another order: products, largest outputs and rows are those of the inputs' order.
#[test]
fn columns_in_another_order_take_the_inputs_in_that_order() {
    let mut random = Random(51);
    let (inputs, out, rows) = (256, 40, 5);
    let order: Vec<u32> = (0..inputs as u32).map(|k| (k * 37 + 11) % inputs as u32).collect();
    for dtype in DTYPES {
        let data = stored(&mut random, dtype, out, inputs);
        let w = WeightView { dtype, out_features: out, in_features: inputs, data: &data };
        let x = random.floats(rows * inputs);
        let turned: Vec<f32> =
            x.chunks_exact(inputs).flat_map(|x| order.iter().map(|k| x[*k as usize])).collect();
        for cpu in Cpu::all_paths(2) {
            let plain = cpu.pack("w", &w, PackMode::Stored).unwrap();
            let packed = cpu.pack_ordered("w", &w, &order, PackMode::Stored).unwrap();
            let wanted = matmul(&cpu, &turned, rows, &w, PackMode::Stored);
            let direct = matmul(&cpu, &x, rows, &w, PackMode::Stored);
            let mut ys: Vec<_> = (0..4).map(|_| cpu.scratch(rows * out)).collect();
            cpu.matmuls(
                &x,
                rows,
                &[(&packed, None), (&packed, None), (&plain, None), (&packed, None)],
                &mut ys,
            );
            assert_eq!((&ys[0], &ys[1], &ys[3], &ys[2]), (&wanted, &wanted, &wanted, &direct), "{dtype:?}");
            assert_eq!(cpu.argmax(&x, rows, &packed), cpu.argmax(&turned, rows, &plain));
            let mut values = cpu.zeros(inputs);
            cpu.embed(&packed, &[7], 1.0, &mut values);
            let row = &quant::dequantize(&w)[7 * inputs..8 * inputs];
            for (k, v) in order.iter().zip(row) {
                let found = values[*k as usize];
                assert!(found.to_bits() == v.to_bits(), "{dtype:?}: {found} at {k}, not {v}");
            }
        }
    }
    let data = stored(&mut random, WeightDtype::F32, 3, 4);
    let w = WeightView { dtype: WeightDtype::F32, out_features: 3, in_features: 4, data: &data };
    for order in [&[0, 1, 2][..], &[0, 1, 2, 2], &[0, 1, 2, 4]] {
        let error = Cpu::new(1).pack_ordered("w", &w, order, PackMode::F32).err().unwrap();
        assert!(error.to_string().contains("does not name each of its 4 inputs once"), "{error}");
    }
}

/// All 8-bit floats against their definition, and on every path the products of each with one.
#[test]
fn eight_bit_floats_have_their_values() {
    let mut data = Vec::new();
    let mut wanted = Vec::new();
    for bits in 0..=255u8 {
        let (sign, exponent, mantissa) = (bits >> 7, i32::from(bits >> 3 & 15), f32::from(bits & 7));
        let size = match exponent {
            0 => mantissa * 2f32.powi(-9),
            _ => (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
        };
        let value = if sign == 1 { -size } else { size };
        if bits & 0x7f == 0x7f {
            assert!(quant::f8_value(bits).is_nan());
            continue;
        }
        assert_eq!(quant::f8_value(bits).to_bits(), value.to_bits(), "{bits:#x}");
        data.extend(0.37f32.to_le_bytes());
        data.extend([bits; 16]);
        wanted.push(0.37 * value);
    }
    let dtype = WeightDtype::Fp8(Groups { len: 16, single: true, zeros: false });
    let w = WeightView { dtype, out_features: wanted.len(), in_features: 16, data: &data };
    let mut x = [0.0; 16];
    x[5] = 1.0;
    for cpu in Cpu::all_paths(1) {
        assert_eq!(matmul(&cpu, &x, 1, &w, PackMode::Stored), wanted, "{}", cpu.features().path);
    }
}

/// One pass over a head for rows of both kinds gives what two give.
#[test]
fn the_largest_outputs_and_whole_rows_are_those_of_two_calls() {
    let mut random = Random(43);
    for (dtype, out) in [(WeightDtype::Q8_0, 16384 + 7), (WeightDtype::Q6K, 700), (WeightDtype::F16, 33)] {
        let inputs = 256;
        let data = stored(&mut random, dtype, out, inputs);
        let w = WeightView { dtype, out_features: out, in_features: inputs, data: &data };
        for cpu in Cpu::all_paths(2) {
            let packed = cpu.pack("w", &w, PackMode::Stored).unwrap();
            for (rows, whole) in [
                (1, vec![0u32]),
                (3, vec![1]),
                (9, vec![8, 0, 3]),
                (33, (0..33).collect()),
                (70, vec![69, 64]),
            ] {
                let x = random.floats(rows * inputs);
                let mut y = cpu.scratch(whole.len() * out);
                let best = cpu.argmax_and_outputs(&x, (rows, inputs), &packed, &whole, &mut y);
                assert_eq!(best, cpu.argmax(&x, rows, &packed), "{dtype:?}, {rows} rows");
                let mut all = [cpu.scratch(rows * out)];
                cpu.matmuls(&x, rows, &[(&packed, None)], &mut all);
                for (row, y) in whole.iter().zip(y.chunks_exact(out)) {
                    let at = *row as usize * out;
                    assert_eq!(y, &all[0][at..at + out], "{dtype:?}, row {row} of {rows}");
                }
            }
        }
    }
}

/// Of a packed head: the arg-max is that of decoding, the log-sum-exp that of its outputs, alone and among others, on every path and
/// number of threads the same.
#[test]
fn arg_max_and_log_sum_exp_are_those_of_the_outputs() {
    let mut random = Random(45);
    let (inputs, rows) = (256, 135);
    for (dtype, out) in [
        (WeightDtype::Q8_0, 16384 + 7),
        (WeightDtype::Q6K, 700),
        (WeightDtype::F16, 33),
        (WeightDtype::F32, 1),
    ] {
        let data = stored(&mut random, dtype, out, inputs);
        let w = WeightView { dtype, out_features: out, in_features: inputs, data: &data };
        let mut x = random.floats(rows * inputs);
        // Even outputs, and logits as far apart as those of a model that is sure.
        x[..inputs].fill(0.0);
        x[inputs..2 * inputs].iter_mut().for_each(|v| *v *= 40.0);
        let mut first = None;
        for threads in [1, 2, 3] {
            for cpu in Cpu::all_paths(threads) {
                let packed = cpu.pack("w", &w, PackMode::Stored).unwrap();
                let (best, lse) = cpu.tops(&x, &packed);
                assert_eq!(best, cpu.argmax(&x, rows, &packed), "{dtype:?}");
                let mut y = [cpu.scratch(rows * out)];
                cpu.matmuls(&x, rows, &[(&packed, None)], &mut y);
                for (row, (y, lse)) in y[0].chunks_exact(out).zip(&lse).enumerate() {
                    let max = y.iter().fold(f32::NEG_INFINITY, |m, v| m.max(*v));
                    let sum: f64 = y.iter().map(|v| f64::from(v - max).exp()).sum();
                    let wanted = f64::from(max) + sum.ln();
                    let error = (f64::from(*lse) - wanted).abs();
                    assert!(
                        error <= 1e-6 * wanted.abs().max(1.0),
                        "{dtype:?}, row {row}: {lse}, not {wanted}"
                    );
                }
                for row in [0, 1, 77, 134] {
                    let (alone, its) = cpu.tops(&x[row * inputs..(row + 1) * inputs], &packed);
                    assert_eq!((alone[0], its[0].to_bits()), (best[row], lse[row].to_bits()), "{dtype:?}");
                }
                let bits: Vec<u32> = lse.iter().map(|v| v.to_bits()).collect();
                assert_eq!(first.get_or_insert_with(|| bits.clone()), &bits, "{dtype:?}, {threads} threads");
                assert_eq!(cpu.tops(&[], &packed), (Vec::new(), Vec::new()));
            }
        }
    }
}

#[test]
fn biases_are_added_to_the_finished_products() {
    let mut random = Random(44);
    let (inputs, out, rows) = (256, 150, 13);
    let data = stored(&mut random, WeightDtype::Q5_0, out, inputs);
    let w = WeightView { dtype: WeightDtype::Q5_0, out_features: out, in_features: inputs, data: &data };
    let (x, bias) = (random.floats(rows * inputs), random.floats(out));
    for cpu in Cpu::all_paths(2) {
        let packed = cpu.pack("w", &w, PackMode::Stored).unwrap();
        let run = |bias| {
            let mut y = [cpu.scratch(rows * out)];
            cpu.matmuls(&x, rows, &[(&packed, bias)], &mut y);
            std::mem::take(&mut y[0])
        };
        let mut wanted = run(None);
        wanted.chunks_exact_mut(out).for_each(|row| row.iter_mut().zip(&bias).for_each(|(y, b)| *y += b));
        assert_eq!(run(Some(&bias)), wanted);
    }
}

/// Rows of many sequences are written into their caches by several threads.
#[test]
fn many_sequences_at_once_leave_the_caches_that_each_alone_leaves() {
    let mut random = Random(45);
    let (kv_heads, heads, sequences) = (3, 6, 20);
    for (kv_dtype, dim) in [(KvDtype::F16, 64), (KvDtype::F32, 24), (KvDtype::F16, 80)] {
        let (width, kv_width) = (heads * dim, kv_heads * dim);
        for cpu in [1, 2, 3].into_iter().flat_map(Cpu::all_paths) {
            let mut together: Vec<_> = (0..sequences).map(|_| cpu.kv_new(kv_heads, dim, kv_dtype)).collect();
            let mut alone: Vec<_> = (0..sequences).map(|_| cpu.kv_new(kv_heads, dim, kv_dtype)).collect();
            // Every sequence has a length of its own: a prompt first, then one row each.
            let mut base = vec![0; sequences];
            for step in 0..3 {
                let counts: Vec<usize> = (0..sequences).map(|i| if step == 0 { 1 + i } else { 1 }).collect();
                let rows: usize = counts.iter().sum();
                let (q, k, v) = (
                    random.floats(rows * width),
                    random.floats(rows * kv_width),
                    random.floats(rows * kv_width),
                );
                let parents: Vec<Vec<Option<u32>>> =
                    counts.iter().map(|n| (0..*n as u32).map(|i| i.checked_sub(1)).collect()).collect();
                let mut segments: Vec<_> = together
                    .iter_mut()
                    .zip(&parents)
                    .zip(&base)
                    .map(|((kv, parents), base)| Segment {
                        kv,
                        mask: StepMask::step(*base, parents, None, 0.2),
                    })
                    .collect();
                let mut y = cpu.zeros(rows * width);
                cpu.attend(&q, &k, &v, heads, &mut segments, &mut y);
                let mut from = 0;
                for (i, kv) in alone.iter_mut().enumerate() {
                    let to = from + counts[i];
                    let mut own = cpu.zeros((to - from) * width);
                    let mask = StepMask::step(base[i], &parents[i], None, 0.2);
                    let part = from * kv_width..to * kv_width;
                    cpu.attend(
                        &q[from * width..to * width].to_vec(),
                        &k[part.clone()].to_vec(),
                        &v[part].to_vec(),
                        heads,
                        &mut [Segment { kv, mask }],
                        &mut own,
                    );
                    assert_eq!(own, y[from * width..to * width], "sequence {i} in step {step}");
                    base[i] += counts[i];
                    from = to;
                }
            }
        }
    }
}

#[test]
fn packed_weights_are_as_small_as_in_the_file() {
    for dtype in DTYPES {
        let (inputs, out) = (512, 64);
        let data = stored(&mut Random(8), dtype, out, inputs);
        let w = WeightView { dtype, out_features: out, in_features: inputs, data: &data };
        let packed = Cpu::new(1).pack("w", &w, PackMode::Stored).unwrap();
        let ratio = packed.bytes() as f64 / data.len() as f64;
        if dtype.widened().is_none() {
            assert!(ratio <= 1.03, "{dtype:?}: {ratio}");
        } else {
            assert!(ratio > 1.03, "{dtype:?} is not wider than in the file");
        }
    }
}

/// Recorded numbers of models rest on these bits: a change of a panel must not change them.
#[test]
fn products_keep_the_bits_that_they_had_in_the_first_panels() {
    use PackMode::{Q8, Stored};
    for (dtype, mode, wanted) in [
        (WeightDtype::Q4_0, Stored, 0x4d8f_5ec1_3f02_9702_u64),
        (WeightDtype::Q4_1, Stored, 0x85c8_f145_0bf3_1daf),
        (WeightDtype::Q8_0, Stored, 0xc68c_c241_4488_6ddf),
        (WeightDtype::Q4K, Stored, 0xfb0a_52ed_cb17_b18a),
        (WeightDtype::Q6K, Stored, 0xe55c_69c6_67aa_fcc1),
        (WeightDtype::Bf16, Q8, 0x5af0_1158_3ec9_0762),
        (WeightDtype::Bf16, Stored, 0xddfa_a07a_f648_bf3d),
    ] {
        let (inputs, out, rows) = (768, 40, 5);
        let mut random = Random(77);
        let data = stored(&mut random, dtype, out, inputs);
        let w = WeightView { dtype, out_features: out, in_features: inputs, data: &data };
        let y = matmul(&Cpu::new(1), &random.floats(rows * inputs), rows, &w, mode);
        // FNV-1a over the bits.
        let hash = y
            .iter()
            .flat_map(|v| v.to_bits().to_le_bytes())
            .fold(0xcbf2_9ce4_8422_2325, |h, byte| (h ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
        assert_eq!(hash, wanted, "{dtype:?} {mode:?}: {hash:#018x}");
    }
}

#[test]
fn values_are_those_of_the_reference() {
    for cpu in Cpu::all_paths(2) {
        // Activations rounded to 8 bits in blocks of 32: about 0.3 % of a block's largest value.
        testing::infer::all(&cpu, 0.0, 8e-3);
    }
}

/// Rows of a step decoded together, and each row's path decoded alone as a chain, one token at a time.
fn check_attention(random: &mut Random, case: &AttentionCase) {
    let rows = case.parents.len();
    let (kv_width, width) = (case.kv_width(), case.heads * case.dim);
    let slots = case.base + rows;
    let (k, v) = (random.floats(slots * kv_width), random.floats(slots * kv_width));
    let q = random.floats(rows * width);
    let run = |cpu: &Cpu| {
        let mut kv = case.filled(cpu, &k, &v);
        let tail = case.base * kv_width..;
        case.attend(cpu, &mut kv, case.mask(), (&q, &k[tail.clone()], &v[tail]))
    };
    let plain = run(&Cpu::all_paths(1)[0]);
    for threads in [1, 3] {
        for cpu in Cpu::all_paths(threads) {
            assert_eq!(plain, run(&cpu), "path {}", cpu.features().path);
        }
    }
    // In two calls, as a draft tree grows: the same bits.
    let cpu = Cpu::new(2);
    let first = rows / 2;
    if first > 0 {
        let mut kv = case.filled(&cpu, &k, &v);
        for (from, to) in [(0, first), (first, rows)] {
            let mask = StepMask { new_rows: to - from, ..case.step(case.base, &case.parents[..to]) };
            let at = (case.base + from) * kv_width..(case.base + to) * kv_width;
            let operands = (&q[from * width..to * width], &k[at.clone()], &v[at]);
            let y = case.attend(&cpu, &mut kv, mask, operands);
            assert_eq!(y, plain[from * width..to * width], "rows {from}..{to} of {rows}");
        }
    }
    for row in 0..rows {
        let mut path = vec![row];
        while let Some(p) = case.parents[path[path.len() - 1]] {
            path.push(p as usize);
        }
        path.reverse();
        let mut kv = case.filled(&cpu, &k, &v);
        let mut y = Vec::new();
        for (i, node) in path.iter().enumerate() {
            let slot = case.base + node;
            let at = slot * kv_width..(slot + 1) * kv_width;
            let mask = case.step(case.base + i, &[None]);
            let operands = (&q[node * width..(node + 1) * width], &k[at.clone()], &v[at]);
            y = case.attend(&cpu, &mut kv, mask, operands);
        }
        assert_eq!(y, plain[row * width..(row + 1) * width], "row {row} of {rows}, base {}", case.base);
    }
}

#[test]
fn attention_rows_are_the_same_bits_alone_and_in_any_tree() {
    let mut random = Random(4);
    for i in 0..60 {
        let case = AttentionCase::numbered(&mut random, i);
        check_attention(&mut random, &case);
    }
}

#[test]
fn compaction_leaves_the_bits_of_a_cache_that_never_held_the_rest() {
    for kv_dtype in [KvDtype::F32, KvDtype::F16] {
        check_compaction(kv_dtype);
    }
}

fn check_compaction(kv_dtype: KvDtype) {
    let mut random = Random(5);
    let cpu = Cpu::new(1);
    let (k, v) = (random.floats(30 * 32), random.floats(30 * 32));
    let mut kept = cpu.kv_new(2, 16, kv_dtype);
    append(&cpu, &mut kept, 2, 16, 0, (&k, &v));
    cpu.kv_compact(&mut kept, 20, &[21, 24, 29]);
    let pick = |x: &[f32]| {
        [&x[..20 * 32], &x[21 * 32..22 * 32], &x[24 * 32..25 * 32], &x[29 * 32..30 * 32]].concat()
    };
    let mut fresh = cpu.kv_new(2, 16, kv_dtype);
    append(&cpu, &mut fresh, 2, 16, 0, (&pick(&k), &pick(&v)));
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
fn norms_rope_and_gates_agree_across_paths() {
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
    }
}

/// The plain way: one row after the other, of each row one expert after the other.
fn experts_one_by_one(cpu: &Cpu, case: &ExpertsCase, mode: PackMode) -> Vec<f32> {
    let layer = case.layer(cpu, mode);
    let routes = case.routing.choose(&case.logits);
    let (hidden, width) = (case.hidden, case.width);
    let mut sums = vec![0.0f32; case.x.len()];
    for (place, (expert, weight)) in routes.experts.iter().zip(&routes.weights).enumerate() {
        let row = place / routes.used;
        let expert = &layer.each[*expert as usize];
        let bias = |i: usize| expert.bias.as_ref().map(|b| &b[i]);
        let x = case.x[row * hidden..(row + 1) * hidden].to_vec();
        let mut inner = [cpu.scratch(width), cpu.scratch(width)];
        cpu.matmuls(&x, 1, &[(&expert.gate, bias(0)), (&expert.up, bias(1))], &mut inner);
        let [mut gate, up] = inner;
        cpu.gated(case.activation, &mut gate, &up);
        let mut output = [cpu.scratch(hidden)];
        cpu.matmuls(&gate, 1, &[(&expert.down, bias(2))], &mut output);
        for (s, v) in sums[row * hidden..(row + 1) * hidden].iter_mut().zip(&output[0]) {
            *s = weight.mul_add(*v, *s);
        }
    }
    sums
}

#[test]
fn experts_give_the_same_bits_one_by_one_grouped_and_at_once() {
    let mut random = Random(51);
    for i in 0..40 {
        let case = ExpertsCase::numbered(&mut random, i);
        for mode in [PackMode::Stored, PackMode::F32] {
            let plain = experts_one_by_one(&Cpu::all_paths(1)[0], &case, mode);
            let routes = case.routing.choose(&case.logits);
            for cpu in [1, 2, 5].into_iter().flat_map(Cpu::all_paths) {
                let layer = case.layer(&cpu, mode);
                let (mut fused, mut parts) = (cpu.scratch(case.x.len()), cpu.scratch(case.x.len()));
                cpu.experts(&case.x, &routes, &layer, &mut fused);
                let path = cpu.features().path;
                assert!(fused == plain, "case {i}, {mode:?} on {path}, {} threads", cpu.threads());
                grouped(&cpu, &case.x, &routes, &layer, &mut parts);
                assert!(parts == plain, "case {i}, {mode:?}, grouped on {path}");
                // Each row alone.
                for (row, x) in case.x.chunks_exact(case.hidden).enumerate().step_by(7) {
                    let at = row * routes.used..(row + 1) * routes.used;
                    let own = Routes {
                        used: routes.used,
                        experts: routes.experts[at.clone()].to_vec(),
                        weights: routes.weights[at].to_vec(),
                    };
                    let mut y = cpu.scratch(case.hidden);
                    cpu.experts(&x.to_vec(), &own, &layer, &mut y);
                    assert!(
                        y == plain[row * case.hidden..][..case.hidden],
                        "case {i}, row {row} alone on {path}"
                    );
                }
            }
        }
    }
}

#[test]
fn kept_panels_of_every_form_are_the_packed_weight_and_changed_ones_are_refused() {
    /// Bytes that begin at a multiple of 64, as those of a mapped file do.
    struct Aligned(Vec<u8>, usize);
    impl AsRef<[u8]> for Aligned {
        fn as_ref(&self) -> &[u8] {
            &self.0[self.1..]
        }
    }
    let aligned = |bytes: &[u8]| {
        let mut all = vec![0; bytes.len() + 64];
        let from = all.as_ptr().align_offset(64);
        all[from..from + bytes.len()].copy_from_slice(bytes);
        std::sync::Arc::new(Aligned(all, from))
    };
    let mut random = Random(61);
    let cpu = Cpu::new(2);
    // All rows of a matrix of 8-bit floats with one scale, beside rows with their own.
    let fp8 = Groups { len: 128, single: true, zeros: false };
    let one = [0.02f32.to_le_bytes().to_vec(), vec![0x31; 128]].concat().repeat(2 * 37);
    let mut cases: Vec<_> = DTYPES
        .iter()
        .flat_map(|dtype| [PackMode::Stored, PackMode::Q8].map(|mode| (*dtype, mode)))
        .map(|(dtype, mode)| (dtype, mode, stored(&mut random, dtype, 37, 256), 37))
        .collect();
    cases.push((WeightDtype::Fp8(fp8), PackMode::Stored, one, 37));
    let head = stored(&mut random, WeightDtype::Q8_0, 16384, 256);
    cases.push((WeightDtype::Q8_0, PackMode::Stored, head, 16384));
    for (dtype, mode, data, out) in &cases {
        let w = WeightView { dtype: *dtype, out_features: *out, in_features: 256, data };
        let packed = cpu.pack("w", &w, *mode).unwrap();
        let (form, largest_scale) = (packed.form(), packed.largest_scale());
        let kept = |bytes: &[u8], form| {
            let len = bytes.len();
            let kept = KeptPanels { form, largest_scale, bytes: aligned(bytes), range: 0..len };
            PackedWeight::from_kept("w", &w, *mode, &kept).unwrap()
        };
        let panels = packed.panel_bytes_all();
        let again = kept(panels, form).unwrap_or_else(|| panic!("{dtype:?} {mode:?} is refused"));
        let x = random.floats(3 * 256);
        let run = |weight: &PackedWeight| {
            let mut y = [cpu.scratch(3 * out)];
            cpu.matmuls(&x, 3, &[(weight, None)], &mut y);
            y[0].iter().map(|v| v.to_bits()).collect::<Vec<_>>()
        };
        assert_eq!(run(&again), run(&packed), "{dtype:?} {mode:?}");
        let mut other = panels.to_vec();
        other[5] ^= 4;
        assert!(kept(&other, form).is_none(), "{dtype:?} {mode:?}");
        assert!(kept(&panels[..panels.len() - 1], form).is_none(), "{dtype:?} {mode:?}");
        assert!(kept(panels, "another form").is_none(), "{dtype:?} {mode:?}");
    }
}
