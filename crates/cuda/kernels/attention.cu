// Attention of training in tiles, without logits in memory.
//
// Every query row sees a span of the context and a span of the own keys (`sights`: four numbers a row). A training-time
// test has spans of the context alone; its diagonals, an own key and value for each row, are merged by the log-sum-exp.
// A tile is a range of query rows with the union of what they see (six numbers a tile). Gradients are computed twice over,
// per row tile and per key tile, so that no two blocks add to one place.
//
// D is the head width rounded up to 64, 128 or 256; Q and N are the rows of a tile and the keys taken at once.

#define SIGHT 4
#define TILE 6

// Copies `count` rows of a head into shared memory, `D` wide; zeros behind the head and the rows.
template <int D, class Source, class Target>
DEVICE void load_rows(Source x, i64 first, int count, int most, i64 stride, i64 column, int width, Target to) {
    UNROLL_SOME
    for (int i = THREAD; i < most * D; i += THREADS) {
        int row = i / D, c = i % D;
        float value = 0.0f;
        if (row < count && c < width) value = x[(first + row) * stride + column + c];
        to[row * (D + 1) + c] = value;
    }
}

// sums[i] = row `row` of a times row `first + i * step` of b.
template <int D, int COUNT, class A, class B>
DEVICE void dot_rows(A a, int row, B b, int first, int step, float *sums) {
    UNROLL
    for (int i = 0; i < COUNT; i++) sums[i] = 0.0f;
    UNROLL_SOME
    for (int c = 0; c < D; c++) {
        float value = a[row * (D + 1) + c];
        UNROLL
        for (int i = 0; i < COUNT; i++) sums[i] += value * b[(first + i * step) * (D + 1) + c];
    }
}

// sums[i] += row `row` of weights[.., N] times column `lane + i * LANES` of values[N, D].
template <int D, int N, int LANES, class W, class V>
DEVICE void mix_rows(W weights, int row, V values, int lane, float *sums) {
    UNROLL_NONE
    for (int n = 0; n < N; n++) {
        float weight = weights[row * (N + 1) + n];
        UNROLL
        for (int i = 0; i < D / LANES; i++) sums[i] += weight * values[n * (D + 1) + lane + i * LANES];
    }
}

template <int WIDTH> DEVICE float lanes_sum(float value) {
    UNROLL
    for (int mask = WIDTH / 2; mask > 0; mask >>= 1) value += LANE_XOR(value, mask);
    return value;
}

template <int WIDTH> DEVICE float lanes_max(float value) {
    UNROLL
    for (int mask = WIDTH / 2; mask > 0; mask >>= 1) value = fmaxf(value, LANE_XOR(value, mask));
    return value;
}

