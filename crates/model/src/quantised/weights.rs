//! Quantised tensors to rows of groups, value for value.
//!
//! What each format defines, in whole numbers and one rounded product in f32 (`f32(scale)` is exact for every type that
//! scales are stored in):
//!
//! | format | value |
//! |---|---|
//! | AWQ (`gemm`) | `scale[k / group, o] * (q[k, o] - zero[k / group, o])` |
//! | GPTQ | the same with `g_idx[k]` for `k / group`; in files of version 1 a zero is one more than stored, modulo `2^bits` |
//! | FP8 | `float8 * scale` of the weight, the output, or the block; `weight_scale_inv` is multiplied with, too |
//! | compressed-tensors, packed | `scale * (q - zero)`, both stored with half their range added |
//! | compressed-tensors, int8, FP8 | `scale * (q - zero)`, `float8 * scale` |
//!
//! Other programs round further: transformers, AutoAWQ and compressed-tensors give the product in the type of the scale
//! (f16 or bf16). They also differ in GPTQ's zero of version 1 that is stored as the largest number: ours is 0 as in
//! AutoGPTQ, where others carry into the next zero or take `2^bits`. Whoever writes such files avoids it. Blocks of FP8
//! begin every `weight_block_size` outputs and inputs and the last may be smaller, as in vLLM and compressed-tensors;
//! transformers cuts into equal parts, which is another thing where a side is no multiple.
//!
//! Shape legend: `O`, `I` outputs and inputs of a layer, `G` groups of a row.

use draftsmith_formats::safetensors_dir::{Dtype, SafetensorsDir, Tensor};
use draftsmith_kernels::{Groups, WeightDtype, quant};

use super::scheme::{Group, Method, Scheme, Strategy};
use crate::ModelError;

/// Smallest group of 8-bit floats that is kept; below it is no smaller than f32.
const FP8_GROUP_MIN: usize = 16;

/// A quantised weight that was found and checked, not yet put into rows.
pub(crate) struct Found<'a> {
    /// `[O, I]`
    pub shape: [usize; 2],
    /// Form of the rows.
    pub dtype: WeightDtype,
    /// Input of each column where that is another one.
    pub order: Option<Vec<u32>>,
    /// The tensors that it consists of.
    pub tensors: Vec<String>,
    /// The largest of them.
    pub main: String,
    numbers: Numbers<'a>,
    scales: Scales,
    /// `[G, O]` or as the scales stand.
    zeros: Option<Vec<i8>>,
    /// The zero where none is stored.
    middle: i8,
    /// Group of each input, where that is neither `k / len` nor told by the order.
    group_of: Option<Vec<u32>>,
}

/// Where the number of an output and input stands.
enum Numbers<'a> {
    /// Words of eight outputs, `[I, O / 8]`.
    Awq(&'a [u8]),
    /// Words of inputs, `[I * bits / 32, O]`.
    Columns(&'a [u8], usize),
    /// Words of inputs, `[O, I * bits / 32]`.
    Rows(&'a [u8], usize),
    /// Signed bytes `[O, I]`.
    Bytes(&'a [u8]),
    /// 8-bit floats `[O, I]`.
    Floats(&'a [u8]),
}

/// Scales of blocks of `high` outputs and `wide` inputs, or of groups.
struct Scales {
    values: Vec<f32>,
    /// Distance of two outputs' (or blocks') scales, and of two groups'.
    steps: [usize; 2],
    /// Outputs that share one.
    high: usize,
    /// Inputs that share one.
    wide: usize,
}

impl Scales {
    fn at(&self, o: usize, g: usize) -> usize {
        o / self.high * self.steps[0] + g * self.steps[1]
    }
}

/// Nibble of a word in which AWQ keeps an output.
const AWQ_NIBBLE: [u32; 8] = [0, 4, 1, 5, 2, 6, 3, 7];

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[4 * at], bytes[4 * at + 1], bytes[4 * at + 2], bytes[4 * at + 3]])
}

/// Number `i` of a row of numbers in words that begins at word `first` and goes on every `step` words.
fn packed(bytes: &[u8], bits: usize, first: usize, step: usize, i: usize) -> u8 {
    let per = 32 / bits;
    (word(bytes, first + i / per * step) >> (i % per * bits)) as u8 & ((1u16 << bits) - 1) as u8
}

/// The tensors of one layer, and errors that name them.
struct Layer<'a, 'n> {
    dir: &'a SafetensorsDir,
    name: &'n str,
    used: Vec<String>,
}

impl<'a> Layer<'a, '_> {
    fn full(&self, part: &str) -> String {
        format!("{}.{part}", self.name)
    }

    fn find(&mut self, part: &str) -> Option<Tensor<'a>> {
        let tensor = self.dir.find(&self.full(part))?;
        self.used.push(tensor.name.to_owned());
        Some(tensor)
    }

    fn need(&mut self, part: &str, main: &Tensor<'_>) -> Result<Tensor<'a>, ModelError> {
        let missing = || wrong(main, format!("needs `{}`, which is missing", self.full(part)));
        self.dir.find(&self.full(part)).ok_or_else(missing)?;
        Ok(self.find(part).expect("just found"))
    }
}

