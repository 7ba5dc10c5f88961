// Stored weights: rows of floats, or of blocks as GGUF files have them, made into numbers where they are multiplied.
//
// A weight is read in words of 16 bits, which every block begins and ends at. Sixteen values in a row share their scale in
// all types, so that a thread unpacks as many. The numbers are those of the file, rounded as `draftsmith_kernels::quant`
// rounds them.
//
// Every output of a row is summed over the inputs in one order, sixteen at a time, whatever else is in the call: that a row
// stands in a tile of 16 or of 64 rows changes no bit.

#define W_F32 0
#define W_F16 1
#define W_BF16 2
#define W_Q4_0 3
#define W_Q4_1 4
#define W_Q5_0 5
#define W_Q5_1 6
#define W_Q8_0 7
#define W_Q4_K 8
#define W_Q5_K 9
#define W_Q6_K 10

#define TAKE 16

template <class W> DEVICE int byte_of(W w, i64 at, int i) {
    u16 word = w[at + i / 2];
    return (i % 2 ? word >> 8 : word) & 255;
}

template <class W> DEVICE float half_of(W w, i64 at) {
    u16 word = w[at];
    return from_f16(word);
}

// The 6-bit scale and minimum of part `j` of a Q4_K or Q5_K block whose twelve bytes of them begin at word `at`.
template <class W> DEVICE void k4_scales(W w, i64 at, int j, int &scale, int &minimum) {
    if (j < 4) {
        scale = byte_of(w, at, j) & 63;
        minimum = byte_of(w, at, j + 4) & 63;
    } else {
        int low = byte_of(w, at, j + 4), a = byte_of(w, at, j - 4), b = byte_of(w, at, j);
        scale = (low & 15) | a >> 6 << 4;
        minimum = low >> 4 | b >> 6 << 4;
    }
}

// Values `k..k + 16` of the row that begins at word `row`; `k` is a multiple of 16, and what lies at `width` and behind it is 0.
template <int TYPE, class W> DEVICE void unpack(W w, i64 row, int k, int width, float *values) {
    if constexpr (TYPE == W_F32) {
        UNROLL
        for (int i = 0; i < TAKE; i++) {
            union { float f; u32 u; } bits;
            bits.u = 0;
            if (k + i < width) {
                u16 low = w[row + 2 * (k + i)], high = w[row + 2 * (k + i) + 1];
                bits.u = (u32)low | (u32)high << 16;
            }
            values[i] = bits.f;
        }
    } else if constexpr (TYPE == W_F16 || TYPE == W_BF16) {
        UNROLL
        for (int i = 0; i < TAKE; i++) {
            u16 word = 0;
            if (k + i < width) word = w[row + k + i];
            values[i] = TYPE == W_F16 ? from_f16(word) : from_bf16(word);
        }
    } else if (k >= width) {
        UNROLL
        for (int i = 0; i < TAKE; i++) values[i] = 0.0f;
    } else if constexpr (TYPE == W_Q8_0) {
        i64 at = row + k / 32 * 17;
        float scale = half_of(w, at);
        UNROLL
        for (int i = 0; i < TAKE; i += 2) {
            u16 word = w[at + 1 + (k % 32 + i) / 2];
            values[i] = MUL(scale, (float)(signed char)(word & 255));
            values[i + 1] = MUL(scale, (float)(signed char)(word >> 8));
        }
    } else if constexpr (TYPE == W_Q4_0 || TYPE == W_Q4_1 || TYPE == W_Q5_0 || TYPE == W_Q5_1) {
        // The low nibbles of sixteen bytes, then the high ones; a fifth bit of each value in a word of its own.
        const bool five = TYPE == W_Q5_0 || TYPE == W_Q5_1, minima = TYPE == W_Q4_1 || TYPE == W_Q5_1;
        const int head = 1 + (minima ? 1 : 0), zero = minima ? 0 : five ? 16 : 8;
        i64 at = row + k / 32 * (head + (five ? 2 : 0) + 8);
        float scale = half_of(w, at), least = minima ? half_of(w, at + 1) : 0.0f;
        int second = k / 16 % 2;
        u32 fifth = 0;
        if (five) fifth = (u32)w[at + head + second];
        i64 data = at + head + (five ? 2 : 0);
        UNROLL
        for (int i = 0; i < TAKE; i++) {
            u16 word = w[data + i / 2];
            int q = word >> (i % 2 * 8 + second * 4) & 15;
            if (five) q |= (fifth >> i & 1) << 4;
            float value = MUL(scale, (float)(q - zero));
            values[i] = minima ? value + least : value;
        }
    } else if constexpr (TYPE == W_Q4_K || TYPE == W_Q5_K) {
        const bool five = TYPE == W_Q5_K;
        i64 at = row + k / 256 * (five ? 88 : 72);
        int part = k % 256 / 32, first = k % 32, scale, minimum;
        k4_scales(w, at + 2, part, scale, minimum);
        float step = MUL(half_of(w, at), (float)scale), least = MUL(half_of(w, at + 1), (float)minimum);
        i64 data = at + (five ? 24 : 8) + part / 2 * 16 + first / 2;
        UNROLL
        for (int i = 0; i < TAKE; i++) {
            u16 word = w[data + i / 2];
            int q = word >> (i % 2 * 8 + part % 2 * 4) & 15;
            if (five) q |= (byte_of(w, at + 8, first + i) >> part & 1) << 4;
            values[i] = MUL(step, (float)q) - least;
        }
    } else if constexpr (TYPE == W_Q6_K) {
        i64 at = row + k / 256 * 105;
        int part = k % 256 / 32, first = k % 32, half = part / 4, quarter = part % 4;
        int own = (int)(signed char)byte_of(w, at + 96, 2 * part + first / 16);
        float step = MUL(half_of(w, at + 104), (float)own);
        i64 low = at + half * 32 + (first + 32 * (quarter % 2)) / 2, high = at + 64 + half * 16 + first / 2;
        UNROLL
        for (int i = 0; i < TAKE; i++) {
            u16 lows = w[low + i / 2], highs = w[high + i / 2];
            int q = lows >> (i % 2 * 8 + quarter / 2 * 4) & 15;
            q |= (highs >> (i % 2 * 8 + 2 * quarter) & 3) << 4;
            values[i] = MUL(step, (float)(q - 32));
        }
    }
}

