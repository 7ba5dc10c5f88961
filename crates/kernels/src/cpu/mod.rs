//! The CPU implementation: packed panels, exact integer dot products, fixed reduction orders.

mod attention;
mod block;
mod dot;
mod experts;
pub(crate) mod isa;
mod math;
mod matmul;
#[cfg(target_arch = "aarch64")]
mod neon;
mod pack;
mod pages;
mod peaks;

use std::sync::{Arc, OnceLock};

pub use attention::KvLayer;
pub(crate) use math::exp;
pub use pack::{KeptPanels, PANEL_VERSION, PackedWeight, SharedBytes};

use crate::experts::{Experts, Routes};
use crate::pool::SendPtr;
use crate::train::{Products, Team};
use crate::{
    Activation, Buffer, KernelError, Kernels, KvDtype, Memory, PackMode, Pool, RopeTable, Segment, TopK,
    WeightView, check_order, scratch,
};
use isa::Level;

/// Elements from which an element-wise operation is worth a second thread.
const PARALLEL_ELEMENTS: usize = 1 << 15;

/// What the CPU offers and what the kernels use of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuFeatures {
    /// `portable`, `avx2`, `avx512-vnni` or `neon-dotprod`: the path in use.
    pub path: &'static str,
    /// Features that matter here, and whether they are there.
    pub offered: Vec<(&'static str, bool)>,
}

/// Kernels on the CPU with a persistent pool of threads.
#[derive(Clone)]
pub struct Cpu {
    level: Level,
    pool: Arc<Pool>,
    products: Products,
}

impl Cpu {
    /// Kernels on the best instruction set of this CPU, with `threads` threads in total (at least one).
    pub fn new(threads: usize) -> Cpu {
        Cpu { level: Level::detect(), pool: Arc::new(Pool::new(threads)), products: Products::F32 }
    }

    /// One per usable instruction set, plainest first: all must agree bit for bit.
    pub fn all_paths(threads: usize) -> Vec<Cpu> {
        let pool = Arc::new(Pool::new(threads));
        Level::available()
            .into_iter()
            .map(|level| Cpu { level, pool: Arc::clone(&pool), products: Products::F32 })
            .collect()
    }

    /// The same with other products in training; decoding computes as before.
    pub fn with_products(self, products: Products) -> Cpu {
        Cpu { products, ..self }
    }

    /// Who computes the products of training.
    pub(crate) fn team(&self) -> Team {
        Team { threads: self.threads(), products: self.products }
    }

    /// Threads in total.
    pub fn threads(&self) -> usize {
        self.pool.threads()
    }

    /// The pool, for training operations.
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// What this CPU offers and which path is in use.
    pub fn features(&self) -> CpuFeatures {
        let path = match self.level {
            Level::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => "avx512-vnni",
            #[cfg(target_arch = "aarch64")]
            Level::Neon => "neon-dotprod",
        };
        #[cfg(target_arch = "x86_64")]
        let offered = {
            use std::arch::is_x86_feature_detected as has;
            vec![
                ("avx2", has!("avx2")),
                ("fma", has!("fma")),
                ("f16c", has!("f16c")),
                ("avx512f", has!("avx512f")),
                ("avx512bw", has!("avx512bw")),
                ("avx512vnni", has!("avx512vnni")),
                ("avx512bf16", has!("avx512bf16")),
                ("amx-bf16", crate::tiles::is_usable()),
            ]
        };
        #[cfg(target_arch = "aarch64")]
        let offered = {
            use std::arch::is_aarch64_feature_detected as has;
            vec![("neon", has!("neon")), ("dotprod", has!("dotprod"))]
        };
        #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
        let offered = Vec::new();
        CpuFeatures { path, offered }
    }

