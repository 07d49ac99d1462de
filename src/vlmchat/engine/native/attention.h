/* Attention of a step's rows over the cache: each row by itself, or rows of one slot by tiles. */
#pragma once
#include "model.h"

/* scores [length], and up to 15 more: of keys [length, dim] for one query. */
static void score(const Model *m, const bf16 *query, const bf16 *keys, int64_t length, float *to) {
    const int64_t dim = m->dim;
    for (int64_t i = 0; i < length; i += 16) {
        __m512 sum[16];
        UNROLL for (int j = 0; j < 16; j++) {
            const bf16 *key = keys + MIN(i + j, length - 1) * dim;
            sum[j] = _mm512_setzero_ps();
            for (int64_t d = 0; d < dim; d += 32)
                sum[j] = dot(sum[j], _mm512_loadu_ps((const void *)(key + d)),
                             _mm512_loadu_ps((const void *)(query + d)));
        }
        _mm512_storeu_ps(to + i, sums_of(sum));
    }
}

/* Softmax of scores [length], but for the sum that it is to be divided by, which is returned;
 * 0 from there to `end`, a multiple of 16. */
static float softmax(const float *scores, float scale, int64_t length, int64_t end, bf16 *to) {
    __m512 most = _mm512_set1_ps(-INFINITY), total = _mm512_setzero_ps();
    for (int64_t i = 0; i < length; i += 16)
        most = _mm512_mask_max_ps(most, first_of(length - i), most, _mm512_loadu_ps(scores + i));
    most = _mm512_set1_ps(_mm512_reduce_max_ps(most));
    for (int64_t i = 0; i < end; i += 16) {
        __m512 value = _mm512_sub_ps(_mm512_maskz_loadu_ps(first_of(length - i), scores + i), most);
        value = exponential(_mm512_mul_ps(value, _mm512_set1_ps(scale)));
        value = _mm512_maskz_mov_ps(first_of(length - i), value);
        store_bf16(to + i, value);
        total = _mm512_add_ps(total, value);
    }
    return _mm512_reduce_add_ps(total);
}

/* Two rows of 32 numbers, woven as products take them: pairs of dimensions 0 to 3, 8 to 11, …. */
INLINE void weave(const bf16 *a, const bf16 *b, __m512i *low, __m512i *high) {
    const __m512i x = _mm512_loadu_si512(a), y = _mm512_loadu_si512(b);
    *low = _mm512_unpacklo_epi16(x, y);
    *high = _mm512_unpackhi_epi16(x, y);
}

/* 32 sums of woven numbers, in order again, divided by `sum`. */
INLINE void store_unwoven(__m512 low, __m512 high, float sum, bf16 *to) {
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i last =
        _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    const __m512 share = _mm512_set1_ps(1.0f / sum);
    store_bf16(to, _mm512_mul_ps(_mm512_permutex2var_ps(low, first, high), share));
    store_bf16(to + 16, _mm512_mul_ps(_mm512_permutex2var_ps(low, last, high), share));
}

/* The mean of values [length, dim] by weights, 0 past the end; 32 of the dimensions. */
INLINE void mean32(const bf16 *values, int64_t dim, const bf16 *weight, int64_t length, float sum,
                   bf16 *to) {
    __m512 low = _mm512_setzero_ps(), high = _mm512_setzero_ps();
    for (int64_t i = 0; i < length; i += 2) {
        __m512i a, b; /* what lies past the end need not be a number */
        weave(values + i * dim, values + MIN(i + 1, length - 1) * dim, &a, &b);
        low = dot(low, _mm512_castsi512_ps(a), pair(weight + i));
        high = dot(high, _mm512_castsi512_ps(b), pair(weight + i));
    }
    store_unwoven(low, high, sum, to);
}

/* Query heads first..last-1 of all rows over keys and values. */
static void attend(const Model *m, const Step *s, int64_t layer, int64_t first, int64_t last,
                   float *room) {
    const int64_t dim = m->dim;
    for (int64_t unit = first; unit < last; unit++) {
        const int64_t r = unit / m->heads, head = unit % m->heads * m->kv_heads / m->heads;
        const int64_t slot = s->slots[r], length = s->positions[r] + 1, end = (length + 15) / 16 * 16;
        const bf16 *keys = cached(m, 2 * layer, slot, head), *values = cached(m, 2 * layer + 1, slot, head);
        bf16 *weight = (bf16 *)(room + end);
        score(m, s->queries + unit * dim, keys, length, room);
        const float sum = softmax(room, m->scale, length, end, weight);
        for (int64_t d = 0; d < dim; d += 32)
            mean32(values + d, dim, weight, length, sum, s->attended + unit * dim + d);
    }
}

/* What attention by tiles takes of a thread's memory, for keys up to `end`, a multiple of 32. */
typedef struct {
    int64_t end;
    float *scores;         /* [16, end], of each query */
    bf16 *weight;          /* [16, end] */
    float (*block)[16];    /* [16 keys, 16 queries] */
    int32_t (*packed)[16]; /* the queries, by pairs of dimensions: [dim / 2, 16] */
    __m512i (*woven)[4];   /* 32 values, 64 of the dimensions; or [16, 64] of sums */
    bf16 *tail;            /* the last keys, [16, dim] */
} Room;

static Room furnish(float *room, int64_t length, int64_t dim) {
    Room its = {.end = (length + 31) / 32 * 32, .scores = room};
    its.weight = (bf16 *)(its.scores + 16 * its.end);
    its.block = (void *)(its.weight + 16 * its.end);
    its.packed = (void *)(its.block + 16);
    its.woven = (void *)(its.packed + dim / 2);
    its.tail = (bf16 *)(its.woven + 16);
    return its;
}