// Rows `ids` of a table, times a factor. A thread per sixteen values.
template <int TYPE, class W, class Ids, class Y>
DEVICE void embed_rows(W w, Ids ids, Y y, i64 count, int width, i64 words, float factor) {
    int parts = (width + TAKE - 1) / TAKE;
    for (i64 n = BLOCK_X * THREADS + THREAD; n < count * parts; n += BLOCKS_X * THREADS) {
        i64 row = n / parts;
        int k = (int)(n % parts) * TAKE;
        u32 id = ids[row];
        float values[TAKE];
        unpack<TYPE>(w, (i64)id * words, k, width, values);
        UNROLL
        for (int i = 0; i < TAKE; i++)
            if (k + i < width) y[row * width + k + i] = MUL(values[i], factor);
    }
}

// Outputs and inputs of a tile.
#define TILE_COLS 64
#define TILE_STEP 64

// y[R, O] = x[R, I] times the weight, with both rounded to bf16 and sums in f32: a block for 64 outputs of ROWS rows, a warp
// for 16 rows. Eight warps stand side by side for 16 rows, 4 by 2 for 64.
template <int TYPE, int ROWS, class X, class W, class B, class Y>
DEVICE void product_bf16(X x, W w, B bias, Y y, i64 rows, int out, int inp, i64 words) {
    const int stride = TILE_STEP / 2 + 4, down = ROWS / 16, across = 8 / down, tiles = TILE_COLS / across / 8;
    SHARED(u32, left, ROWS * (TILE_STEP / 2 + 4));
    SHARED(u32, right, TILE_COLS * (TILE_STEP / 2 + 4));
    i64 first_row = BLOCK_Y * ROWS;
    int first_col = (int)BLOCK_X * TILE_COLS, warp = THREAD / 32, lane = THREAD % 32;
    int row = warp / across * 16 + lane / 4, col = warp % across * (8 * tiles);
    float sums[tiles][4];
    UNROLL
    for (int t = 0; t < tiles; t++)
        UNROLL
        for (int i = 0; i < 4; i++) sums[t][i] = 0.0f;
    for (int k = 0; k < inp; k += TILE_STEP) {
        UNROLL
        for (int i = 0; i < ROWS * TILE_STEP / 2 / 256; i++) {
            int n = i * 256 + THREAD, r = n / (TILE_STEP / 2), c = n % (TILE_STEP / 2);
            float low = 0.0f, high = 0.0f;
            i64 at = (first_row + r) * inp + k + 2 * c;
            if (first_row + r < rows && k + 2 * c < inp) low = x[at];
            if (first_row + r < rows && k + 2 * c + 1 < inp) high = x[at + 1];
            u32 word;
            PAIR_BF16(word, low, high);
            left[r * stride + c] = word;
        }
        {
            int c = THREAD / (TILE_STEP / TAKE), part = THREAD % (TILE_STEP / TAKE);
            float values[TAKE];
            UNROLL
            for (int i = 0; i < TAKE; i++) values[i] = 0.0f;
            if (first_col + c < out) unpack<TYPE>(w, (i64)(first_col + c) * words, k + part * TAKE, inp, values);
            UNROLL
            for (int i = 0; i < TAKE / 2; i++) {
                u32 word;
                PAIR_BF16(word, values[2 * i], values[2 * i + 1]);
                right[c * stride + part * (TAKE / 2) + i] = word;
            }
        }
        SYNC();
        UNROLL
        for (int s = 0; s < TILE_STEP / 2; s += 8) {
            u32 a[4];
            int at = row * stride + s + lane % 4;
            a[0] = left[at];
            a[1] = left[at + 8 * stride];
            a[2] = left[at + 4];
            a[3] = left[at + 8 * stride + 4];
            UNROLL
            for (int t = 0; t < tiles; t++) {
                int b = (col + t * 8 + lane / 4) * stride + s + lane % 4;
                u32 low = right[b], high = right[b + 4];
                MMA(sums[t], a, low, high);
            }
        }
        SYNC();
    }
    UNROLL
    for (int t = 0; t < tiles; t++) {
        UNROLL
        for (int i = 0; i < 4; i++) {
            i64 r = first_row + row + i / 2 * 8;
            int c = first_col + col + t * 8 + lane % 4 * 2 + i % 2;
            if (r < rows && c < out) {
                float value = sums[t][i];
                if (HAS(bias)) value += bias[c];
                y[r * out + c] = value;
            }
        }
    }
}