    /// Arg-max and log-sum-exp per row of `x[R, I] · Wᵀ`: what [`TrainKernels::stream_head`] gives of a head in f32, of a packed one
    /// and in its products. Ties go to the smaller index.
    ///
    /// # Panics
    /// If `x` does not have whole rows.
    ///
    /// [`TrainKernels::stream_head`]: crate::TrainKernels::stream_head
    pub fn tops(&self, x: &[f32], w: &PackedWeight) -> (Vec<u32>, Vec<f32>) {
        let rows = x.len() / w.in_features;
        assert_eq!(x.len(), rows * w.in_features, "whole rows");
        let run = |x: &[f32]| matmul::tops(self.level, &self.pool, x, rows, w).into_iter().unzip();
        match &w.order {
            None => run(x),
            Some(order) => run(&in_order(x, rows, order)),
        }
    }

    /// Runs `body(from, to)` over `units` rows (or values) of `unit_len` elements, in parallel when it pays.
    fn split(&self, units: usize, unit_len: usize, body: &(dyn Fn(usize, usize) + Sync)) {
        if units * unit_len < PARALLEL_ELEMENTS || self.pool.threads() == 1 {
            body(0, units);
        } else {
            let step = units.div_ceil(self.pool.threads() * 2);
            self.pool.run(units.div_ceil(step), &|t| body(t * step, ((t + 1) * step).min(units)));
        }
    }
}

/// Activations in the order of a weight's columns.
fn in_order(x: &[f32], rows: usize, order: &[u32]) -> Vec<f32> {
    x.chunks_exact(order.len()).take(rows).flat_map(|x| order.iter().map(|k| x[*k as usize])).collect()
}

impl Memory for Cpu {
    type Buf = Vec<f32>;

    fn zeros(&self, len: usize) -> Vec<f32> {
        vec![0.0; len]
    }

    fn scratch(&self, len: usize) -> Vec<f32> {
        scratch::take(len)
    }

    fn upload(&self, data: &[f32]) -> Vec<f32> {
        let mut buf = scratch::take(data.len());
        buf.copy_from_slice(data);
        buf
    }

    fn download(&self, buf: &Vec<f32>, offset: usize, out: &mut [f32]) {
        out.copy_from_slice(&buf[offset..offset + out.len()]);
    }
}

impl Kernels for Cpu {
    type Packed = PackedWeight;
    type Kv = KvLayer;
    const ROW_EXACT: bool = true;

    fn pack(&self, name: &str, weight: &WeightView<'_>, mode: PackMode) -> Result<PackedWeight, KernelError> {
        PackedWeight::pack(&self.pool, name, weight, mode)
    }

    fn pack_ordered(
        &self,
        name: &str,
        weight: &WeightView<'_>,
        order: &[u32],
        mode: PackMode,
    ) -> Result<PackedWeight, KernelError> {
        check_order(name, weight, order)?;
        let mut packed = PackedWeight::pack(&self.pool, name, weight, mode)?;
        packed.order = Some(order.into());
        Ok(packed)
    }

    fn matmuls(
        &self,
        x: &Vec<f32>,
        rows: usize,
        weights: &[(&PackedWeight, Option<&Vec<f32>>)],
        ys: &mut [Vec<f32>],
    ) {
        let weights: Vec<matmul::Layer<'_>> = weights
            .iter()
            .map(|(weight, bias)| matmul::Layer { weight, bias: bias.map(Vec::as_slice) })
            .collect();
        let mut outputs: Vec<&mut [f32]> = ys.iter_mut().map(Vec::as_mut_slice).collect();
        // Layers of one order together; nearly always that is all of them.
        let mut from = 0;
        while from < weights.len() {
            let order = &weights[from].weight.order;
            let same = weights[from..].iter().take_while(|w| w.weight.order == *order).count();
            let (weights, outputs) = (&weights[from..from + same], &mut outputs[from..from + same]);
            let mut run = |x: &[f32]| matmul::matmuls(self.level, &self.pool, x, rows, weights, outputs);
            match order {
                None => run(x),
                Some(order) => run(&in_order(x, rows, order)),
            }
            from += same;
        }
    }

