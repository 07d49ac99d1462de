/* A Llama-shaped language model on a CPU with AVX-512 and bfloat16: a whole step of a few rows, and
 * what stands between the products of many.
 *
 * Compiled by native_library.py and called by native_step.py, which says how the weights lie, and native_ops.py.
 * A step is bound by reading weights, so they are read once for all rows, as they lie in
 * memory, and all that is between two products is done by the threads that are there already.
 * Values are rounded to bfloat16 where torch's own operators round them. Sums of a row do not
 * depend on the other rows, so an answer is the same whoever else is in the batch.
 */
#include <immintrin.h>
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
#define MIN(a, b) ((a) < (b) ? (a) : (b))

typedef uint16_t bf16;
enum { BFLOAT16, INT8, INT4 };
enum { WIDEST = 64 }; /* outputs in a block, at most */

/* y = W x + b, W [out, in]; see `_matrix` in native_step.py. */
typedef struct {
    const void *weight;
    const bf16 *scales;
    const bf16 *bias;
    int64_t out, in, kind, block, group;
} Matrix;

typedef struct {
    const float *attention_norm, *mlp_norm;
    const bf16 *head_norm; /* [heads + kv_heads, dim], or none */
    Matrix qkv, output, gate_up, down;
} Layer;

/* cache: [layers * 2, slots, kv_heads, context, dim], a layer's keys, then its values. */
typedef struct {
    const Layer *layers;
    const float *norm;
    Matrix head;
    int64_t num_layers, hidden, heads, kv_heads, dim, num_slots, context;
    bf16 *cache;
    float eps, scale;
} Model;

/* The rows of a step: x [rows, hidden]; cos, sin [rows, dim], the sines' first half negated. */
typedef struct {
    int64_t rows;
    float *x;
    const bf16 *cos, *sin;
    const int64_t *slots, *positions;
    bf16 *logits;     /* [rows - first_logits, head.out] */
    float *joint;     /* [rows, heads + 2 * kv_heads, dim] */
    bf16 *queries;    /* [rows, heads, dim] */
    bf16 *attended;   /* [rows, heads * dim] */
    bf16 *activated;  /* [rows, inner] */
    char *scratch;    /* of each thread */
    int64_t scratch_size, first_logits;
} Step;

/* What a product takes, of one thread: x [rows, in]. Quantised weights are multiplied by integers:
 * x is whole * scale, a scale for each group of inputs; offset: scale times the group's sum. */
typedef struct {
    const bf16 *x;
    int8_t *whole;         /* [rows, in] */
    float *scale, *offset; /* [rows, in / group] */
    int64_t rows, in, group;
} Input;

INLINE float widen(bf16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
INLINE __m512 widen16(__m256i x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
INLINE __m512 load_bf16(const bf16 *x) { return widen16(_mm256_loadu_si256((const void *)x)); }
INLINE __m256i narrow(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }
INLINE void store_bf16(bf16 *to, __m512 x) { _mm256_storeu_si256((void *)to, narrow(x)); }
INLINE __m512 rounded(__m512 x) { return widen16(narrow(x)); }
INLINE __m512 pair(const bf16 *x) {
    int32_t both;
    memcpy(&both, x, 4);
    return _mm512_castsi512_ps(_mm512_set1_epi32(both));
}
INLINE __m512 dot(__m512 sum, __m512 a, __m512 b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}

/* e to the x, within 2 units of float32's last place (Cephes' polynomial). */
INLINE __m512 exponential(__m512 x) {
    x = _mm512_max_ps(x, _mm512_set1_ps(-87.0f));
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
    x = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    x = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), x);
    __m512 y = _mm512_set1_ps(1.9875691500e-4f);
    y = _mm512_fmadd_ps(y, x, _mm512_set1_ps(1.3981999507e-3f));
    y = _mm512_fmadd_ps(y, x, _mm512_set1_ps(8.3334519073e-3f));
    y = _mm512_fmadd_ps(y, x, _mm512_set1_ps(4.1665795894e-2f));
    y = _mm512_fmadd_ps(y, x, _mm512_set1_ps(1.6666665459e-1f));
    y = _mm512_fmadd_ps(y, x, _mm512_set1_ps(0.5f));
    y = _mm512_fmadd_ps(y, _mm512_mul_ps(x, x), _mm512_add_ps(x, _mm512_set1_ps(1.0f)));
    return _mm512_scalef_ps(y, n);
}

