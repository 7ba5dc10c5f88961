// Row-wise operations and their gradients: norms, RoPE, gating, copies. R rows of `width` values, row-major.

KERNEL(fill, OUT(float) y, float value, i64 count) {
    for (i64 i = BLOCK_X * THREADS + THREAD; i < count; i += BLOCKS_X * THREADS) y[i] = value;
}

KERNEL(round_to_bf16, IN(float) x, OUT(bf16) y, i64 count) {
    for (i64 i = BLOCK_X * THREADS + THREAD; i < count; i += BLOCKS_X * THREADS) y[i] = to_bf16(x[i]);
}

KERNEL(widen_bf16, IN(bf16) x, OUT(float) y, i64 count) {
    for (i64 i = BLOCK_X * THREADS + THREAD; i < count; i += BLOCKS_X * THREADS) y[i] = from_bf16(x[i]);
}

KERNEL(sum, IN(float) a, IN(float) b, OUT(float) y, i64 count) {
    for (i64 i = BLOCK_X * THREADS + THREAD; i < count; i += BLOCKS_X * THREADS) y[i] = a[i] + b[i];
}

KERNEL(add_to, IN(float) x, OUT(float) y, i64 count, int accumulate) {
    for (i64 i = BLOCK_X * THREADS + THREAD; i < count; i += BLOCKS_X * THREADS) {
        float value = x[i];
        if (accumulate) value += y[i];
        y[i] = value;
    }
}

// One block per row.
KERNEL(rms_norm, IN(float) x, IN(float) w, OUT(float) y, int width, float eps) {
    SHARED(float, room, 8);
    i64 at = BLOCK_X * width;
    float squares = 0.0f;
    for (int c = THREAD; c < width; c += THREADS) {
        float value = x[at + c];
        squares += value * value;
    }
    float scale = 1.0f / sqrtf(block_sum(squares, room) / (float)width + eps);
    for (int c = THREAD; c < width; c += THREADS) y[at + c] = x[at + c] * scale * w[c];
}

// One block per row: 1 / rms of the row, and `dx` if it is wanted.
KERNEL(rms_norm_dx, IN(float) x, IN(float) w, IN(float) dy, OUT(float) dx, OUT(float) inverse, int width, float eps,
       int accumulate) {
    SHARED(float, room, 8);
    i64 at = BLOCK_X * width;
    float squares = 0.0f, through = 0.0f;
    for (int c = THREAD; c < width; c += THREADS) {
        float value = x[at + c];
        squares += value * value;
        through += w[c] * dy[at + c] * value;
    }
    float scale = 1.0f / sqrtf(block_sum(squares, room) / (float)width + eps);
    // mean(w dy x^): the part of the gradient that goes through the root mean square
    through = block_sum(through, room) * scale * scale / (float)width;
    if (THREAD == 0) inverse[BLOCK_X] = scale;
    if (!HAS(dx)) return;
    for (int c = THREAD; c < width; c += THREADS) {
        float value = scale * (w[c] * dy[at + c] - x[at + c] * through);
        if (accumulate) value += dx[at + c];
        dx[at + c] = value;
    }
}

// Block (x, y): columns of x, rows y * 64 and on, which add up to one row of `part`.
KERNEL(rms_norm_dw, IN(float) x, IN(float) dy, IN(float) inverse, OUT(float) part, i64 rows, int width) {
    int c = (int)(BLOCK_X * THREADS + THREAD);
    if (c >= width) return;
    i64 end = BLOCK_Y * 64 + 64 < rows ? BLOCK_Y * 64 + 64 : rows;
    float sum = 0.0f;
    for (i64 row = BLOCK_Y * 64; row < end; row++) sum += dy[row * width + c] * x[row * width + c] * inverse[row];
    part[BLOCK_Y * width + c] = sum;
}

// dst[c] += the column's values of all rows, in their order.
KERNEL(fold_rows, IN(float) part, OUT(float) dst, i64 rows, i64 width) {
    i64 c = BLOCK_X * THREADS + THREAD;
    if (c >= width) return;
    float sum = dst[c];
    for (i64 row = 0; row < rows; row++) sum += part[row * width + c];
    dst[c] = sum;
}

