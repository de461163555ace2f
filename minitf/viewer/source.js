/* The viewer's source of data within a page: the page itself. The Attention tab has another, in tab.js.
 *
 *   runs()                    -> { names, tags }: the runs, and the tags of each run's sentences
 *   run(name)                 -> { sentences: [{ tag, text, looks: [[step, time]] }], curves, scores, series, found, importance,
 *                                  checkpoints }
 *   map(name, sentence, look) -> an AttentionMaps.to_viewer()
 *   live(request)             -> the same, exact; `live` is null where unavailable, and `why` is the reason
 *   kinds                     -> which of "lens", "contributions" and "patch" live(request) answers too
 *   address                   -> { read(), write(text), link(text) }: where the state of the page is kept
 *
 * A request is { run, step, text, new_tokens, temperature, seed, heads_off, edits, kind } and what its kind needs; without a
 * kind, maps are wanted, which come with prompt_length, full (the text with what was generated) and, under heads_off or edits,
 * before: { next_tokens, actual } of the unedited model. For edits see edits.js. A map may have the other replies stored as
 * `lens`, `contributions` and `patch`: those of the Python API, `to_json()`.
 *
 *   lens           {} -> { tokens, rows: [{ after, best: [{ token, probability }], actual: [probability or null] }] }
 *                  a row after "embedding", "layer 0 attention", "layer 0 MLP", ...; best and actual by position
 *   contributions  { position, token } -> { token, logit, position, parts: { embedding, "layer 0 head 0", "layer 0 MLP", ... } }
 *                  to the logit of the token with that label after a position; null: the one that follows, at the end the likeliest
 *   patch          { changed, position, layer, heads } -> { clean: [token], changed: [token], answers: [a, b],
 *                  probabilities: [[of a, of b], [of a, of b]], difference, position, layer, heads, restores, breaks }
 *                  of the texts up to a position; shares by position; with `heads`, by head and position. Without edits.
 *                  Answers are the likeliest next tokens; if those are the same, the two whose probabilities differ most.
 */

import { createLaboratory } from "./laboratory.js";

export function embeddedSource(data) {
  const byText = groupByText(data.maps);
  const sentences = [...byText.keys()].map((text) => ({
    tag: text, text, looks: byText.get(text).map((map, index) => [map.step, index]),
  }));
  const scored = byText.get(sentences[0].text).filter((map) => Object.keys(map.scores).length);
  const scores = { steps: scored.map((map) => map.step), values: {} };
  for (const name of Object.keys(scored[0]?.scores ?? {}))
    scores.values[name] = scored[0].scores[name].map((row, layer) =>
      row.map((_, head) => scored.map((map) => map.scores[name][layer][head])));
  const curves = data.curves ?? { train: [], val: [] };
  const model = data.model?.weights ? data.model : null; // small models are in the page
  const laboratory = model ? createLaboratory(model, usualScores(data.maps)) : { live: null, count: undefined };
  return {
    title: data.title,
    ...laboratory,
    why: data.model?.why ?? "page",
    scoredOn: data.scored_on ?? "held_out",
    address: pageAddress(),
    runs: async () => ({ names: [""], tags: { "": sentences.map(({ tag }) => tag) } }),
    run: async () => ({ sentences, curves, scores, series: data.series ?? {}, found: data.found ?? {}, importance: null, checkpoints: model ? [model.step ?? 0] : [] }),
    // A page of one sentence has its labels from that sentence: they cannot differ from what is usual.
    map: async (_, sentence, [, index]) => ({ ...byText.get(sentence.text)[index], ...(data.scored_on === "sentence" ? { here: null } : {}) }),
  };
}

/** The latest scores of the heads that were measured on random tokens, and so are the same for every text. */
function usualScores(maps) {
  const scores = maps.findLast((map) => map.scores.induction)?.scores ?? {};
  return Object.fromEntries(["induction", "same_word"].filter((name) => name in scores).map((name) => [name, scores[name]]));
}

function groupByText(maps) {
  const groups = new Map();
  for (const map of maps) groups.set(map.text, [...(groups.get(map.text) ?? []), map]);
  return groups;
}

/** The part of the page's own address after "#". A frame of a notebook has none that can be written. */
function pageAddress() {
  return {
    read: () => location.hash.slice(1),
    write(text) {
      try { history.replaceState(null, "", `#${text}`); } catch { /* a frame without an address */ }
    },
    link: (text) => `${location.href.split("#")[0]}#${text}`,
  };
}
