/* Two sentences with one difference, and the places that carry it: what patching.py computes, in the same format.
 *
 * What the model computed at a place of one text is put into the other. Positions before the place are as they were, so
 * only the later ones are computed again.
 */

import { range } from "./dom.js";
import { dot, embedded, logitsOf, normalised, rowsOf, throughLayers } from "./model.js";
import { refusal } from "./refusals.js";
import { recorded } from "./residual.js";
import { likeliest, probabilitiesOf } from "./sampling.js";

const SMALLEST_DIFFERENCE = 1e-3;

/** A clean and a changed text, lists of as many ids: { toJson(), layer(n, pause), heads(n, pause) }, these to
 * { restores, breaks }, shares by position, or by head and position. Throws for texts that cannot be compared. `pause()` is
 * awaited between computations; what it throws ends the work. */
export function createPair(model, tokenizer, clean, changed) {
  const { hidden_size: D, num_heads: H, rms_norm_eps: eps } = model.config;
  const size = clean.length;
  const first = clean.findIndex((id, t) => id !== changed[t]); // before it both texts are the same
  const sides = [clean, changed].map((ids) => {
    const side = recorded(model, ids);
    return { ...side, logits: logitsOf(model, side.streams.at(-1).at(-1)) };
  });
  const [one, other] = answersOf(sides);
  const starts = sides.map(({ logits }) => logits[one] - logits[other]);
  const all = starts[0] - starts[1];
  if (Math.abs(all) < SMALLEST_DIFFERENCE) throw refusal("pair_no_difference");

  /** The logit difference at the end of a text of which one position is edited, in a layer. */
  function patched({ reading, streams }, layer, position, edited) {
    const x_TD = new Float32Array((size - position) * D);
    streams[2 * layer].slice(position).forEach((row, t) => x_TD.set(row, t * D));
    reading.length = position;
    throughLayers(model, reading, x_TD, edited, layer);
    const last_D = normalised(rowsOf(x_TD, D).at(-1), model.parameter("model.norm"), eps);
    const logit = (id) => dot(last_D, model.vocabulary.subarray(id * D, (id + 1) * D));
    return logit(one) - logit(other);
  }

  /** Shares by position; from the last to the first, as each computation writes over the later positions of the reading. */
  async function shares(layer, pause, editOf) {
    for (const { ids, reading } of sides) {
      reading.length = 0;
      throughLayers(model, reading, embedded(model, ids));
    }
    const [restores, breaks] = [new Array(size).fill(0), new Array(size).fill(0)];
    for (const position of range(size).slice(first).reverse()) {
      restores[position] = rounded((patched(sides[1], layer, position, editOf(sides[0], position)) - starts[1]) / all);
      breaks[position] = rounded(-(patched(sides[0], layer, position, editOf(sides[1], position)) - starts[0]) / all);
      await pause();
    }
    return { restores, breaks };
  }

  return {
    toJson: () => ({
      clean: clean.map(tokenizer.label), changed: changed.map(tokenizer.label), answers: [one, other].map(tokenizer.label),
      probabilities: sides.map(({ logits }) => [one, other].map(probabilitiesOf(logits))), difference: all,
    }),
    layer: (layer, pause) => shares(layer, pause, ({ streams }, position) => (step, at, _, start, rows) => {
      if (step === "stream" && at === 2 * layer) rows[position - start].set(streams[at][position]);
    }),
    async heads(layer, pause) {
      const found = [];
      for (const head of range(H)) {
        found.push(await shares(layer, pause, ({ mixed }, position) => (step, at, of, start, rows) => {
          if (step === "gather" && at === layer && of === head) rows[position - start].set(mixed[at][of][position]);
        }));
      }
      return { restores: found.map(({ restores }) => restores), breaks: found.map(({ breaks }) => breaks) };
    },
  };
}

/** The likeliest next tokens of both texts; where they are the same, those whose probability differs most. */
function answersOf(sides) {
  const [one, other] = sides.map(({ logits }) => likeliest(logits, 1)[0]);
  if (one !== other) return [one, other];
  const [clean, changed] = sides.map(({ logits }) => probabilitiesOf(logits));
  const gains = sides[0].logits.map((_, id) => clean(id) - changed(id));
  return [likeliest(gains, 1)[0], likeliest(gains.map((gain) => -gain), 1)[0]];
}

const rounded = (share) => Math.round(1e4 * share) / 1e4 + 0;
