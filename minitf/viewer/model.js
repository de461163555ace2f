/* The transformer in the page: token ids -> what every head matched, weighed and gathered, and the logits. In float32, in
 * the order of attention.py and model.py, for the standard model without a context stretched after training.
 *
 * Axes in names, as there: T position, S key, D hidden, H heads, G key heads, K head width, V vocabulary. All arrays are
 * flat and row by row.
 */

import { bytesOf } from "./maps.js";

/** A model from the page's data: { config, parameters: [[name, size], ...], weights }, these in bfloat16 as base64. */
export function loadModel({ config, parameters, weights }) {
  const halves = new Uint16Array(bytesOf(weights).buffer);
  const bits = new Uint32Array(halves.length);
  for (let i = 0; i < bits.length; i++) bits[i] = halves[i] << 16; // bfloat16 is the upper half of a float32
  const all = new Float32Array(bits.buffer);
  const tensors = new Map();
  let end = 0;
  for (const [name, size] of parameters) tensors.set(name, all.subarray(end, (end += size)));
  if (end !== all.length) throw new Error("damaged");
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

/** Read more tokens. `edited(step, layer, head, position, row)` changes in place the row that a position has after the
 * step "match", "weigh" or "gather" of a head, or after the feed-forward layer ("mlp", of head 0). */
export function read(model, reading, ids, edited = unedited) {
  const { config: { num_layers: L, hidden_size: D, vocab_size: V, rms_norm_eps: eps }, parameter, ofLayer } = model;
  const embedding = parameter("model.embed_tokens");
  const x_TD = new Float32Array(ids.length * D);
  ids.forEach((id, t) => x_TD.set(embedding.subarray(id * D, (id + 1) * D), t * D));
  for (let layer = 0; layer < L; layer++) {
    add(x_TD, attention(model, layer, normalised(x_TD, ofLayer(layer, "input_layernorm"), eps), reading, edited));
    add(x_TD, feedForward(model, layer, normalised(x_TD, ofLayer(layer, "post_attention_layernorm"), eps), reading, edited));
  }
  reading.logits_TV.set(product(normalised(x_TD, parameter("model.norm"), eps), model.vocabulary, D, V), reading.length * V);
  reading.length += ids.length;
}

/** Every position looks at the positions up to itself: match, weigh, gather. */
function attention(model, layer, x_TD, reading, edited) {
  const { config, ofLayer } = model;
  const { hidden_size: D, num_heads: H, num_kv_heads: G, head_dim: K, qk_norm, rms_norm_eps: eps } = config;
  const { capacity, length, triangle } = reading;
  const at = (heads, head, position) => ((layer * heads + head) * capacity + position) * K;

  /** The vectors of each head, made by a projection of x: normalised, turned by their position, and stored. */
  function project(name, heads, stored, isTurned) {
    let rows = product(x_TD, ofLayer(layer, `self_attn.${name}_proj`), D, heads * K);
    if (isTurned && qk_norm) rows = normalised(rows, ofLayer(layer, `self_attn.${name}_norm`), eps);
    for (let t = 0; t * heads * K < rows.length; t++)
      for (let head = 0; head < heads; head++) {
        const row = rows.subarray((t * heads + head) * K, (t * heads + head + 1) * K);
        stored.set(isTurned ? rotated(row, model.rotary, length + t) : row, at(heads, head, length + t));
      }
  }
  project("q", H, reading.q_LHTK, true);
  project("k", G, reading.k_LGTK, true);
  project("v", G, reading.v_LGTK, false);

  const T = x_TD.length / D;
  const mixed_THK = new Float32Array(T * H * K);
  for (let head = 0; head < H; head++) {
    const group = Math.floor((head * G) / H); // consecutive query heads share a key head
    const [k_SK, v_SK] = [reading.k_LGTK, reading.v_LGTK].map((all) => all.subarray(at(G, group, 0), at(G, group, capacity)));
    for (let t = 0; t < T; t++) {
      const query = length + t;
      const start = (layer * H + head) * triangle + (query * (query + 1)) / 2;
      const row = reading.weights.subarray(start, start + query + 1);
      match(reading.q_LHTK.subarray(at(H, head, query), at(H, head, query + 1)), k_SK, row);
      edited("match", layer, head, query, row);
      weigh(row);
      edited("weigh", layer, head, query, row);
      const mixed_K = mixed_THK.subarray((t * H + head) * K, (t * H + head + 1) * K);
      gather(row, v_SK, mixed_K);
      edited("gather", layer, head, query, mixed_K);
    }
  }
  return product(mixed_THK, ofLayer(layer, "self_attn.o_proj"), H * K, D);
}

/** scores = q · k / √K, for the keys up to the query's own position. */
function match(q_K, k_SK, scores_S) {
  const K = q_K.length;
  for (let key = 0; key < scores_S.length; key++) {
    let dot = 0;
    for (let i = 0; i < K; i++) dot += q_K[i] * k_SK[key * K + i];
    scores_S[key] = dot / Math.sqrt(K);
  }
}

/** Softmax, in place: shares that sum to 1. */
function weigh(scores_S) {
  let [largest, sum] = [-Infinity, 0];
  for (const score of scores_S) largest = Math.max(largest, score);
  for (let i = 0; i < scores_S.length; i++) sum += scores_S[i] = Math.exp(scores_S[i] - largest);
  for (let i = 0; i < scores_S.length; i++) scores_S[i] /= sum;
}

/** The values, summed by their weights. */
function gather(weights_S, v_SK, mixed_K) {
  const K = mixed_K.length;
  for (let key = 0; key < weights_S.length; key++)
    for (let i = 0; i < K; i++) mixed_K[i] += weights_S[key] * v_SK[key * K + i];
}

/** SwiGLU: down(silu(gate(x)) * up(x)). */
function feedForward({ config, ofLayer }, layer, x_TD, reading, edited) {
  const { hidden_size: D, intermediate_size: F } = config;
  const gate_TF = product(x_TD, ofLayer(layer, "mlp.gate_proj"), D, F);
  const up_TF = product(x_TD, ofLayer(layer, "mlp.up_proj"), D, F);
  for (let i = 0; i < gate_TF.length; i++) gate_TF[i] *= up_TF[i] / (1 + Math.exp(-gate_TF[i]));
  const out_TD = product(gate_TF, ofLayer(layer, "mlp.down_proj"), F, D);
  for (let t = 0; t * D < out_TD.length; t++) edited("mlp", layer, 0, reading.length + t, out_TD.subarray(t * D, (t + 1) * D));
  return out_TD;
}

/** RMSNorm of every row of as many numbers as `weight` has: x / rms(x) * weight. */
function normalised(x, weight, eps) {
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