    fn argmax(&self, x: &Vec<f32>, rows: usize, w: &PackedWeight) -> Vec<u32> {
        match &w.order {
            None => matmul::argmax(self.level, &self.pool, x, rows, w),
            Some(order) => matmul::argmax(self.level, &self.pool, &in_order(x, rows, order), rows, w),
        }
    }

    fn argmax_and_outputs(
        &self,
        x: &Vec<f32>,
        (rows, _): (usize, usize),
        w: &PackedWeight,
        whole: &[u32],
        y: &mut Vec<f32>,
    ) -> Vec<u32> {
        let run = |x: &[f32], y| matmul::argmax_and_outputs(self.level, &self.pool, x, rows, w, (whole, y));
        match &w.order {
            None => run(x, y),
            Some(order) => run(&in_order(x, rows, order), y),
        }
    }

    fn top_k(&self, x: &Vec<f32>, rows: usize, (w, outputs): (&PackedWeight, usize), k: usize) -> Vec<TopK> {
        let mut y = [self.scratch(rows * outputs)];
        self.matmuls(x, rows, &[(w, None)], &mut y);
        let found: Vec<OnceLock<TopK>> = (0..rows).map(|_| OnceLock::new()).collect();
        // An exponential is worth several simple operations.
        self.split(rows, 8 * outputs, &|from, to| {
            for row in from..to {
                let values = &y[0][row * outputs..(row + 1) * outputs];
                found[row].get_or_init(|| TopK::of(values, k));
            }
        });
        y[0].give_back();
        found.into_iter().map(|row| row.into_inner().expect("every row was looked at")).collect()
    }

    fn embed(&self, table: &PackedWeight, ids: &[u32], scale: f32, y: &mut Vec<f32>) {
        for (row, id) in y.chunks_exact_mut(table.in_features).zip(ids) {
            table.row(*id as usize, row);
            if scale != 1.0 {
                row.iter_mut().for_each(|v| *v *= scale);
            }
        }
    }

    fn rms_norm(&self, x: &Vec<f32>, weight: &Vec<f32>, width: usize, eps: f32, y: &mut Vec<f32>) {
        assert!(weight.len() == width && y.len() >= x.len(), "norm weight and buffers must fit");
        let out = SendPtr(y.as_mut_ptr());
        self.split(x.len() / width, width, &|from, to| {
            let args = math::NormArgs {
                x: x[from * width..].as_ptr(),
                weight: weight.as_ptr(),
                width,
                groups: to - from,
                eps,
                // SAFETY: groups `from..to` exist in `y`; tasks are disjoint.
                y: unsafe { out.get().add(from * width) },
            };
            // SAFETY: as described in `args`.
            unsafe { math::rms_norm(self.level, args) };
        });
    }

    fn rope(&self, x: &mut Vec<f32>, heads: usize, table: &RopeTable, positions: &[u32]) {
        let half = table.head_dim() / 2;
        let width = heads * table.head_dim();
        assert!(x.len() >= positions.len() * width, "RoPE buffer too short");
        let out = SendPtr(x.as_mut_ptr());
        self.split(positions.len(), width, &|from, to| {
            for (row, position) in positions.iter().enumerate().take(to).skip(from) {
                let (cos, sin) = table.angles(*position);
                let args = math::RopeArgs {
                    // SAFETY: row `row` exists; tasks are disjoint.
                    x: unsafe { out.get().add(row * width) },
                    heads,
                    half,
                    cos: cos.as_ptr(),
                    sin: sin.as_ptr(),
                };
                // SAFETY: as described in `args`.
                unsafe { math::rope(self.level, args) };
            }
        });
    }

    fn gated(&self, activation: Activation, gate: &mut Vec<f32>, up: &Vec<f32>) {
        assert!(gate.len() <= up.len(), "gate and up must match");
        let len = gate.len();
        let out = SendPtr(gate.as_mut_ptr());
        self.split(len, 1, &|from, to| {
            let args = math::GateArgs {
                // SAFETY: values `from..to` exist; tasks are disjoint.
                gate: unsafe { out.get().add(from) },
                up: up[from..].as_ptr(),
                len: to - from,
                activation,
            };
            // SAFETY: as described in `args`.
            unsafe { math::gated(self.level, args) };
        });
    }