// Block (tile, head). Q * LANES threads: LANES of them share a query row.
template <int D, int Q, int N, int LANES>
DEVICE void attend_tile(IN(float) q, IN(float) kc, IN(float) vc, IN(float) ko, IN(float) vo, IN(u32) sights,
                        IN(u32) tiles, OUT(float) out, OUT(float) lse, int heads, int kv_heads, int width,
                        float scale) {
    SHARED(float, q_rows, Q *(D + 1));
    SHARED(float, kv_rows, N *(D + 1));
    SHARED(float, probs, Q *(N + 1));
    const int COLUMNS = D / LANES, KEYS = N / LANES;
    int head = (int)BLOCK_Y, kv = head / (heads / kv_heads);
    i64 q_stride = (i64)heads * width, kv_stride = (i64)kv_heads * width;
    i64 tile = BLOCK_X * TILE;
    u32 first = tiles[tile], rows = tiles[tile + 1];
    int row = THREAD / LANES, lane = THREAD % LANES;
    bool live = row < (int)rows;
    load_rows<D>(q, first, (int)rows, Q, q_stride, (i64)head * width, width, q_rows);
    float mix[COLUMNS];
    UNROLL
    for (int i = 0; i < COLUMNS; i++) mix[i] = 0.0f;
    float top = MINUS_INFINITY, total = 0.0f;
    for (int part = 0; part < 2; part++) {
        u32 from = tiles[tile + 2 + 2 * part], to = tiles[tile + 3 + 2 * part];
        u32 seen_from = 0, seen_to = 0;
        if (live) {
            seen_from = sights[(first + row) * SIGHT + 2 * part];
            seen_to = sights[(first + row) * SIGHT + 2 * part + 1];
        }
        for (u32 key = from; key < to; key += N) {
            int count = to - key < N ? (int)(to - key) : N;
            SYNC();
            load_rows<D>(part ? ko : kc, key, count, N, kv_stride, (i64)kv * width, width, kv_rows);
            SYNC();
            float logits[KEYS];
            float most = top;
            dot_rows<D, KEYS>(q_rows, row, kv_rows, lane, LANES, logits);
            UNROLL
            for (int i = 0; i < KEYS; i++) {
                u32 at = key + lane + i * LANES;
                bool seen = at >= seen_from && at < seen_to;
                logits[i] = seen ? scale * logits[i] : MINUS_INFINITY;
                most = fmaxf(most, logits[i]);
            }
            most = lanes_max<LANES>(most);
            // Nothing seen so far: no term, and nothing to scale.
            bool any = most > MINUS_INFINITY;
            float keep = any ? expf(top - most) : 1.0f, sum = 0.0f;
            UNROLL
            for (int i = 0; i < KEYS; i++) {
                float p = any ? expf(logits[i] - most) : 0.0f;
                sum += p;
                probs[row * (N + 1) + lane + i * LANES] = p;
            }
            total = total * keep + lanes_sum<LANES>(sum);
            top = most;
            SYNC();
            load_rows<D>(part ? vo : vc, key, count, N, kv_stride, (i64)kv * width, width, kv_rows);
            SYNC();
            UNROLL
            for (int i = 0; i < COLUMNS; i++) mix[i] *= keep;
            mix_rows<D, N, LANES>(probs, row, kv_rows, lane, mix);
        }
    }
    if (!live) return;
    float inverse = total > 0.0f ? 1.0f / total : 0.0f;
    i64 at = (first + row) * q_stride + (i64)head * width;
    UNROLL
    for (int i = 0; i < COLUMNS; i++) {
        int c = lane + i * LANES;
        if (c < width) out[at + c] = mix[i] * inverse;
    }
    if (lane == 0) lse[(i64)(first + row) * heads + head] = total > 0.0f ? top + logf(total) : 0.0f;
}

// Block (tile, head): the gradient of the queries of a tile, added to.
template <int D, int Q, int N, int LANES>
DEVICE void attend_dq_tile(IN(float) q, IN(float) kc, IN(float) vc, IN(float) ko, IN(float) vo, IN(u32) sights,
                           IN(u32) tiles, IN(float) dout, IN(float) lse, IN(float) delta, OUT(float) dq, int heads,
                           int kv_heads, int width, float scale) {
    SHARED(float, q_rows, Q *(D + 1));
    SHARED(float, d_rows, Q *(D + 1));
    SHARED(float, kv_rows, N *(D + 1));
    SHARED(float, dlogits, Q *(N + 1));
    const int COLUMNS = D / LANES, KEYS = N / LANES;
    int head = (int)BLOCK_Y, kv = head / (heads / kv_heads);
    i64 q_stride = (i64)heads * width, kv_stride = (i64)kv_heads * width;
    i64 tile = BLOCK_X * TILE;
    u32 first = tiles[tile], rows = tiles[tile + 1];
    int row = THREAD / LANES, lane = THREAD % LANES;
    bool live = row < (int)rows;
    load_rows<D>(q, first, (int)rows, Q, q_stride, (i64)head * width, width, q_rows);
    load_rows<D>(dout, first, (int)rows, Q, q_stride, (i64)head * width, width, d_rows);
    float own_lse = 0.0f, own_delta = 0.0f;
    if (live) {
        own_lse = lse[(i64)(first + row) * heads + head];
        own_delta = delta[(i64)(first + row) * heads + head];
    }
    float sums[COLUMNS];
    UNROLL
    for (int i = 0; i < COLUMNS; i++) sums[i] = 0.0f;
    for (int part = 0; part < 2; part++) {
        u32 from = tiles[tile + 2 + 2 * part], to = tiles[tile + 3 + 2 * part];
        u32 seen_from = 0, seen_to = 0;
        if (live) {
            seen_from = sights[(first + row) * SIGHT + 2 * part];
            seen_to = sights[(first + row) * SIGHT + 2 * part + 1];
        }
        for (u32 key = from; key < to; key += N) {
            int count = to - key < N ? (int)(to - key) : N;
            SYNC();
            load_rows<D>(part ? vo : vc, key, count, N, kv_stride, (i64)kv * width, width, kv_rows);
            SYNC();
            float slopes[KEYS];
            dot_rows<D, KEYS>(d_rows, row, kv_rows, lane, LANES, slopes);
            SYNC();
            load_rows<D>(part ? ko : kc, key, count, N, kv_stride, (i64)kv * width, width, kv_rows);
            SYNC();
            float logits[KEYS];
            dot_rows<D, KEYS>(q_rows, row, kv_rows, lane, LANES, logits);
            UNROLL
            for (int i = 0; i < KEYS; i++) {
                u32 at = key + lane + i * LANES;
                bool seen = at >= seen_from && at < seen_to;
                float d = 0.0f;
                if (seen) d = scale * expf(scale * logits[i] - own_lse) * (slopes[i] - own_delta);
                dlogits[row * (N + 1) + lane + i * LANES] = d;
            }
            SYNC();
            mix_rows<D, N, LANES>(dlogits, row, kv_rows, lane, sums);
        }
    }
    if (!live) return;
    i64 at = (first + row) * q_stride + (i64)head * width;
    UNROLL
    for (int i = 0; i < COLUMNS; i++) {
        int c = lane + i * LANES;
        if (c < width) dq[at + c] += sums[i];
    }
}

