// Losses over rows of logits: one block per row, sums in the order of threads.

struct Top {
    float value;
    u32 id;
};

// The largest value of a row and the lowest id that has it; NaN never wins.
template <class Row, class Room, class Ids> DEVICE Top row_top(Row z, i64 vocab, Room room, Ids ids) {
    Top top;
    float most = MINUS_INFINITY;
    for (i64 j = THREAD; j < vocab; j += THREADS) most = fmaxf(most, z[j]);
    top.value = block_max(most, room);
    u32 id = NO_ID;
    for (i64 j = THREAD; j < vocab; j += THREADS) {
        float value = z[j];
        if (value == top.value) {
            id = (u32)j;
            break;
        }
    }
    id = block_lowest(id, ids);
    top.id = id == NO_ID ? 0u : id;
    return top;
}

// Most likely token and log-sum-exp of each row.
KERNEL(log_sum_exp, IN(float) logits, OUT(u32) best, OUT(float) lse, i64 vocab) {
    SHARED(float, room, 8);
    SHARED(u32, ids, 8);
    IN(float) z = logits + BLOCK_X * vocab;
    Top top = row_top(z, vocab, room, ids);
    float sum = 0.0f;
    for (i64 j = THREAD; j < vocab; j += THREADS) sum += expf(z[j] - top.value);
    sum = block_sum(sum, room);
    if (THREAD == 0) {
        best[BLOCK_X] = top.id;
        lse[BLOCK_X] = top.value + logf(sum);
    }
}

// Logits of the draft vocabulary to probabilities in place; `mass` is their share of the full distribution.
KERNEL(soft_targets, OUT(float) logits, IN(float) lse, OUT(float) mass, i64 vocab) {
    SHARED(float, room, 8);
    OUT(float) z = logits + BLOCK_X * vocab;
    float most = MINUS_INFINITY;
    for (i64 j = THREAD; j < vocab; j += THREADS) most = fmaxf(most, z[j]);
    most = block_max(most, room);
    float sum = 0.0f;
    for (i64 j = THREAD; j < vocab; j += THREADS) {
        float e = expf(z[j] - most);
        z[j] = e;
        sum += e;
    }
    sum = block_sum(sum, room);
    float inverse = 1.0f / sum;
    for (i64 j = THREAD; j < vocab; j += THREADS) z[j] *= inverse;
    if (THREAD == 0) mass[BLOCK_X] = expf(most - lse[BLOCK_X]) * sum;
}

#define ALPHA_NONE 0
#define ALPHA_FACTOR 1
#define ALPHA_LOG 2

// Logits to the gradient of their loss, in place. stats[row] = KL, alpha, 1 if the most likely token is the label's.
KERNEL(soft_rows, OUT(float) logits, IN(float) probs, IN(float) masses, IN(u32) labels, IN(u32) rows, i64 first,
       i64 vocab, float kl_factor, int alpha_kind, float alpha_factor, OUT(float) stats) {
    SHARED(float, room, 8);
    SHARED(u32, ids, 8);
    OUT(float) z = logits + BLOCK_X * vocab;
    u32 teacher = rows[first + BLOCK_X];
    IN(float) p = probs + (i64)teacher * vocab;
    float mass = masses[teacher];
    Top top = row_top(z, vocab, room, ids);
    float sum_p = 0.0f, sum_pz = 0.0f, sum = 0.0f;
    for (i64 j = THREAD; j < vocab; j += THREADS) {
        float shifted = z[j] - top.value, pj = p[j];
        float e = expf(shifted);
        sum_p += pj;
        sum_pz += pj * shifted;
        sum += e;
        z[j] = e;
    }
    sum_p = block_sum(sum_p, room);
    sum_pz = block_sum(sum_pz, room);
    sum = block_sum(sum, room);
    float inverse = 1.0f / sum, kl = kl_factor * sum_p;
    // alpha and, for its gradient, the mass of q where q is the smaller one.
    float alpha = 0.0f, below = 0.0f;
    for (i64 j = THREAD; j < vocab; j += THREADS) {
        float q = z[j] * inverse, pj = p[j];
        float m = pj * mass;
        z[j] = alpha_kind == ALPHA_NONE ? q * kl - kl_factor * pj : q;
        alpha += q < m ? q : m;
        below += q < m ? q : 0.0f;
    }
    alpha = block_sum(alpha, room);
    below = block_sum(below, room);
    if (alpha_kind != ALPHA_NONE) {
        float slope = alpha_kind == ALPHA_FACTOR ? alpha_factor : alpha > 0.0f ? alpha_factor / alpha : 0.0f;
        for (i64 j = THREAD; j < vocab; j += THREADS) {
            float q = z[j], pj = p[j];
            float inside = q < pj * mass ? 1.0f : 0.0f;
            z[j] = q * kl - kl_factor * pj + slope * q * (inside - below);
        }
    }
    if (THREAD == 0) {
        stats[3 * BLOCK_X] = sum_p * logf(sum) - sum_pz;
        stats[3 * BLOCK_X + 1] = alpha;
        stats[3 * BLOCK_X + 2] = top.id == labels[teacher] ? 1.0f : 0.0f;
    }
}

