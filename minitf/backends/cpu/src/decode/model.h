#pragma once

/* The model, its cache and one call's input and output, as decode_bindings.py passes them. Axes: see decode.c. */

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
} Model;

/* One call: T tokens of each text in, the scores of the next token out. */
typedef struct {
    int64_t texts, length; /* B texts of T tokens each: the first B rows of the cache */
    int64_t position;      /* position of the first token in the cache */
    const int64_t *ids;    /* (B, T) */
    const int64_t *starts; /* (B) first position of each row's text, or null: all start at 0 */
    float *logits;         /* (B, V) */
    float *scratch;        /* decode_scratch() floats */
} Step;