fn wrong(tensor: &Tensor<'_>, problem: String) -> ModelError {
    ModelError::QuantisedTensor {
        place: tensor.path.display().to_string(),
        name: tensor.name.to_owned(),
        problem,
    }
}

/// Numbers of eight bits with half their range taken off.
fn signed(number: u8, bits: usize) -> u8 {
    if bits == 8 { number ^ 0x80 } else { number }
}

fn typed<'a>(tensor: Tensor<'a>, wanted: Dtype) -> Result<Tensor<'a>, ModelError> {
    match tensor.dtype == wanted {
        true => Ok(tensor),
        false => Err(wrong(&tensor, format!("is stored as {:?}, expected {wanted:?}", tensor.dtype))),
    }
}

fn shaped(tensor: &Tensor<'_>, wanted: &[usize], why: &str) -> Result<(), ModelError> {
    match tensor.shape == wanted {
        true => Ok(()),
        false => Err(wrong(tensor, format!("has shape {:?}, expected {wanted:?} {why}", tensor.shape))),
    }
}

/// Two sizes, none of them zero.
fn matrix(tensor: &Tensor<'_>) -> Result<[usize; 2], ModelError> {
    match *tensor.shape {
        [a, b] if a > 0 && b > 0 => Ok([a, b]),
        _ => Err(wrong(tensor, format!("has shape {:?}, expected two sizes", tensor.shape))),
    }
}

/// Scales as f32; powers of two in one byte, too.
fn scale_values(tensor: &Tensor<'_>) -> Result<Vec<f32>, ModelError> {
    let values: Vec<f32> = match tensor.dtype {
        Dtype::F8_E8M0 | Dtype::U8 => {
            tensor.bytes.iter().map(|e| (f64::from(*e) - 127.0).exp2() as f32).collect()
        }
        Dtype::F16 | Dtype::BF16 | Dtype::F32 => tensor.to_f32()?,
        other => return Err(wrong(tensor, format!("is stored as {other:?}, expected F16, BF16 or F32"))),
    };
    // Products with an 8-bit float and its 256 stay in range.
    match values.iter().position(|v| !v.is_finite() || v.abs() > 1e30) {
        Some(at) => Err(wrong(tensor, format!("has {} at {at}, which is no scale", values[at]))),
        None => Ok(values),
    }
}

