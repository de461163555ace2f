/* The transformer in the page: token ids -> what every head matched, weighed and gathered, and the logits. In float32, in
 * the order of attention.py and model.py, for the standard model without a context stretched after training.
 *
 * Axes in names, as there: T position, S key, D hidden, H heads, G key heads, K head width, V vocabulary. All arrays are
 * flat and row by row.
 */

import { range } from "./dom.js";
import { bytesOf } from "./maps.js";
import { refusal } from "./refusals.js";

/** A model from the page's data: { config, parameters: [[name, size], ...], weights }, these in bfloat16 as base64. */
export function loadModel({ config, parameters, weights }) {
  const halves = new Uint16Array(bytesOf(weights).buffer);
  const bits = new Uint32Array(halves.length);
  for (let i = 0; i < bits.length; i++) bits[i] = halves[i] << 16; // bfloat16 is the upper half of a float32
  const all = new Float32Array(bits.buffer);
  const tensors = new Map();
  let end = 0;
  for (const [name, size] of parameters) tensors.set(name, all.subarray(end, (end += size)));
  if (end !== all.length) throw refusal("damaged");
  return {
    config,
    parameter: (name) => tensors.get(`${name}.weight`),
    ofLayer: (layer, name) => tensors.get(`model.layers.${layer}.${name}.weight`),
    vocabulary: tensors.get(config.tie_embeddings ? "model.embed_tokens.weight" : "lm_head.weight"),
    rotary: rotaryTable(config),
  };
}

/** What was read of a text of `capacity` tokens in the end: the arrays are complete once all were read.
 *
 *   q_LHTK  k_LGTK  v_LGTK  as match and gather receive them      logits_TV  of the token after each position
 *   weights                 lower triangles, as in to_viewer()    length     tokens read so far
 */
export function createReading({ config }, capacity) {
  const { num_layers: L, num_heads: H, num_kv_heads: G, head_dim: K, vocab_size: V } = config;
  const make = (...sizes) => new Float32Array(sizes.reduce((a, b) => a * b));
  return {
    capacity, length: 0, triangle: (capacity * (capacity + 1)) / 2,
    q_LHTK: make(L, H, capacity, K), k_LGTK: make(L, G, capacity, K), v_LGTK: make(L, G, capacity, K),
    weights: make(L, H, (capacity * (capacity + 1)) / 2), logits_TV: make(capacity, V),
  };
}

const unedited = () => {};

/** Read more tokens, and compute the logits after them. `edited(step, layer, head, first, rows)` may change in place the
 * rows that the positions from `first` on have after a step: "match", "weigh" or "gather" of a head, "mlp" of the
 * feed-forward layer (head 0), "stream" before each half-layer and after the last (`layer` counts them, from 0 to 2 L). */
export function read(model, reading, ids, edited = unedited) {
  const start = reading.length * model.config.vocab_size;
  reading.logits_TV.set(logitsOf(model, throughLayers(model, reading, embedded(model, ids), edited)), start);
}

/** The tokens' rows of the embedding: x_TD before the first layer. */
export function embedded({ config: { hidden_size: D }, parameter }, ids) {
  const embedding = parameter("model.embed_tokens");
  const x_TD = new Float32Array(ids.length * D);
  ids.forEach((id, t) => x_TD.set(embedding.subarray(id * D, (id + 1) * D), t * D));
  return x_TD;
}

/** What the layers from `from` on make of x_TD, in place; its positions follow those that were read. */
export function throughLayers(model, reading, x_TD, edited = unedited, from = 0) {
  const { config: { num_layers: L, hidden_size: D, rms_norm_eps: eps }, ofLayer } = model;
  const stream = rowsOf(x_TD, D);
  for (let layer = from; layer < L; layer++) {
    edited("stream", 2 * layer, 0, reading.length, stream);
    add(x_TD, attention(model, layer, normalised(x_TD, ofLayer(layer, "input_layernorm"), eps), reading, edited));
    edited("stream", 2 * layer + 1, 0, reading.length, stream);
    add(x_TD, feedForward(model, layer, normalised(x_TD, ofLayer(layer, "post_attention_layernorm"), eps), reading, edited));
  }
  edited("stream", 2 * L, 0, reading.length, stream);
  reading.length += stream.length;
  return x_TD;
}