/* SiLU of gate, times up. */
INLINE __m512 activated(__m512 gate, __m512 up) {
    __m512 e = exponential(_mm512_sub_ps(_mm512_setzero_ps(), gate));
    return _mm512_mul_ps(rounded(_mm512_div_ps(gate, _mm512_add_ps(_mm512_set1_ps(1), e))), up);
}

/* ---- products: y[r * WIDEST + n] for the outputs n of one block ---- */

/* weight: [in / 2, 16 * V, 2] of a block, as oneDNN orders it. Four sums side by side, for their
 * latency; with many rows one vector of outputs after the other, so that all stay in registers. */
INLINE void bf16_some(const bf16 *w, const bf16 *x, int64_t in, float *y, const int R, const int V,
                      const int from, const int to) {
    __m512 sum[4][4][4];
    UNROLL for (int u = 0; u < 4; u++)
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int v = from; v < to; v++) sum[u][r][v] = _mm512_setzero_ps();
    for (int64_t k = 0; k < in; k += 8)
        UNROLL for (int u = 0; u < 4; u++)
            UNROLL for (int v = from; v < to; v++) {
                const bf16 *here = w + ((k + 2 * u) * V + 2 * v) * 16;
                __m512 weight = _mm512_loadu_ps((const void *)here);
                UNROLL for (int r = 0; r < R; r++)
                    sum[u][r][v] = dot(sum[u][r][v], weight, pair(x + r * in + k + 2 * u));
            }
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int v = from; v < to; v++) {
            __m512 a = _mm512_add_ps(sum[0][r][v], sum[1][r][v]);
            __m512 b = _mm512_add_ps(sum[2][r][v], sum[3][r][v]);
            _mm512_storeu_ps(y + r * WIDEST + 16 * v, _mm512_add_ps(a, b));
        }
}

INLINE void bf16_rows(const bf16 *w, const bf16 *x, int64_t in, float *y, const int R, const int V) {
    const int at_once = R == 1 ? V : R == 2 ? 2 : 1;
    UNROLL for (int v = 0; v < V; v += at_once) bf16_some(w, x, in, y, R, V, v, v + at_once);
}

INLINE __m512i four(const int8_t *x) {
    int32_t all;
    memcpy(&all, x, 4);
    return _mm512_set1_epi32(all);
}

/* weight: [16, in] of a block, four outputs at a time, and 64 inputs, which are a group.
 * The product wants one side unsigned: it gets w + 128, and 128 times the sum of x too much. */
INLINE void int8_rows(const int8_t *w, const bf16 *scales, const Input *in, int64_t first,
                      int64_t most, float *y, const int R) {
    const __m512i sign = _mm512_set1_epi8((char)0x80), none = _mm512_setzero_si512();
    const int64_t groups = in->in / in->group;
    const int8_t *x = in->whole + first * in->in;
    const float *scale = in->scale + first * groups, *offset = in->offset + first * groups;
    float much[4] = {0};
    for (int r = 0; r < R; r++)
        for (int64_t g = 0; g < groups; g++) much[r] += 128 * offset[r * groups + g];
    for (int64_t n = 0; n < most; n += 4) {
        const int64_t here = MIN(4, most - n);
        const int8_t *row[4];
        __m512 sum[4][4];
        UNROLL for (int i = 0; i < 4; i++) {
            row[i] = w + (n + MIN(i, here - 1)) * in->in;
            UNROLL for (int r = 0; r < R; r++) sum[i][r] = _mm512_setzero_ps();
        }
        for (int64_t g = 0; g < groups; g++) {
            UNROLL for (int i = 0; i < 4; i++) {
                __m512i weight = _mm512_xor_si512(_mm512_loadu_si512(row[i] + g * 64), sign);
                UNROLL for (int r = 0; r < R; r++) {
                    __m512i values = _mm512_loadu_si512(x + r * in->in + g * 64);
                    __m512 part = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(none, weight, values));
                    __m512 by = _mm512_set1_ps(scale[r * groups + g]);
                    sum[i][r] = _mm512_fmadd_ps(part, by, sum[i][r]);
                }
            }
        }
        for (int i = 0; i < here; i++)
            for (int r = 0; r < R; r++)
                y[r * WIDEST + n + i] =
                    (_mm512_reduce_add_ps(sum[i][r]) - much[r]) * widen(scales[n + i]);
    }
}