// Pairs `i` and `half + i` of every head turned by their position; `angles` holds a row of cosines and sines per position.
KERNEL(rotate, IN(float) x, IN(float) angles, IN(u32) positions, OUT(float) y, i64 rows, int heads, int half,
       float turn, int accumulate) {
    i64 count = rows * heads * half;
    for (i64 n = BLOCK_X * THREADS + THREAD; n < count; n += BLOCKS_X * THREADS) {
        i64 head = n / half;
        int i = (int)(n % half);
        i64 row = head / heads;
        u32 position = positions[row];
        i64 angle = (i64)position * 2 * half;
        float cosine = angles[angle + i], sine = turn * angles[angle + half + i];
        i64 at = head * 2 * half + i;
        float a = x[at], b = x[at + half];
        float ya = a * cosine - b * sine, yb = b * cosine + a * sine;
        if (accumulate) {
            ya += y[at];
            yb += y[at + half];
        }
        y[at] = ya;
        y[at + half] = yb;
    }
}

#define SILU 0
#define GELU_TANH 1
#define CLAMPED_SWIGLU 2
#define GELU 1.5957692f

DEVICE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

struct Gated {
    float value, slope, up;
    bool gate_passes, up_passes;
};

// Value and slope of the activation, what it makes of `up`, and which of both pass a gradient on.
DEVICE Gated activate(int activation, float gate, float up, float alpha, float limit) {
    Gated g;
    g.gate_passes = true;
    g.up_passes = true;
    g.up = up;
    if (activation == CLAMPED_SWIGLU) {
        g.gate_passes = gate <= limit;
        g.up_passes = fabsf(up) <= limit;
        // Comparisons that leave NaN as it is.
        float x = gate > limit ? limit : gate;
        g.up = (up > limit ? limit : up < -limit ? -limit : up) + 1.0f;
        float s = sigmoid(alpha * x);
        g.value = x * s;
        g.slope = s + alpha * x * s * (1.0f - s);
    } else if (activation == GELU_TANH) {
        // 0.5 x (1 + tanh(u)) = x sigmoid(2u)
        float s = sigmoid(GELU * (gate + 0.044715f * gate * gate * gate));
        g.value = gate * s;
        g.slope = s + gate * s * (1.0f - s) * GELU * (1.0f + 3.0f * 0.044715f * gate * gate);
    } else {
        float s = sigmoid(gate);
        g.value = gate * s;
        g.slope = s * (1.0f + gate * (1.0f - s));
    }
    return g;
}

KERNEL(gate, IN(float) gate_in, IN(float) up, OUT(float) y, i64 count, int activation, float alpha, float limit) {
    for (i64 i = BLOCK_X * THREADS + THREAD; i < count; i += BLOCKS_X * THREADS) {
        Gated g = activate(activation, gate_in[i], up[i], alpha, limit);
        y[i] = g.value * g.up;
    }
}

KERNEL(gate_grad, IN(float) gate_in, IN(float) up, IN(float) dy, OUT(float) dgate, OUT(float) dup, i64 count,
       int activation, float alpha, float limit) {
    for (i64 i = BLOCK_X * THREADS + THREAD; i < count; i += BLOCKS_X * THREADS) {
        Gated g = activate(activation, gate_in[i], up[i], alpha, limit);
        float d = dy[i];
        dgate[i] = g.gate_passes ? d * g.up * g.slope : 0.0f;
        dup[i] = g.up_passes ? d * g.value : 0.0f;
    }
}

KERNEL(copy_cols, IN(float) x, i64 x_stride, i64 x_from, OUT(float) y, i64 y_stride, i64 y_from, i64 rows, i64 width,
       int accumulate) {
    for (i64 i = BLOCK_X * THREADS + THREAD; i < rows * width; i += BLOCKS_X * THREADS) {
        i64 row = i / width, c = i % width;
        i64 to = row * y_stride + y_from + c;
        float value = x[row * x_stride + x_from + c];
        if (accumulate) value += y[to];
        y[to] = value;
    }
}

// y[i] = x[rows[i]] * scale
KERNEL(gather, IN(float) x, IN(u32) rows, OUT(float) y, i64 count, i64 width, float scale) {
    for (i64 i = BLOCK_X * THREADS + THREAD; i < count * width; i += BLOCKS_X * THREADS) {
        u32 row = rows[i / width];
        y[i] = x[(i64)row * width + i % width] * scale;
    }
}

