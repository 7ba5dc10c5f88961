// Decoding: keys and values in pages, attention of a step over them, and choices from a head's outputs.
//
// A page holds 32 slots of one layer of one sequence: keys as [kv_heads][head_dim / 2][32 slots][2], so that lanes that each
// take a slot read side by side; values behind them as [kv_heads][32 slots][head_dim]. Pages lie in slabs; the upper bits of
// a page's number say in which.
//
// A row's logits, weights and sums run over its own positions in blocks of 32 that begin at multiples of 32, one after the
// other: nothing else in the step changes a bit of it.

#define PAGE 32
#define SLABS 32
#define SLAB_SHIFT 26
#define NO_PATH 0xffffffffu
// Queries that a warp takes together: of one key head.
#define TOGETHER 4
// Numbers of an item (key head, first row, first query, queries, its page table) and of a row (first position, end of them,
// its path, committed positions).
#define ITEM 5
#define ROW 4

struct HalfSlabs {
    IN(u32) at[SLABS];
};
struct FloatSlabs {
    IN(float) at[SLABS];
};
struct HalfSlabsOut {
    OUT(u16) at[SLABS];
};
struct FloatSlabsOut {
    OUT(float) at[SLABS];
};

DEVICE i64 page_start(u32 page, i64 page_size) { return (i64)(page & ((1u << SLAB_SHIFT) - 1u)) * page_size; }

DEVICE void store(OUT(u16) slab, i64 at, float value) { slab[at] = to_f16(value); }
DEVICE void store(OUT(float) slab, i64 at, float value) { slab[at] = value; }

// Two values side by side; `at` is even.
DEVICE void load_pair(IN(u32) slab, i64 at, float &a, float &b) {
    u32 word = slab[at / 2];
    a = from_f16((u16)(word & 0xffffu));
    b = from_f16((u16)(word >> 16));
}
DEVICE void load_pair(IN(float) slab, i64 at, float &a, float &b) {
    a = slab[at];
    b = slab[at + 1];
}

// Where value `c` of a row of keys, or of values, stands in a page.
DEVICE i64 key_place(int c, int slot, int dim) {
    int head = c / dim, d = c % dim;
    return ((i64)(head * (dim / 2) + d / 2) * PAGE + slot) * 2 + d % 2;
}
DEVICE i64 value_place(int c, int slot, int dim, int width) {
    int head = c / dim, d = c % dim;
    return (i64)width * PAGE + (i64)(head * PAGE + slot) * dim + d;
}

// places[row] = page and slot of the row.
template <class K, class Slabs, class Places>
DEVICE void append_rows(K k, K v, const Slabs &slabs, Places places, i64 rows, int width, int dim) {
    for (i64 n = BLOCK_X * THREADS + THREAD; n < rows * width; n += BLOCKS_X * THREADS) {
        i64 row = n / width;
        int c = (int)(n % width);
        u32 page = places[2 * row];
        int slot = (int)places[2 * row + 1];
        i64 start = page_start(page, 2 * PAGE * (i64)width);
        store(slabs.at[page >> SLAB_SHIFT], start + key_place(c, slot, dim), k[n]);
        store(slabs.at[page >> SLAB_SHIFT], start + value_place(c, slot, dim, width), v[n]);
    }
}
KERNEL(kv_append_f16, IN(float) k, IN(float) v, VALUE(HalfSlabsOut) slabs, IN(u32) places, i64 rows, int width, int dim) {
    append_rows(k, v, slabs, places, rows, width, dim);
}
KERNEL(kv_append_f32, IN(float) k, IN(float) v, VALUE(FloatSlabsOut) slabs, IN(u32) places, i64 rows, int width, int dim) {
    append_rows(k, v, slabs, places, rows, width, dim);
}

