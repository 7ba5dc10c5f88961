//! Weights in 8 bits: blocks of 32 along the input features, each with one power of two
//! [OCP Microscaling Formats (MX) v1.0, MXINT8].
//!
//! A weight `NAME` `[out, in]` lies as two tensors: its codes `NAME`, I8 `[out, in]`, and `NAME_scale`, F8_E8M0
//! `[out, in / 32]`. A value is `code · 2⁻⁶ · 2^(exponent - 127)`. BF16 holds every such value exactly, so that whoever
//! reads the wider form reads the same numbers; 8.25 bits stand for 16.

use std::collections::BTreeSet;
use std::path::Path;

use crate::safetensors_dir::{Dtype, SafetensorsDir, SafetensorsError, Tensor, TensorData, to_bytes};

/// Weights that share a power of two.
pub const BLOCK: usize = 32;
/// What the powers of a weight are called behind its own name.
pub const SCALE: &str = "_scale";

/// Exponent that says that a block is no number.
const NOT_A_NUMBER: u8 = 255;
/// Power of two of a code's last bit where the stored exponent is zero: 127 of the exponent, 6 bits of the code.
const LOWEST: i32 = -133;
/// The largest code that is written; -128 is read as well.
const CODE_MAX: f64 = 127.0;

/// Whether a tensor of this shape can lie in 8 bits: a matrix whose rows are whole blocks.
pub fn fits(shape: &[usize]) -> bool {
    matches!(shape, [_, width] if *width > 0 && width.is_multiple_of(BLOCK))
}

/// `2^(LOWEST + exponent)`, exact in f32: the smallest is a subnormal.
fn unit(exponent: u8) -> f32 {
    match exponent {
        NOT_A_NUMBER => f32::NAN,
        _ => 2f64.powi(LOWEST + i32::from(exponent)) as f32,
    }
}

/// The exponent of a block's largest magnitude.
fn exponent(block: &[f32]) -> u8 {
    let largest =
        block.iter().fold(0f32, |max, x| if x.is_finite() { max.max(x.abs()) } else { f32::INFINITY });
    match largest.is_finite() {
        true => (largest.to_bits() >> 23) as u8, // zero for what f32 has as a subnormal, and its floor of log2 else
        false => NOT_A_NUMBER,
    }
}

/// Codes and powers of a weight `[out, in]`, each value rounded to the nearest (ties to even); a block with a value that
/// is not finite becomes no numbers.
///
/// # Panics
/// If the shape does not [fit](fits), or is not that of the values.
pub fn narrow(name: &str, shape: &[usize], values: &[f32]) -> [TensorData; 2] {
    assert!(fits(shape), "`{name}` has shape {shape:?}: rows of whole blocks are wanted");
    assert_eq!(values.len(), shape.iter().product::<usize>(), "`{name}`: shape and values disagree");
    let mut codes = Vec::with_capacity(values.len());
    let mut exponents = Vec::with_capacity(values.len() / BLOCK);
    for block in values.chunks_exact(BLOCK) {
        let exponent = exponent(block);
        let unit = f64::from(unit(exponent));
        exponents.push(exponent);
        // No number becomes code 0; its exponent says what it was.
        codes.extend(
            block
                .iter()
                .map(|x| (f64::from(*x) / unit).round_ties_even().clamp(-CODE_MAX, CODE_MAX) as i8 as u8),
        );
    }
    let data = |name: String, dtype, shape: &[usize], bytes| TensorData {
        name,
        dtype,
        shape: shape.to_vec(),
        bytes,
    };
    [
        data(name.to_owned(), Dtype::I8, shape, codes),
        data(format!("{name}{SCALE}"), Dtype::F8_E8M0, &[shape[0], shape[1] / BLOCK], exponents),
    ]
}

/// The values of codes and powers; equal lengths in blocks were checked.
fn values<'a>(codes: &'a [u8], exponents: &'a [u8]) -> impl Iterator<Item = f32> + 'a {
    codes.chunks_exact(BLOCK).zip(exponents).flat_map(|(block, exponent)| {
        let unit = unit(*exponent);
        block.iter().map(move |code| f32::from(*code as i8) * unit)
    })
}

fn is_codes(tensor: &Tensor<'_>) -> bool {
    tensor.dtype == Dtype::I8
}

/// Whether some tensor lies in 8 bits.
pub fn is_narrow(weights: &SafetensorsDir) -> bool {
    weights.names().filter_map(|name| weights.find(name)).any(|tensor| is_codes(&tensor))
}

