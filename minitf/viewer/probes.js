/* What the views Where predicted, What added and Two sentences ask the live model. The formats are in source.js. */

import { liveOf, requestOf } from "./edits.js";
import { range } from "./dom.js";
import { nearest } from "./state.js";

export const PROBES = ["lens", "contributions", "patch"];

/** Whether a view can be filled: by the source's live model, or with what is stored with the map. */
export const canProbe = (view, run, map, source) =>
  Boolean(map[view]) || Boolean(source.live && run.checkpoints.length && (source.kinds ?? []).includes(view));

/** The requests of the chosen view, none where the map has the result stored. */
export function probesOf(state, run, map, source) {
  const { view, live, edits, query, target, pair, pairHeads } = state;
  if (!PROBES.includes(view) || !source.live || !(source.kinds ?? []).includes(view)) return { requests: [] };
  const sentence = live ?? liveOf(run.sentences[state.sentence].text, state.step);
  const step = nearest(run.checkpoints, sentence.step);
  if (step === null) return { requests: [] };
  const base = { run: run.name, step, ...requestOf(sentence, edits), kind: view };
  if (view === "lens") return { requests: [base] };
  if (view === "contributions") return { requests: [{ ...base, position: query, token: target }] };
  if (!pair || pair.position >= map.size) return { requests: [] };
  const asked = { ...base, heads_off: [], edits: [], changed: pair.changed, position: pair.position };
  const layers = range(map.layers).map((layer) => ({ ...asked, layer, heads: false }));
  const heads = pairHeads !== null && pairHeads < map.layers ? [{ ...asked, layer: pairHeads, heads: true }] : [];
  return { requests: [...layers, ...heads] };
}

/** The replies about the map shown, or what is stored with it, or null; `done` of `count` are there. */
export function probeOf({ data, map, state }) {
  const { probe } = data;
  if (probe && probe.view === state.view) return probe;
  return map[state.view] ? { view: state.view, of: map.stamp, replies: [map[state.view]], count: 1, error: null, stored: true } : null;
}

/** A half-layer or a part by its English name in a reply: { kind, layer, head }. */
export function partOf(name) {
  const match = name.match(/^layer (\d+) (?:(attention|MLP)|head (\d+))$/);
  if (!match) return { kind: "embedding", layer: -1, head: null };
  return { kind: match[2] ?? "head", layer: Number(match[1]), head: match[3] === undefined ? null : Number(match[3]) };
}

/** Its name in the language of the page. */
export function partName(t, name, short = false) {
  const { kind, layer, head } = partOf(name);
  if (kind === "embedding") return t("part_embedding");
  return t(`${short ? "short" : "part"}_${kind}`, { layer, head });
}
