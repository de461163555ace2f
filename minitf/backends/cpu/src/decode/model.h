#pragma once

/* The model, its cache and what is read of it, as native.py hands them over. Axes are those of decode.c. */

#include <stdint.h>

typedef struct {
    const float *input_norm, *q, *k, *v, *q_norm, *k_norm, *o, *post_norm, *gate, *up, *down;
} Layer;

typedef struct {
    int64_t num_layers, hidden_size, num_heads, num_kv_heads, head_dim, intermediate_size, vocab_size;
    int64_t batch_size, capacity, num_positions;
    float norm_eps;
    const float *embedding, *final_norm, *vocabulary, *rotary; /* rotary: (2, num_positions, K) */
    float *keys, *values;                                      /* (layers, B, G, capacity, K) */
    const Layer *layers;
    int8_t *coarse; /* (V, D) the vocabulary in whole `steps` (V), each row off by `errors` (V) at most; or null */
    float *steps, *errors;
} Model;

/* What is read by one call, and what is asked for: logits, likeliest or both. */
typedef struct {
    int64_t texts, length;           /* T tokens of each text */
    const int64_t *ids;              /* (texts, T) */
    const int64_t *starts;           /* where each row of the cache begins, or null: all at 0 */
    int64_t position;                /* where the first of the T tokens goes in the cache */
    float *logits;                   /* (texts, V) for what comes next, or null */
    int64_t *likeliest;              /* (steps, texts) ids of the largest logits, -1 where any is not finite; or null */
    int64_t steps;                   /* each but the first reads the likeliest of the one before */
    float *scratch;
} Reading;