// Moves slots, in the order named: page and slot from where and to where. A thread moves one value of all of them, so a slot
// may be read and then written.
template <class Slabs, class Moves> DEVICE void move_slots(const Slabs &slabs, Moves moves, int count, int width, int dim) {
    int n = (int)(BLOCK_X * THREADS + THREAD);
    if (n >= 2 * width) return;
    int c = n % width;
    for (int i = 0; i < count; i++) {
        u32 from = moves[4 * i], to = moves[4 * i + 2];
        int from_slot = (int)moves[4 * i + 1], to_slot = (int)moves[4 * i + 3];
        i64 size = 2 * PAGE * (i64)width, source, target;
        if (n < width) {
            source = key_place(c, from_slot, dim);
            target = key_place(c, to_slot, dim);
        } else {
            source = value_place(c, from_slot, dim, width);
            target = value_place(c, to_slot, dim, width);
        }
        slabs.at[to >> SLAB_SHIFT][page_start(to, size) + target] =
            slabs.at[from >> SLAB_SHIFT][page_start(from, size) + source];
    }
}
KERNEL(kv_move_f16, VALUE(HalfSlabsOut) slabs, IN(u32) moves, int count, int width, int dim) {
    move_slots(slabs, moves, count, width, dim);
}
KERNEL(kv_move_f32, VALUE(FloatSlabsOut) slabs, IN(u32) moves, int count, int width, int dim) {
    move_slots(slabs, moves, count, width, dim);
}

// What a query has come to: largest logit, sum of weights, weighted values (2 P columns a lane).
template <int P> struct Mixed {
    float most, sum, values[2 * P];
};

// What a query sees: positions from..to, and where those behind `base` stand if not in order.
struct Sight {
    int from, to, base;
    u32 path;
};

// One block of 32 positions from `tile` on for the queries first..first + N, which all find them in the same slots.
template <int P, int N, class Q, class Slabs, class Pages, class Paths>
DEVICE void mix_tile(Q q, int q_at, int q_stride, const Slabs &slabs, Pages pages, i64 pages_at, Paths paths, int kv_head,
                     int width, int dim, float scale, float softcap, int tile, int first, Sight *sights,
                     Mixed<P> *mixed) {
    int lane = THREAD % 32, position = tile + lane;
    int from = sights[first].from, to = sights[first].to;
    UNROLL
    for (int j = 1; j < N; j++) {
        from = sights[first + j].from < from ? sights[first + j].from : from;
        to = sights[first + j].to > to ? sights[first + j].to : to;
    }
    if (tile + PAGE <= from || tile >= to) return;
    // Lanes that see nothing read what the first position of the block, or the last, reads.
    int seen = position < to ? position : to - 1;
    int slot = seen;
    if (sights[first].path != NO_PATH && seen >= sights[first].base)
        slot = (int)paths[(i64)sights[first].path + seen - sights[first].base];
    u32 page = pages[pages_at + slot / PAGE];
    i64 size = 2 * PAGE * (i64)width, start = page_start(page, size);
    float dots[N];
    UNROLL
    for (int j = 0; j < N; j++) dots[j] = 0.0f;
    {
        i64 at = start + ((i64)kv_head * (dim / 2) * PAGE + slot % PAGE) * 2;
        UNROLL_SOME
        for (int d = 0; d < dim; d += 2) {
            float a, b;
            load_pair(slabs.at[page >> SLAB_SHIFT], at + (i64)d * PAGE, a, b);
            UNROLL
            for (int j = 0; j < N; j++) {
                dots[j] = fmaf(q[q_at + j * q_stride + d], a, dots[j]);
                dots[j] = fmaf(q[q_at + j * q_stride + d + 1], b, dots[j]);
            }
        }
    }
    float weights[N];
    UNROLL
    for (int j = 0; j < N; j++) {
        Sight s = sights[first + j];
        weights[j] = 0.0f;
        if (tile + PAGE <= s.from || tile >= s.to) continue;
        float logit = MUL(dots[j], scale);
        if (softcap > 0.0f) logit = MUL(softcap, tanhf(logit / softcap));
        if (position < s.from || position >= s.to) logit = MINUS_INFINITY;
        Mixed<P> &m = mixed[first + j];
        float most = fmaxf(m.most, warp_max(logit));
        float keep = expf(m.most - most);
        weights[j] = expf(logit - most);
        m.sum = fmaf(m.sum, keep, warp_sum(weights[j]));
        m.most = most;
        UNROLL
        for (int p = 0; p < 2 * P; p++) m.values[p] = MUL(m.values[p], keep);
    }
    int begin = from > tile ? from - tile : 0, end = to - tile < PAGE ? to - tile : PAGE;
    for (int i = begin; i < end; i++) {
        u32 page_of = LANE_FROM(page, i);
        int slot_of = LANE_FROM(slot, i);
        i64 at = page_start(page_of, size) + (i64)width * PAGE + (i64)(kv_head * PAGE + slot_of % PAGE) * dim;
        float shares[N];
        UNROLL
        for (int j = 0; j < N; j++) shares[j] = LANE_FROM(weights[j], i);
        UNROLL
        for (int p = 0; p < P; p++) {
            int c = 2 * (lane + 32 * p);
            if (c < dim) {
                float a, b;
                load_pair(slabs.at[page_of >> SLAB_SHIFT], at + c, a, b);
                UNROLL
                for (int j = 0; j < N; j++) {
                    mixed[first + j].values[2 * p] = fmaf(shares[j], a, mixed[first + j].values[2 * p]);
                    mixed[first + j].values[2 * p + 1] = fmaf(shares[j], b, mixed[first + j].values[2 * p + 1]);
                }
            }
        }
    }
}