// Logits to the gradient of the losses against tokens, in place. `wanted` holds the target's logits, and afterwards its
// probabilities; `lse` their full log-sum-exp where the vocabulary is a part. values[row] = cross-entropy, L1, probability of
// the draft's and of the target's most likely token; tops[row] = these tokens.
KERNEL(token_rows, OUT(float) logits, OUT(float) wanted, IN(u32) labels, IN(float) ce_factors, IN(float) l1_factors,
       IN(float) lse, i64 first, i64 vocab, OUT(float) values, OUT(u32) tops) {
    SHARED(float, room, 8);
    SHARED(u32, ids, 8);
    i64 row = first + BLOCK_X;
    OUT(float) z = logits + BLOCK_X * vocab;
    u32 label = labels[row];
    Top top = row_top(z, vocab, room, ids);
    float at_label = top.value;
    if (label != NO_ID) at_label = z[label];
    // The label's logit is read before its thread overwrites it.
    SYNC();
    float sum = 0.0f;
    for (i64 j = THREAD; j < vocab; j += THREADS) {
        float e = expf(z[j] - top.value);
        z[j] = e;
        sum += e;
    }
    sum = block_sum(sum, room);
    float inverse = 1.0f / sum, found_ce = 0.0f, ce = 0.0f, l1 = 0.0f, best_prob = 0.0f;
    u32 best = 0;
    if (label != NO_ID) {
        found_ce = logf(sum) - (at_label - top.value);
        ce = ce_factors[row];
    }
    if (!HAS(wanted)) {
        for (i64 j = THREAD; j < vocab; j += THREADS) {
            float value = z[j] * inverse * ce;
            if ((u32)j == label) value -= ce;
            z[j] = value;
        }
    } else {
        OUT(float) t = wanted + BLOCK_X * vocab;
        Top target = row_top(t, vocab, room, ids);
        float shift;
        if (HAS(lse)) {
            shift = lse[row];
        } else {
            float total = 0.0f;
            for (i64 j = THREAD; j < vocab; j += THREADS) total += expf(t[j] - target.value);
            shift = target.value + logf(block_sum(total, room));
        }
        best = target.id;
        best_prob = expf(target.value - shift);
        float mass = 0.0f, distance = 0.0f, sign_q = 0.0f;
        for (i64 j = THREAD; j < vocab; j += THREADS) {
            float p = expf(t[j] - shift), q = z[j] * inverse;
            t[j] = p;
            z[j] = q;
            mass += p;
            distance += fabsf(q - p);
            sign_q += q > p ? q : q < p ? -q : 0.0f;
        }
        mass = block_sum(mass, room);
        distance = block_sum(distance, room);
        sign_q = block_sum(sign_q, room);
        l1 = distance;
        if (HAS(lse)) l1 += fmaxf(1.0f - mass, 0.0f);
        float factor = l1_factors[row];
        for (i64 j = THREAD; j < vocab; j += THREADS) {
            float q = z[j], p = t[j];
            float sign = q > p ? 1.0f : q < p ? -1.0f : 0.0f;
            float value = q * (ce + factor * (sign - sign_q));
            if ((u32)j == label) value -= ce;
            z[j] = value;
        }
    }
    if (THREAD == 0) {
        values[4 * BLOCK_X] = found_ce;
        values[4 * BLOCK_X + 1] = l1;
        values[4 * BLOCK_X + 2] = inverse;
        values[4 * BLOCK_X + 3] = best_prob;
        tops[2 * BLOCK_X] = top.id;
        tops[2 * BLOCK_X + 1] = best;
    }
}