/// Opens weights as [`SafetensorsDir::open`] does, [widened].
///
/// # Errors
/// As [`SafetensorsDir::open`] and [`widened`].
pub fn open(path: impl AsRef<Path>) -> Result<SafetensorsDir, SafetensorsError> {
    widened(SafetensorsDir::open(path)?)
}

/// The same weights with every one that lies in 8 bits in BF16; others, and all of weights without such, as they are.
///
/// # Errors
/// Codes without their powers, or with powers of another shape or type, named.
pub fn widened(weights: SafetensorsDir) -> Result<SafetensorsDir, SafetensorsError> {
    if !is_narrow(&weights) {
        return Ok(weights);
    }
    let all = || weights.names().filter_map(|name| weights.find(name));
    let scale_of = |codes: &Tensor<'_>| format!("{}{SCALE}", codes.name);
    let scales: BTreeSet<String> = all().filter(is_codes).map(|codes| scale_of(&codes)).collect();
    let tensors: Result<Vec<TensorData>, SafetensorsError> = all()
        .filter(|tensor| !scales.contains(tensor.name))
        .map(|tensor| match is_codes(&tensor) {
            true => wide(&tensor, &weights.get(&scale_of(&tensor))?),
            false => Ok(TensorData {
                name: tensor.name.to_owned(),
                dtype: tensor.dtype,
                shape: tensor.shape.to_vec(),
                bytes: tensor.bytes.to_vec(),
            }),
        })
        .collect();
    let tensors = tensors?;
    SafetensorsDir::from_bytes(weights.path(), to_bytes(&tensors, &Default::default()))
}

