/* Attention maps: decodes the data of a run or of the live model into numbers and colours. */

function bytesOf(text) {
  return Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
}
const floatsOf = (text) => new Float32Array(bytesOf(text).buffer);

/** The content of an `AttentionMaps.to_viewer()` as functions; throws if it is inconsistent. */
export function readMap(raw) {
  const { layers, heads } = raw;
  const size = raw.tokens.length;
  const triangle = (size * (size + 1)) / 2; // lower triangle, row by row
  const exact = raw.encoding === "float32";
  const weights = exact ? floatsOf(raw.weights) : bytesOf(raw.weights);
  if (weights.length !== layers * heads * triangle || raw.next_tokens.length !== size) throw new Error("damaged");
  const unit = exact ? 1 : 1 / 255;
  const group = (head) => Math.floor((head * raw.kv_heads) / heads);
  const norms = raw.value_norms ? floatsOf(raw.value_norms) : null;
  const decoded = new Map();
  return {
    ...raw,
    size,
    exact,
    id: raw.tokens.join("\u0000") + `\u0000${layers}x${heads}`,
    weight: (layer, head, query, key) =>
      key > query ? 0 : weights[(layer * heads + head) * triangle + (query * (query + 1)) / 2 + key] * unit,
    norm: (layer, head, key) => (norms ? norms[(layer * raw.kv_heads + group(head)) * size + key] : 1),
    hasNorms: norms !== null,
    label: (layer, head) => raw.labels[layer][head],
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

function vectorsOf(packed, encoding) {
  if (encoding === "float32") {
    const values = floatsOf(packed.values);
    return (row, width) => values.subarray(row * width, (row + 1) * width);
  }
  const [values, scale] = [new Int8Array(bytesOf(packed.values).buffer), floatsOf(packed.scale)];
  return (row, width) => Float32Array.from(values.subarray(row * width, (row + 1) * width), (one) => one * scale[row]);
}

/** One head under the current settings: its values, which keys are hidden, and the value with the strongest colour. */
export function headLook(map, layer, head, { hideFirst = false, measure = "weight" } = {}) {
  const byNorm = measure === "norm" && map.hasNorms;
  const isHidden = (query, key) => hideFirst && key === 0;
  const value = (query, key) => map.weight(layer, head, query, key) * (byNorm ? map.norm(layer, head, key) : 1);
  let largest = hideFirst || byNorm ? 0 : 1;
  if (!largest)
    for (let query = 0; query < map.size; query++)
      for (let key = hideFirst ? 1 : 0; key <= query; key++) largest = Math.max(largest, value(query, key));
  largest = largest || 1;
  return {
    layer, head, largest, isHidden, value, byNorm,
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

// -- colours ------------------------------------------------------------------------------------------------------------

const RAMPS = { // evenly rising (dark) or falling (light) lightness, after Matplotlib's "inferno"
  dark: [[34, 32, 48], [66, 28, 104], [118, 32, 122], [176, 46, 106], [224, 80, 66], [248, 140, 36], [252, 200, 80], [252, 252, 200]],
  light: [[243, 241, 246], [252, 222, 170], [250, 170, 92], [232, 98, 78], [186, 54, 110], [124, 32, 124], [70, 24, 104], [28, 14, 50]],
};
const DIVERGING = { // below zero, zero, above zero
  dark: [[110, 190, 255], [38, 84, 150], [30, 30, 40], [160, 76, 20], [255, 178, 84]],
  light: [[20, 84, 170], [128, 178, 226], [246, 245, 248], [240, 148, 120], [184, 28, 60]],
};
/** Colours of several heads shown together, distinguishable with colour blindness (after Okabe and Ito). */
export const HEAD_COLOURS = {
  dark: ["#ffb454", "#5cc8ff", "#5fd7a0", "#ff8a7a", "#d6a2ff", "#f2e66b", "#9fb3ff", "#ff9fd6"],
  light: ["#b4308c", "#0072b2", "#00875f", "#c4500a", "#6a4bbd", "#8a7400", "#3f5ae0", "#c2185b"],
};
export const MAX_HEADS = 8;

function between(ramp, place) {
  const at = Math.min(Math.max(place, 0), 1) * (ramp.length - 1);
  const below = Math.min(Math.floor(at), ramp.length - 2);
  return ramp[below].map((start, i) => Math.round(start + (ramp[below + 1][i] - start) * (at - below)));
}

/** Colours of a theme: of a share from 0 to 1, by its square root so that small weights can be told apart, and of a
 * signed number from -1 to 1. */
export function paletteOf(theme) {
  const [ramp, diverging] = [RAMPS[theme], DIVERGING[theme]];
  const table = (of) => Uint32Array.from({ length: 256 }, (_, i) => {
    const [r, g, b] = of(i / 255);
    return ((255 << 24) | (b << 16) | (g << 8) | r) >>> 0;
  });
  const shareRgb = (share) => between(ramp, Math.sqrt(Math.min(Math.max(share, 0), 1)));
  const signedRgb = (value) => between(diverging, (Math.sign(value) * Math.sqrt(Math.min(Math.abs(value), 1)) + 1) / 2);
  return {
    theme,
    shares: table(shareRgb),
    signs: table((place) => signedRgb(2 * place - 1)),
    share: (share) => `rgb(${shareRgb(share)})`,
    signed: (value) => `rgb(${signedRgb(value)})`,
    ink: (share) => inkOn(shareRgb(share)),
    heads: HEAD_COLOURS[theme],
  };
}
const inkOn = ([r, g, b]) => (0.3 * r + 0.59 * g + 0.11 * b > 140 ? "#15131c" : "#fff");

/** Paint a lower triangle with one pixel per weight; the style sheet enlarges it. `of(query, key)` is in 0..1. */
export function paintTriangle(canvas, size, colours, of) {
  canvas.width = canvas.height = size;
  const image = new ImageData(size, size);
  const dots = new Uint32Array(image.data.buffer);
  for (let query = 0; query < size; query++)
    for (let key = 0; key <= query; key++)
      dots[query * size + key] = colours[Math.round(255 * Math.min(Math.max(of(query, key), 0), 1))];
  canvas.getContext("2d").putImageData(image, 0, 0);
}

/** A vector as a strip of colours. */
export function paintStrip(canvas, numbers, largest, palette) {
  canvas.width = numbers.length;
  canvas.height = 1;
  const image = new ImageData(numbers.length, 1);
  const dots = new Uint32Array(image.data.buffer);
  numbers.forEach((one, i) => {
    dots[i] = palette.signs[Math.round(127.5 * (Math.min(Math.max(one / (largest || 1), -1), 1) + 1))];
  });
  canvas.getContext("2d").putImageData(image, 0, 0);
}