// y[R, heads, dim]: what queries mix of their sequences' values. A warp per item.
template <int P, class Slabs, class X, class Y, class Words>
DEVICE void attend_pages(X q, const Slabs &slabs, Words items, Words rows, Words pages, Words paths, X sinks, Y y, i64 count,
                         int heads, int kv_heads, int dim, float scale, float softcap) {
    SHARED(float, queries, 8 * TOGETHER * 64 * P);
    const int q_stride = 64 * P;
    int warp = THREAD / 32, lane = THREAD % 32, group = heads / kv_heads, q_at = warp * TOGETHER * q_stride;
    i64 item = BLOCK_X * 8 + warp;
    int kv_head = 0, first_query = 0, here = 0;
    i64 first_row = 0, pages_at = 0;
    if (item < count) {
        kv_head = (int)items[item * ITEM];
        first_row = (i64)items[item * ITEM + 1];
        first_query = (int)items[item * ITEM + 2];
        here = (int)items[item * ITEM + 3];
        pages_at = (i64)items[item * ITEM + 4];
    }
    Sight sights[TOGETHER];
    Mixed<P> mixed[TOGETHER];
    bool in_order = true;
    int from = 0x7fffffff, to = 0, base = 0x7fffffff;
    UNROLL
    for (int j = 0; j < TOGETHER; j++) {
        sights[j].from = sights[j].to = sights[j].base = 0;
        sights[j].path = NO_PATH;
        mixed[j].most = MINUS_INFINITY;
        mixed[j].sum = 0.0f;
        UNROLL
        for (int p = 0; p < 2 * P; p++) mixed[j].values[p] = 0.0f;
        i64 row = first_row + (first_query + j) / group;
        int head = kv_head * group + (first_query + j) % group;
        if (j < here) {
            sights[j].from = (int)rows[row * ROW];
            sights[j].to = (int)rows[row * ROW + 1];
            sights[j].path = rows[row * ROW + 2];
            sights[j].base = (int)rows[row * ROW + 3];
            in_order = in_order && sights[j].path == NO_PATH;
            from = sights[j].from < from ? sights[j].from : from;
            to = sights[j].to > to ? sights[j].to : to;
            base = sights[j].base < base ? sights[j].base : base;
        } else {
            // Nothing: no tile has it.
            sights[j].from = 0x7fffffff;
        }
        for (int c = lane; c < q_stride; c += 32) {
            float value = 0.0f;
            if (j < here && c < dim) value = q[(row * heads + head) * dim + c];
            queries[q_at + j * q_stride + c] = value;
        }
    }
    SYNC();
    for (int tile = from / PAGE * PAGE; tile < to; tile += PAGE) {
        if (in_order || tile + PAGE <= base) {
            mix_tile<P, TOGETHER>(queries, q_at, q_stride, slabs, pages, pages_at, paths, kv_head, kv_heads * dim,
                                  dim, scale, softcap, tile, 0, sights, mixed);
        } else {
            UNROLL
            for (int j = 0; j < TOGETHER; j++)
                if (j < here)
                    mix_tile<P, 1>(queries, q_at + j * q_stride, q_stride, slabs, pages, pages_at, paths, kv_head,
                                   kv_heads * dim, dim, scale, softcap, tile, j, sights, mixed);
        }
    }
    UNROLL
    for (int j = 0; j < TOGETHER; j++) {
        if (j >= here) continue;
        i64 row = first_row + (first_query + j) / group;
        int head = kv_head * group + (first_query + j) % group;
        float keep = 1.0f, sum = mixed[j].sum;
        if (HAS(sinks)) {
            float sink = sinks[head];
            float most = fmaxf(mixed[j].most, sink);
            keep = expf(mixed[j].most - most);
            sum = fmaf(sum, keep, expf(sink - most));
        }
        float inverse = keep / sum;
        UNROLL
        for (int p = 0; p < P; p++) {
            int c = 2 * (lane + 32 * p);
            if (c < dim) {
                y[(row * heads + head) * dim + c] = MUL(mixed[j].values[2 * p], inverse);
                y[(row * heads + head) * dim + c + 1] = MUL(mixed[j].values[2 * p + 1], inverse);
            }
        }
    }
}