/* weight: [in, 32] bytes of a block, output n in the low and n + 32 in the high 4 bits.
 * scales: [groups, stride, 2] of scale and zero: w = (q - 8) * scale + zero. */
INLINE void int4_rows(const uint8_t *w, const bf16 *scales, int64_t stride, const Input *in,
                      int64_t first, float *y, const int R) {
    const __m512i nibble = _mm512_set1_epi8(15), high_half = _mm512_set1_epi32((int)0xffff0000u);
    /* two rows of bytes, woven so that unpacking their words gives four inputs of each output */
    uint8_t order[64];
    for (int i = 0; i < 32; i++) {
        const int place = i % 16 / 4 * 8 + i / 16 * 4 + i % 4;
        order[2 * place] = i;
        order[2 * place + 1] = 32 + i;
    }
    const __m512i woven = _mm512_loadu_si512(order);
    const int64_t group = in->group, groups = in->in / group;
    const int8_t *x = in->whole + first * in->in;
    const float *scale = in->scale + first * groups, *offset = in->offset + first * groups;
    __m512 sum[4][4];
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int v = 0; v < 4; v++) sum[r][v] = _mm512_setzero_ps();
    for (int64_t g = 0; g < groups; g++) {
        __m512i part[4][4];
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int v = 0; v < 4; v++) part[r][v] = _mm512_setzero_si512();
        for (int64_t k = g * group; k < (g + 1) * group; k += 4) {
            __m512i a = _mm512_permutexvar_epi8(woven, _mm512_loadu_si512(w + k * 32));
            __m512i b = _mm512_permutexvar_epi8(woven, _mm512_loadu_si512(w + k * 32 + 64));
            __m512i c = _mm512_unpacklo_epi16(a, b), d = _mm512_unpackhi_epi16(a, b);
            __m512i weight[4] = {
                _mm512_and_si512(c, nibble),
                _mm512_and_si512(d, nibble),
                _mm512_and_si512(_mm512_srli_epi16(c, 4), nibble),
                _mm512_and_si512(_mm512_srli_epi16(d, 4), nibble),
            };
            UNROLL for (int v = 0; v < 4; v++)
                UNROLL for (int r = 0; r < R; r++)
                    part[r][v] = _mm512_dpbusd_epi32(part[r][v], weight[v],
                                                     four(x + r * in->in + k));
        }
        UNROLL for (int v = 0; v < 4; v++) {
            __m512i both = _mm512_loadu_si512(scales + (g * stride + 16 * v) * 2);
            __m512 factor = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
            __m512 zero = _mm512_castsi512_ps(_mm512_and_si512(both, high_half));
            UNROLL for (int r = 0; r < R; r++) {
                const float of_x = offset[r * groups + g];
                __m512 by = _mm512_set1_ps(scale[r * groups + g]);
                __m512 dots = _mm512_cvtepi32_ps(part[r][v]);
                dots = _mm512_fmadd_ps(dots, by, _mm512_set1_ps(-8 * of_x));
                sum[r][v] = _mm512_fmadd_ps(factor, dots, sum[r][v]);
                sum[r][v] = _mm512_fmadd_ps(zero, _mm512_set1_ps(of_x), sum[r][v]);
            }
        }
    }
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int v = 0; v < 4; v++) _mm512_storeu_ps(y + r * WIDEST + 16 * v, sum[r][v]);
}