/** Logits of the next tokens, from what the layers make. */
export function logitsOf({ config: { hidden_size: D, vocab_size: V, rms_norm_eps: eps }, parameter, vocabulary }, x_TD) {
  return product(normalised(x_TD, parameter("model.norm"), eps), vocabulary, D, V);
}

/** The rows of a flat array, as parts of it. */
export const rowsOf = (all, width) => Array.from({ length: all.length / width }, (_, i) => all.subarray(i * width, (i + 1) * width));

/** Every position looks at the positions up to itself: match, weigh, gather. */
function attention(model, layer, x_TD, reading, edited) {
  const { config: { hidden_size: D, num_heads: H, num_kv_heads: G, head_dim: K }, ofLayer } = model;
  const { capacity, length, triangle } = reading;
  const T = x_TD.length / D;
  project(model, layer, x_TD, reading);

  const mixed_THK = new Float32Array(T * H * K);
  const ofHead = (all, heads, head) => rowsOf(all.subarray((layer * heads + head) * capacity * K, (layer * heads + head + 1) * capacity * K), K);
  for (let head = 0; head < H; head++) {
    const group = Math.floor((head * G) / H); // consecutive query heads share a key head
    const [q_T, k_S, v_S] = [ofHead(reading.q_LHTK, H, head), ofHead(reading.k_LGTK, G, group), ofHead(reading.v_LGTK, G, group)];
    const weights = range(T).map((t) => {
      const start = (layer * H + head) * triangle + ((length + t) * (length + t + 1)) / 2;
      return reading.weights.subarray(start, start + length + t + 1);
    });
    const mixed = range(T).map((t) => mixed_THK.subarray((t * H + head) * K, (t * H + head + 1) * K));
    weights.forEach((row, t) => match(q_T[length + t], k_S, row));
    edited("match", layer, head, length, weights);
    weights.forEach(weigh);
    edited("weigh", layer, head, length, weights);
    weights.forEach((row, t) => gather(row, v_S, mixed[t]));
    edited("gather", layer, head, length, mixed);
  }
  return product(mixed_THK, ofLayer(layer, "self_attn.o_proj"), H * K, D);
}

/** Queries, keys and values of the new positions: normalised, turned by their position, and stored in `reading`. */
function project({ config, ofLayer, rotary }, layer, x_TD, { q_LHTK, k_LGTK, v_LGTK, capacity, length }) {
  const { hidden_size: D, num_heads: H, num_kv_heads: G, head_dim: K, qk_norm, rms_norm_eps: eps } = config;
  for (const [name, heads, stored] of [["q", H, q_LHTK], ["k", G, k_LGTK], ["v", G, v_LGTK]]) {
    const plain = product(x_TD, ofLayer(layer, `self_attn.${name}_proj`), D, heads * K);
    const isTurned = name !== "v";
    const all = isTurned && qk_norm ? normalised(plain, ofLayer(layer, `self_attn.${name}_norm`), eps) : plain;
    rowsOf(all, K).forEach((row, i) => {
      const [position, head] = [length + Math.floor(i / heads), i % heads];
      stored.set(isTurned ? rotated(row, rotary, position) : row, ((layer * heads + head) * capacity + position) * K);
    });
  }
}

/** scores = q · k / √K, for the keys up to the query's own position. */
function match(q_K, k_S, scores_S) {
  const scale = 1 / Math.sqrt(q_K.length);
  for (let key = 0; key < scores_S.length; key++) scores_S[key] = dot(q_K, k_S[key]) * scale;
}

/** Softmax, in place: shares that sum to 1. */
function weigh(scores_S) {
  let [largest, sum] = [-Infinity, 0];
  for (const score of scores_S) largest = Math.max(largest, score);
  for (let i = 0; i < scores_S.length; i++) sum += scores_S[i] = Math.exp(scores_S[i] - largest);
  for (let i = 0; i < scores_S.length; i++) scores_S[i] /= sum;
}

/** The values, summed by their weights. */
function gather(weights_S, v_S, mixed_K) {
  for (let key = 0; key < weights_S.length; key++) {
    const v_K = v_S[key];
    for (let i = 0; i < mixed_K.length; i++) mixed_K[i] += weights_S[key] * v_K[i];
  }
}

export function dot(x, y) {
  let sum = 0;
  for (let i = 0; i < x.length; i++) sum += x[i] * y[i];
  return sum;
}