// Block (keys of `Q`, key head): the gradients of a tile of keys and values, added to. `part` says which of both spans the
// keys belong to; `tiles` are of at most N query rows.
template <int D, int Q, int N, int LANES>
DEVICE void attend_dkv_tile(int part, u32 keys_from, u32 keys_to, IN(float) q, IN(float) k, IN(float) v,
                            IN(u32) sights, IN(u32) tiles, int tile_count, IN(float) dout, IN(float) lse,
                            IN(float) delta, OUT(float) dk, OUT(float) dv, int heads, int kv_heads, int width,
                            float scale) {
    SHARED(float, k_rows, Q *(D + 1));
    SHARED(float, v_rows, Q *(D + 1));
    SHARED(float, q_rows, N *(D + 1));
    SHARED(float, probs, Q *(N + 1));
    SHARED(float, dlogits, Q *(N + 1));
    const int COLUMNS = D / LANES, ROWS = N / LANES;
    int kv = (int)BLOCK_Y, group = heads / kv_heads;
    i64 q_stride = (i64)heads * width, kv_stride = (i64)kv_heads * width;
    u32 first_key = keys_from + (u32)BLOCK_X * Q;
    u32 last_key = keys_to - first_key < Q ? keys_to : first_key + Q;
    int key = THREAD / LANES, lane = THREAD % LANES;
    u32 at_key = first_key + key;
    bool live = at_key < last_key;
    load_rows<D>(k, first_key, (int)(last_key - first_key), Q, kv_stride, (i64)kv * width, width, k_rows);
    load_rows<D>(v, first_key, (int)(last_key - first_key), Q, kv_stride, (i64)kv * width, width, v_rows);
    float sum_k[COLUMNS], sum_v[COLUMNS];
    UNROLL
    for (int i = 0; i < COLUMNS; i++) {
        sum_k[i] = 0.0f;
        sum_v[i] = 0.0f;
    }
    for (int tile = 0; tile < tile_count; tile++) {
        u32 from = tiles[tile * TILE + 2 + 2 * part], to = tiles[tile * TILE + 3 + 2 * part];
        if (from >= last_key || to <= first_key) continue;
        u32 first = tiles[tile * TILE], rows = tiles[tile * TILE + 1];
        for (int head = kv * group; head < (kv + 1) * group; head++) {
            SYNC();
            load_rows<D>(q, first, (int)rows, N, q_stride, (i64)head * width, width, q_rows);
            SYNC();
            float p[ROWS], slopes[ROWS];
            dot_rows<D, ROWS>(k_rows, key, q_rows, lane, LANES, p);
            UNROLL
            for (int i = 0; i < ROWS; i++) {
                u32 row = lane + i * LANES;
                bool seen = false;
                if (live && row < rows) {
                    u32 seen_from = sights[(first + row) * SIGHT + 2 * part];
                    u32 seen_to = sights[(first + row) * SIGHT + 2 * part + 1];
                    seen = at_key >= seen_from && at_key < seen_to;
                }
                p[i] = seen ? expf(scale * p[i] - lse[(i64)(first + row) * heads + head]) : 0.0f;
                probs[key * (N + 1) + row] = p[i];
            }
            SYNC();
            load_rows<D>(dout, first, (int)rows, N, q_stride, (i64)head * width, width, q_rows);
            SYNC();
            dot_rows<D, ROWS>(v_rows, key, q_rows, lane, LANES, slopes);
            UNROLL
            for (int i = 0; i < ROWS; i++) {
                u32 row = lane + i * LANES;
                float d = 0.0f;
                if (p[i] != 0.0f) d = scale * p[i] * (slopes[i] - delta[(i64)(first + row) * heads + head]);
                dlogits[key * (N + 1) + row] = d;
            }
            mix_rows<D, N, LANES>(probs, key, q_rows, lane, sum_v);
            SYNC();
            load_rows<D>(q, first, (int)rows, N, q_stride, (i64)head * width, width, q_rows);
            SYNC();
            mix_rows<D, N, LANES>(dlogits, key, q_rows, lane, sum_k);
        }
    }
    if (!live) return;
    i64 at = (i64)at_key * kv_stride + (i64)kv * width;
    UNROLL
    for (int i = 0; i < COLUMNS; i++) {
        int c = lane + i * LANES;
        if (c < width) {
            dk[at + c] += sum_k[i];
            dv[at + c] += sum_v[i];
        }
    }
}

