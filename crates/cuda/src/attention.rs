//! Attention of training: both masks as spans, tiles of rows, and the launches.
//!
//! Shape legend: `R` query rows, `C` context slots, `B` own rows, `nh`/`nkv` query/key heads, `hd` head width.

use draftsmith_kernels::train::{AttentionMask, KeyValue, KeyValueMut, Sight, Span, SpanShape, TttShape};

use crate::error::CudaError;
use crate::launcher::{Arg, Launcher};
use crate::memory::{Block, Buf};
use crate::ops::{Cuda, Operands, Place};

/// Own pairs that one launch takes: `PAIRS` of the kernels.
const PAIRS: usize = 8;

/// Sizes of the tiles of one head width, as `ATTEND` of the kernels names them.
#[derive(Clone, Copy)]
struct Tiles {
    /// Head widths up to this.
    width: usize,
    /// Query rows of a tile; keys of a tile of their gradient.
    rows: usize,
    /// Query rows that a tile of keys takes at once.
    step: usize,
    /// Threads of a row.
    lanes: usize,
    forward: &'static str,
    dq: &'static str,
    dkv: &'static str,
}

/// In the tensor cores, from operands rounded to bf16: as `TENSOR_ATTEND` names them.
const TENSOR_TILES: [Tiles; 2] = [
    Tiles {
        width: 64,
        rows: 64,
        step: 32,
        lanes: 2,
        forward: "tensor_attend_64",
        dq: "tensor_attend_dq_64",
        dkv: "tensor_attend_dkv_64",
    },
    Tiles {
        width: 128,
        rows: 64,
        step: 32,
        lanes: 2,
        forward: "tensor_attend_128",
        dq: "tensor_attend_dq_128",
        dkv: "tensor_attend_dkv_128",
    },
];

/// In f32.
const TILES: [Tiles; 3] = [
    Tiles {
        width: 64,
        rows: 32,
        step: 32,
        lanes: 8,
        forward: "attend_64",
        dq: "attend_dq_64",
        dkv: "attend_dkv_64",
    },
    Tiles {
        width: 128,
        rows: 16,
        step: 32,
        lanes: 16,
        forward: "attend_128",
        dq: "attend_dq_128",
        dkv: "attend_dkv_128",
    },
    Tiles {
        width: 256,
        rows: 8,
        step: 16,
        lanes: 16,
        forward: "attend_256",
        dq: "attend_dq_256",
        dkv: "attend_dkv_256",
    },
];

/// A mask and its tables on the device.
struct Plan<L: Launcher> {
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    scale: f32,
    rows: usize,
    tiles: Tiles,
    /// `[R][4]`
    sights: Block<L>,
    /// Tiles of [`Tiles::rows`] and of [`Tiles::step`] query rows: `[T][6]`, and how many.
    by_rows: (Block<L>, usize),
    by_step: (Block<L>, usize),
    /// Everything that some row sees.
    seen: [Span; 2],
    /// Own keys and values are an entry per row and step, not rows that others see.
    diagonals: bool,
}

/// What each row of a training-time test sees of block 0.
fn sights(shape: TttShape<'_>, slots: usize) -> Vec<Sight> {
    let mut all = Vec::with_capacity(shape.slots.len());
    for document in shape.by_document(slots) {
        for row in document.rows {
            let context = Span::new(document.doc.start, shape.slots[row] + 1);
            all.push(Sight { context, own: Span::default() });
        }
    }
    all
}

fn tile_table(shape: &SpanShape<'_>, most: usize) -> Vec<u32> {
    let tiles = shape.tiles(most).into_iter();
    tiles
        .flat_map(|t| [t.first as u32, t.rows as u32, t.context.from, t.context.to, t.own.from, t.own.to])
        .collect()
}

/// The smallest span over both.
fn join(a: Span, b: Span) -> Span {
    match (a.is_empty(), b.is_empty()) {
        (_, true) => a,
        (true, _) => b,
        _ => Span { from: a.from.min(b.from), to: a.to.max(b.to) },
    }
}

impl<L: Launcher> Cuda<L> {
    fn plan(&self, mask: AttentionMask<'_>, context: usize, own: usize) -> Option<Plan<L>> {
        let (found, diagonals);
        let shape = match mask {
            AttentionMask::Spans(shape) => {
                diagonals = false;
                shape
            }
            AttentionMask::Ttt(shape) => {
                diagonals = true;
                let TttShape { heads, kv_heads, head_dim, scale, .. } = shape;
                found = sights(shape, context / (kv_heads * head_dim).max(1));
                SpanShape { sights: &found, heads, kv_heads, head_dim, scale }
            }
        };
        let SpanShape { sights, heads, kv_heads, head_dim, scale } = shape;
        if sights.is_empty() {
            return None;
        }
        let kv_width = kv_heads * head_dim;
        shape.check(context / kv_width, if diagonals { 0 } else { own / kv_width });
        let tensor = TENSOR_TILES.iter().filter(|_| self.operands == Operands::Bf16);
        let tiles = tensor.chain(&TILES).find(|t| head_dim <= t.width);
        let tiles = *self.must(tiles.ok_or(CudaError::WideHeads { found: head_dim }));
        let table: Vec<u32> =
            sights.iter().flat_map(|s| [s.context.from, s.context.to, s.own.from, s.own.to]).collect();
        let on_device = |most: usize| {
            let table = tile_table(&shape, most);
            (self.put_values(&table), table.len() / 6)
        };
        let all = |of: fn(&Sight) -> Span| sights.iter().fold(Span::default(), |all, s| join(all, of(s)));
        Some(Plan {
            heads,
            kv_heads,
            head_dim,
            scale,
            rows: sights.len(),
            tiles,
            sights: self.put_values(&table),
            by_rows: on_device(tiles.rows),
            by_step: on_device(tiles.step),
            seen: [all(|s| s.context), all(|s| s.own)],
            diagonals,
        })
    }

