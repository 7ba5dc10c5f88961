//! Experts of a layer at once: two rounds of tasks over the panels of all experts that have rows.
//!
//! The bits are those of [`crate::experts::grouped`]: the same panels, the same gate, the same sum.

use std::cell::RefCell;

use super::Cpu;
use super::block::QuantRows;
use super::isa::{Isa, dispatch};
use super::math;
use super::matmul::{Input, balanced_step};
use super::pack::{Body, LANES, PackedWeight};
use crate::experts::{Experts, Group, Routes};
use crate::pool::SendPtr;
use crate::{Buffer, scratch};

thread_local! {
    static QUANT: RefCell<QuantRows> = RefCell::default();
}

/// Where the rows of a group stand among those of all.
struct Rows<'a> {
    group: &'a Group,
    /// First of its rows in inputs and outputs of the products.
    first: usize,
    /// First of its rows in the input of gate and up: one row stands there once for all experts.
    input: usize,
}

/// Panels `from..to` of a group.
struct Task {
    group: usize,
    from: usize,
    to: usize,
}

/// Cuts the panels of all groups into tasks.
fn tasks<'a>(cpu: &Cpu, groups: &[Rows<'_>], weight: impl Fn(usize) -> &'a PackedWeight) -> Vec<Task> {
    let of = |g: &Rows<'_>| weight(g.group.expert);
    let all: usize = groups.iter().map(|g| of(g).panels()).sum();
    let float = groups.iter().any(|g| matches!(of(g).body, Body::Float(_)));
    let step = balanced_step(all, cpu.threads(), if float { 4 } else { 1 });
    let mut tasks = Vec::new();
    for (group, g) in groups.iter().enumerate() {
        let panels = of(g).panels();
        // Equal parts: an expert has few panels, and a short last part would cost as much as a long one.
        let parts = panels.div_ceil(step).max(1);
        let step = panels.div_ceil(parts).next_multiple_of(if float { 4 } else { 1 });
        tasks.extend((0..panels).step_by(step).map(|from| Task {
            group,
            from,
            to: (from + step).min(panels),
        }));
    }
    tasks
}

fn quantised(w: &PackedWeight) -> bool {
    matches!(w.body, Body::Block(_))
}

