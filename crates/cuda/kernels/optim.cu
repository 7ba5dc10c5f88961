// AdamW, and the sum that clipping needs.

// `half`, if there is one, is the rounded copy of the weights that products read.
KERNEL(adamw, OUT(float) w, IN(float) g, OUT(float) m, OUT(float) v, OUT(bf16) half, i64 count, float grad_scale,
       float beta1, float beta2, float eps, float keep, float step_size, float inverse_root) {
    for (i64 i = BLOCK_X * THREADS + THREAD; i < count; i += BLOCKS_X * THREADS) {
        float grad = g[i] * grad_scale;
        float first = m[i], second = v[i];
        first += (1.0f - beta1) * (grad - first);
        second = beta2 * second + (1.0f - beta2) * grad * grad;
        float weight = w[i] * keep - step_size * first / (sqrtf(second) * inverse_root + eps);
        m[i] = first;
        v[i] = second;
        w[i] = weight;
        if (HAS(half)) half[i] = to_bf16(weight);
    }
}

// parts[block] = the sum of the squares of the block's `chunk` values.
KERNEL(sum_squares, IN(float) x, OUT(double) parts, i64 count, i64 chunk) {
    SHARED(double, room, 256);
    i64 end = (BLOCK_X + 1) * chunk < count ? (BLOCK_X + 1) * chunk : count;
    double sum = 0.0;
    for (i64 i = BLOCK_X * chunk + THREAD; i < end; i += THREADS) {
        float value = x[i];
        sum += (double)value * (double)value;
    }
    room[THREAD] = sum;
    for (int half = THREADS / 2; half > 0; half /= 2) {
        SYNC();
        if (THREAD < half) room[THREAD] += room[THREAD + half];
    }
    if (THREAD == 0) parts[BLOCK_X] = room[0];
}