INLINE void some_rows(const Matrix *m, int64_t b, const Input *in, int64_t first, float *y,
                      const int R) {
    const int64_t n = b * m->block;
    y += first * WIDEST;
    if (m->kind == INT8)
        int8_rows((const int8_t *)m->weight + n * m->in, m->scales + n, in, first,
                  MIN(m->block, m->out - n), y, R);
    else if (m->kind == INT4)
        int4_rows((const uint8_t *)m->weight + n / 2 * m->in, m->scales + n * 2,
                  (m->out + 63) / 64 * 64, in, first, y, R);
    else if (m->block == 32)
        bf16_rows((const bf16 *)m->weight + n * m->in, in->x + first * m->in, m->in, y, R, 2);
    else
        bf16_rows((const bf16 *)m->weight + n * m->in, in->x + first * m->in, m->in, y, R, 4);
}

/* y [rows, WIDEST]: block b of the product, rounded, with the bias. */
static void product(const Matrix *m, int64_t b, const Input *in, float *y) {
    int64_t r = 0;
    for (; in->rows - r >= 4; r += 4) some_rows(m, b, in, r, y, 4);
    if (in->rows - r == 3) some_rows(m, b, in, r, y, 3);
    if (in->rows - r == 2) some_rows(m, b, in, r, y, 2);
    if (in->rows - r == 1) some_rows(m, b, in, r, y, 1);
    for (r = 0; r < in->rows; r++)
        for (int64_t n = 0; n < m->block; n += 16) {
            float *here = y + r * WIDEST + n;
            __m512 value = rounded(_mm512_loadu_ps(here));
            if (m->bias) value = rounded(_mm512_add_ps(value, load_bf16(m->bias + b * m->block + n)));
            _mm512_storeu_ps(here, value);
        }
}

/* x [rows, in] as `m` takes it; room: of the thread. */
static Input prepared(const Matrix *m, const bf16 *x, int64_t rows, float *room) {
    Input in = {.x = x, .rows = rows, .in = m->in, .group = m->kind == INT8 ? 64 : m->group};
    if (m->kind == BFLOAT16) return in;
    const int64_t groups = rows * m->in / in.group;
    in.scale = room;
    in.offset = room + groups;
    in.whole = (int8_t *)(room + 2 * groups);
    for (int64_t g = 0; g < groups; g++) {
        const bf16 *from = x + g * in.group;
        __m512 most = _mm512_setzero_ps();
        for (int64_t k = 0; k < in.group; k += 16)
            most = _mm512_max_ps(most, _mm512_abs_ps(load_bf16(from + k)));
        const float scale = _mm512_reduce_max_ps(most) / 127, inverse = scale > 0 ? 1 / scale : 0;
        __m512i sum = _mm512_setzero_si512();
        for (int64_t k = 0; k < in.group; k += 16) {
            __m512 value = _mm512_mul_ps(load_bf16(from + k), _mm512_set1_ps(inverse));
            __m512i whole = _mm512_cvtps_epi32(value);
            sum = _mm512_add_epi32(sum, whole);
            _mm_storeu_si128((void *)(in.whole + g * in.group + k), _mm512_cvtepi32_epi8(whole));
        }
        in.scale[g] = scale;
        in.offset[g] = scale * (float)_mm512_reduce_add_epi32(sum);
    }
    return in;
}

/* ---- between the products ---- */

