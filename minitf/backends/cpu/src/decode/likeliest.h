#pragma once

/* The likeliest token, exactly, without reading all of the vocabulary, a quarter of what a small model's step reads: by
   its copy in 8 bits, times x in 16, each logit is known up to |w - w'| |x| + |w'| |x - x'| (Cauchy and Schwarz), and only
   those are computed that may be the largest. */

#include "model.h"
#include "products.h"

#define FEW_TEXTS 4 /* from here on a step takes its time to multiply, not to read */

/* What a thread has found of its share of one text's logits. */
typedef struct { float total, largest; int64_t id; } Found;

/* Into how many steps the largest of D values is divided, so that the sum of products fits into 32 bits. */
static float steps_of(int64_t D) {
    int64_t most = INT32_MAX / (127 * D);
    return most < INT16_MAX ? most : INT16_MAX;
}

/* The largest magnitude of D values. Bits of magnitudes are ordered as the magnitudes; what is not a number is above. */
static float magnitude(const float *x, int64_t D) {
    union { int32_t bits; float value; } largest = {0};
    for (int64_t i = 0; i < D; i++) {
        int32_t bits;
        memcpy(&bits, x + i, sizeof bits);
        bits &= INT32_MAX;
        largest.bits = bits > largest.bits ? bits : largest.bits;
    }
    return largest.value;
}

/* x (D) times `per_step`, to whole numbers, which are within their type. */
#define MAKE_WHOLE(whole, x, per_step, D)                                                                 \
    for (int64_t i = 0; i < D; i++) {                                                                     \
        float times = x[i] * per_step;                                                                    \
        whole[i] = (int32_t)(times + copysignf(0.5f, times));                                             \
    }

/* What to multiply values with, the largest of which is given, to make them whole; 0 for what would not be numbers. */
static float per_step_of(float largest, float steps) {
    float per_step = steps / largest;
    return largest > 0 && isfinite(largest) && isfinite(per_step) ? per_step : 0;
}

/* |x| of D values, the largest of which is given; its square may be too small for a float32. */
static float length_of(const float *x, float largest, int64_t D) {
    float per_step = per_step_of(largest, 1), squares = 0;
    for (int64_t i = 0; i < D; i++) squares += (x[i] * per_step) * (x[i] * per_step);
    return per_step > 0 ? sqrtf(squares) * largest : sqrtf(D) * largest;
}

/* Make the copy of a share of the vocabulary. Of a row with what is not a number the error is none either. */
static void make_coarse(const Model *m, Share own) {
    int64_t D = m->hidden_size;
    /* A float32 sum of D products is off by D 2^-24 |w| |x| at most, and there are a few such sums. */
    float relative = 1.01f * (0.5f * sqrtf(D) / steps_of(D) + 4 * D * 0x1p-24f);
    for (int64_t n = own.from; n < own.to; n++) {
        const float *w = m->vocabulary + n * D;
        int8_t *restrict copy = m->coarse + n * D;
        float largest = magnitude(w, D), per_step = per_step_of(largest, 127), length = length_of(w, largest, D), off = 0;
        if (!(per_step > 0)) {
            memset(copy, 0, D);
            m->steps[n] = 0;
            m->errors[n] = length;
            continue;
        }
        MAKE_WHOLE(copy, w, per_step, D)
        for (int64_t i = 0; i < D; i++) {
            float rest = w[i] * per_step - copy[i];
            off += rest * rest;
        }
        m->steps[n] = largest / 127;
        m->errors[n] = 1.01f * sqrtf(off) * m->steps[n] + relative * length;
    }
}

/* x (D) in whole steps, which are returned: not a number, where they cannot be told. */
static float make_whole(int16_t *restrict whole, const float *x, float largest, int64_t D) {
    float steps = steps_of(D), per_step = per_step_of(largest, steps);
    memset(whole, 0, D * sizeof(int16_t));
    if (!(per_step > 0)) return NAN;
    MAKE_WHOLE(whole, x, per_step, D)
    return largest / steps;
}