impl<'a> Found<'a> {
    /// The quantised weight of a layer; `None` if the layer is plain or not there.
    ///
    /// # Errors
    /// Tensors that are missing, or have other types or shapes than the scheme says, named.
    pub(crate) fn new(
        scheme: &Scheme,
        dir: &'a SafetensorsDir,
        layer: &str,
    ) -> Result<Option<Found<'a>>, ModelError> {
        let mut tensors = Layer { dir, name: layer, used: Vec::new() };
        let packed = match scheme.method {
            Method::Awq { .. } | Method::Gptq { .. } => "qweight",
            Method::Fp8 { .. } => "weight",
            Method::Compressed { .. } if dir.find(&tensors.full("weight_packed")).is_some() => {
                "weight_packed"
            }
            Method::Compressed { .. } => "weight",
        };
        let Some(main) = dir.find(&tensors.full(packed)) else { return Ok(None) };
        // Plain weights are read as they are, whatever the configuration says.
        let plain = matches!(main.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16);
        if packed == "weight" && plain {
            return Ok(None);
        }
        if let Some((key, entry)) = scheme.skips(layer) {
            let (place, prefix) = (&scheme.place, scheme.prefix);
            let problem =
                format!("is quantised, but `{prefix}{key}` of `{place}` leaves it out by `{entry}`");
            return Err(wrong(&main, problem));
        }
        tensors.find(packed);
        let found = match &scheme.method {
            Method::Awq { group } => awq(&mut tensors, main, *group),
            Method::Gptq { bits, group, v2, dynamic } => {
                gptq(&mut tensors, main, *bits as usize, *group, *v2, *dynamic)
            }
            Method::Fp8 { block } => fp8(&mut tensors, main, None, *block),
            Method::Compressed { forms } => {
                let Some(form) = scheme.form(forms, layer) else {
                    let (place, prefix) = (&scheme.place, scheme.prefix);
                    let problem = format!(
                        "is quantised, but no target of `{prefix}config_groups` of `{place}` names it"
                    );
                    return Err(wrong(&main, problem));
                };
                let key = format!("{}config_groups.{}", scheme.prefix, form.key);
                match (packed, main.dtype, form.float) {
                    ("weight_packed", _, false) => {
                        let (bits, strategy) = (form.bits as usize, form.strategy);
                        packed_rows(&mut tensors, main, bits, strategy, form.symmetric)
                    }
                    ("weight", Dtype::I8, false) if form.bits == 8 => {
                        bytes(&mut tensors, main, form.strategy, form.symmetric)
                    }
                    ("weight", Dtype::F8_E4M3, true) => {
                        fp8(&mut tensors, main, Some(form.strategy), [128, 128])
                    }
                    (_, dtype, float) => {
                        let what = if float { "floats" } else { "whole numbers" };
                        let problem =
                            format!("is stored as {dtype:?}, but `{key}` says {} bits, {what}", form.bits);
                        Err(wrong(&main, problem))
                    }
                }
            }
        }?;
        Ok(Some(Found { tensors: tensors.used, main: main.name.to_owned(), ..found }))
    }

    /// In what form it runs, for people.
    pub(crate) fn form(&self) -> &'static str {
        match (self.dtype, &self.order) {
            (WeightDtype::Int4(Groups { single: true, .. }), None) => "4 bits, f32 and zero per group",
            (WeightDtype::Int4(Groups { single: true, .. }), Some(_)) => {
                "4 bits, f32 and zero per group, inputs reordered"
            }
            (WeightDtype::Int4(Groups { zeros: true, .. }), None) => "4 bits, f16 and zero per group",
            (WeightDtype::Int4(Groups { zeros: true, .. }), Some(_)) => {
                "4 bits, f16 and zero per group, inputs reordered"
            }
            (WeightDtype::Int4(_), None) => "4 bits, f16 per group",
            (WeightDtype::Int4(_), Some(_)) => "4 bits, f16 per group, inputs reordered",
            (WeightDtype::Int8(Groups { single: true, .. }), None) => "8 bits, f32 and zero per group",
            (WeightDtype::Int8(Groups { single: true, .. }), Some(_)) => {
                "8 bits, f32 and zero per group, inputs reordered"
            }
            (WeightDtype::Int8(_), None) => "8 bits, f16 and zero per group",
            (WeightDtype::Int8(_), Some(_)) => "8 bits, f16 and zero per group, inputs reordered",
            (WeightDtype::Fp8(_), _) => "FP8, f32 per group",
            _ => "F32",
        }
    }

    /// The numbers of an output, input by input: unsigned nibbles, signed bytes, 8-bit floats.
    fn numbers(&self, o: usize, numbers: &mut [u8]) {
        let [out, inputs] = self.shape;
        // Numbers of a row in words from `first` on, `step` words apart.
        let words = |numbers: &mut [u8], bytes: &[u8], bits: usize, first: usize, step: usize| {
            for (i, numbers) in numbers.chunks_mut(32 / bits).enumerate() {
                let mut word = word(bytes, first + i * step);
                for number in numbers {
                    *number = signed(word as u8 & ((1u16 << bits) - 1) as u8, bits);
                    word >>= bits;
                }
            }
        };
        match self.numbers {
            Numbers::Awq(bytes) => {
                let shift = 4 * AWQ_NIBBLE[o % 8];
                for (k, number) in numbers.iter_mut().enumerate() {
                    *number = (word(bytes, k * (out / 8) + o / 8) >> shift) as u8 & 15;
                }
            }
            Numbers::Columns(bytes, bits) => words(numbers, bytes, bits, o, out),
            Numbers::Rows(bytes, bits) => words(numbers, bytes, bits, o * (inputs * bits).div_ceil(32), 1),
            Numbers::Bytes(bytes) | Numbers::Floats(bytes) => {
                numbers.copy_from_slice(&bytes[o * inputs..][..inputs]);
            }
        }
    }

    /// Row-major bytes of [`Found::dtype`], columns in [`Found::order`].
    pub(crate) fn rows(&self) -> Vec<u8> {
        let [out, inputs] = self.shape;
        let (values, bytes) = self.dtype.block();
        let row_bytes = inputs / values * bytes;
        let mut data = vec![0u8; out * row_bytes];
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let chunk = match out * inputs < 1 << 18 {
            true => out,
            // Neighbours of an output often lie in the same line of memory.
            false => out.div_ceil(4 * threads).next_multiple_of(16),
        };
        let fill = |(i, part): (usize, &mut [u8])| {
            let mut numbers = vec![0; inputs];
            for (o, row) in part.chunks_exact_mut(row_bytes).enumerate() {
                self.numbers(i * chunk + o, &mut numbers);
                self.row(i * chunk + o, &numbers, row);
            }
        };
        let parts = data.chunks_mut(chunk * row_bytes).enumerate();
        if chunk == out {
            parts.for_each(fill);
        } else {
            let parts = std::sync::Mutex::new(parts);
            let next = || parts.lock().expect("no thread fails inside").next();
            std::thread::scope(|scope| {
                for _ in 0..threads {
                    scope.spawn(|| {
                        while let Some(part) = next() {
                            fill(part);
                        }
                    });
                }
            });
        }
        data
    }

    /// Output `o` from its numbers.
    fn row(&self, o: usize, numbers: &[u8], row: &mut [u8]) {
        let scale = |g: usize| self.scales.values[self.scales.at(o, g)];
        let zero = |g: usize| self.zeros.as_ref().map(|zeros| zeros[self.scales.at(o, g)]);
        let column = |k: usize| self.order.as_ref().map_or(k, |order| order[k] as usize);
        let (WeightDtype::Int4(groups) | WeightDtype::Int8(groups) | WeightDtype::Fp8(groups)) = self.dtype
        else {
            // No group fits: the values themselves.
            for (k, out) in row.chunks_exact_mut(4).enumerate() {
                let g = self.group_of.as_ref().map_or(k / self.scales.wide, |of| of[k] as usize);
                let number = numbers[k];
                let value = match self.numbers {
                    Numbers::Floats(_) => scale(g) * quant::f8_value(number),
                    _ => {
                        let zero = zero(g).unwrap_or(self.middle);
                        scale(g) * f32::from(i16::from(number as i8) - i16::from(zero))
                    }
                };
                out.copy_from_slice(&value.to_le_bytes());
            }
            return;
        };
        let (len, bytes) = self.dtype.block();
        let head = groups.head_bytes();
        for (at, group) in row.chunks_exact_mut(bytes).enumerate() {
            let g = at * len / self.scales.wide;
            match groups.single {
                true => group[..4].copy_from_slice(&scale(g).to_le_bytes()),
                false => group[..2].copy_from_slice(&half::f16::from_f32(scale(g)).to_le_bytes()),
            }
            if groups.zeros {
                group[head - 1] = zero(g).unwrap_or(self.middle) as u8;
            }
            for i in 0..len {
                let number = numbers[column(at * len + i)];
                match self.dtype {
                    WeightDtype::Int4(_) => group[head + i / 2] |= number << (i % 2 * 4),
                    _ => group[head + i] = number,
                }
            }
        }
    }
}