/* RMSNorm of x [rows, hidden] by weight, in bfloat16. */
static void normed(const float *x, const float *weight, int64_t rows, int64_t hidden, float eps,
                   bf16 *to) {
    for (int64_t r = 0; r < rows; r++, x += hidden, to += hidden) {
        __m512 squares = _mm512_setzero_ps();
        for (int64_t i = 0; i < hidden; i += 16) {
            __m512 value = _mm512_loadu_ps(x + i);
            squares = _mm512_fmadd_ps(value, value, squares);
        }
        const float mean = _mm512_reduce_add_ps(squares) / (float)hidden;
        const __m512 scale = _mm512_set1_ps(1.0f / sqrtf(mean + eps));
        for (int64_t i = 0; i < hidden; i += 16) {
            __m512 value = _mm512_mul_ps(_mm512_loadu_ps(x + i), scale);
            store_bf16(to + i, _mm512_mul_ps(value, _mm512_loadu_ps(weight + i)));
        }
    }
}

/* One head of a query or key, x [dim]: its norm, if any, and its position's rotation. */
static void rotated(const Model *m, const bf16 *weight, float *x, const bf16 *cos, const bf16 *sin,
                    bf16 *to) {
    const int64_t dim = m->dim, half = dim / 2;
    if (weight) {
        __m512 squares = _mm512_setzero_ps();
        for (int64_t i = 0; i < dim; i += 16) {
            __m512 value = _mm512_loadu_ps(x + i);
            squares = _mm512_fmadd_ps(value, value, squares);
        }
        const float mean = _mm512_reduce_add_ps(squares) / (float)dim;
        const __m512 scale = _mm512_set1_ps(1.0f / sqrtf(mean + m->eps));
        for (int64_t i = 0; i < dim; i += 16) {
            __m512 value = rounded(_mm512_mul_ps(_mm512_loadu_ps(x + i), scale));
            value = rounded(_mm512_mul_ps(value, load_bf16(weight + i)));
            _mm512_storeu_ps(x + i, value);
        }
    }
    for (int64_t i = 0; i < dim; i += 16) {
        __m512 straight = _mm512_mul_ps(_mm512_loadu_ps(x + i), load_bf16(cos + i));
        __m512 other = _mm512_loadu_ps(x + (i + half) % dim);
        store_bf16(to + i, _mm512_fmadd_ps(other, load_bf16(sin + i), rounded(straight)));
    }
}

/* The sums of 16 vectors, each in its place. */
INLINE __m512 sums_of(const __m512 *x) {
    __m512 four[4];
    UNROLL for (int i = 0; i < 4; i++) {
        __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(x[4 * i], x[4 * i + 1]),
                                 _mm512_unpackhi_ps(x[4 * i], x[4 * i + 1]));
        __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(x[4 * i + 2], x[4 * i + 3]),
                                 _mm512_unpackhi_ps(x[4 * i + 2], x[4 * i + 3]));
        __m512d c = _mm512_castps_pd(a), d = _mm512_castps_pd(b);
        four[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(c, d)),
                                _mm512_castpd_ps(_mm512_unpackhi_pd(c, d)));
    }
    __m512 a = _mm512_add_ps(_mm512_shuffle_f32x4(four[0], four[1], 0x88),
                             _mm512_shuffle_f32x4(four[0], four[1], 0xdd));
    __m512 b = _mm512_add_ps(_mm512_shuffle_f32x4(four[2], four[3], 0x88),
                             _mm512_shuffle_f32x4(four[2], four[3], 0xdd));
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}

/* Softmax of the scores of keys [length, dim] for one query; e to the score, and their sum. */
static float weights(const Model *m, const bf16 *query, const bf16 *keys, int64_t length,
                     float *to) {
    const int64_t dim = m->dim;
    float most = -INFINITY;
    for (int64_t i = 0; i < length; i += 16) {
        __m512 sum[16];
        UNROLL for (int j = 0; j < 16; j++) {
            const bf16 *key = keys + MIN(i + j, length - 1) * dim;
            sum[j] = _mm512_setzero_ps();
            for (int64_t d = 0; d < dim; d += 32)
                sum[j] = dot(sum[j], _mm512_loadu_ps((const void *)(key + d)),
                             _mm512_loadu_ps((const void *)(query + d)));
        }
        __m512 scores = _mm512_mul_ps(sums_of(sum), _mm512_set1_ps(m->scale));
        _mm512_storeu_ps(to + i, scores); /* past the end: the last one again */
        most = fmaxf(most, _mm512_reduce_max_ps(scores));
    }
    __m512 total = _mm512_setzero_ps();
    for (int64_t i = 0; i < length; i += 16) {
        __mmask16 there = length - i >= 16 ? 0xffff : (__mmask16)((1u << (length - i)) - 1);
        __m512 value = exponential(_mm512_sub_ps(_mm512_loadu_ps(to + i), _mm512_set1_ps(most)));
        value = _mm512_maskz_mov_ps(there, value);
        _mm512_storeu_ps(to + i, value);
        total = _mm512_add_ps(total, value);
    }
    return _mm512_reduce_add_ps(total);
}