/* room->scores, up to 15 keys past `length` too. */
static void score_by_tiles(const bf16 *keys, int64_t length, int64_t dim, int64_t num,
                           const bf16 *const *query, const Room *room) {
    memset(room->packed, 0, dim / 2 * sizeof *room->packed);
    for (int64_t q = 0; q < num; q++)
        for (int64_t d = 0; d < dim / 2; d++) memcpy(&room->packed[d][q], query[q] + 2 * d, 4);
    int32_t order[16];
    for (int i = 0; i < 16; i++) order[i] = 16 * i;
    const __m512i column = _mm512_loadu_si512(order);
    for (int64_t i = 0; i < length; i += 16) {
        const bf16 *here = keys + i * dim;
        if (i + 16 > length) here = memcpy(room->tail, here, (length - i) * dim * sizeof(bf16));
        _tile_zero(6);
        for (int64_t d = 0; d < dim; d += 32) {
            _tile_loadd(7, here + d, dim * 2);
            _tile_loadd(5, room->packed + d / 2, 64);
            _tile_dpbf16ps(6, 7, 5);
        }
        _tile_stored(6, room->block, 64);
        for (int64_t q = 0; q < num; q++) {
            __m512 found = _mm512_i32gather_ps(column, &room->block[0][q], 4);
            _mm512_storeu_ps(room->scores + q * room->end + i, found);
        }
    }
}

/* Sums of values [length, dim] by room->weight, into room->woven; wide: of 64 dimensions, not 32. */
INLINE void sum_by_tiles(const bf16 *values, int64_t length, int64_t dim, const Room *room,
                         const int wide) {
    __m512i(*woven)[4] = room->woven;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t i = 0; i < length; i += 32) {
        for (int64_t j = 0; j < 16; j++) { /* past the end the last one, by a weight of 0 */
            const bf16 *a = values + MIN(i + 2 * j, length - 1) * dim;
            const bf16 *b = values + MIN(i + 2 * j + 1, length - 1) * dim;
            weave(a, b, &woven[j][0], &woven[j][1]);
            if (wide) weave(a + 32, b + 32, &woven[j][2], &woven[j][3]);
        }
        _tile_loadd(4, room->weight + i, room->end * 2);
        _tile_loadd(5, &woven[0][0], 256);
        _tile_dpbf16ps(0, 4, 5);
        _tile_loadd(5, &woven[0][1], 256);
        _tile_dpbf16ps(1, 4, 5);
        if (!wide) continue;
        _tile_loadd(5, &woven[0][2], 256);
        _tile_dpbf16ps(2, 4, 5);
        _tile_loadd(5, &woven[0][3], 256);
        _tile_dpbf16ps(3, 4, 5);
    }
    _tile_stored(0, &woven[0][0], 256);
    _tile_stored(1, &woven[0][1], 256);
    _tile_stored(2, &woven[0][2], 256);
    _tile_stored(3, &woven[0][3], 256);
}

/* Attention of up to 16 queries over the same keys and values.
 * query: of each, [dim].  length: how much each sees, the last one all.  to: of each, [dim]. */
static void attend_tiles(const Model *m, const bf16 *keys, const bf16 *values, int64_t num,
                         const bf16 *const *query, const int64_t *length, bf16 *const *to,
                         float *memory) {
    const int64_t dim = m->dim, all = length[num - 1];
    const Room room = furnish(memory, all, dim);
    float sum[16];
    shape_tiles(num);
    score_by_tiles(keys, all, dim, num, query, &room);
    for (int64_t q = 0; q < num; q++)
        sum[q] = softmax(room.scores + q * room.end, m->scale, length[q], room.end,
                         room.weight + q * room.end);
    for (int64_t d = 0; d < dim; d += 64) {
        const int wide = dim - d > 32;
        sum_by_tiles(values + d, all, dim, &room, wide);
        for (int64_t q = 0; q < num; q++)
            for (int i = 0; i <= 32 * wide; i += 32) {
                const float *found = (const float *)room.woven[q] + i;
                store_unwoven(_mm512_loadu_ps(found), _mm512_loadu_ps(found + 16), sum[q],
                              to[q] + d + i);
            }
    }
    _tile_release();
}

/* A thread's part of the rows from `first` on: rows of one slot, and the heads that share keys, go
 * together. */
static void attend_together(const Model *m, const Step *s, int64_t layer, int64_t first,
                            int64_t number, int64_t count, float *room) {
    const int64_t group = m->heads / m->kv_heads, dim = m->dim;
    int64_t unit = 0;
    for (int64_t last; first < s->rows; first = last) {
        for (last = first + 1; last < s->rows && s->slots[last] == s->slots[first];) last++;
        for (int64_t head = 0; head < m->kv_heads; head++)
            for (int64_t from = 0; from < (last - first) * group; from += 16) {
                if (unit++ % count != number) continue;
                const bf16 *query[16];
                bf16 *to[16];
                int64_t length[16], num = MIN(16, (last - first) * group - from);
                for (int64_t q = 0; q < num; q++) {
                    const int64_t r = first + (from + q) / group;
                    const int64_t at = r * m->heads + head * group + (from + q) % group;
                    query[q] = s->queries + at * dim;
                    to[q] = s->attended + at * dim;
                    length[q] = s->positions[r] + 1;
                }
                attend_tiles(m, cached(m, 2 * layer, s->slots[first], head),
                             cached(m, 2 * layer + 1, s->slots[first], head), num, query, length,
                             to, room);
            }
    }
}