    /// The arguments that every kernel ends with.
    fn layout<'a>(plan: &Plan<L>) -> [Arg<'a, L::Memory>; 4] {
        [
            Arg::I32(plan.heads as i32),
            Arg::I32(plan.kv_heads as i32),
            Arg::I32(plan.head_dim as i32),
            Arg::F32(plan.scale),
        ]
    }

    pub(crate) fn attend_packs(
        &self,
        mask: AttentionMask<'_>,
        q: &Buf<L>,
        (k0, v0): KeyValue<'_, Buf<L>>,
        own: &[KeyValue<'_, Buf<L>>],
        out: &mut Buf<L>,
        lse: &mut Buf<L>,
    ) {
        let Some(plan) = self.plan(mask, k0.capacity.min(v0.capacity), own_capacity(own)) else { return };
        let (rows, heads) = (plan.rows, plan.heads);
        let q_len = rows * heads * plan.head_dim;
        assert!(
            q.capacity >= q_len && out.capacity >= q_len && lse.capacity >= rows * heads,
            "complete rows"
        );
        out.changed();
        lse.changed();
        let [kc, vc] = [k0, v0].map(|b| Arg::Buffer(b.place(0)));
        let (ko, vo) = second(&plan, own);
        let mut args = vec![
            Arg::Buffer(q.place(0)),
            kc,
            vc,
            Arg::Buffer(ko),
            Arg::Buffer(vo),
            Arg::Buffer(Some(plan.sights.at(0))),
            Arg::Buffer(Some(plan.by_rows.0.at(0))),
            Arg::Buffer(out.place(0)),
            Arg::Buffer(lse.place(0)),
        ];
        args.extend(Self::layout(&plan));
        let t = plan.tiles;
        self.launch(t.forward, (plan.by_rows.1, heads), t.rows * t.lanes, &args);
        if !plan.diagonals {
            return;
        }
        for pairs in own.chunks(PAIRS) {
            let mut args = vec![
                Arg::Buffer(q.place(0)),
                Arg::Buffers(places(pairs)),
                Arg::I32(pairs.len() as i32),
                Arg::Buffer(out.place(0)),
                Arg::Buffer(lse.place(0)),
                Arg::I64(rows as i64),
            ];
            args.extend(Self::layout(&plan));
            self.warps(rows * heads, "merge_diagonals", &args);
        }
    }

    #[allow(clippy::too_many_arguments, reason = "the operands of one gradient")]
    pub(crate) fn attend_packs_grad(
        &self,
        mask: AttentionMask<'_>,
        q: &Buf<L>,
        (k0, v0): KeyValue<'_, Buf<L>>,
        own: &[KeyValue<'_, Buf<L>>],
        (out, lse): KeyValue<'_, Buf<L>>,
        dout: &Buf<L>,
        dq: &mut Buf<L>,
        (dk0, dv0): KeyValueMut<'_, Buf<L>>,
        down: Vec<KeyValueMut<'_, Buf<L>>>,
    ) {
        let Some(plan) = self.plan(mask, k0.capacity.min(v0.capacity), own_capacity(own)) else { return };
        assert_eq!(down.len(), own.len(), "one gradient per pair");
        let (rows, heads) = (plan.rows, plan.heads);
        let q_len = rows * heads * plan.head_dim;
        assert!(
            q.capacity.min(out.capacity).min(dout.capacity).min(dq.capacity) >= q_len
                && lse.capacity >= rows * heads,
            "complete rows"
        );
        assert!(dk0.capacity.min(dv0.capacity) >= plan.seen[0].to as usize * plan.kv_heads * plan.head_dim);
        dq.changed();
        dk0.changed();
        dv0.changed();
        // <dO, out> of each row and head: what the softmax subtracts.
        let delta = self.block(rows * heads * 4);
        let args = [
            Arg::Buffer(dout.place(0)),
            Arg::Buffer(out.place(0)),
            Arg::Buffer(Some(delta.at(0))),
            Arg::I64((rows * heads) as i64),
            Arg::I32(plan.head_dim as i32),
        ];
        self.warps(rows * heads, "attend_delta", &args);
        // What each launch reads of the pass.
        let pass = || [Arg::Buffer(dout.place(0)), Arg::Buffer(lse.place(0)), Arg::Buffer(Some(delta.at(0)))];
        if plan.diagonals {
            let mut down = down;
            for (pairs, grads) in own.chunks(PAIRS).zip(down.chunks_mut(PAIRS)) {
                let kv_len = rows * plan.kv_heads * plan.head_dim;
                for (dk, dv) in grads.iter_mut() {
                    assert!(dk.capacity.min(dv.capacity) >= kv_len, "complete gradients");
                    dk.changed();
                    dv.changed();
                }
                let mut all: Vec<Place<'_, L>> = vec![None; 2 * PAIRS];
                for (i, (dk, dv)) in grads.iter().enumerate() {
                    (all[i], all[PAIRS + i]) = (dk.place(0), dv.place(0));
                }
                let mut args = vec![
                    Arg::Buffer(q.place(0)),
                    Arg::Buffers(places(pairs)),
                    Arg::Buffers(all),
                    Arg::I32(pairs.len() as i32),
                ];
                args.extend(pass());
                args.extend([Arg::Buffer(dq.place(0)), Arg::I64(rows as i64)]);
                args.extend(Self::layout(&plan));
                self.warps(rows * plan.kv_heads, "diagonal_grads", &args);
            }
        } else {
            let (dk, dv) = down.into_iter().next().expect("blocks have one pair of own keys and values");
            dk.changed();
            dv.changed();
            let (k, v) = own[0];
            self.attend_dkv(&plan, 1, q, (k, v), pass(), (dk, dv));
        }
        self.attend_dkv(&plan, 0, q, (k0, v0), pass(), (dk0, dv0));
        let (ko, vo) = second(&plan, own);
        let mut args = vec![
            Arg::Buffer(q.place(0)),
            Arg::Buffer(k0.place(0)),
            Arg::Buffer(v0.place(0)),
            Arg::Buffer(ko),
            Arg::Buffer(vo),
            Arg::Buffer(Some(plan.sights.at(0))),
            Arg::Buffer(Some(plan.by_rows.0.at(0))),
        ];
        args.extend(pass());
        args.push(Arg::Buffer(dq.place(0)));
        args.extend(Self::layout(&plan));
        let t = plan.tiles;
        self.launch(t.dq, (plan.by_rows.1, heads), t.rows * t.lanes, &args);
    }

    /// Gradients of the keys and values of the context (`part` 0) or of the own ones (1).
    fn attend_dkv(
        &self,
        plan: &Plan<L>,
        part: usize,
        q: &Buf<L>,
        (k, v): KeyValue<'_, Buf<L>>,
        pass: [Arg<'_, L::Memory>; 3],
        (dk, dv): KeyValueMut<'_, Buf<L>>,
    ) {
        let seen = plan.seen[part];
        assert!(
            dk.capacity.min(dv.capacity) >= seen.to as usize * plan.kv_heads * plan.head_dim,
            "complete gradients"
        );
        let mut args = vec![
            Arg::I32(part as i32),
            Arg::U32(seen.from),
            Arg::U32(seen.to),
            Arg::Buffer(q.place(0)),
            Arg::Buffer(k.place(0)),
            Arg::Buffer(v.place(0)),
            Arg::Buffer(Some(plan.sights.at(0))),
            Arg::Buffer(Some(plan.by_step.0.at(0))),
            Arg::I32(plan.by_step.1 as i32),
        ];
        args.extend(pass);
        args.extend([Arg::Buffer(dk.place(0)), Arg::Buffer(dv.place(0))]);
        args.extend(Self::layout(plan));
        let t = plan.tiles;
        self.launch(t.dkv, (seen.len().div_ceil(t.rows), plan.kv_heads), t.rows * t.lanes, &args);
    }
}

fn own_capacity<L: Launcher>(own: &[KeyValue<'_, Buf<L>>]) -> usize {
    own.iter().map(|(k, v)| k.capacity.min(v.capacity)).min().unwrap_or(0)
}

/// Keys and values of the second span; a training-time test has none there.
fn second<'a, L: Launcher>(plan: &Plan<L>, own: &[KeyValue<'a, Buf<L>>]) -> (Place<'a, L>, Place<'a, L>) {
    match own {
        [(k, v)] if !plan.diagonals => (k.place(0), v.place(0)),
        _ if !plan.diagonals => panic!("blocks have one pair of own keys and values"),
        _ => (None, None),
    }
}

/// Keys, then values, of at most [`PAIRS`] pairs.
fn places<'a, L: Launcher>(pairs: &[KeyValue<'a, Buf<L>>]) -> Vec<Place<'a, L>> {
    let mut all = vec![None; 2 * PAIRS];
    for (i, (k, v)) in pairs.iter().enumerate() {
        (all[i], all[PAIRS + i]) = (k.place(0), v.place(0));
    }
    all
}