/// See [`crate::Kernels::experts`].
pub(crate) fn experts(
    cpu: &Cpu,
    x: &[f32],
    routes: &Routes,
    experts: &Experts<PackedWeight, Vec<f32>>,
    y: &mut [f32],
) {
    let (rows, used, hidden, width) = (routes.rows(), routes.used, experts.hidden, experts.width);
    assert!(x.len() >= rows * hidden && y.len() >= rows * hidden, "activations of the experts too short");
    let groups = routes.groups();
    let mut first = 0;
    let groups: Vec<Rows<'_>> = groups
        .iter()
        .map(|group| {
            let rows_of = Rows { group, first, input: if rows == 1 { 0 } else { first } };
            first += group.places.len();
            rows_of
        })
        .collect();
    for g in &groups {
        let expert = &experts.each[g.group.expert];
        for (w, shape) in
            [(&expert.gate, [width, hidden]), (&expert.up, [width, hidden]), (&expert.down, [hidden, width])]
        {
            assert!([w.out_features, w.in_features] == shape, "weights of an expert have its shape");
        }
        if let Some([gate, up, down]) = &expert.bias {
            assert!(gate.len() == width && up.len() == width && down.len() == hidden, "one bias per output");
        }
    }
    let pairs = routes.experts.len();
    let mut gathered = Vec::new();
    let input = if rows == 1 {
        x
    } else {
        gathered = scratch::take(pairs * hidden);
        let places = groups.iter().flat_map(|g| &g.group.places);
        for (place, row) in places.zip(gathered.chunks_exact_mut(hidden)) {
            let from = *place as usize / used * hidden;
            row.copy_from_slice(&x[from..from + hidden]);
        }
        &gathered
    };
    let (mut inner, mut up, mut parts) =
        (scratch::take(pairs * width), scratch::take(pairs * width), scratch::take(pairs * hidden));

    // Gate, up and their product, panel by panel.
    let any = |of: &dyn Fn(usize) -> bool| groups.iter().any(|g| of(g.group.expert));
    let quants = any(&|e| quantised(&experts.each[e].gate) || quantised(&experts.each[e].up));
    let list = tasks(cpu, &groups, |e| &experts.each[e].gate);
    let starts = |of: &dyn Fn(&Rows<'_>) -> usize| -> Vec<(usize, usize)> {
        groups.iter().map(|g| (of(g), of(g) + g.group.places.len())).collect()
    };
    QUANT.with_borrow_mut(|quant| {
        if quants {
            let parts = if rows == 1 { vec![(0, 1)] } else { starts(&|g| g.input) };
            quant.fill_parts(cpu.level, &cpu.pool, input, &parts, hidden);
        }
        let quant = quants.then_some(&*quant);
        let (gates, ups) = (SendPtr(inner.as_mut_ptr()), SendPtr(up.as_mut_ptr()));
        cpu.pool.run(list.len(), &|task| {
            let Task { group, from, to } = list[task];
            let g = &groups[group];
            let (expert, count) = (&experts.each[g.group.expert], g.group.places.len());
            let input =
                Input { level: cpu.level, x: &input[g.input * hidden..], quant, first: g.input, rows: count };
            let columns = from * LANES..(to * LANES).min(width);
            let at = g.first * width + columns.start;
            // SAFETY: rows `first..first + count` of `[pairs, width]` belong to this group and these columns to this
            // task alone; products and gates stay inside them.
            unsafe {
                input.panels(&expert.gate, from, to, gates.get().add(at), width);
                input.panels(&expert.up, from, to, ups.get().add(at), width);
                for row in 0..count {
                    let (gate, up) = (gates.get().add(at + row * width), ups.get().add(at + row * width));
                    if let Some([gate_bias, up_bias, _]) = &expert.bias {
                        add(gate, &gate_bias[columns.clone()]);
                        add(up, &up_bias[columns.clone()]);
                    }
                    let args =
                        math::GateArgs { gate, up, len: columns.len(), activation: experts.activation };
                    math::gated(cpu.level, args);
                }
            }
        });
    });

    // Down.
    let quants = any(&|e| quantised(&experts.each[e].down));
    let list = tasks(cpu, &groups, |e| &experts.each[e].down);
    QUANT.with_borrow_mut(|quant| {
        if quants {
            quant.fill_parts(cpu.level, &cpu.pool, &inner, &starts(&|g| g.first), width);
        }
        let quant = quants.then_some(&*quant);
        let out = SendPtr(parts.as_mut_ptr());
        cpu.pool.run(list.len(), &|task| {
            let Task { group, from, to } = list[task];
            let g = &groups[group];
            let (expert, count) = (&experts.each[g.group.expert], g.group.places.len());
            let input =
                Input { level: cpu.level, x: &inner[g.first * width..], quant, first: g.first, rows: count };
            let columns = from * LANES..(to * LANES).min(hidden);
            let at = g.first * hidden + columns.start;
            // SAFETY: as above, of `[pairs, hidden]`.
            unsafe {
                input.panels(&expert.down, from, to, out.get().add(at), hidden);
                if let Some([_, _, bias]) = &expert.bias {
                    (0..count).for_each(|row| add(out.get().add(at + row * hidden), &bias[columns.clone()]));
                }
            }
        });
    });

    // Where the output for each place stands.
    let mut stands = vec![0usize; pairs];
    for (at, place) in groups.iter().flat_map(|g| &g.group.places).enumerate() {
        stands[*place as usize] = at;
    }
    let out = SendPtr(y.as_mut_ptr());
    cpu.split(rows, used * hidden, &|from, to| {
        for row in from..to {
            let args = SumArgs {
                parts: parts.as_ptr(),
                stands: &stands[row * used..(row + 1) * used],
                weights: &routes.weights[row * used..(row + 1) * used],
                width: hidden,
                // SAFETY: row `row` exists; tasks are disjoint.
                y: unsafe { out.get().add(row * hidden) },
            };
            // SAFETY: as described in `args`.
            unsafe { weighted_sum(cpu.level, args) };
        }
    });
    for mut buffer in [gathered, inner, up, parts] {
        buffer.give_back();
    }
}

/// # Safety
/// `y` holds as many values as `bias`.
unsafe fn add(y: *mut f32, bias: &[f32]) {
    // SAFETY: by the caller.
    let y = unsafe { std::slice::from_raw_parts_mut(y, bias.len()) };
    for (y, b) in y.iter_mut().zip(bias) {
        *y += b;
    }
}

#[derive(Clone, Copy)]
struct SumArgs<'a> {
    /// Rows of `width` values.
    parts: *const f32,
    stands: &'a [usize],
    weights: &'a [f32],
    width: usize,
    y: *mut f32,
}

#[inline(always)]
unsafe fn sum_body<I: Isa>(a: SumArgs<'_>) {
    // SAFETY: `y` holds `width` values, `parts` a row wherever `stands` points.
    unsafe {
        let y = std::slice::from_raw_parts_mut(a.y, a.width);
        y.fill(0.0);
        for (stand, weight) in a.stands.iter().zip(a.weights) {
            let part = std::slice::from_raw_parts(a.parts.add(stand * a.width), a.width);
            for (y, part) in y.iter_mut().zip(part) {
                *y = weight.mul_add(*part, *y);
            }
        }
    }
}
dispatch! { unsafe fn weighted_sum(a: SumArgs<'_>) = sum_body }