/* The mean of values [length, dim] by weights; 32 of the dimensions. */
INLINE void mean32(const bf16 *values, int64_t dim, const float *weight, int64_t length, float sum,
                   bf16 *to) {
    __m512 low = _mm512_setzero_ps(), high = _mm512_setzero_ps();
    for (int64_t i = 0; i < length; i += 2) {
        /* weights past the end are 0, but what lies there need not be a number */
        const bf16 *next = values + MIN(i + 1, length - 1) * dim;
        __m512i a = _mm512_loadu_si512(values + i * dim), b = _mm512_loadu_si512(next);
        __m128 both = _mm_loadl_pi(_mm_setzero_ps(), (const void *)(weight + i));
        int32_t pair_of = _mm_cvtsi128_si32((__m128i)_mm_cvtneps_pbh(both));
        __m512 shares = _mm512_castsi512_ps(_mm512_set1_epi32(pair_of));
        low = dot(low, _mm512_castsi512_ps(_mm512_unpacklo_epi16(a, b)), shares);
        high = dot(high, _mm512_castsi512_ps(_mm512_unpackhi_epi16(a, b)), shares);
    }
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i last =
        _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    const __m512 share = _mm512_set1_ps(1.0f / sum);
    store_bf16(to, _mm512_mul_ps(_mm512_permutex2var_ps(low, first, high), share));
    store_bf16(to + 16, _mm512_mul_ps(_mm512_permutex2var_ps(low, last, high), share));
}

static bf16 *cached(const Model *m, int64_t tensor, int64_t slot, int64_t head) {
    return m->cache + ((tensor * m->num_slots + slot) * m->kv_heads + head) * m->context * m->dim;
}

/* Queries and keys rotated, keys and values put into the cache: heads first..last-1 of all rows. */
static void put(const Model *m, const Step *s, int64_t layer, int64_t first, int64_t last) {
    const int64_t dim = m->dim, all = m->heads + 2 * m->kv_heads;
    const bf16 *norm = m->layers[layer].head_norm;
    for (int64_t unit = first; unit < last; unit++) {
        const int64_t r = unit / all, head = unit % all, kind = head - m->heads;
        float *x = s->joint + unit * dim;
        const bf16 *cos = s->cos + r * dim, *sin = s->sin + r * dim;
        bf16 *to = s->queries + (r * m->heads + head) * dim;
        if (kind >= 0) {
            const int64_t values = kind >= m->kv_heads;
            to = cached(m, 2 * layer + values, s->slots[r], kind - values * m->kv_heads);
            to += s->positions[r] * dim;
            if (values) {
                for (int64_t i = 0; i < dim; i += 16) store_bf16(to + i, _mm512_loadu_ps(x + i));
                continue;
            }
        }
        rotated(m, norm ? norm + head * dim : 0, x, cos, sin, to);
    }
}

/* Query heads first..last-1 of all rows over keys and values. */
static void attend(const Model *m, const Step *s, int64_t layer, int64_t first, int64_t last,
                   float *room) {
    const int64_t dim = m->dim;
    for (int64_t unit = first; unit < last; unit++) {
        const int64_t r = unit / m->heads, head = unit % m->heads * m->kv_heads / m->heads;
        const int64_t slot = s->slots[r], length = s->positions[r] + 1;
        const bf16 *keys = cached(m, 2 * layer, slot, head), *values = cached(m, 2 * layer + 1, slot, head);
        const float sum = weights(m, s->queries + unit * dim, keys, length, room);
        for (int64_t d = 0; d < dim; d += 32)
            mean32(values + d, dim, room, length, sum, s->attended + unit * dim + d);
    }
}

