// Attention of training in the tensor cores: as `attention.cu`, with queries, keys, values and probabilities rounded to
// bf16 for the products, and sums in f32. A warp takes 16 rows; what it multiplies from the left stays in registers.
//
// Numbers of a 16 x 16 operand in a lane (mma.m16n8k16): row lane / 4 and that + 8, columns 2 (lane % 4) and that + 8,
// two side by side in a word. A result has two columns side by side per row, so that the results of two products make
// the left operand of the next. What is multiplied from the right stands as rows of its columns, words along the sum.

// Words of a row of `count` bf16 in shared memory: four more, so that eight rows lie in different banks.
#define WORDS(count) ((count) / 2 + 4)

DEVICE u32 pair_bf16(float low, float high) {
    u32 word;
    PAIR_BF16(word, low, high);
    return word;
}

// 16 rows of `D` values that a warp multiplies from the left.
template <int D> struct Left {
    u32 words[D / 16][4];
};

template <int D, class Source>
DEVICE Left<D> left_rows(Source x, i64 first, int count, i64 stride, i64 column, int width) {
    Left<D> left;
    int lane = THREAD % 32, base = THREAD / 32 * 16;
    UNROLL
    for (int tile = 0; tile < D / 16; tile++) {
        UNROLL
        for (int part = 0; part < 4; part++) {
            int row = base + lane / 4 + part % 2 * 8, c = tile * 16 + part / 2 * 8 + lane % 4 * 2;
            float low = 0.0f, high = 0.0f;
            if (row < count) {
                i64 at = (first + row) * stride + column + c;
                if (c < width) low = x[at];
                if (c + 1 < width) high = x[at + 1];
            }
            left.words[tile][part] = pair_bf16(low, high);
        }
    }
    return left;
}

// `most` rows as they stand: words along the head.
template <int D, class Source, class Target>
DEVICE void right_rows(Source x, i64 first, int count, int most, i64 stride, i64 column, int width, Target to) {
    UNROLL_SOME
    for (int i = THREAD; i < most * (D / 2); i += THREADS) {
        int row = i / (D / 2), c = i % (D / 2) * 2;
        float low = 0.0f, high = 0.0f;
        if (row < count) {
            i64 at = (first + row) * stride + column + c;
            if (c < width) low = x[at];
            if (c + 1 < width) high = x[at + 1];
        }
        to[row * WORDS(D) + c / 2] = pair_bf16(low, high);
    }
}

// `N` rows turned: a row per column of the head, words along the rows.
template <int D, int N, class Source, class Target>
DEVICE void turned_rows(Source x, i64 first, int count, i64 stride, i64 column, int width, Target to) {
    UNROLL_SOME
    for (int i = THREAD; i < N / 2 * D; i += THREADS) {
        int row = i / D * 2, c = i % D;
        float low = 0.0f, high = 0.0f;
        if (c < width) {
            i64 at = (first + row) * stride + column + c;
            if (row < count) low = x[at];
            if (row + 1 < count) high = x[at + stride];
        }
        to[c * WORDS(N) + row / 2] = pair_bf16(low, high);
    }
}

// sums[16, 8] += left tile times rows `first`.. of `right`, whose tile of the sum begins at word `at`.
template <class Right> DEVICE void multiply(float (&sums)[4], const u32 (&left)[4], Right right, int stride, int first, int at) {
    int lane = THREAD % 32;
    i64 place = (i64)(first + lane / 4) * stride + at + lane % 4;
    u32 low = right[place], high = right[place + 4];
    MMA(sums, left, low, high);
}

// sums = left rows times `N` right rows.
template <int D, int N, class Right> DEVICE void logits_of(const Left<D> &left, Right right, float (&sums)[N / 8][4]) {
    UNROLL
    for (int n = 0; n < N / 8; n++) {
        UNROLL
        for (int i = 0; i < 4; i++) sums[n][i] = 0.0f;
        UNROLL
        for (int tile = 0; tile < D / 16; tile++) multiply(sums[n], left.words[tile], right, WORDS(D), n * 8, tile * 8);
    }
}

