/* Attention maps: decodes the data of a run or of the live model into numbers. */

import { percent } from "./dom.js";
import { refusal } from "./refusals.js";

/** The bytes that base64 stands for. */
export function bytesOf(text) {
  const characters = atob(text);
  const bytes = new Uint8Array(characters.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = characters.charCodeAt(i);
  return bytes;
}
/** Numbers of float32 as base64; those that the page itself computed are no text. */
const floatsOf = (data) => (typeof data === "string" ? new Float32Array(bytesOf(data).buffer) : data);

/** The content of an `AttentionMaps.to_viewer()` as functions; throws if it is inconsistent. */
export function readMap(raw) {
  const { layers, heads } = raw;
  const size = raw.tokens.length;
  const triangle = (size * (size + 1)) / 2; // lower triangle, row by row
  const exact = raw.encoding === "float32";
  const weights = exact ? floatsOf(raw.weights) : bytesOf(raw.weights);
  if (weights.length !== layers * heads * triangle || raw.next_tokens.length !== size) throw refusal("damaged");
  const unit = exact ? 1 : 1 / 255;
  const group = (head) => Math.floor((head * raw.kv_heads) / heads);
  const norms = raw.value_norms ? floatsOf(raw.value_norms) : null;
  const outputs = raw.output_norms ? floatsOf(raw.output_norms) : null;
  const decoded = new Map();
  return {
    ...raw,
    size,
    exact,
    id: raw.tokens.join("\u0000") + `\u0000${layers}x${heads}`,
    weight: (layer, head, query, key) =>
      key > query ? 0 : weights[(layer * heads + head) * triangle + (query * (query + 1)) / 2 + key] * unit,
    /** The stored bytes of a head's triangle, row by row, or null if the weights are exact. */
    bytes: (layer, head) => (exact ? null : weights.subarray((layer * heads + head) * triangle, (layer * heads + head + 1) * triangle)),
    /** The length of what a weight of 1 would add to the residual stream; in older maps of the value alone. */
    norm: (layer, head, key) => (outputs ? outputs[(layer * heads + head) * size + key]
      : norms ? norms[(layer * raw.kv_heads + group(head)) * size + key] : 1),
    hasNorms: outputs !== null || norms !== null,
    /** [pattern, score] of what a head usually does, on held-out text where it was measured; null if unclear. */
    label: (layer, head) => (raw.usual ?? raw.labels)[layer]?.[head] ?? null,
    /** The same on this text alone, or undefined where it was not measured. */
    here: (layer, head) => (raw.here ?? (raw.usual ? raw.labels : null))?.[layer]?.[head],
    /** Heads that the run found for a purpose, { aligns, refers }: lists of [layer, head]; see `foundAt`. */
    found: raw.found ?? {},
    /** Queries, keys and values of one head, each a function of the position; null if they were not stored. */
    vectors: raw.vectors && ((layer, head) => {
      const at = { q: [heads, head], k: [raw.kv_heads, group(head)], v: [raw.kv_heads, group(head)] };
      return Object.fromEntries(Object.entries(at).map(([name, [count, index]]) => {
        if (!decoded.has(name)) decoded.set(name, vectorsOf(raw.vectors[name], raw.vectors.encoding));
        const vector = decoded.get(name);
        return [name, (position) => vector((layer * count + index) * size + position, raw.head_dim)];
      }));
    }),
  };
}

/** The heads of a run's `found`, { aligns: [[step, heads]], ... }, that were found by a step. */
export function foundAt(found, step) {
  const last = (rows) => rows.findLast(([at]) => step === null || at <= step)?.[1] ?? [];
  return Object.fromEntries(Object.entries(found ?? {}).map(([role, rows]) => [role, last(rows)]));
}

function vectorsOf(packed, encoding) {
  if (encoding === "float32") {
    const values = floatsOf(packed.values);
    return (row, width) => values.subarray(row * width, (row + 1) * width);
  }
  const [values, scale] = [new Int8Array(bytesOf(packed.values).buffer), floatsOf(packed.scale)];
  return (row, width) => Float32Array.from(values.subarray(row * width, (row + 1) * width), (one) => one * scale[row]);
}

/** One head under the current settings: its values, which keys are hidden, and the value with the strongest colour. */
export function headLook(map, layer, head, { hideFirst = false, measure = "weight" } = {}, colour = 0) {
  const byNorm = measure === "norm" && map.hasNorms;
  const isHidden = (query, key) => hideFirst && key === 0;
  const value = (query, key) => map.weight(layer, head, query, key) * (byNorm ? map.norm(layer, head, key) : 1);
  let largest = hideFirst || byNorm ? 0 : 1;
  if (!largest)
    for (let query = 0; query < map.size; query++)
      for (let key = hideFirst ? 1 : 0; key <= query; key++) largest = Math.max(largest, value(query, key));
  largest = largest || 1;
  return {
    layer, head, colour, largest, isHidden, value, byNorm,
    isPlain: !hideFirst && !byNorm,
    /** A value as text: a share of the attention, or a share times the norm of the value vector. */
    say: (query, key, digits) => (byNorm ? value(query, key).toFixed(2) : percent(map.weight(layer, head, query, key), digits)),
    weight: (query, key) => map.weight(layer, head, query, key),
    norm: (key) => map.norm(layer, head, key),
    share: (query, key) => (isHidden(query, key) ? 0 : value(query, key) / largest),
  };
}

/** A query's dot products with the keys up to its own position, its scores and weights, as in match and weigh. */
export function threeSteps(vectors, query, width, temperature = 1) {
  const q = vectors.q(query);
  const dots = Array.from({ length: query + 1 }, (_, key) => vectors.k(key).reduce((sum, k, i) => sum + k * q[i], 0));
  const scores = dots.map((dot) => dot / Math.sqrt(width));
  const weights = softmax(scores, temperature);
  const output = new Float32Array(width);
  weights.forEach((weight, key) => vectors.v(key).forEach((v, i) => { output[i] += weight * v; }));
  return { q, dots, scores, weights, output };
}

export function softmax(scores, temperature = 1) {
  const largest = Math.max(...scores);
  const powers = scores.map((score) => Math.exp((score - largest) / temperature));
  const sum = powers.reduce((a, b) => a + b, 0);
  return powers.map((power) => power / sum);
}