/// Whole numbers of `bits` in the smallest form that has their values.
fn whole<'a>(
    shape: [usize; 2],
    bits: usize,
    numbers: Numbers<'a>,
    scales: Scales,
    zeros: Option<Vec<i8>>,
    group_of: Option<Vec<u32>>,
) -> Found<'a> {
    let (inputs, len) = (shape[1], scales.wide.min(shape[1]));
    let middle = if bits == 4 { 8 } else { 0 };
    let zeros = zeros.filter(|zeros| zeros.iter().any(|z| *z != middle));
    let exact = |s: &f32| half::f16::from_f32(*s).to_f32().to_bits() == s.to_bits();
    let groups = Groups { len: len as u32, single: !scales.values.iter().all(exact), zeros: zeros.is_some() };
    let group_of = group_of.filter(|of| of.iter().enumerate().any(|(k, g)| *g as usize != k / len));
    // Inputs of a group beside each other, if all groups are full.
    let order = group_of.as_ref().and_then(|of| {
        let mut order: Vec<u32> = (0..inputs as u32).collect();
        order.sort_by_key(|k| of[*k as usize]);
        let full = order.iter().enumerate().all(|(at, k)| of[*k as usize] as usize == at / len);
        full.then_some(order)
    });
    let fits =
        len.is_multiple_of(32) && inputs.is_multiple_of(len) && (group_of.is_none() || order.is_some());
    let dtype = match (fits, bits) {
        (false, _) => WeightDtype::F32,
        (true, 4) => WeightDtype::Int4(groups),
        (true, _) => WeightDtype::Int8(groups),
    };
    let (order, group_of) = if fits { (order, None) } else { (None, group_of) };
    let (tensors, main) = Default::default();
    Found { shape, dtype, order, tensors, main, numbers, scales, zeros, middle, group_of }
}