// sums += weights[16, N], as results stand, times turned rows.
template <int D, int N, class Right>
DEVICE void mix_of(const float (&weights)[N / 8][4], Right turned, float (&sums)[D / 8][4]) {
    UNROLL
    for (int tile = 0; tile < N / 16; tile++) {
        u32 left[4];
        UNROLL
        for (int part = 0; part < 4; part++) {
            // Parts 0 and 1 are columns 0 to 7, rows lane / 4 and that + 8.
            left[part] = pair_bf16(weights[tile * 2 + part / 2][part % 2 * 2], weights[tile * 2 + part / 2][part % 2 * 2 + 1]);
        }
        UNROLL
        for (int n = 0; n < D / 8; n++) multiply(sums[n], left, turned, WORDS(N), n * 8, tile * 8);
    }
}

// Over the four lanes that share a row.
DEVICE float quad_sum(float value) {
    value += LANE_XOR(value, 1);
    return value + LANE_XOR(value, 2);
}

DEVICE float quad_max(float value) {
    value = fmaxf(value, LANE_XOR(value, 1));
    return fmaxf(value, LANE_XOR(value, 2));
}

// Block (tile of at most 64 query rows, head), N keys at a time.
template <int D, int N>
DEVICE void tensor_attend_tile(IN(float) q, IN(float) kc, IN(float) vc, IN(float) ko, IN(float) vo, IN(u32) sights,
                               IN(u32) tiles, OUT(float) out, OUT(float) lse, int heads, int kv_heads, int width,
                               float scale) {
    SHARED(u32, k_rows, N *WORDS(D));
    SHARED(u32, v_turned, D *WORDS(N));
    int head = (int)BLOCK_Y, kv = head / (heads / kv_heads), lane = THREAD % 32;
    i64 q_stride = (i64)heads * width, kv_stride = (i64)kv_heads * width;
    i64 tile = BLOCK_X * TILE;
    u32 first = tiles[tile];
    int rows = (int)tiles[tile + 1];
    Left<D> left = left_rows<D>(q, first, rows, q_stride, (i64)head * width, width);
    // Two rows of a lane: `base` and `base + 8`.
    int base = THREAD / 32 * 16 + lane / 4;
    float mix[D / 8][4];
    UNROLL
    for (int n = 0; n < D / 8; n++) {
        UNROLL
        for (int i = 0; i < 4; i++) mix[n][i] = 0.0f;
    }
    float top[2], total[2];
    UNROLL
    for (int r = 0; r < 2; r++) {
        top[r] = MINUS_INFINITY;
        total[r] = 0.0f;
    }
    for (int part = 0; part < 2; part++) {
        u32 from = tiles[tile + 2 + 2 * part], to = tiles[tile + 3 + 2 * part];
        u32 seen_from[2], seen_to[2];
        UNROLL
        for (int r = 0; r < 2; r++) {
            seen_from[r] = seen_to[r] = 0;
            if (base + r * 8 < rows) {
                seen_from[r] = sights[(first + base + r * 8) * SIGHT + 2 * part];
                seen_to[r] = sights[(first + base + r * 8) * SIGHT + 2 * part + 1];
            }
        }
        for (u32 key = from; key < to; key += N) {
            int count = to - key < N ? (int)(to - key) : N;
            SYNC();
            right_rows<D>(part ? ko : kc, key, count, N, kv_stride, (i64)kv * width, width, k_rows);
            turned_rows<D, N>(part ? vo : vc, key, count, kv_stride, (i64)kv * width, width, v_turned);
            SYNC();
            float p[N / 8][4];
            logits_of<D, N>(left, k_rows, p);
            float keep[2];
            UNROLL
            for (int r = 0; r < 2; r++) {
                float most = top[r];
                UNROLL
                for (int n = 0; n < N / 8; n++) {
                    UNROLL
                    for (int i = 0; i < 2; i++) {
                        u32 at = key + n * 8 + lane % 4 * 2 + i;
                        bool seen = at >= seen_from[r] && at < seen_to[r];
                        float logit = seen ? scale * p[n][r * 2 + i] : MINUS_INFINITY;
                        p[n][r * 2 + i] = logit;
                        most = fmaxf(most, logit);
                    }
                }
                most = quad_max(most);
                // Nothing seen so far: no term, and nothing to scale.
                bool any = most > MINUS_INFINITY;
                keep[r] = any ? expf(top[r] - most) : 1.0f;
                float sum = 0.0f;
                UNROLL
                for (int n = 0; n < N / 8; n++) {
                    UNROLL
                    for (int i = 0; i < 2; i++) {
                        float e = any ? expf(p[n][r * 2 + i] - most) : 0.0f;
                        p[n][r * 2 + i] = e;
                        sum += e;
                    }
                }
                total[r] = total[r] * keep[r] + quad_sum(sum);
                top[r] = most;
            }
            UNROLL
            for (int n = 0; n < D / 8; n++) {
                UNROLL
                for (int i = 0; i < 4; i++) mix[n][i] *= keep[i / 2];
            }
            mix_of<D, N>(p, v_turned, mix);
        }
    }
    UNROLL
    for (int r = 0; r < 2; r++) {
        int row = base + r * 8;
        if (row < rows) {
            float inverse = total[r] > 0.0f ? 1.0f / total[r] : 0.0f;
            i64 at = (first + row) * q_stride + (i64)head * width;
            UNROLL
            for (int n = 0; n < D / 8; n++) {
                UNROLL
                for (int i = 0; i < 2; i++) {
                    int c = n * 8 + lane % 4 * 2 + i;
                    if (c < width) out[at + c] = mix[n][r * 2 + i] * inverse;
                }
            }
            if (lane % 4 == 0)
                lse[(i64)(first + row) * heads + head] = total[r] > 0.0f ? top[r] + logf(total[r]) : 0.0f;
        }
    }
}

