/* Products of a few or many rows with weights as they lie in memory, a block of outputs at a time. */
#pragma once
#include "numbers.h"
#include "tiles.h"

enum { BFLOAT16, INT8, INT4 };
enum { WIDEST = 64 };  /* outputs in a block, at most */
enum { FEW = 16 };     /* for more rows quantised weights are unpacked, where there are tiles */
enum { PART = 512 };   /* inputs that many rows are multiplied with at once */
enum { AHEAD = 8192 }; /* bytes of weights that are on their way */

/* y = W x + b, W [out, in]; see `_matrix` in native_step.py. */
typedef struct {
    const void *weight;
    const bf16 *scales;
    const bf16 *bias;
    int64_t out, in, kind, block, group;
} Matrix;

/* What a product takes, of one thread: x [rows, in]. Quantised weights are multiplied by integers:
 * x is whole * scale, a scale for each group of inputs; offset: scale times the group's sum. Or
 * they are unpacked, a block at a time. */
typedef struct {
    const bf16 *x;
    bf16 *unpacked;        /* [in / 2, WIDEST, 2], for many rows */
    int8_t *whole;         /* [rows, in] */
    float *scale, *offset; /* [rows, in / group] */
    int64_t rows, in, group;
} Input;

/* y[r * WIDEST + n] for the outputs n of one block: */

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
                _mm_prefetch((const char *)here + AHEAD, _MM_HINT_T0);
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

/* The same by tiles: up to 16 rows, V tiles of outputs, inputs from..to-1 on top of what is in y.
 * far: the weights come from memory. */
INLINE void tile_rows(const bf16 *w, const bf16 *x, const Input *in, int64_t from, int64_t to,
                      float *y, const int V, const int far) {
    const int64_t row = WIDEST * sizeof(float);
    if (from) {
        _tile_loadd(0, y, row);
        if (V > 1) _tile_loadd(1, y + 16, row);
        if (V > 2) _tile_loadd(2, y + 32, row);
        if (V > 2) _tile_loadd(3, y + 48, row);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t k = from; k < to; k += 32) {
        const bf16 *here = w + k * V * 16;
        if (far)
            UNROLL for (int i = 0; i < 16 * V; i++)
                _mm_prefetch((const char *)here + AHEAD + 64 * i, _MM_HINT_T0);
        _tile_loadd(4, x + k, in->in * 2);
        _tile_loadd(5, here, V * 64);
        _tile_dpbf16ps(0, 4, 5);
        if (V < 2) continue;
        _tile_loadd(5, here + 32, V * 64);
        _tile_dpbf16ps(1, 4, 5);
        if (V < 4) continue;
        _tile_loadd(5, here + 64, V * 64);
        _tile_dpbf16ps(2, 4, 5);
        _tile_loadd(5, here + 96, V * 64);
        _tile_dpbf16ps(3, 4, 5);
    }
    _tile_stored(0, y, row);
    if (V > 1) _tile_stored(1, y + 16, row);
    if (V > 2) _tile_stored(2, y + 32, row);
    if (V > 2) _tile_stored(3, y + 48, row);
}

/* Of all rows; with many, the inputs in parts, whose weights stay in the nearest cache meanwhile. */
static void tile_product(const bf16 *w, const Input *in, int64_t block, float *y) {
    const int64_t part = in->rows > 16 ? PART : in->in;
    int64_t shaped = 0;
    for (int64_t from = 0; from < in->in; from += part)
        for (int64_t r = 0; r < in->rows; r += 16) {
            const bf16 *x = in->x + r * in->in;
            const int64_t to = MIN(from + part, in->in), num = MIN(16, in->rows - r);
            const int far = r == 0 && w != in->unpacked;
            if (num != shaped) shape_tiles(shaped = num);
            if (block == 64 && far)
                tile_rows(w, x, in, from, to, y + r * WIDEST, 4, 1);
            else if (block == 64)
                tile_rows(w, x, in, from, to, y + r * WIDEST, 4, 0);
            else if (block == 32)
                tile_rows(w, x, in, from, to, y + r * WIDEST, 2, far);
            else
                tile_rows(w, x, in, from, to, y + r * WIDEST, 1, far);
        }
    _tile_release();
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

/* Two vectors of outputs, of an even and an odd input, as pairs in bfloat16. */
INLINE void store_pairs(bf16 *to, __m512 even, __m512 odd) {
    uint16_t order[32];
    UNROLL for (int i = 0; i < 32; i++) order[i] = i / 2 + i % 2 * 16;
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(_mm512_loadu_si512(order), both));
}

