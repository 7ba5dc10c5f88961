// Products as cuBLASLt counts: by columns, with a leading dimension, f32 or bf16 operands, f32 results.
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef void *handle;
struct desc {
    int compute, scale, transposed[2];
};
struct layout {
    int kind;
    uint64_t rows, cols;
    int64_t ld;
};
struct preference {
    uint64_t workspace;
    uint32_t alignment[4];
};
struct heuristic {
    uint64_t algorithm[8];
    size_t workspace;
    int state;
    float waves;
    int reserved[4];
};

size_t cublasLtGetVersion(void) { return 120803; }
int cublasLtCreate(handle *made) { return *made = (handle)3, 0; }
int cublasLtDestroy(handle made) { return made == (handle)3 ? 0 : 1; }
int cublasLtMatmulDescCreate(handle *made, int compute, int scale) {
    struct desc *d = calloc(1, sizeof *d);
    d->compute = compute, d->scale = scale;
    return *made = d, compute == 68 && scale == 0 ? 0 : 7;
}
int cublasLtMatmulDescDestroy(handle made) { return free(made), 0; }
int cublasLtMatmulDescSetAttribute(handle made, int attribute, const void *value, size_t size) {
    if (attribute < 3 || attribute > 4 || size != 4) return 7;
    return memcpy(&((struct desc *)made)->transposed[attribute - 3], value, 4), 0;
}
int cublasLtMatrixLayoutCreate(handle *made, int kind, uint64_t rows, uint64_t cols, int64_t ld) {
    struct layout *l = calloc(1, sizeof *l);
    l->kind = kind, l->rows = rows, l->cols = cols, l->ld = ld;
    return *made = l, (kind == 0 || kind == 14) && ld >= (int64_t)rows ? 0 : 7;
}
int cublasLtMatrixLayoutDestroy(handle made) { return free(made), 0; }
int cublasLtMatmulPreferenceCreate(handle *made) {
    struct preference *p = calloc(1, sizeof *p);
    for (int i = 0; i < 4; i++) p->alignment[i] = 256;
    return *made = p, 0;
}
int cublasLtMatmulPreferenceDestroy(handle made) { return free(made), 0; }
int cublasLtMatmulPreferenceSetAttribute(handle made, int attribute, const void *value, size_t size) {
    struct preference *p = made;
    if (attribute == 1 && size == 8) return memcpy(&p->workspace, value, 8), 0;
    if (attribute >= 5 && attribute <= 8 && size == 4) return memcpy(&p->alignment[attribute - 5], value, 4), 0;
    return 7;
}
int cublasLtMatmulAlgoGetHeuristic(handle made, handle desc, handle a, handle b, handle c, handle d, handle preference,
                                   int asked, struct heuristic *found, int *count) {
    struct preference *p = preference;
    memset(found, 0, sizeof *found);
    for (int i = 0; i < 4; i++) found->algorithm[i] = p->alignment[i];
    found->algorithm[7] = 77;
    return *count = asked == 1 && p->workspace ? 1 : 0, 0;
}
static float at(uint64_t place, const struct layout *l, int64_t row, int64_t col) {
    int64_t i = row + col * l->ld;
    if (l->kind == 0) return ((float *)place)[i];
    uint32_t bits = (uint32_t)((uint16_t *)place)[i] << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
int cublasLtMatmul(handle made, handle desc, const float *alpha, uint64_t a, handle la, uint64_t b, handle lb,
                   const float *beta, uint64_t c, handle lc, uint64_t d, handle ld, const uint64_t *algorithm,
                   uint64_t workspace, size_t bytes, handle stream) {
    const struct desc *x = desc;
    const struct layout *A = la, *B = lb, *D = ld;
    uint64_t places[4] = {a, b, c, d};
    for (int i = 0; i < 4; i++)
        if (places[i] % algorithm[i]) return 7;
    uint64_t m = x->transposed[0] ? A->cols : A->rows, k = x->transposed[0] ? A->rows : A->cols;
    uint64_t n = x->transposed[1] ? B->rows : B->cols, k2 = x->transposed[1] ? B->cols : B->rows;
    if (algorithm[7] != 77 || m != D->rows || n != D->cols || k != k2 || c != d || lc != ld || D->kind != 0) return 7;
    if (!workspace || bytes < 1 << 20 || stream != (handle)7) return 7;
    for (uint64_t i = 0; i < m; i++) {
        for (uint64_t j = 0; j < n; j++) {
            double sum = 0;
            for (uint64_t t = 0; t < k; t++)
                sum += (double)at(a, A, x->transposed[0] ? t : i, x->transposed[0] ? i : t) *
                       at(b, B, x->transposed[1] ? j : t, x->transposed[1] ? t : j);
            float *to = (float *)d + i + j * D->ld;
            *to = *alpha * (float)sum + (*beta == 0 ? 0 : *beta * *to);
        }
    }
    return 0;
}
