/* The model in the page answers what TensorBoard's server answers in the Attention tab (tensorboard/live.py): the exact
 * maps of a typed sentence and what the model writes after it, under edits and with heads switched off.
 */

import { range } from "./dom.js";
import { placed } from "./interventions.js";
import { createReading, loadModel, product, read } from "./model.js";
import { createPair } from "./patching.js";
import { headPattern, patternScores } from "./patterns.js";
import { refusal } from "./refusals.js";
import { contributions, lens } from "./residual.js";
import { draw, likeliest, probabilitiesOf, randomNumbers } from "./sampling.js";
import { createTokenizer } from "./tokenizer.js";

const [MAX_TOKENS, MAX_CHARACTERS, TOP, PAUSE_MS] = [256, 20000, 10, 40];
const MAX_VECTOR_NUMBERS = 4_000_000;

/** { live, kinds, count } of a source, from the page's data of its model; for the requests see source.js. `usual` are scores
 * of the heads that do not depend on the text, { induction: [layer][head], same_word }. The weights are decoded with the
 * first request; a newer request ends the work on an older one. */
export function createLaboratory(data, usual) {
  const tokenizer = createTokenizer(data.tokenizer);
  const limit = Math.min(MAX_TOKENS, data.config.context_length);
  const latest = new Map(); // the latest result of each kind, as views ask about one sentence several times
  let [model, newest] = [null, 0];

  function remember(kind, key, make) {
    if (latest.get(kind)?.key !== key) latest.set(kind, { key, result: make() });
    return latest.get(kind).result;
  }
  function check(text) {
    if (text.length > MAX_CHARACTERS) throw refusal("too_many_characters", { limit: MAX_CHARACTERS });
    return text;
  }

  /** The tokens of a text and of what the model writes after it, and what it computed on them. */
  function write({ text, new_tokens = 0, temperature = 0.8, seed = 0, heads_off = [], edits = [] }) {
    const prompt = tokenizer.encodePrompt(check(text));
    const size = prompt.length + new_tokens;
    if (size > limit) throw refusal("too_long", { tokens: prompt.length, added: new_tokens, limit });
    const edited = placed(edits, heads_off, data.config, size);
    const reading = createReading(model, size);
    const random = randomNumbers(seed);
    const ids = [...prompt];
    read(model, reading, prompt, edited);
    while (ids.length < size) {
      ids.push(draw(logitsAt(model, reading, ids.length - 1), temperature, random()));
      if (edits.some(({ by }) => by === "mean")) reading.length = 0; // the mean is that of all positions so far
      read(model, reading, ids.slice(reading.length), edited);
    }
    return { ids, reading, edited, prompt_length: prompt.length, full: new_tokens ? tokenizer.decode(ids) : text };
  }

  /** The maps, and without edits the predictions. */
  function maps(request, { ids, reading, edited, prompt_length, full }) {
    const whole = () => {
      const unedited = createReading(model, ids.length);
      read(model, unedited, ids);
      return predictions(model, unedited, ids, tokenizer);
    };
    return {
      text: request.text, step: data.step, tokens: tokenizer.labels(ids), prompt_length, full,
      ...mapsOf(model, reading, request.heads_off ?? [], usual), ...predictions(model, reading, ids, tokenizer),
      ...(edited ? { before: remember("before", ids.join(), whole) } : {}),
    };
  }

  /** One layer of the comparison with another sentence, up to a position. */
  async function patch({ changed, layer, heads }, ids, position, pause) {
    const others = tokenizer.encode(check(changed));
    if (others.length !== ids.length) throw refusal("pair_lengths", { one: ids.length, other: others.length });
    if (!range(data.config.num_layers).includes(layer)) throw refusal("no_layer", { layer });
    const texts = [ids, others].map((all) => all.slice(0, position + 1));
    if (texts[0].join() === texts[1].join()) throw refusal("pair_alike");
    const pair = remember("pair", texts.join(";"), () => createPair(model, tokenizer, ...texts));
    return { ...pair.toJson(), position, layer, heads, ...(await (heads ? pair.heads : pair.layer)(layer, pause)) };
  }

  return {
    kinds: ["lens", "contributions", "patch"],
    count: async (_, __, text) => ({ tokens: tokenizer.encode(check(text)).length, limit }),
    async live(request) {
      const mine = ++newest;
      model ??= loadModel(data);
      const { kind = "maps", run, position, token, changed, layer, heads, ...sentence } = request;
      const written = remember("sentence", JSON.stringify(sentence), () => write(sentence));
      const { ids, edited } = written;
      const at = position ?? ids.length - 1;
      if (!range(ids.length).includes(at)) throw refusal("no_position", { position: at + 1, tokens: ids.length });
      if (kind === "maps") return maps(request, written);
      if (kind === "lens") return lens(model, tokenizer, ids, edited);
      if (kind === "contributions") return contributions(model, tokenizer, ids, at, token ? tokenizer.idOf(token) : null, edited);
      return patch(request, ids, at, pauses(() => mine === newest));
    },
  };
}

/** A function that lets the page react now and then, and throws once `isWanted()` is false. */
function pauses(isWanted) {
  let since = performance.now();
  return async () => {
    if (performance.now() - since < PAUSE_MS) return;
    await new Promise((resolve) => setTimeout(resolve));
    since = performance.now();
    if (!isWanted()) throw refusal("superseded");
  };
}

/** The maps of an `AttentionMaps.to_viewer(exact=True)`; the numbers stay numbers. */
function mapsOf(model, reading, headsOff, usual) {
  const { num_layers: L, num_heads: H, num_kv_heads: G, head_dim: K } = model.config;
  const { capacity: size, triangle, weights, q_LHTK, k_LGTK, v_LGTK } = reading;
  if (!weights.every(Number.isFinite)) throw refusal("diverged");
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
    return { best: likeliest(logits, TOP), probability: probabilitiesOf(logits) };
  });
  return {
    next_tokens: found.map(({ best, probability }) => best.map((id) => [tokenizer.label(id), probability(id)])),
    actual: found.slice(0, -1).map(({ probability }, position) => probability(ids[position + 1])),
  };
}