#define ATTEND(D, Q, N, LANES)                                                                                         \
    KERNEL(attend_##D, IN(float) q, IN(float) kc, IN(float) vc, IN(float) ko, IN(float) vo, IN(u32) sights,            \
           IN(u32) tiles, OUT(float) out, OUT(float) lse, int heads, int kv_heads, int width, float scale) {           \
        attend_tile<D, Q, N, LANES>(q, kc, vc, ko, vo, sights, tiles, out, lse, heads, kv_heads, width, scale);        \
    }                                                                                                                  \
    KERNEL(attend_dq_##D, IN(float) q, IN(float) kc, IN(float) vc, IN(float) ko, IN(float) vo, IN(u32) sights,         \
           IN(u32) tiles, IN(float) dout, IN(float) lse, IN(float) delta, OUT(float) dq, int heads, int kv_heads,      \
           int width, float scale) {                                                                                   \
        attend_dq_tile<D, Q, N, LANES>(q, kc, vc, ko, vo, sights, tiles, dout, lse, delta, dq, heads, kv_heads, width, \
                                       scale);                                                                         \
    }                                                                                                                  \
    KERNEL(attend_dkv_##D, int part, u32 keys_from, u32 keys_to, IN(float) q, IN(float) k, IN(float) v,                \
           IN(u32) sights, IN(u32) tiles, int tile_count, IN(float) dout, IN(float) lse, IN(float) delta,              \
           OUT(float) dk, OUT(float) dv, int heads, int kv_heads, int width, float scale) {                            \
        attend_dkv_tile<D, Q, N, LANES>(part, keys_from, keys_to, q, k, v, sights, tiles, tile_count, dout, lse,       \
                                        delta, dk, dv, heads, kv_heads, width, scale);                                 \
    }

// Tiles of query rows, keys at a time, threads of a row; Q * LANES threads in a block. `TILES` of the host says the same.
ATTEND(64, 32, 32, 8)
ATTEND(128, 16, 32, 16)
ATTEND(256, 8, 16, 16)