/// Zeros in words along the outputs, `[G, O * bits / 32]`; `more` is added to each.
fn word_zeros(tensor: &Tensor<'_>, bits: usize, groups: usize, out: usize, more: u8, awq: bool) -> Vec<i8> {
    let words = out * bits / 32;
    let mut zeros = Vec::with_capacity(groups * out);
    for g in 0..groups {
        for o in 0..out {
            let zero = match awq {
                true => (word(tensor.bytes, g * words + o / 8) >> (4 * AWQ_NIBBLE[o % 8])) as u8 & 15,
                false => packed(tensor.bytes, bits, g * words, 1, o),
            };
            let zero = zero.wrapping_add(more) & ((1u16 << bits) - 1) as u8;
            zeros.push(signed(zero, bits) as i8);
        }
    }
    zeros
}

fn groups_of(group: Group, inputs: usize) -> (usize, String) {
    match group {
        Some(len) => (inputs.div_ceil(len), format!("for groups of {len} of {inputs} inputs")),
        None => (1, format!("for one group of all {inputs} inputs")),
    }
}

fn awq<'a>(layer: &mut Layer<'a, '_>, main: Tensor<'a>, group: Group) -> Result<Found<'a>, ModelError> {
    let main = typed(main, Dtype::I32)?;
    let [inputs, words] = matrix(&main)?;
    let out = words * 8;
    let (groups, why) = groups_of(group, inputs);
    let scales = layer.need("scales", &main)?;
    shaped(&scales, &[groups, out], &why)?;
    let zeros = typed(layer.need("qzeros", &main)?, Dtype::I32)?;
    shaped(&zeros, &[groups, words], &why)?;
    let zeros = word_zeros(&zeros, 4, groups, out, 0, true);
    let scales =
        Scales { values: scale_values(&scales)?, steps: [1, out], high: 1, wide: group.unwrap_or(inputs) };
    Ok(whole([out, inputs], 4, Numbers::Awq(main.bytes), scales, Some(zeros), None))
}

fn gptq<'a>(
    layer: &mut Layer<'a, '_>,
    main: Tensor<'a>,
    mut bits: usize,
    mut group: Group,
    v2: bool,
    dynamic: bool,
) -> Result<Found<'a>, ModelError> {
    let main = typed(main, Dtype::I32)?;
    let [words, out] = matrix(&main)?;
    let g_idx = layer.find("g_idx").map(|t| typed(t, Dtype::I32)).transpose()?;
    let scales = layer.need("scales", &main)?;
    if dynamic {
        if let Some(g_idx) = &g_idx {
            bits = words * 32 / g_idx.elements().max(1);
        }
        if !(bits == 4 || bits == 8) {
            return Err(wrong(&main, format!("has {bits} bits a weight; of GPTQ 4 and 8 bits are read")));
        }
        let rows = scales.shape.first().copied().unwrap_or(1).max(1);
        group = Some((words * (32 / bits)).div_ceil(rows));
    }
    let inputs = words * (32 / bits);
    let (groups, why) = groups_of(group, inputs);
    if !(out * bits).is_multiple_of(32) {
        return Err(wrong(&main, format!("has {out} outputs, no multiple of the {} of a word", 32 / bits)));
    }
    shaped(&scales, &[groups, out], &why)?;
    let zeros = typed(layer.need("qzeros", &main)?, Dtype::I32)?;
    shaped(&zeros, &[groups, out * bits / 32], &why)?;
    let zeros = word_zeros(&zeros, bits, groups, out, u8::from(!v2), false);
    let group_of = g_idx.map(|g_idx| group_ids(&g_idx, inputs, groups)).transpose()?.flatten();
    let scales =
        Scales { values: scale_values(&scales)?, steps: [1, out], high: 1, wide: group.unwrap_or(inputs) };
    Ok(whole([out, inputs], bits, Numbers::Columns(main.bytes, bits), scales, Some(zeros), group_of))
}

