/* A Llama-shaped language model on a CPU with AVX-512 and bfloat16: a whole step, and for steps by
 * torch what stands between its products.
 *
 * Compiled by native_library.py; called by native_step.py, which says how the weights lie, and by
 * native_operators.py. A step of few rows is bound by reading weights, so they are read once for
 * all rows, as they lie in memory, and all that is between two products is done by the threads that
 * are there already. Values are rounded to bfloat16 where torch's own operators round them. Sums of
 * a row do not depend on the other rows, so an answer is the same whoever else is in the batch; but
 * quantised weights are multiplied in another way where there are more than FEW rows.
 */
#include <omp.h>

#include "attention.h"

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

/* Rows from `first` on go on behind the layer; of the others only keys and values are wanted. */
static void one_layer(const Model *m, const Step *s, int64_t index, int64_t first,
                      const Thread *t) {
    const Layer *layer = m->layers + index;
    const int64_t all = m->heads + 2 * m->kv_heads, rows = s->rows - first;
    normed(s->x, layer->attention_norm, s->rows, m->hidden, m->eps, t->hidden);
    Input in = prepared(&layer->qkv, t->hidden, s->rows, t->room);
    store(&layer->qkv, &in, s->joint, t);
#pragma omp barrier
    put(m, s, index, part(t, s->rows * all, 0), part(t, s->rows * all, 1));
#pragma omp barrier
    if (!rows) return;
    const int64_t before = first * m->heads, units = rows * m->heads;
    if (has_tiles)
        attend_together(m, s, index, first, t->number, t->count, t->room);
    else
        attend(m, s, index, before + part(t, units, 0), before + part(t, units, 1), t->room);
#pragma omp barrier
    float *x = s->x + first * m->hidden;
    in = prepared(&layer->output, s->attended + before * m->dim, rows, t->room);
    add(&layer->output, &in, x, t);
#pragma omp barrier
    normed(x, layer->mlp_norm, rows, m->hidden, m->eps, t->hidden);
    in = prepared(&layer->gate_up, t->hidden, rows, t->room);
    activate(&layer->gate_up, &in, s->activated, t);
#pragma omp barrier
    in = prepared(&layer->down, s->activated, rows, t->room);
    add(&layer->down, &in, x, t);
#pragma omp barrier
}

/* Logits of the rows from `first_logits` on; keys and values of all. */
void vlmchat_step(const Model *m, const Step *s, int64_t threads) {
#pragma omp parallel num_threads(threads)
    {
        Thread t = {.number = omp_get_thread_num(), .count = omp_get_num_threads()};
        t.hidden = (bf16 *)(s->scratch + t.number * s->scratch_size);
        t.y = (float *)(t.hidden + s->rows * m->hidden);
        t.room = t.y + 2 * s->rows * WIDEST;
        for (int64_t index = 0; index < m->num_layers; index++)
            one_layer(m, s, index, index == m->num_layers - 1 ? s->first_logits : 0, &t);
        const int64_t rows = s->rows - s->first_logits;
        if (rows > 0) {
            const float *x = s->x + s->first_logits * m->hidden;
            normed(x, m->norm, rows, m->hidden, m->eps, t.hidden);
            Input in = prepared(&m->head, t.hidden, rows, t.room);
            narrowed(&m->head, &in, s->logits, &t);
        }
    }
}

/* Whether there are tiles and, from now on, they may be used. */
int vlmchat_tiles(int allowed) { return has_tiles = allowed && can_have_tiles; }

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