/** SwiGLU: down(silu(gate(x)) * up(x)). */
function feedForward({ config, ofLayer }, layer, x_TD, reading, edited) {
  const { hidden_size: D, intermediate_size: F } = config;
  const gate_TF = product(x_TD, ofLayer(layer, "mlp.gate_proj"), D, F);
  const up_TF = product(x_TD, ofLayer(layer, "mlp.up_proj"), D, F);
  for (let i = 0; i < gate_TF.length; i++) gate_TF[i] *= up_TF[i] / (1 + Math.exp(-gate_TF[i]));
  const out_TD = product(gate_TF, ofLayer(layer, "mlp.down_proj"), F, D);
  edited("mlp", layer, 0, reading.length, rowsOf(out_TD, D));
  return out_TD;
}

/** RMSNorm of every row of as many numbers as `weight` has: x / rms(x) * weight. */
export function normalised(x, weight, eps) {
  const size = weight.length;
  const out = new Float32Array(x.length);
  for (let start = 0; start < x.length; start += size) {
    let squares = 0;
    for (let i = 0; i < size; i++) squares += x[start + i] ** 2;
    const scale = 1 / Math.sqrt(squares / size + eps);
    for (let i = 0; i < size; i++) out[start + i] = x[start + i] * scale * weight[i];
  }
  return out;
}

/** Cosines and sines of the rotation of each pair of channels at each position (rope.py), rounded as there. */
function rotaryTable({ head_dim: K, context_length, rope_theta }) {
  const { fround } = Math;
  const half = K / 2;
  const [cos, sin] = [new Float32Array(context_length * half), new Float32Array(context_length * half)];
  for (let i = 0; i < half; i++) {
    const frequency = fround(rope_theta ** -fround((2 * i) / K));
    for (let position = 0; position < context_length; position++) {
      cos[position * half + i] = Math.cos(fround(position * frequency));
      sin[position * half + i] = Math.sin(fround(position * frequency));
    }
  }
  return { cos, sin };
}

/** A query or key, turned by its position: pairs are (i, i + K / 2). */
function rotated(row, { cos, sin }, position) {
  const half = row.length / 2;
  const out = new Float32Array(row.length);
  for (let i = 0; i < half; i++) {
    const c = cos[position * half + i];
    const s = sin[position * half + i];
    out[i] = row[i] * c - row[i + half] * s;
    out[i + half] = row[i + half] * c + row[i] * s;
  }
  return out;
}

function add(x, y) {
  for (let i = 0; i < x.length; i++) x[i] += y[i];
}

/** y = x W^T: rows of `inputs` numbers to rows of `outputs`. Four rows by two columns at a time, as each number that is
 * loaded then serves several products: 3 times as fast as one by one. At the edges the last row or column is repeated. */
export function product(x, weight, inputs, outputs) {
  const rows = x.length / inputs;
  const out = new Float32Array(rows * outputs);
  for (let t = 0; t < rows; t += 4) {
    const [t1, t2, t3] = [Math.min(t + 1, rows - 1), Math.min(t + 2, rows - 1), Math.min(t + 3, rows - 1)];
    const [a, b, c, d] = [t * inputs, t1 * inputs, t2 * inputs, t3 * inputs];
    for (let o = 0; o < outputs; o += 2) {
      const o1 = Math.min(o + 1, outputs - 1);
      const [w, v] = [o * inputs, o1 * inputs];
      let [a0, b0, c0, d0, a1, b1, c1, d1] = [0, 0, 0, 0, 0, 0, 0, 0];
      for (let i = 0; i < inputs; i++) {
        const w0 = weight[w + i];
        const w1 = weight[v + i];
        const xa = x[a + i];
        const xb = x[b + i];
        const xc = x[c + i];
        const xd = x[d + i];
        a0 += xa * w0;
        b0 += xb * w0;
        c0 += xc * w0;
        d0 += xd * w0;
        a1 += xa * w1;
        b1 += xb * w1;
        c1 += xc * w1;
        d1 += xd * w1;
      }
      out[t * outputs + o] = a0;
      out[t1 * outputs + o] = b0;
      out[t2 * outputs + o] = c0;
      out[t3 * outputs + o] = d0;
      out[t * outputs + o1] = a1;
      out[t1 * outputs + o1] = b1;
      out[t2 * outputs + o1] = c1;
      out[t3 * outputs + o1] = d1;
    }
  }
  return out;
}
