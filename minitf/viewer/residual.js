/* Where the model of the page makes its predictions: what residual.py computes for the views of the lens and of the
 * contributions, in the same formats. A block only ever adds to its input, so the last hidden state is a sum.
 */

import { range } from "./dom.js";
import { createReading, dot, embedded, logitsOf, rowsOf, throughLayers } from "./model.js";
import { likeliest, probabilitiesOf } from "./sampling.js";

/** What was computed on a text: `streams[s][t]` before each half-layer and after the last, `mixed[layer][head][t]` that the
 * heads gathered, and `reading`. */
export function recorded(model, ids, edited = () => {}) {
  const [streams, mixed] = [[], range(model.config.num_layers).map(() => [])];
  const reading = createReading(model, ids.length);
  throughLayers(model, reading, embedded(model, ids), (step, layer, head, first, rows) => {
    edited(step, layer, head, first, rows);
    const kept = () => rows.map((row) => row.slice());
    if (step === "stream") streams.push(kept());
    if (step === "gather") mixed[layer][head] = kept();
  });
  return { ids, streams, mixed, reading };
}

/** The likeliest token at every position if the model stopped after each half-layer. */
export function lens(model, tokenizer, ids, edited) {
  const { num_layers: L, hidden_size: D, vocab_size: V } = model.config;
  const names = ["embedding", ...range(L).flatMap((layer) => [`layer ${layer} attention`, `layer ${layer} MLP`])];
  const rows = recorded(model, ids, edited).streams.map((stream, s) => {
    const stream_TD = new Float32Array(ids.length * D);
    stream.forEach((row, t) => stream_TD.set(row, t * D));
    const found = rowsOf(logitsOf(model, stream_TD), V).map((logits) => ({ id: likeliest(logits, 1)[0], probability: probabilitiesOf(logits) }));
    return {
      after: names[s],
      best: found.map(({ id, probability }) => ({ token: tokenizer.label(id), probability: probability(id) })),
      actual: found.map(({ probability }, t) => (t + 1 < ids.length ? probability(ids[t + 1]) : null)),
    };
  });
  return { tokens: ids.map(tokenizer.label), rows };
}

/** What each head and feed-forward layer adds to the logit of a token (its id) after a position; null: of the one that
 * follows, at the end of the text of the likeliest. The last norm scales all by one number, so the parts sum to the logit. */
export function contributions(model, tokenizer, ids, position, token, edited) {
  const { config: { num_layers: L, num_heads: H, head_dim: K, hidden_size: D, rms_norm_eps: eps }, parameter, ofLayer, vocabulary } = model;
  const { streams, mixed } = recorded(model, ids, edited);
  const last_D = streams.at(-1)[position];
  const id = token ?? ids[position + 1] ?? likeliest(logitsOf(model, last_D), 1)[0];
  const scale = 1 / Math.sqrt(dot(last_D, last_D) / D + eps);
  const direction_D = parameter("model.norm").map((weight, i) => weight * vocabulary[id * D + i] * scale);
  const parts = { embedding: dot(streams[0][position], direction_D) };
  for (const layer of range(L)) {
    const back_HK = backwards(ofLayer(layer, "self_attn.o_proj"), direction_D);
    for (const head of range(H)) parts[`layer ${layer} head ${head}`] = dot(mixed[layer][head][position], back_HK.subarray(head * K, (head + 1) * K));
    const [before_D, after_D] = [streams[2 * layer + 1][position], streams[2 * layer + 2][position]];
    parts[`layer ${layer} MLP`] = dot(after_D.map((one, i) => one - before_D[i]), direction_D);
  }
  return { token: tokenizer.label(id), logit: dot(last_D, direction_D), parts, position };
}

/** W^T y: what each input of a projection adds in the direction y of its outputs. */
function backwards(weight, y) {
  const inputs = weight.length / y.length;
  const x = new Float32Array(inputs);
  y.forEach((one, o) => {
    for (let i = 0; i < inputs; i++) x[i] += weight[o * inputs + i] * one;
  });
  return x;
}