#define ATTEND_PAGES(name, P, Slabs)                                                                                   \
    KERNEL(name, IN(float) q, VALUE(Slabs) slabs, IN(u32) items, IN(u32) rows, IN(u32) pages, IN(u32) paths, IN(float) sinks,  \
           OUT(float) y, i64 count, int heads, int kv_heads, int dim, float scale, float softcap) {                    \
        attend_pages<P>(q, slabs, items, rows, pages, paths, sinks, y, count, heads, kv_heads, dim, scale, softcap);   \
    }
ATTEND_PAGES(attend_f16_64, 1, HalfSlabs)
ATTEND_PAGES(attend_f16_128, 2, HalfSlabs)
ATTEND_PAGES(attend_f16_256, 4, HalfSlabs)
ATTEND_PAGES(attend_f32_64, 1, FloatSlabs)
ATTEND_PAGES(attend_f32_128, 2, FloatSlabs)
ATTEND_PAGES(attend_f32_256, 4, FloatSlabs)

// Changes in place.

KERNEL(turn, OUT(float) x, IN(float) angles, IN(u32) positions, i64 rows, int heads, int half) {
    i64 count = rows * heads * half;
    for (i64 n = BLOCK_X * THREADS + THREAD; n < count; n += BLOCKS_X * THREADS) {
        i64 head = n / half;
        int i = (int)(n % half);
        u32 position = positions[head / heads];
        i64 angle = (i64)position * 2 * half, at = head * 2 * half + i;
        float cosine = angles[angle + i], sine = angles[angle + half + i];
        float a = x[at], b = x[at + half];
        x[at] = a * cosine - b * sine;
        x[at + half] = b * cosine + a * sine;
    }
}

KERNEL(gate_by, OUT(float) gate, IN(float) up, i64 count, int activation, float alpha, float limit) {
    for (i64 i = BLOCK_X * THREADS + THREAD; i < count; i += BLOCKS_X * THREADS) {
        Gated g = activate(activation, gate[i], up[i], alpha, limit);
        gate[i] = g.value * g.up;
    }
}

KERNEL(scale_by, OUT(float) x, i64 count, float factor) {
    for (i64 i = BLOCK_X * THREADS + THREAD; i < count; i += BLOCKS_X * THREADS) x[i] *= factor;
}

KERNEL(cap_by, OUT(float) x, i64 count, float cap) {
    for (i64 i = BLOCK_X * THREADS + THREAD; i < count; i += BLOCKS_X * THREADS) {
        float value = x[i];
        x[i] = cap * tanhf(value / cap);
    }
}

// A block per row: its largest output, the lowest id among equals; NaN never wins.
KERNEL(row_best, IN(float) logits, OUT(u32) best, i64 vocab) {
    SHARED(float, room, 8);
    SHARED(u32, ids, 8);
    Top top = row_top(logits + BLOCK_X * vocab, vocab, room, ids);
    if (THREAD == 0) best[BLOCK_X] = top.id;
}