/* Block b, without its scales: whole numbers up to 127 are as they are in bfloat16. */
static void unpack_int8(const Matrix *m, int64_t b, bf16 *to) {
    for (int64_t v = 0; v < m->block; v += 16) {
        int32_t at[16];
        for (int64_t i = 0; i < 16; i++)
            at[i] = (int32_t)((MIN(b * m->block + v + i, m->out - 1) - b * m->block) * m->in);
        const __m512i rows = _mm512_loadu_si512(at);
        const int8_t *from = (const int8_t *)m->weight + b * m->block * m->in;
        for (int64_t k = 0; k < m->in; k += 4) {
            __m512i four = _mm512_i32gather_epi32(rows, from + k, 1);
            __m512 value[4];
            UNROLL for (int i = 0; i < 4; i++) {
                __m512i one = _mm512_srai_epi32(_mm512_slli_epi32(four, 24 - 8 * i), 24);
                value[i] = _mm512_cvtepi32_ps(one);
            }
            store_pairs(to + (k * m->block + 2 * v), value[0], value[1]);
            store_pairs(to + ((k + 2) * m->block + 2 * v), value[2], value[3]);
        }
    }
}

static void unpack_int4(const Matrix *m, int64_t b, bf16 *to) {
    const uint8_t *from = (const uint8_t *)m->weight + b * WIDEST / 2 * m->in;
    const int64_t stride = (m->out + WIDEST - 1) / WIDEST * WIDEST;
    for (int64_t g = 0; g < m->in / m->group; g++) {
        __m512 scale[4], zero[4];
        UNROLL for (int v = 0; v < 4; v++) {
            const bf16 *here = m->scales + (g * stride + b * WIDEST + 16 * v) * 2;
            __m512i both = _mm512_loadu_si512(here);
            scale[v] = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
            zero[v] = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(0xffff0000)));
            zero[v] = _mm512_fmadd_ps(scale[v], _mm512_set1_ps(-8), zero[v]);
        }
        for (int64_t k = g * m->group; k < (g + 1) * m->group; k += 2)
            UNROLL for (int v = 0; v < 4; v++) {
                __m512 value[2];
                UNROLL for (int i = 0; i < 2; i++) {
                    const uint8_t *here = from + (k + i) * 32 + v % 2 * 16;
                    __m512i level = _mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)here));
                    level = v < 2 ? _mm512_and_si512(level, _mm512_set1_epi32(15))
                                  : _mm512_srli_epi32(level, 4);
                    value[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(level), scale[v], zero[v]);
                }
                store_pairs(to + k * WIDEST + 32 * v, value[0], value[1]);
            }
    }
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
    const int64_t first = b * m->block, rows = in->rows;
    int64_t r = 0;
    if (in->unpacked) {
        (m->kind == INT8 ? unpack_int8 : unpack_int4)(m, b, in->unpacked);
        tile_product(in->unpacked, in, m->block, y);
    } else if (has_tiles && m->kind == BFLOAT16) {
        tile_product((const bf16 *)m->weight + first * m->in, in, m->block, y);
    } else {
        for (; rows - r >= 4; r += 4) some_rows(m, b, in, r, y, 4);
        if (rows - r == 3) some_rows(m, b, in, r, y, 3);
        if (rows - r == 2) some_rows(m, b, in, r, y, 2);
        if (rows - r == 1) some_rows(m, b, in, r, y, 1);
    }
    for (int64_t n = 0; n < m->block; n += 16) {
        const __mmask16 there = first_of(m->out - first - n);
        __m512 scale = _mm512_set1_ps(1), bias = _mm512_setzero_ps();
        if (in->unpacked && m->kind == INT8)
            scale = widen16(_mm256_maskz_loadu_epi16(there, m->scales + first + n));
        if (m->bias) bias = load_bf16(m->bias + first + n);
        for (r = 0; r < rows; r++) {
            float *here = y + r * WIDEST + n;
            __m512 value = rounded(_mm512_mul_ps(_mm512_loadu_ps(here), scale));
            if (m->bias) value = rounded(_mm512_add_ps(value, bias));
            _mm512_storeu_ps(here, value);
        }
    }
}

/* x [rows, in] as `m` takes it; room: of the thread. */
static Input prepared(const Matrix *m, const bf16 *x, int64_t rows, float *room) {
    Input in = {.x = x, .rows = rows, .in = m->in, .group = m->kind == INT8 ? 64 : m->group};
    if (m->kind == BFLOAT16) return in;
    if (has_tiles && rows > FEW) {
        in.unpacked = (bf16 *)room;
        return in;
    }
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
