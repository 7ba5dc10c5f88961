//! The small gates of Markov heads, on slices: what a proposal carries from one of its tokens to the next.
//!
//! Shape legend: `R` rows, `W` width of the state.

/// Which gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cell {
    /// `a[R, W]`, `b[R, W]` → `σ(a) b` `[R, W]`.
    Gate,
    /// `a[R, 3W]` = `g`, `c`, `o` side by side, the state `b[R, W]` → the new state `σ(g) b + (1 - σ(g)) tanh(c)` and
    /// the output `tanh(o)` side by side `[R, 2W]`.
    Recurrent,
}

impl Cell {
    /// Width of `a` for a state of `width`.
    pub fn input_width(self, width: usize) -> usize {
        match self {
            Cell::Gate => width,
            Cell::Recurrent => 3 * width,
        }
    }

    /// Width of the result for a state of `width`.
    pub fn output_width(self, width: usize) -> usize {
        match self {
            Cell::Gate => width,
            Cell::Recurrent => 2 * width,
        }
    }
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

/// Runs a gate; see [`Cell`].
pub fn forward(cell: Cell, (a, b): (&[f32], &[f32]), rows: usize, width: usize, y: &mut [f32]) {
    match cell {
        Cell::Gate => {
            for ((y, a), b) in y[..rows * width].iter_mut().zip(a).zip(b) {
                *y = sigmoid(*a) * b;
            }
        }
        Cell::Recurrent => {
            for row in 0..rows {
                let (a, b) = (&a[row * 3 * width..][..3 * width], &b[row * width..][..width]);
                let y = &mut y[row * 2 * width..][..2 * width];
                for i in 0..width {
                    let (gate, candidate) = (sigmoid(a[i]), a[width + i].tanh());
                    y[i] = gate * b[i] + (1.0 - gate) * candidate;
                    y[width + i] = a[2 * width + i].tanh();
                }
            }
        }
    }
}

/// Gradient of [`forward`], overwriting.
pub fn backward(
    cell: Cell,
    (a, b): (&[f32], &[f32]),
    dy: &[f32],
    rows: usize,
    width: usize,
    (da, db): (&mut [f32], &mut [f32]),
) {
    match cell {
        Cell::Gate => {
            for i in 0..rows * width {
                let gate = sigmoid(a[i]);
                da[i] = dy[i] * b[i] * gate * (1.0 - gate);
                db[i] = dy[i] * gate;
            }
        }
        Cell::Recurrent => {
            for row in 0..rows {
                let (a, b) = (&a[row * 3 * width..][..3 * width], &b[row * width..][..width]);
                let dy = &dy[row * 2 * width..][..2 * width];
                let (da, db) = (&mut da[row * 3 * width..][..3 * width], &mut db[row * width..][..width]);
                for i in 0..width {
                    let (gate, candidate, output) =
                        (sigmoid(a[i]), a[width + i].tanh(), a[2 * width + i].tanh());
                    da[i] = dy[i] * (b[i] - candidate) * gate * (1.0 - gate);
                    da[width + i] = dy[i] * (1.0 - gate) * (1.0 - candidate * candidate);
                    da[2 * width + i] = dy[width + i] * (1.0 - output * output);
                    db[i] = dy[i] * gate;
                }
            }
        }
    }
}
