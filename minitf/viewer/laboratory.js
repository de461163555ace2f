/* The model in the page answers what TensorBoard's server answers in the Attention tab (tensorboard/live.py): the exact
 * maps of a typed sentence and what the model writes after it, under edits and with heads switched off.
 */

import { range } from "./dom.js";
import { placed } from "./interventions.js";
import { createReading, loadModel, product, read } from "./model.js";
import { headPattern, patternScores } from "./patterns.js";
import { createTokenizer } from "./tokenizer.js";

const [MAX_TOKENS, MAX_CHARACTERS, TOP] = [256, 20000, 10];
const MAX_VECTOR_NUMBERS = 4_000_000;

/** { live, count } of a source, from the page's data of its model. `usual` are scores of the heads that do not depend on
 * the text, { induction: [layer][head], same_word }. The weights are decoded with the first request. */
export function createLaboratory(data, usual) {
  const tokenizer = createTokenizer(data.tokenizer);
  const limit = Math.min(MAX_TOKENS, data.config.context_length);
  let model = null;
  let whole = { ids: "", content: null }; // the predictions without edits, of the latest text

  function check(text) {
    if (text.length > MAX_CHARACTERS) throw new Error(`the text is longer than ${MAX_CHARACTERS} characters`);
    return text;
  }

  /** The tokens of a text and of what the model writes after it, and all that it computed on them. */
  function write({ text, new_tokens = 0, temperature = 0.8, seed = 0, heads_off = [], edits = [] }) {
    const prompt = tokenizer.encodePrompt(check(text));
    const size = prompt.length + new_tokens;
    if (size > limit) throw new Error(`${prompt.length} tokens and ${new_tokens} new ones are more than the ${limit} that fit: shorten the text`);
    const edited = placed(edits, heads_off, data.config, size);
    const reading = createReading(model, size);
    const random = randomNumbers(seed);
    const ids = [...prompt];
    read(model, reading, prompt, edited);
    while (ids.length < size) {
      ids.push(draw(logitsAt(model, reading, ids.length - 1), temperature, random()));
      read(model, reading, ids.slice(-1), edited);
    }
    return { ids, reading, edited, prompt_length: prompt.length, full: new_tokens ? tokenizer.decode(ids) : text };
  }

  function predictionsOf(ids) {
    if (whole.ids !== ids.join()) {
      const reading = createReading(model, ids.length);
      read(model, reading, ids);
      whole = { ids: ids.join(), content: predictions(model, reading, ids, tokenizer) };
    }
    return whole.content;
  }

  return {
    count: async (_, __, text) => ({ tokens: tokenizer.encode(check(text)).length, limit }),
    async live(request) {
      model ??= loadModel(data);
      const { ids, reading, edited, ...written } = write(request);
      const maps = mapsOf(model, reading, request.heads_off ?? [], usual);
      return {
        text: request.text, step: data.step, tokens: tokenizer.labels(ids), ...maps, ...predictions(model, reading, ids, tokenizer),
        ...written, ...(edited ? { before: predictionsOf(ids) } : {}),
      };
    },
  };
}

/** The maps of an `AttentionMaps.to_viewer(exact=True)`; the numbers stay numbers. */
function mapsOf(model, reading, headsOff, usual) {
  const { num_layers: L, num_heads: H, num_kv_heads: G, head_dim: K } = model.config;
  const { capacity: size, triangle, weights, q_LHTK, k_LGTK, v_LGTK } = reading;
  if (!weights.every(Number.isFinite)) throw new Error("the attention weights are not finite: the training diverged");
  const row = (layer, head) => (query) => {
    const start = (layer * H + head) * triangle + (query * (query + 1)) / 2;
    return weights.subarray(start, start + query + 1);
  };
  const here = range(L).map((layer) => range(H).map((head) => patternScores(row(layer, head), size)));
  const all = here.map((heads, layer) => heads.map((scores, head) =>
    ({ ...scores, ...Object.fromEntries(Object.entries(usual).map(([name, values]) => [name, values[layer][head]])) })));
  const small = q_LHTK.length + k_LGTK.length + v_LGTK.length <= MAX_VECTOR_NUMBERS;
  return {
    layers: L, heads: H, kv_heads: G, head_dim: K, encoding: "float32", weights,
    labels: all.map((heads) => heads.map(headPattern)),
    here: here.map((heads) => heads.map(headPattern)),
    scores: Object.fromEntries(Object.keys(all[0][0]).map((name) => [name, all.map((heads) => heads.map((scores) => scores[name]))])),
    value_norms: lengths(v_LGTK, K),
    output_norms: outputNorms(model, v_LGTK, size, headsOff),
    vectors: small ? { encoding: "float32", q: { values: q_LHTK }, k: { values: k_LGTK }, v: { values: v_LGTK } } : null,
    standard_formula: true, formula: null, rows_sum_to_one: true, alignment: null,
  };
}