// Block (tile of at most 64 query rows, head): the gradient of the queries, added to.
template <int D, int N>
DEVICE void tensor_dq_tile(IN(float) q, IN(float) kc, IN(float) vc, IN(float) ko, IN(float) vo, IN(u32) sights,
                           IN(u32) tiles, IN(float) dout, IN(float) lse, IN(float) delta, OUT(float) dq, int heads,
                           int kv_heads, int width, float scale) {
    SHARED(u32, k_rows, N *WORDS(D));
    SHARED(u32, v_rows, N *WORDS(D));
    SHARED(u32, k_turned, D *WORDS(N));
    int head = (int)BLOCK_Y, kv = head / (heads / kv_heads), lane = THREAD % 32;
    i64 q_stride = (i64)heads * width, kv_stride = (i64)kv_heads * width;
    i64 tile = BLOCK_X * TILE;
    u32 first = tiles[tile];
    int rows = (int)tiles[tile + 1];
    Left<D> left = left_rows<D>(q, first, rows, q_stride, (i64)head * width, width);
    Left<D> left_d = left_rows<D>(dout, first, rows, q_stride, (i64)head * width, width);
    int base = THREAD / 32 * 16 + lane / 4;
    float own_lse[2], own_delta[2];
    UNROLL
    for (int r = 0; r < 2; r++) {
        own_lse[r] = own_delta[r] = 0.0f;
        if (base + r * 8 < rows) {
            own_lse[r] = lse[(i64)(first + base + r * 8) * heads + head];
            own_delta[r] = delta[(i64)(first + base + r * 8) * heads + head];
        }
    }
    float sums[D / 8][4];
    UNROLL
    for (int n = 0; n < D / 8; n++) {
        UNROLL
        for (int i = 0; i < 4; i++) sums[n][i] = 0.0f;
    }
    for (int part = 0; part < 2; part++) {
        u32 from = tiles[tile + 2 + 2 * part], to = tiles[tile + 3 + 2 * part];
        u32 seen_from[2], seen_to[2];
        UNROLL
        for (int r = 0; r < 2; r++) {
            seen_from[r] = seen_to[r] = 0;
            if (base + r * 8 < rows) {
                seen_from[r] = sights[(first + base + r * 8) * SIGHT + 2 * part];
                seen_to[r] = sights[(first + base + r * 8) * SIGHT + 2 * part + 1];
            }
        }
        for (u32 key = from; key < to; key += N) {
            int count = to - key < N ? (int)(to - key) : N;
            SYNC();
            right_rows<D>(part ? ko : kc, key, count, N, kv_stride, (i64)kv * width, width, k_rows);
            right_rows<D>(part ? vo : vc, key, count, N, kv_stride, (i64)kv * width, width, v_rows);
            turned_rows<D, N>(part ? ko : kc, key, count, kv_stride, (i64)kv * width, width, k_turned);
            SYNC();
            float p[N / 8][4], slopes[N / 8][4];
            logits_of<D, N>(left, k_rows, p);
            logits_of<D, N>(left_d, v_rows, slopes);
            UNROLL
            for (int n = 0; n < N / 8; n++) {
                UNROLL
                for (int i = 0; i < 4; i++) {
                    u32 at = key + n * 8 + lane % 4 * 2 + i % 2;
                    bool seen = at >= seen_from[i / 2] && at < seen_to[i / 2];
                    float weight = seen ? expf(scale * p[n][i] - own_lse[i / 2]) : 0.0f;
                    p[n][i] = scale * weight * (slopes[n][i] - own_delta[i / 2]);
                }
            }
            mix_of<D, N>(p, k_turned, sums);
        }
    }
    UNROLL
    for (int r = 0; r < 2; r++) {
        int row = base + r * 8;
        if (row < rows) {
            i64 at = (first + row) * q_stride + (i64)head * width;
            UNROLL
            for (int n = 0; n < D / 8; n++) {
                UNROLL
                for (int i = 0; i < 2; i++) {
                    int c = n * 8 + lane % 4 * 2 + i;
                    if (c < width) dq[at + c] += sums[n][r * 2 + i];
                }
            }
        }
    }
}