// A block per row: the k largest in order, of equals the lower id first, NO_ID where there are no more; and the logarithm of
// the sum of exp(value - largest value).
KERNEL(row_top_k, IN(float) logits, OUT(u32) ids, OUT(float) values, OUT(float) log_sums, i64 vocab, int k) {
    SHARED(float, room, 8);
    SHARED(u32, id_room, 8);
    IN(float) z = logits + BLOCK_X * vocab;
    float last = 0.0f, first = 0.0f;
    u32 last_id = NO_ID;
    for (int n = 0; n < k; n++) {
        // The best of those behind the last one.
        float most = MINUS_INFINITY;
        u32 id = NO_ID;
        for (i64 j = THREAD; j < vocab; j += THREADS) {
            float value = z[j];
            bool behind = n == 0 || value < last || (value == last && (u32)j > last_id);
            if (behind && (value > most || (id == NO_ID && value == most))) {
                most = value;
                id = (u32)j;
            }
        }
        float top = block_max(most, room);
        id = block_lowest(id != NO_ID && most == top ? id : NO_ID, id_room);
        last = top;
        last_id = id;
        if (n == 0) first = id == NO_ID ? 0.0f : top;
        if (THREAD == 0) {
            ids[BLOCK_X * k + n] = id;
            values[BLOCK_X * k + n] = top;
        }
        if (id == NO_ID) {
            // No thread found one: all leave here.
            for (int rest = n + 1; rest < k; rest++)
                if (THREAD == 0) ids[BLOCK_X * k + rest] = NO_ID;
            break;
        }
    }
    float sum = 0.0f;
    for (i64 j = THREAD; j < vocab; j += THREADS) sum += expf(z[j] - first);
    sum = block_sum(sum, room);
    if (THREAD == 0) log_sums[BLOCK_X] = logf(sum);
}

// Draws keyed by position: see `draftsmith_core::choose_token`, whose rule this is.

DEVICE u64 mix_bits(u64 x) {
    x += 0x9E3779B97F4A7C15ull;
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ x >> 27) * 0x94D049BB133111EBull;
    return x ^ x >> 31;
}

// Gumbel noise of a token.
DEVICE float noise_of(u64 key, u32 token) {
    u64 bits = mix_bits(key ^ mix_bits((u64)token << 1 | 1)) >> 11;
    double uniform = ((double)bits + 0.5) * (1.0 / 9007199254740992.0);
    double most = 1.0 - 1.1102230246251565e-16;
    if (uniform > most) uniform = most;
    return (float)-log(-log(uniform));
}
#define NOISE_MOST 36.75f

// An order of floats as whole numbers: all numbers from -inf to inf.
DEVICE u32 order_of(float value) {
    union { float f; u32 u; } bits;
    bits.f = value;
    return bits.u & 0x80000000u ? ~bits.u : bits.u | 0x80000000u;
}

template <class Room> DEVICE double block_total(double value, Room room) {
    UNROLL
    for (int mask = 16; mask > 0; mask >>= 1) value += LANE_XOR(value, mask);
    if (THREAD % 32 == 0) room[THREAD / 32] = value;
    SYNC();
    double sum = 0.0;
    for (int warp = 0; warp < THREADS / 32; warp++) sum += room[warp];
    SYNC();
    return sum;
}

// What is kept of a row: orders above `order`, and of those at it ids up to `id`.
struct Kept {
    u32 order, id;
};

DEVICE bool keeps(Kept kept, u32 order, u32 id) { return order > kept.order || (order == kept.order && id <= kept.id); }

// What the kept tokens come to whose order is `least` or above (or above it alone), or that have this order and an id up to
// `id`: their number, or their weights.
#define FROM 0
#define ABOVE 1
#define AT_UP_TO 2
template <class Z, class Room>
DEVICE double amount(Z z, i64 vocab, Kept kept, int which, u32 least, u32 id, bool weighed, float most, float factor,
                     Room room) {
    double sum = 0.0;
    for (i64 j = THREAD; j < vocab; j += THREADS) {
        float value = z[j];
        u32 order = order_of(value);
        bool counted = value == value && keeps(kept, order, (u32)j);
        if (which == FROM) counted = counted && order >= least;
        if (which == ABOVE) counted = counted && order > least;
        if (which == AT_UP_TO) counted = counted && order == least && (u32)j <= id;
        if (counted) sum += weighed ? (double)expf((value - most) * factor) : 1.0;
    }
    return block_total(sum, room);
}