/* One of `count` threads, and its own memory: hidden [rows, hidden], y [2, rows, WIDEST], room. */
typedef struct {
    int64_t number, count;
    bf16 *hidden;
    float *y, *room;
} Thread;

/* This thread's part of `all` things: from part(…, 0) to part(…, 1). */
INLINE int64_t part(const Thread *t, int64_t all, int64_t end) {
    return all * (t->number + end) / t->count;
}

INLINE int64_t num_blocks(const Matrix *m) { return (m->out + m->block - 1) / m->block; }

/* What becomes of a product's blocks. */

static void store(const Matrix *w, const Input *in, float *to, const Thread *t) {
    const int64_t blocks = num_blocks(w);
    for (int64_t b = part(t, blocks, 0); b < part(t, blocks, 1); b++) {
        product(w, b, in, t->y);
        for (int64_t r = 0; r < in->rows; r++)
            memcpy(to + r * w->out + b * w->block, t->y + r * WIDEST, w->block * sizeof(float));
    }
}

static void add(const Matrix *w, const Input *in, float *to, const Thread *t) {
    const int64_t blocks = num_blocks(w);
    for (int64_t b = part(t, blocks, 0); b < part(t, blocks, 1); b++) {
        product(w, b, in, t->y);
        for (int64_t r = 0; r < in->rows; r++)
            for (int64_t i = 0; i < w->block; i += 16) {
                float *x = to + r * w->out + b * w->block + i;
                const float *y = t->y + r * WIDEST + i;
                _mm512_storeu_ps(x, _mm512_add_ps(_mm512_loadu_ps(x), _mm512_loadu_ps(y)));
            }
    }
}

/* SiLU of the first half of the outputs times the other half. */
static void activate(const Matrix *w, const Input *in, bf16 *to, const Thread *t) {
    const int64_t blocks = num_blocks(w) / 2, inner = w->out / 2;
    float *gates = t->y, *ups = t->y + in->rows * WIDEST;
    for (int64_t b = part(t, blocks, 0); b < part(t, blocks, 1); b++) {
        product(w, b, in, gates);
        product(w, b + blocks, in, ups);
        for (int64_t r = 0; r < in->rows; r++)
            for (int64_t i = 0; i < w->block; i += 16) {
                __m512 gate = _mm512_loadu_ps(gates + r * WIDEST + i);
                __m512 up = _mm512_loadu_ps(ups + r * WIDEST + i);
                store_bf16(to + r * inner + b * w->block + i, activated(gate, up));
            }
    }
}

static void narrowed(const Matrix *w, const Input *in, bf16 *to, const Thread *t) {
    const int64_t blocks = num_blocks(w);
    for (int64_t b = part(t, blocks, 0); b < part(t, blocks, 1); b++) {
        product(w, b, in, t->y);
        for (int64_t r = 0; r < in->rows; r++)
            for (int64_t i = 0; i < MIN(w->block, w->out - b * w->block); i += 16) {
                const int64_t left = w->out - b * w->block - i;
                const __mmask16 there = left >= 16 ? 0xffff : (__mmask16)((1u << left) - 1);
                __m256i y = narrow(_mm512_loadu_ps(t->y + r * WIDEST + i));
                _mm256_mask_storeu_epi16(to + r * w->out + b * w->block + i, there, y);
            }
    }
}