/** The lengths of rows of `width` numbers. */
function lengths(rows, width) {
  return Float32Array.from({ length: rows.length / width }, (_, i) =>
    Math.sqrt(rows.subarray(i * width, (i + 1) * width).reduce((sum, one) => sum + one ** 2, 0)));
}

/** || v W_O || of every head and position: the length of what a weight of 1 would add to the residual stream. */
function outputNorms({ config, ofLayer }, v_LGTK, size, headsOff) {
  const { num_layers: L, num_heads: H, num_kv_heads: G, head_dim: K, hidden_size: D } = config;
  const norms_LHT = new Float32Array(L * H * size);
  for (let layer = 0; layer < L; layer++) {
    const weight = ofLayer(layer, "self_attn.o_proj");
    for (let head = 0; head < H; head++) {
      if (headsOff.some(([l, h]) => l === layer && h === head)) continue;
      const start = (layer * G + Math.floor((head * G) / H)) * size * K;
      const columns_DK = new Float32Array(D * K); // the columns of W_O that read this head
      for (let d = 0; d < D; d++) columns_DK.set(weight.subarray((d * H + head) * K, (d * H + head + 1) * K), d * K);
      norms_LHT.set(lengths(product(v_LGTK.subarray(start, start + size * K), columns_DK, K, D), D), (layer * H + head) * size);
    }
  }
  return norms_LHT;
}

const logitsAt = ({ config: { vocab_size: V } }, { logits_TV }, position) => logits_TV.subarray(position * V, (position + 1) * V);

/** { next_tokens, actual }: the likeliest tokens after each position, and the probability of the one that follows. */
function predictions(model, reading, ids, tokenizer) {
  const found = ids.map((_, position) => {
    const logits = logitsAt(model, reading, position);
    let largest = -Infinity;
    for (const logit of logits) largest = Math.max(largest, logit);
    let sum = 0;
    for (const logit of logits) sum += Math.exp(logit - largest);
    return { logits, probability: (id) => Math.exp(logits[id] - largest) / sum };
  });
  return {
    next_tokens: found.map(({ logits, probability }) => likeliest(logits, TOP).map((id) => [tokenizer.label(id), probability(id)])),
    actual: found.slice(0, -1).map(({ probability }, position) => probability(ids[position + 1])),
  };
}

/** The places of the largest numbers, in descending order. */
function likeliest(numbers, count) {
  const best = [];
  for (let i = 0; i < numbers.length; i++) {
    if (best.length === count && !(numbers[i] > numbers[best.at(-1)])) continue;
    let place = best.length;
    while (place > 0 && numbers[i] > numbers[best[place - 1]]) place--;
    best.splice(place, 0, i);
    if (best.length > count) best.pop();
  }
  return best;
}

/** The likeliest id at temperature 0, else one by its probability: the first at which their sum exceeds `random`. */
function draw(logits, temperature, random) {
  const [best] = likeliest(logits, 1);
  if (temperature === 0) return best;
  const powers = logits.map((logit) => Math.exp((logit - logits[best]) / temperature));
  let left = random * powers.reduce((a, b) => a + b, 0);
  return Math.max(powers.findIndex((power) => (left -= power) < 0), 0);
}

/** Numbers from 0 to below 1, the same for the same seed: xorshift (Marsaglia, 2003). */
function randomNumbers(seed) {
  let bits = Math.imul(seed + 1, 0x9e3779b1) | 1;
  const next = () => {
    bits ^= bits << 13;
    bits ^= bits >>> 17;
    bits ^= bits << 5;
    return (bits >>> 0) / 2 ** 32;
  };
  range(8).forEach(next); // the first numbers of neighbouring seeds are alike
  return next;
}