static Found largest_of(const float *logits, Share own) {
    Found found = {0, -INFINITY, 0};
    for (int64_t n = own.from; n < own.to; n++) found.total += logits[n];
    for (int64_t n = own.from; n < own.to; n++)
        if (logits[n] > found.largest) found = (Found){found.total, logits[n], n};
    return found;
}

/* Into `highest` (V) how large each logit of a share may be. Returns the largest that one is at least, and a total that
   is finite if all are. */
static Found bound_roughly(const Model *m, const float *x, int16_t *whole, float *highest, Share own) {
    int64_t D = m->hidden_size;
    float largest = magnitude(x, D), step = make_whole(whole, x, largest, D), length = 1.001f * length_of(x, largest, D);
    Found found = {0, -INFINITY, 0};
    for (int64_t n = own.from; n < own.to; n++) {
        const int8_t *copy = m->coarse + n * D;
        int32_t product = 0;
        for (int64_t i = 0; i < D; i++) product += (int32_t)copy[i] * whole[i];
        float logit = product * (m->steps[n] * step), off = m->errors[n] * length;
        highest[n] = logit + off;
        found.largest = logit - off > found.largest ? logit - off : found.largest;
        found.total += fabsf(logit) + off;
    }
    return found;
}

/* The largest logit of a share, of those that may reach `least`. */
static Found largest_above(const Model *m, const float *x, const float *highest, float least, Share own) {
    Found found = {0, -INFINITY, 0};
    for (int64_t n = own.from; n < own.to; n++) {
        if (highest[n] < least) continue;
        float logit;
        tile_1_1(&logit, 1, x, m->vocabulary + n * m->hidden_size, m->hidden_size);
        found.total += logit;
        if (logit > found.largest) found.largest = logit, found.id = n;
    }
    return found;
}

/* What all threads have found of text `text`. */
static Found together(const Found *found, int64_t text, int64_t texts, int64_t threads) {
    Found best = found[text];
    for (int64_t thread = 1; thread < threads; thread++) {
        const Found *other = &found[thread * texts + text];
        best.total += other->total;
        if (other->largest > best.largest) best.largest = other->largest, best.id = other->id;
    }
    return best;
}

/* Logits and likeliest tokens after x (texts, D), the same in each thread. Through `logits` (texts, V) and `whole` (D). */
static void score(const Model *m, const Reading *reading, const float *x, float *logits, int16_t *whole, Found *found,
                  int64_t thread, int64_t threads) {
    int64_t D = m->hidden_size, V = m->vocab_size, texts = reading->texts;
    Share own = share_of(V, thread, threads);
    Found *mine = found + thread * texts, *rough = found + threads * texts;
    int roughly = m->coarse && !reading->logits && texts < FEW_TEXTS;
    if (roughly) {
        for (int64_t b = 0; b < texts; b++)
            rough[thread * texts + b] = bound_roughly(m, x + b * D, whole, logits + b * V, own);
        WAIT_FOR_ALL();
        for (int64_t b = 0; b < texts; b++) {
            Found bounds = together(rough, b, texts, threads);
            if (isfinite(bounds.total)) mine[b] = largest_above(m, x + b * D, logits + b * V, bounds.largest, own);
            else {
                linear(logits + b * V, x + b * D, m->vocabulary, 1, V, D, own);
                mine[b] = largest_of(logits + b * V, own);
            }
        }
    } else {
        linear(logits, x, m->vocabulary, texts, V, D, own);
        if (!reading->likeliest) return;
        for (int64_t b = 0; b < texts; b++) mine[b] = largest_of(logits + b * V, own);
    }
    WAIT_FOR_ALL();
    for (int64_t b = 0; thread == 0 && b < texts; b++) {
        Found best = together(found, b, texts, threads);
        reading->likeliest[b] = isfinite(best.total) ? best.id : -1;
    }
}