/// The group of each input; `None` where a tool left zeros that mean nothing.
fn group_ids(g_idx: &Tensor<'_>, inputs: usize, groups: usize) -> Result<Option<Vec<u32>>, ModelError> {
    shaped(g_idx, &[inputs], "for as many inputs")?;
    let ids = g_idx.to_i64()?;
    if let Some(at) = ids.iter().position(|g| !(0..groups as i64).contains(g)) {
        return Err(wrong(
            g_idx,
            format!("has group {} at input {at}, but there are {groups} groups", ids[at]),
        ));
    }
    let blank = groups > 1 && ids.iter().all(|g| *g == 0);
    Ok((!blank).then(|| ids.into_iter().map(|g| g as u32).collect()))
}

/// Checks the shape of scales, and says how they stand.
fn scales_of(
    tensor: &Tensor<'_>,
    strategy: Strategy,
    [out, inputs]: [usize; 2],
) -> Result<Scales, ModelError> {
    let (rows, columns, high, wide, why) = match strategy {
        Strategy::Tensor => (1, 1, out, inputs, "for one scale of the whole weight".to_owned()),
        Strategy::Channel => (out, 1, 1, inputs, format!("for {out} outputs")),
        Strategy::Group(len) => {
            (out, inputs.div_ceil(len), 1, len, format!("for {out} outputs and groups of {len} inputs"))
        }
        Strategy::Block([high, wide]) => {
            let why = format!("for blocks of {high} x {wide} of a weight of {out} x {inputs}");
            (out.div_ceil(high), inputs.div_ceil(wide), high, wide, why)
        }
    };
    let flat = rows * columns == 1 && tensor.elements() == 1 || columns == 1 && tensor.shape == [rows];
    if !flat {
        shaped(tensor, &[rows, columns], &why)?;
    }
    Ok(Scales { values: scale_values(tensor)?, steps: [columns, 1], high, wide })
}

fn packed_rows<'a>(
    layer: &mut Layer<'a, '_>,
    main: Tensor<'a>,
    bits: usize,
    strategy: Strategy,
    symmetric: bool,
) -> Result<Found<'a>, ModelError> {
    let main = typed(main, Dtype::I32)?;
    let [out, words] = matrix(&main)?;
    let sizes = layer.need("weight_shape", &main)?;
    shaped(&sizes, &[2], "for two sizes")?;
    let sizes_said = sizes.to_i64()?;
    let inputs = match sizes_said[..] {
        [o, i]
            if o == out as i64
                && i > 0
                && (i as u64).saturating_mul(bits as u64).div_ceil(32) == words as u64 =>
        {
            i as usize
        }
        _ => {
            let problem =
                format!("is {sizes_said:?}, but `{}` has {out} x {words} words of {bits} bits", main.name);
            return Err(wrong(&sizes, problem));
        }
    };
    let shape = [out, inputs];
    let scales = scales_of(&layer.need("weight_scale", &main)?, strategy, shape)?;
    let groups = inputs.div_ceil(scales.wide);
    let zeros = match layer.find("weight_zero_point") {
        None if symmetric => None,
        None => Some(layer.need("weight_zero_point", &main)?),
        Some(zeros) => Some(zeros),
    };
    let zeros = match zeros {
        None => None,
        Some(zeros)
            if zeros.dtype == Dtype::I32 && matches!(strategy, Strategy::Group(_) | Strategy::Channel) =>
        {
            let rows = (out * bits).div_ceil(32);
            shaped(&zeros, &[rows, groups], &format!("for {out} outputs in words and {groups} groups"))?;
            let numbers = (0..out).flat_map(|o| (0..groups).map(move |g| (o, g)));
            let number = |(o, g)| signed(packed(zeros.bytes, bits, g, groups, o), bits) as i8;
            Some(numbers.map(number).collect())
        }
        Some(zeros) => Some(byte_zeros(&zeros, &scales, if bits == 4 { 8 } else { 0 })?),
    };
    let g_idx = layer.find("weight_g_idx").map(|t| typed(t, Dtype::I32)).transpose()?;
    let group_of = g_idx.map(|g_idx| group_ids(&g_idx, inputs, groups)).transpose()?.flatten();
    Ok(whole(shape, bits, Numbers::Rows(main.bytes, bits), scales, zeros, group_of))
}