// x[places[g]] += the rows order[starts[g]..starts[g + 1]] of y times scale, in that order. Places are distinct, so no two
// blocks write one row.
KERNEL(add_rows, IN(float) y, IN(u32) places, IN(u32) starts, IN(u32) order, OUT(float) x, i64 width, float scale) {
    u32 place = places[BLOCK_X];
    u32 from = starts[BLOCK_X], to = starts[BLOCK_X + 1];
    for (i64 c = THREAD; c < width; c += THREADS) {
        float sum = x[(i64)place * width + c];
        for (u32 i = from; i < to; i++) {
            u32 row = order[i];
            sum += y[(i64)row * width + c] * scale;
        }
        x[(i64)place * width + c] = sum;
    }
}

#define CELL_GATE 0

// Gates of Markov heads: see `draftsmith_kernels::Cell`.
KERNEL(cell, int kind, IN(float) a, IN(float) b, OUT(float) y, i64 rows, i64 width) {
    for (i64 i = BLOCK_X * THREADS + THREAD; i < rows * width; i += BLOCKS_X * THREADS) {
        i64 row = i / width, c = i % width;
        if (kind == CELL_GATE) {
            y[i] = sigmoid(a[i]) * b[i];
        } else {
            i64 at = row * 3 * width + c, to = row * 2 * width + c;
            float open = sigmoid(a[at]);
            y[to] = open * b[i] + (1.0f - open) * tanhf(a[at + width]);
            y[to + width] = tanhf(a[at + 2 * width]);
        }
    }
}

KERNEL(cell_grad, int kind, IN(float) a, IN(float) b, IN(float) dy, OUT(float) da, OUT(float) db, i64 rows,
       i64 width) {
    for (i64 i = BLOCK_X * THREADS + THREAD; i < rows * width; i += BLOCKS_X * THREADS) {
        i64 row = i / width, c = i % width;
        if (kind == CELL_GATE) {
            float open = sigmoid(a[i]), d = dy[i];
            da[i] = d * b[i] * open * (1.0f - open);
            db[i] = d * open;
        } else {
            i64 at = row * 3 * width + c, to = row * 2 * width + c;
            float open = sigmoid(a[at]), candidate = tanhf(a[at + width]), output = tanhf(a[at + 2 * width]);
            float dstate = dy[to], doutput = dy[to + width];
            da[at] = dstate * (b[i] - candidate) * open * (1.0f - open);
            da[at + width] = dstate * (1.0f - open) * (1.0f - candidate * candidate);
            da[at + 2 * width] = doutput * (1.0f - output * output);
            db[i] = dstate * open;
        }
    }
}

#define KEPT_BF16 0
#define KEPT_BLOCK 32

// The scale of a block of a kept state whose largest magnitude is `most`: a 127th of that, rounded up to bf16.
DEVICE float kept_scale(float most) {
    float exact = most / 127.0f;
    union { float f; u32 u; } bits;
    bits.f = exact;
    bits.u &= 0xffff0000u;
    if (bits.f < exact) bits.u += 0x10000u;
    return bits.f;
}

// A warp per row. A state of each row as the target cache gives it back, bit for bit: see `cache::RowEncoder` of
// draftsmith-formats. `unfit[row]` is the first state of a row with a value that cannot be kept, or NO_ID.
KERNEL(keep_state, IN(float) x, OUT(float) y, OUT(u32) unfit, i64 rows, int width, i64 stride, u32 state, int kind) {
    i64 row = (BLOCK_X * THREADS + THREAD) / 32;
    if (row >= rows) return;
    int lane = THREAD % 32;
    float wrong = 0.0f;
    for (int c = lane; c - lane < width; c += KEPT_BLOCK) {
        float value = 0.0f, kept;
        if (c < width) value = x[row * width + c];
        if (!(fabsf(value) <= 3.3e38f)) wrong = 1.0f;
        if (kind == KEPT_BF16) {
            kept = from_bf16(to_bf16(value));
        } else {
            float most = warp_max(fabsf(value)), scale = kept_scale(most);
            float inverse = most > 0.0f ? 1.0f / scale : 0.0f;
            // That of a subnormal scale is infinite: such a block is zero for every purpose.
            if (!(inverse < -MINUS_INFINITY)) inverse = 0.0f;
            // By way of an integer, which has no negative zero.
            kept = (float)(int)rintf(value * inverse) * scale;
        }
        if (c < width) y[row * stride + c] = kept;
    }
    wrong = warp_max(wrong);
    if (lane > 0) return;
    u32 first = NO_ID;
    if (state > 0) first = unfit[row];
    if (first == NO_ID && wrong > 0.0f) first = state;
    unfit[row] = first;
}