fn wide(codes: &Tensor<'_>, scale: &Tensor<'_>) -> Result<TensorData, SafetensorsError> {
    if !fits(codes.shape) {
        let wanted = vec![codes.shape.first().copied().unwrap_or(1), BLOCK];
        codes.expect_shape(&wanted)?;
    }
    scale.expect_shape(&[codes.shape[0], codes.shape[1] / BLOCK])?;
    if scale.dtype != Dtype::F8_E8M0 {
        return Err(scale.wrong_type("F8_E8M0"));
    }
    let values: Vec<f32> = values(codes.bytes, scale.bytes).collect();
    Ok(TensorData::bf16(codes.name, codes.shape, &values))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn opened(tensors: &[TensorData]) -> SafetensorsDir {
        SafetensorsDir::from_bytes(Path::new("draft"), to_bytes(tensors, &Default::default())).unwrap()
    }

    /// What is left of values that were stored and read.
    fn rounded(shape: &[usize], values: &[f32]) -> Vec<f32> {
        widened(opened(&narrow("w", shape, values))).unwrap().get("w").unwrap().to_f32().unwrap()
    }

    #[test]
    fn codes_and_powers_are_those_of_the_format() {
        let mut row = [0f32; BLOCK];
        // Largest magnitude 1.5: exponent 0, a unit of 2⁻⁶.
        row[..6].copy_from_slice(&[1.5, -1.0, 0.015_625, 0.0078, 0.0079, -0.023_437_5]);
        let [codes, scale] = narrow("fc.weight", &[1, BLOCK], &row);
        assert_eq!(
            (codes.name.as_str(), codes.dtype, &codes.shape[..]),
            ("fc.weight", Dtype::I8, &[1, 32][..])
        );
        assert_eq!((scale.name.as_str(), scale.dtype), ("fc.weight_scale", Dtype::F8_E8M0));
        assert_eq!((&scale.shape[..], &scale.bytes[..]), (&[1, 1][..], &[127][..]));
        let found: Vec<i8> = codes.bytes[..7].iter().map(|b| *b as i8).collect();
        assert_eq!(found, [96, -64, 1, 0, 1, -2, 0], "the last is a tie, to even");
        // All bits of the largest are kept but those below the seventh; what would round up to 2 stays below it.
        row[0] = 1.999;
        assert_eq!(narrow("w", &[1, BLOCK], &row)[0].bytes[0], 127);
    }

    #[test]
    fn the_ends_of_the_range_are_exact() {
        for (value, exponent, code) in [
            (f32::MAX, 254, 127),
            (f32::MIN_POSITIVE, 1, 64),
            (f32::MIN_POSITIVE / 2.0, 0, 64),
            (2f32.powi(-133), 0, 1),
            (f32::from_bits(1), 0, 0),
        ] {
            let mut row = [0f32; BLOCK];
            row[3] = value;
            let [codes, scale] = narrow("w", &[1, BLOCK], &row);
            assert_eq!((scale.bytes[0], codes.bytes[3]), (exponent, code), "{value:e}");
            let back = widened(opened(&[codes, scale])).unwrap();
            let back = back.get("w").unwrap().to_f32().unwrap()[3];
            assert!(
                back.is_finite() && (f64::from(back) - f64::from(value)).abs() <= f64::from(value) / 64.0
                    || code == 0
            );
        }
        assert_eq!(rounded(&[1, BLOCK], &[0.0; BLOCK]), [0.0; BLOCK]);
    }

    #[test]
    fn what_is_no_number_stays_none() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut rows = [0.5f32; 2 * BLOCK];
            rows[BLOCK + 1] = bad;
            let back = rounded(&[2, BLOCK], &rows);
            assert!(back[..BLOCK].iter().all(|x| *x == 0.5) && back[BLOCK..].iter().all(|x| x.is_nan()));
        }
    }

    #[test]
    fn wrong_parts_are_named() {
        let [codes, scale] = narrow("w", &[2, BLOCK], &[0.5; 2 * BLOCK]);
        let message = |tensors: &[TensorData]| widened(opened(tensors)).unwrap_err().to_string();
        assert_eq!(message(std::slice::from_ref(&codes)), "tensor `w_scale` is missing in `draft`");
        let short = TensorData { shape: vec![1, 2], ..scale.clone() };
        assert!(
            message(&[codes.clone(), short])
                .contains("`w_scale` in `draft` has shape [1, 2], expected [2, 1]")
        );
        let other = TensorData { dtype: Dtype::U8, ..scale.clone() };
        assert!(
            message(&[codes.clone(), other]).contains("`w_scale` in `draft` has type U8, expected F8_E8M0")
        );
        let flat = TensorData { shape: vec![2 * BLOCK], ..codes };
        assert!(message(&[flat, scale]).contains("expected [64, 32]"));
    }

    #[test]
    fn weights_without_codes_are_left_alone() {
        let plain = [TensorData::f32("a", &[2], &[1.0, 2.0]), TensorData::i64("d2t", &[1], &[3])];
        let same = widened(opened(&plain)).unwrap();
        assert_eq!(same.get("a").unwrap().dtype, Dtype::F32);
        assert_eq!(same.len(), 2);
    }

    proptest! {
        /// BF16 holds what the codes say, and narrowing it again changes nothing.
        #[test]
        fn widening_is_exact_and_narrowing_again_is_idle(
            rows in 1usize..4, blocks in 1usize..3, seed in any::<u64>(), spread in 0i32..60,
        ) {
            let shape = [rows, blocks * BLOCK];
            let mut state = seed | 1;
            let values: Vec<f32> = (0..rows * blocks * BLOCK).map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let unit = (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0;
                unit * 2f32.powi(-((state % (spread as u64 + 1)) as i32))
            }).collect();
            let [codes, scale] = narrow("w", &shape, &values);
            let wide = widened(opened(&[codes.clone(), scale.clone()])).unwrap();
            prop_assert_eq!(wide.len(), 1);
            let tensor = wide.get("w").unwrap();
            prop_assert_eq!((tensor.dtype, tensor.shape), (Dtype::BF16, &shape[..]));
            let found = tensor.to_f32().unwrap();
            let exact = codes.bytes.chunks(BLOCK).zip(&scale.bytes).flat_map(|(block, power)| {
                block.iter().map(|code| f64::from(*code as i8) * 2f64.powi(i32::from(*power) - 133))
            });
            for (found, exact) in found.iter().zip(exact) {
                prop_assert_eq!(f64::from(*found), exact);
            }
            for (block, exact) in found.chunks(BLOCK).zip(values.chunks(BLOCK)) {
                let largest = exact.iter().fold(0f32, |max, x| max.max(x.abs()));
                for (a, b) in block.iter().zip(exact) {
                    // Half a unit, and a whole one where the largest would have become 128 of them.
                    prop_assert!((a - b).abs() <= largest / 64.0, "{} for {}", a, b);
                }
            }
            let [again, powers] = narrow("w", &shape, &found);
            prop_assert_eq!((again.bytes, powers.bytes), (codes.bytes, scale.bytes));
        }
    }
}