/// Zeros as bytes, one per scale; `middle` is added.
fn byte_zeros(zeros: &Tensor<'_>, scales: &Scales, middle: i8) -> Result<Vec<i8>, ModelError> {
    let zeros = typed(*zeros, Dtype::I8)?;
    if zeros.elements() != scales.values.len() {
        let problem =
            format!("has shape {:?}, expected one for each of {} scales", zeros.shape, scales.values.len());
        return Err(wrong(&zeros, problem));
    }
    Ok(zeros.bytes.iter().map(|z| (*z as i8).wrapping_add(middle)).collect())
}

fn bytes<'a>(
    layer: &mut Layer<'a, '_>,
    main: Tensor<'a>,
    strategy: Strategy,
    symmetric: bool,
) -> Result<Found<'a>, ModelError> {
    let shape = matrix(&main)?;
    let scales = scales_of(&layer.need("weight_scale", &main)?, strategy, shape)?;
    let zeros = match layer.find("weight_zero_point") {
        None if symmetric => None,
        None => Some(layer.need("weight_zero_point", &main)?),
        Some(zeros) => Some(zeros),
    };
    let zeros = zeros.map(|zeros| byte_zeros(&zeros, &scales, 0)).transpose()?;
    activation_scales(layer);
    Ok(whole(shape, 8, Numbers::Bytes(main.bytes), scales, zeros, None))
}

/// Scales for activations in 8 bits are of no use here: they stay in f32, or are quantised by what they are.
fn activation_scales(layer: &mut Layer<'_, '_>) {
    for part in
        ["input_scale", "input_zero_point", "input_scale_ub", "activation_scale", "activation_scale_ub"]
    {
        layer.find(part);
    }
}

fn fp8<'a>(
    layer: &mut Layer<'a, '_>,
    main: Tensor<'a>,
    strategy: Option<Strategy>,
    block: [usize; 2],
) -> Result<Found<'a>, ModelError> {
    let main = typed(main, Dtype::F8_E4M3)?;
    let shape @ [out, inputs] = matrix(&main)?;
    if let Some(at) = main.bytes.iter().position(|b| b & 0x7f == 0x7f) {
        return Err(wrong(&main, format!("has no number at {} of output {}", at % inputs, at / inputs)));
    }
    let scales = match layer.find("weight_scale_inv") {
        Some(scales) => scales,
        None => layer.need("weight_scale", &main)?,
    };
    let strategy = strategy.unwrap_or(match *scales.shape {
        _ if scales.elements() == 1 => Strategy::Tensor,
        [rows] | [rows, 1] if rows == out => Strategy::Channel,
        _ => Strategy::Block(block),
    });
    let scales = scales_of(&scales, strategy, shape)?;
    activation_scales(layer);
    // A last block that is smaller: parts that fit both.
    let gcd = |mut a: usize, mut b: usize| {
        while b > 0 {
            (a, b) = (b, a % b);
        }
        a
    };
    let len = gcd(inputs, scales.wide);
    let dtype = match len >= FP8_GROUP_MIN.min(inputs) {
        true => WeightDtype::Fp8(Groups { len: len as u32, single: true, zeros: false }),
        false => WeightDtype::F32,
    };
    let (tensors, main_name) = Default::default();
    let numbers = Numbers::Floats(main.bytes);
    Ok(Found {
        shape,
        dtype,
        order: None,
        tensors,
        main: main_name,
        numbers,
        scales,
        zeros: None,
        middle: 0,
        group_of: None,
    })
}