static void one_layer(const Model *m, const Step *s, int64_t index, const Thread *t) {
    const Layer *layer = m->layers + index;
    const int64_t rows = s->rows, heads = rows * m->heads, all = heads + 2 * rows * m->kv_heads;
    normed(s->x, layer->attention_norm, rows, m->hidden, m->eps, t->hidden);
    Input in = prepared(&layer->qkv, t->hidden, rows, t->room);
    store(&layer->qkv, &in, s->joint, t);
#pragma omp barrier
    put(m, s, index, part(t, all, 0), part(t, all, 1));
#pragma omp barrier
    attend(m, s, index, part(t, heads, 0), part(t, heads, 1), t->room);
#pragma omp barrier
    in = prepared(&layer->output, s->attended, rows, t->room);
    add(&layer->output, &in, s->x, t);
#pragma omp barrier
    normed(s->x, layer->mlp_norm, rows, m->hidden, m->eps, t->hidden);
    in = prepared(&layer->gate_up, t->hidden, rows, t->room);
    activate(&layer->gate_up, &in, s->activated, t);
#pragma omp barrier
    in = prepared(&layer->down, s->activated, rows, t->room);
    add(&layer->down, &in, s->x, t);
#pragma omp barrier
}

/* x becomes the last layer's output; logits are of the rows from `first_logits` on. */
void vlmchat_step(const Model *m, const Step *s, int64_t threads) {
#pragma omp parallel num_threads(threads)
    {
        Thread t = {.number = omp_get_thread_num(), .count = omp_get_num_threads()};
        t.hidden = (bf16 *)(s->scratch + t.number * s->scratch_size);
        t.y = (float *)(t.hidden + s->rows * m->hidden);
        t.room = t.y + 2 * s->rows * WIDEST;
        for (int64_t index = 0; index < m->num_layers; index++) one_layer(m, s, index, &t);
        const int64_t rows = s->rows - s->first_logits;
        if (rows > 0) {
            const float *x = s->x + s->first_logits * m->hidden;
            normed(x, m->norm, rows, m->hidden, m->eps, t.hidden);
            Input in = prepared(&m->head, t.hidden, rows, t.room);
            narrowed(&m->head, &in, s->logits, &t);
        }
    }
}

/* ---- one operator each, of many rows ---- */

void vlmchat_norm(const float *x, const float *weight, int64_t rows, int64_t hidden, float eps,
                  bf16 *to, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t r = 0; r < rows; r++)
        normed(x + r * hidden, weight, 1, hidden, eps, to + r * hidden);
}

/* In place: the first `heads` of each row of x, whose rows are `width` apart. */
void vlmchat_rotate(bf16 *x, int64_t rows, int64_t heads, int64_t width, int64_t dim,
                    const bf16 *cos, const bf16 *sin, int threads) {
    const int64_t half = dim / 2;
#pragma omp parallel for num_threads(threads)
    for (int64_t r = 0; r < rows; r++)
        for (int64_t h = 0; h < heads; h++)
            for (int64_t i = 0; i < half; i += 16) {
                bf16 *low = x + r * width + h * dim + i, *high = low + half;
                const bf16 *c = cos + r * dim + i, *s = sin + r * dim + i;
                const __m512 a = load_bf16(low), b = load_bf16(high);
                __m512 straight = rounded(_mm512_mul_ps(a, load_bf16(c)));
                store_bf16(low, _mm512_fmadd_ps(b, load_bf16(s), straight));
                straight = rounded(_mm512_mul_ps(b, load_bf16(c + half)));
                store_bf16(high, _mm512_fmadd_ps(a, load_bf16(s + half), straight));
            }
}

/* gate_up: [rows, 2 * inner].  to: [rows, inner]. */
void vlmchat_activate(const bf16 *gate_up, int64_t rows, int64_t inner, bf16 *to, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < inner; i += 16) {
            const bf16 *gate = gate_up + 2 * r * inner + i;
            store_bf16(to + r * inner + i, activated(load_bf16(gate), load_bf16(gate + inner)));
        }
}

void vlmchat_add(float *x, const bf16 *y, int64_t rows, int64_t hidden, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = r * hidden; i < (r + 1) * hidden; i += 16)
            _mm512_storeu_ps(x + i, _mm512_add_ps(_mm512_loadu_ps(x + i), load_bf16(y + i)));
}