// Block (64 keys, key head): the gradients of keys and values, added to; tiles are of at most N query rows.
template <int D, int N>
DEVICE void tensor_dkv_tile(int part, u32 keys_from, u32 keys_to, IN(float) q, IN(float) k, IN(float) v, IN(u32) sights,
                            IN(u32) tiles, int tile_count, IN(float) dout, IN(float) lse, IN(float) delta,
                            OUT(float) dk, OUT(float) dv, int heads, int kv_heads, int width, float scale) {
    SHARED(u32, q_rows, N *WORDS(D));
    SHARED(u32, d_rows, N *WORDS(D));
    SHARED(u32, q_turned, D *WORDS(N));
    SHARED(u32, d_turned, D *WORDS(N));
    int kv = (int)BLOCK_Y, group = heads / kv_heads, lane = THREAD % 32;
    i64 q_stride = (i64)heads * width, kv_stride = (i64)kv_heads * width;
    u32 first_key = keys_from + (u32)BLOCK_X * 64;
    int keys = keys_to - first_key < 64 ? (int)(keys_to - first_key) : 64;
    Left<D> left = left_rows<D>(k, first_key, keys, kv_stride, (i64)kv * width, width);
    Left<D> left_v = left_rows<D>(v, first_key, keys, kv_stride, (i64)kv * width, width);
    int base = THREAD / 32 * 16 + lane / 4;
    float sum_k[D / 8][4], sum_v[D / 8][4];
    UNROLL
    for (int n = 0; n < D / 8; n++) {
        UNROLL
        for (int i = 0; i < 4; i++) sum_k[n][i] = sum_v[n][i] = 0.0f;
    }
    for (int tile = 0; tile < tile_count; tile++) {
        u32 from = tiles[tile * TILE + 2 + 2 * part], to = tiles[tile * TILE + 3 + 2 * part];
        if (from >= first_key + keys || to <= first_key) continue;
        u32 first = tiles[tile * TILE];
        int rows = (int)tiles[tile * TILE + 1];
        for (int head = kv * group; head < (kv + 1) * group; head++) {
            SYNC();
            right_rows<D>(q, first, rows, N, q_stride, (i64)head * width, width, q_rows);
            right_rows<D>(dout, first, rows, N, q_stride, (i64)head * width, width, d_rows);
            turned_rows<D, N>(q, first, rows, q_stride, (i64)head * width, width, q_turned);
            turned_rows<D, N>(dout, first, rows, q_stride, (i64)head * width, width, d_turned);
            SYNC();
            float p[N / 8][4], slopes[N / 8][4];
            logits_of<D, N>(left, q_rows, p);
            logits_of<D, N>(left_v, d_rows, slopes);
            UNROLL
            for (int n = 0; n < N / 8; n++) {
                UNROLL
                for (int i = 0; i < 2; i++) {
                    int row = n * 8 + lane % 4 * 2 + i;
                    u32 seen_from = 0, seen_to = 0;
                    float row_lse = 0.0f, row_delta = 0.0f;
                    if (row < rows) {
                        seen_from = sights[(first + row) * SIGHT + 2 * part];
                        seen_to = sights[(first + row) * SIGHT + 2 * part + 1];
                        row_lse = lse[(i64)(first + row) * heads + head];
                        row_delta = delta[(i64)(first + row) * heads + head];
                    }
                    UNROLL
                    for (int r = 0; r < 2; r++) {
                        u32 at = first_key + base + r * 8;
                        bool seen = base + r * 8 < keys && at >= seen_from && at < seen_to;
                        float weight = seen ? expf(scale * p[n][r * 2 + i] - row_lse) : 0.0f;
                        p[n][r * 2 + i] = weight;
                        slopes[n][r * 2 + i] = scale * weight * (slopes[n][r * 2 + i] - row_delta);
                    }
                }
            }
            mix_of<D, N>(p, d_turned, sum_v);
            mix_of<D, N>(slopes, q_turned, sum_k);
        }
    }
    UNROLL
    for (int r = 0; r < 2; r++) {
        int key = base + r * 8;
        if (key < keys) {
            i64 at = (i64)(first_key + key) * kv_stride + (i64)kv * width;
            UNROLL
            for (int n = 0; n < D / 8; n++) {
                UNROLL
                for (int i = 0; i < 2; i++) {
                    int c = n * 8 + lane % 4 * 2 + i;
                    if (c < width) {
                        dk[at + c] += sum_k[n][r * 2 + i];
                        dv[at + c] += sum_v[n][r * 2 + i];
                    }
                }
            }
        }
    }
}