// delta[row, head] = <dout, out>: what the softmax subtracts. A warp per row and head.
KERNEL(attend_delta, IN(float) dout, IN(float) out, OUT(float) delta, i64 count, int width) {
    i64 n = (BLOCK_X * THREADS + THREAD) / 32;
    int lane = THREAD % 32;
    float sum = 0.0f;
    if (n < count)
        for (int c = lane; c < width; c += 32) sum += dout[n * width + c] * out[n * width + c];
    sum = warp_sum(sum);
    if (n < count && lane == 0) delta[n] = sum;
}

#define PAIRS 8

struct KeyValues {
    IN(float) k[PAIRS];
    IN(float) v[PAIRS];
};
struct KeyValueGrads {
    OUT(float) k[PAIRS];
    OUT(float) v[PAIRS];
};

template <class A, class B> DEVICE float warp_dot(A a, i64 at, B b, i64 other, int width) {
    float sum = 0.0f;
    UNROLL_NONE
    for (int c = THREAD % 32; c < width; c += 32) sum += a[at + c] * b[other + c];
    return warp_sum(sum);
}

// Adds each row's own keys and values to what it mixed. A warp per row and head.
KERNEL(merge_diagonals, IN(float) q, KeyValues own, int pairs, OUT(float) out, OUT(float) lse, i64 rows, int heads,
       int kv_heads, int width, float scale) {
    i64 n = (BLOCK_X * THREADS + THREAD) / 32;
    if (n >= rows * heads) return;
    int lane = THREAD % 32, head = (int)(n % heads);
    i64 row = n / heads;
    i64 at = n * width, kv_at = (row * kv_heads + head / (heads / kv_heads)) * width;
    float logits[PAIRS];
    // One lane reads what that lane will write; the others take it from there.
    float before = warp_sum(lane == 0 ? (float)lse[n] : 0.0f);
    float top = before;
    // Loops of a fixed length, so that neither the logits nor the buffers are indexed at run time.
    UNROLL
    for (int d = 0; d < PAIRS; d++) {
        logits[d] = MINUS_INFINITY;
        if (d < pairs) logits[d] = scale * warp_dot(q, at, own.k[d], kv_at, width);
        top = fmaxf(top, logits[d]);
    }
    float share = expf(before - top), total = share;
    UNROLL
    for (int d = 0; d < PAIRS; d++) {
        logits[d] = expf(logits[d] - top);
        total += logits[d];
    }
    float inverse = 1.0f / total;
    UNROLL_NONE
    for (int c = lane; c < width; c += 32) {
        float value = out[at + c] * share;
        UNROLL
        for (int d = 0; d < PAIRS; d++)
            if (d < pairs) value += logits[d] * own.v[d][kv_at + c];
        out[at + c] = value * inverse;
    }
    if (lane == 0) lse[n] = top + logf(total);
}

// Gradients of each row's own keys and values, and their part of its queries'. A warp per row and key head, so that the
// query heads of a key head add up in order.
KERNEL(diagonal_grads, IN(float) q, KeyValues own, KeyValueGrads grads, int pairs, IN(float) dout, IN(float) lse,
       IN(float) delta, OUT(float) dq, i64 rows, int heads, int kv_heads, int width, float scale) {
    i64 n = (BLOCK_X * THREADS + THREAD) / 32;
    if (n >= rows * kv_heads) return;
    int lane = THREAD % 32, group = heads / kv_heads;
    i64 row = n / kv_heads, kv_at = n * width;
    UNROLL
    for (int d = 0; d < PAIRS; d++) {
        if (d >= pairs) continue;
        for (int g = 0; g < group; g++) {
            i64 head = row * heads + (n % kv_heads) * group + g;
            i64 at = head * width;
            float weight = expf(scale * warp_dot(q, at, own.k[d], kv_at, width) - lse[head]);
            float through = warp_dot(dout, at, own.v[d], kv_at, width) - delta[head];
            float dlogit = scale * weight * through;
            UNROLL_NONE
            for (int c = lane; c < width; c += 32) {
                grads.v[d][kv_at + c] += weight * dout[at + c];
                dq[at + c] += dlogit * own.k[d][kv_at + c];
                grads.k[d][kv_at + c] += dlogit * q[at + c];
            }
        }
    }
}
