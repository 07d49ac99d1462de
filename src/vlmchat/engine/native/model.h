/* A language model over its cache, and a step of it, as native_step.py gives them. */
#pragma once
#include "products.h"

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

INLINE bf16 *cached(const Model *m, int64_t tensor, int64_t slot, int64_t head) {
    return m->cache + ((tensor * m->num_slots + slot) * m->kv_heads + head) * m->context * m->dim;
}