#define TENSOR_ATTEND(D, N)                                                                                            \
    KERNEL(tensor_attend_##D, IN(float) q, IN(float) kc, IN(float) vc, IN(float) ko, IN(float) vo, IN(u32) sights,     \
           IN(u32) tiles, OUT(float) out, OUT(float) lse, int heads, int kv_heads, int width, float scale) {           \
        tensor_attend_tile<D, N>(q, kc, vc, ko, vo, sights, tiles, out, lse, heads, kv_heads, width, scale);           \
    }                                                                                                                  \
    KERNEL(tensor_attend_dq_##D, IN(float) q, IN(float) kc, IN(float) vc, IN(float) ko, IN(float) vo, IN(u32) sights,  \
           IN(u32) tiles, IN(float) dout, IN(float) lse, IN(float) delta, OUT(float) dq, int heads, int kv_heads,      \
           int width, float scale) {                                                                                   \
        tensor_dq_tile<D, N>(q, kc, vc, ko, vo, sights, tiles, dout, lse, delta, dq, heads, kv_heads, width, scale);   \
    }                                                                                                                  \
    KERNEL(tensor_attend_dkv_##D, int part, u32 keys_from, u32 keys_to, IN(float) q, IN(float) k, IN(float) v,         \
           IN(u32) sights, IN(u32) tiles, int tile_count, IN(float) dout, IN(float) lse, IN(float) delta,              \
           OUT(float) dk, OUT(float) dv, int heads, int kv_heads, int width, float scale) {                            \
        tensor_dkv_tile<D, N>(part, keys_from, keys_to, q, k, v, sights, tiles, tile_count, dout, lse, delta, dk, dv,  \
                              heads, kv_heads, width, scale);                                                          \
    }

TENSOR_ATTEND(64, 32)
TENSOR_ATTEND(128, 32)