    fn add(&self, a: &mut Vec<f32>, b: &Vec<f32>) {
        for (a, b) in a.iter_mut().zip(b) {
            *a += b;
        }
    }

    fn scale(&self, x: &mut Vec<f32>, factor: f32) {
        for v in x {
            *v *= factor;
        }
    }

    fn softcap(&self, x: &mut Vec<f32>, cap: f32) {
        let len = x.len();
        let out = SendPtr(x.as_mut_ptr());
        self.split(len, 1, &|from, to| {
            // SAFETY: values `from..to` exist; tasks are disjoint.
            let args = math::CapArgs { x: unsafe { out.get().add(from) }, len: to - from, cap };
            // SAFETY: as described in `args`.
            unsafe { math::softcap(self.level, args) };
        });
    }

    fn concat_cols(&self, parts: &[(&Vec<f32>, usize)], rows: usize, y: &mut Vec<f32>) {
        let total: usize = parts.iter().map(|(_, w)| w).sum();
        for (row, out) in y.chunks_exact_mut(total).take(rows).enumerate() {
            let mut at = 0;
            for (part, width) in parts {
                out[at..at + width].copy_from_slice(&part[row * width..(row + 1) * width]);
                at += width;
            }
        }
    }

    fn slice_cols(
        &self,
        x: &Vec<f32>,
        x_width: usize,
        from: usize,
        width: usize,
        rows: usize,
        y: &mut Vec<f32>,
    ) {
        for (x, y) in x.chunks_exact(x_width).zip(y.chunks_exact_mut(width)).take(rows) {
            y.copy_from_slice(&x[from..from + width]);
        }
    }

    fn gather_rows(&self, x: &Vec<f32>, width: usize, rows: &[u32], y: &mut Vec<f32>) {
        for (row, y) in rows.iter().zip(y.chunks_exact_mut(width)) {
            y.copy_from_slice(&x[*row as usize * width..(*row as usize + 1) * width]);
        }
    }

    fn experts(
        &self,
        x: &Vec<f32>,
        routes: &Routes,
        experts: &Experts<PackedWeight, Vec<f32>>,
        y: &mut Vec<f32>,
    ) {
        experts::experts(self, x, routes, experts, y);
    }

    fn cell(
        &self,
        cell: crate::Cell,
        (a, b): (&Vec<f32>, &Vec<f32>),
        rows: usize,
        width: usize,
        y: &mut Vec<f32>,
    ) {
        crate::cell::forward(cell, (a, b), rows, width, y);
    }

    fn kv_write(&self, kv: &mut KvLayer, at: usize, rows: usize, k: &Vec<f32>, v: &Vec<f32>) {
        let len = rows * kv.width();
        kv.write(at, rows, &k[..len], &v[..len]);
    }

    fn kv_new(&self, kv_heads: usize, head_dim: usize, dtype: KvDtype) -> KvLayer {
        KvLayer::new(kv_heads, head_dim, dtype)
    }

    fn kv_compact(&self, kv: &mut KvLayer, base: usize, from: &[usize]) {
        kv.compact(base, from);
    }

    fn attend(
        &self,
        q: &Vec<f32>,
        k: &Vec<f32>,
        v: &Vec<f32>,
        heads: usize,
        segments: &mut [Segment<'_, KvLayer>],
        y: &mut Vec<f32>,
    ) {
        attention::append(&self.pool, segments, k, v);
        let mut first_row = 0;
        let parts: Vec<attention::Part<'_>> = segments
            .iter()
            .map(|segment| {
                let part = attention::Part { first_row, kv: segment.kv, mask: &segment.mask };
                first_row += segment.mask.new_rows;
                part
            })
            .collect();
        attention::attention(self.level, &self.pool, q, heads, &parts, y);
    }
}