// Keeps no more than it takes, largest first and of equals the lower id, to come to `wanted`.
template <class Z, class Room>
DEVICE Kept cut(Z z, i64 vocab, Kept kept, double wanted, bool weighed, float most, float factor, Room room) {
    u32 low = kept.order, high = order_of(most);
    while (low < high) {
        u32 middle = low + (high - low) / 2 + 1;
        double found = amount(z, vocab, kept, FROM, middle, 0, weighed, most, factor, room);
        if (found >= wanted) low = middle; else high = middle - 1;
    }
    double above = amount(z, vocab, kept, ABOVE, low, 0, weighed, most, factor, room);
    u32 first = 0, last = kept.order == low ? kept.id : (u32)vocab - 1;
    if (last > (u32)vocab - 1) last = (u32)vocab - 1;
    while (first < last) {
        u32 middle = first + (last - first) / 2;
        double found = amount(z, vocab, kept, AT_UP_TO, low, middle, weighed, most, factor, room);
        if (above + found >= wanted) last = middle; else first = middle + 1;
    }
    Kept fewer;
    fewer.order = low;
    fewer.id = first;
    return fewer;
}

// Numbers of a row's settings: factor of the logits (0 takes the largest), temperature, least share of the best one's
// probability (0: none), top_p; and top_k and both halves of the noise's key.
#define SETTINGS 4
#define KEYS 3

// A block per row.
KERNEL(draw_rows, IN(float) logits, IN(float) settings, IN(u32) keys, OUT(u32) chosen, i64 vocab) {
    SHARED(float, room, 8);
    SHARED(u32, ids, 8);
    SHARED(double, totals, 8);
    IN(float) z = logits + BLOCK_X * vocab;
    float factor = settings[BLOCK_X * SETTINGS], temperature = settings[BLOCK_X * SETTINGS + 1];
    float share = settings[BLOCK_X * SETTINGS + 2], top_p = settings[BLOCK_X * SETTINGS + 3];
    u32 top_k = keys[BLOCK_X * KEYS];
    u64 key = (u64)keys[BLOCK_X * KEYS + 1] | (u64)keys[BLOCK_X * KEYS + 2] << 32;
    Top top = row_top(z, vocab, room, ids);
    if (factor == 0.0f || !(top.value > MINUS_INFINITY) || fabsf(top.value * factor) > 3.0e38f) {
        if (THREAD == 0) chosen[BLOCK_X] = top.id;
        return;
    }
    Kept kept;
    kept.order = order_of(MINUS_INFINITY);
    kept.id = NO_ID;
    if (share > 0.0f) {
        float least = top.value + temperature * logf(share);
        if (least > MINUS_INFINITY) kept.order = order_of(least); else kept.order += 1;
        // Zeros of both signs are equal.
        if (least == 0.0f) kept.order = order_of(-0.0f);
    }
    if (top_k > 0) {
        double all = amount(z, vocab, kept, FROM, 0, 0, false, top.value, factor, totals);
        if (all > (double)top_k) kept = cut(z, vocab, kept, (double)top_k, false, top.value, factor, totals);
    }
    if (top_p < 1.0f) {
        double all = amount(z, vocab, kept, FROM, 0, 0, true, top.value, factor, totals);
        kept = cut(z, vocab, kept, (double)top_p * all, true, top.value, factor, totals);
    }
    float best = MINUS_INFINITY;
    u32 id = NO_ID;
    for (i64 j = THREAD; j < vocab; j += THREADS) {
        float value = z[j];
        if (!(value == value) || !keeps(kept, order_of(value), (u32)j)) continue;
        float scaled = MUL(value, factor);
        // What noise cannot lift over the best one.
        if (scaled + NOISE_MOST < best) continue;
        float score = scaled + noise_of(key, (u32)j);
        if (score > best) {
            best = score;
            id = (u32)j;
        }
    }
    float most = block_max(best, room);
    id = block_lowest(id != NO_ID && best == most ? id : NO_ID, ids);
    if (THREAD == 0) chosen[BLOCK_X] = id == NO_ID ? top.id : id;
}