// The same without rounding: the specification. A block for 64 outputs of 16 rows, a thread for 4 rows of an output.
template <int TYPE, class X, class W, class B, class Y>
DEVICE void product_f32(X x, W w, B bias, Y y, i64 rows, int out, int inp, i64 words) {
    const int stride = TILE_STEP + 1;
    SHARED(float, left, 16 * (TILE_STEP + 1));
    SHARED(float, right, TILE_COLS * (TILE_STEP + 1));
    i64 first_row = BLOCK_Y * 16;
    int first_col = (int)BLOCK_X * TILE_COLS, col = THREAD % TILE_COLS, row = THREAD / TILE_COLS * 4;
    float sums[4];
    UNROLL
    for (int i = 0; i < 4; i++) sums[i] = 0.0f;
    for (int k = 0; k < inp; k += TILE_STEP) {
        for (int n = THREAD; n < 16 * TILE_STEP; n += 256) {
            int r = n / TILE_STEP, c = n % TILE_STEP;
            float value = 0.0f;
            if (first_row + r < rows && k + c < inp) value = x[(first_row + r) * inp + k + c];
            left[r * stride + c] = value;
        }
        int c = THREAD / (TILE_STEP / TAKE), part = THREAD % (TILE_STEP / TAKE);
        float values[TAKE];
        UNROLL
        for (int i = 0; i < TAKE; i++) values[i] = 0.0f;
        if (first_col + c < out) unpack<TYPE>(w, (i64)(first_col + c) * words, k + part * TAKE, inp, values);
        UNROLL
        for (int i = 0; i < TAKE; i++) right[c * stride + part * TAKE + i] = values[i];
        SYNC();
        float parts[4];
        UNROLL
        for (int i = 0; i < 4; i++) parts[i] = 0.0f;
        UNROLL_SOME
        for (int s = 0; s < TILE_STEP; s++) {
            float value = right[col * stride + s];
            UNROLL
            for (int i = 0; i < 4; i++) parts[i] = fmaf(left[(row + i) * stride + s], value, parts[i]);
        }
        UNROLL
        for (int i = 0; i < 4; i++) sums[i] += parts[i];
        SYNC();
    }
    if (first_col + col >= out) return;
    float more = 0.0f;
    if (HAS(bias)) more = bias[first_col + col];
    UNROLL
    for (int i = 0; i < 4; i++) {
        float value = sums[i];
        if (HAS(bias)) value += more;
        if (first_row + row + i < rows) y[(first_row + row + i) * out + first_col + col] = value;
    }
}

#define WEIGHT(type, name)                                                                                             \
    KERNEL(embed_##name, IN(u16) w, IN(u32) ids, OUT(float) y, i64 count, int width, i64 words, float factor) {         \
        embed_rows<type>(w, ids, y, count, width, words, factor);                                                      \
    }                                                                                                                  \
    KERNEL(multiply_##name, IN(float) x, IN(u16) w, IN(float) bias, OUT(float) y, i64 rows, int out, int inp,           \
           i64 words) {                                                                                                \
        product_f32<type>(x, w, bias, y, rows, out, inp, words);                                                      \
    }                                                                                                                  \
    KERNEL(multiply_##name##_16, IN(float) x, IN(u16) w, IN(float) bias, OUT(float) y, i64 rows, int out, int inp,      \
           i64 words) {                                                                                                \
        product_bf16<type, 16>(x, w, bias, y, rows, out, inp, words);                                                 \
    }                                                                                                                  \
    KERNEL(multiply_##name##_64, IN(float) x, IN(u16) w, IN(float) bias, OUT(float) y, i64 rows, int out, int inp,      \
           i64 words) {                                                                                                \
        product_bf16<type, 64>(x, w, bias, y, rows, out, inp, words);                                                 \
    }

WEIGHT(W_F32, f32)
WEIGHT(W_F16, f16)
WEIGHT(W_BF16, bf16)
WEIGHT(W_Q4_0, q4_0)
WEIGHT(W_Q4_1, q4_1)
WEIGHT(W_Q5_0, q5_0)
WEIGHT(W_Q5_1, q5_1)
WEIGHT(W_Q8_0, q8_0)
WEIGHT(W_Q4_K, q4_k)
WEIGHT(W_Q5_K, q5_k)
WEIGHT(W_Q6_K, q6_k)
