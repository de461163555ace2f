/* The state of the viewer: one object, replaced as a whole by `set`, that every part of the page listens to. Pure: no
 * page and no network, so that it can be tested without a browser.
 *
 *   run        name of the run                    sentence   index among the run's sentences
 *   step       a training step; null: the latest  heads      [layer, head, colour] of the chosen heads
 *   query key  positions of the chosen words      point      { query, key } under the pointer, or null
 *   view       one of VIEWS                       other      what *Compare* compares with, or null: the first step
 *   live       a typed sentence, or null: { text, new_tokens, temperature, seed, off, by, step }
 *   edits      what is done to the looks of the typed sentence, see edits.js; past: what was before, for undo
 *   scope      the heads that the next edit is for: "one" (the first chosen), "chosen" or "all"
 *   target     the next token whose parts are shown, or null: the one that came
 *   pair       the other of two sentences: { changed, position }, or null; pairHeads: the layer whose heads are shown
 */

import { clamp, range } from "./dom.js";
import { fromText, toText } from "./edits.js";

export const VIEWS = [
  "alignment", "lines", "matrix", "three_steps", "next_token", "lens", "contributions", "patch", "over_training", "compare",
];
export const SORTS = ["layer", "score", "importance"];
export const MAX_HEADS = 6;
/** Patterns from the most telling to the least; a head of the first one found is chosen at the start. */
export const PATTERN_ORDER = [
  "refers", "aligns", "induction", "previous_token", "same_word", "nearby", "first_token", "this_token", "broad",
];

export const INITIAL = Object.freeze({
  language: "en", run: null, sentence: null, step: null, heads: null, query: null, key: null, point: null,
  hideFirst: false, measure: "weight", view: null, temperature: 1, focusKey: null, score: "", filter: "", sort: "layer",
  several: false, explain: null, live: null, other: null, edits: [], past: [], scope: "all",
  target: null, pair: null, pairHeads: null,
});

export function createStore(initial) {
  let state = Object.freeze({ ...INITIAL, ...initial });
  const listeners = new Set();
  return {
    get: () => state,
    set(change) {
      const before = state;
      state = Object.freeze({ ...state, ...change });
      for (const listener of listeners) listener(state, before);
    },
    subscribe(listener) {
      listeners.add(listener);
      return () => listeners.delete(listener);
    },
  };
}

/** The sentence selected first: the longest that is still easy to read. */
export function defaultSentence(sentences) {
  const length = (index) => Math.min(sentences[index].text.length, 160);
  return range(sentences.length).reduce((best, index) => (length(index) > length(best) ? index : best), 0);
}

/** The head selected first: the one with the highest score of the most telling pattern found. */
export function defaultHead(map) {
  const all = range(map.layers).flatMap((layer) => range(map.heads).map((head) => [layer, head]));
  for (const pattern of PATTERN_ORDER) {
    const has = ([layer, head]) => map.label(layer, head)?.[0] === pattern || map.found[pattern]?.some(([l, h]) => l === layer && h === head);
    const named = all.filter(has);
    if (named.length) return named.sort((a, b) => (map.label(...b)?.[1] ?? 0) - (map.label(...a)?.[1] ?? 0))[0];
  }
  return [map.layers - 1, 0];
}

/** The query selected first: the word of a relation that the run watches, where its head is shown; else the last one that
 * looks much at one word, other than the first and itself. */
export function defaultQuery(map, [layer, head]) {
  const refers = map.found.refers?.some(([l, h]) => l === layer && h === head);
  const watched = refers ? (map.watched ?? []).map((word) => lastToken(map.tokens, word)).filter((position) => position > 0) : [];
  if (watched.length) return watched[0];
  const late = range(map.size).slice(Math.floor(map.size / 2));
  const strength = (query) => Math.max(0, ...range(query).slice(1).map((key) => map.weight(layer, head, query, key)));
  return late.reduce((best, query) => (strength(query) >= 0.7 * strength(best) ? query : best), map.size - 1);
}

/** The position of the last token of a word's last occurrence, or -1. Of a word with letters no part of another counts. */
export function lastToken(tokens, word) {
  const text = tokens.join("").toLowerCase();
  const name = word.toLowerCase();
  const isLetter = (character) => character !== undefined && /[a-z0-9à-ÿ]/i.test(character);
  for (let start = text.lastIndexOf(name); start >= 0 && name; start = start > 0 ? text.lastIndexOf(name, start - 1) : -1) {
    const end = start + name.length;
    if ((isLetter(name[0]) && isLetter(text[start - 1])) || (isLetter(name.at(-1)) && isLetter(text[end]))) continue;
    let length = 0;
    return tokens.findIndex((token) => (length += token.length) >= end);
  }
  return -1;
}

/** The change for a run that is shown from now on. With the same sentence the selection stays; with others, the most
 * telling sentence, head and word are chosen. `before` is the run shown until now, or null at the start. */
export function fitRun(state, run, before) {
  if (!before || before.name === run.name) {
    const sentence = state.sentence === null ? defaultSentence(run.sentences) : clamp(state.sentence, run.sentences.length);
    return { sentence };
  }
  const text = before.sentences[state.sentence]?.text;
  const same = run.sentences.findIndex((sentence) => sentence.text === text);
  const changes = { step: null, other: null, point: null, pair: null, pairHeads: null, target: null };
  if (same >= 0) return { ...changes, sentence: same };
  return { ...changes, sentence: defaultSentence(run.sentences), heads: null, query: null, key: null };
}

/** The change for a map that is shown from now on: the selection limited to it, or chosen. */
export function fitMap(state, map) {
  let heads = (state.heads ?? []).filter(([layer, head]) => layer < map.layers && head < map.heads);
  if (!heads.length) heads = [[...defaultHead(map), 0]];
  const query = state.query === null ? defaultQuery(map, heads[0]) : Math.min(state.query, map.size - 1); // Infinity: last
  const key = state.key !== null && state.key > query ? null : state.key;
  let view = state.view ?? (map.alignment ? "alignment" : "lines"); // pairs open with the alignment
  if (view === "alignment" && !map.alignment) view = "lines";
  return { heads, query, key, view, point: null };
}

/** The chosen heads after a click on one; null if no more can be chosen. A head keeps its colour while it is chosen. */
export function clickHead(heads, layer, head, several) {
  if (!several) return [[layer, head, 0]];
  const rest = heads.filter(([l, h]) => l !== layer || h !== head);
  if (rest.length < heads.length) return rest.length ? rest : heads;
  if (heads.length >= MAX_HEADS) return null;
  const colour = range(MAX_HEADS).find((one) => !heads.some((chosen) => chosen[2] === one));
  return [...heads, [layer, head, colour]];
}

/** The step of `looks`, [[step, ...]] in ascending order, that is shown: the last at or before `step`; null: the latest. */
export function lookAt(looks, step) {
  if (step === null) return looks.length - 1;
  const index = looks.findLastIndex(([at]) => at <= step);
  return Math.max(index, 0);
}

/** The checkpoint nearest to a step; null: the latest. */
export function nearest(steps, step) {
  if (step === null) return steps.at(-1) ?? null;
  return steps.reduce((best, at) => (best === null || Math.abs(at - step) < Math.abs(best - step) ? at : best), null);
}

// -- the address ------------------------------------------------------------------------------------------------------

/** The state as the parameters of an address, without what is as at the start. `step` pins the step that is shown. */
export function toAddress(state, step = state.step) {
  const live = state.live;
  const values = {
    run: state.run, sentence: live ? null : state.sentence, step: live ? live.step : step,
    head: state.heads?.map(([layer, head]) => `${layer}.${head}`).join(","), word: state.query, key: state.key,
    view: state.view, measure: state.measure === "weight" ? null : state.measure, first: state.hideFirst ? "hidden" : null,
    temperature: state.temperature === 1 ? null : state.temperature, score: state.score, filter: state.filter,
    sort: state.sort === "layer" ? null : state.sort, with: state.view === "compare" ? otherName(state.other) : null,
    text: live?.text, new: live?.new_tokens || null, seed: live?.new_tokens ? live.seed : null,
    sampling: live?.new_tokens ? live.temperature : null,
    off: live?.off.map((head) => head.join(".")).join(","), by: live?.off.length && live.by !== "zero" ? live.by : null,
    edits: live ? toText(state.edits) : null, target: state.view === "contributions" ? state.target : null,
    changed: state.view === "patch" ? state.pair?.changed : null, after: state.view === "patch" ? state.pair?.position : null,
    layer: state.view === "patch" ? state.pairHeads : null,
  };
  const given = Object.entries(values).filter(([, value]) => value !== null && value !== undefined && value !== "");
  return new URLSearchParams(given.map(([name, value]) => [name, String(value)])).toString();
}

/** The change of the state that an address asks for. Anything malformed is ignored; whether it exists is for the fit. */
export function fromAddress(address) {
  const values = new URLSearchParams(address);
  const count = (name) => (/^\d{1,15}$/.test(values.get(name) ?? "") ? Number(values.get(name)) : null);
  const real = (name, low, high) => {
    const value = Number.parseFloat(values.get(name) ?? "");
    return value >= low && value <= high ? value : null;
  };
  const pairs = (name) => (values.get(name) ?? "").split(",").map((one) => one.match(/^(\d{1,4})\.(\d{1,4})$/))
    .filter(Boolean).map(([, layer, head]) => [Number(layer), Number(head)]);
  const heads = pairs("head").slice(0, MAX_HEADS).map(([layer, head], colour) => [layer, head, colour]);
  const word = (name) => (/^[a-z_/]{1,60}$/i.test(values.get(name) ?? "") ? values.get(name) : "");
  const change = {
    run: values.get("run"), sentence: count("sentence"), step: count("step"), heads: heads.length ? heads : null,
    query: count("word"), key: count("key"), view: VIEWS.includes(values.get("view")) ? values.get("view") : null,
    measure: values.get("measure") === "norm" ? "norm" : "weight", hideFirst: values.get("first") === "hidden",
    temperature: real("temperature", 0.05, 20) ?? 1, score: (values.get("score") ?? "").slice(0, 200), filter: word("filter"),
    sort: SORTS.includes(values.get("sort")) ? values.get("sort") : "layer", other: otherOf(values.get("with") ?? ""),
  };
  if (values.get("text")) {
    change.live = {
      text: values.get("text"), new_tokens: count("new") ?? 0, temperature: real("sampling", 0, 100) ?? 0.8,
      seed: count("seed") ?? 0, off: pairs("off"), by: values.get("by") === "mean" ? "mean" : "zero", step: change.step,
    };
    change.step = null;
    change.edits = fromText(values.get("edits"));
  }
  if (values.get("changed") && count("after") !== null) change.pair = { changed: values.get("changed"), position: count("after") };
  Object.assign(change, { pairHeads: count("layer"), target: values.get("target")?.slice(0, 100) ?? null });
  return change;
}

const otherName = (other) => (!other ? null : ["head", "plain"].includes(other.kind) ? other.kind : `${other.kind}:${other.step ?? ""}:${other.run ?? ""}`);

function otherOf(name) {
  if (name === "head" || name === "plain") return { kind: name };
  const match = name.match(/^(step|run):(\d{0,15}):(.*)$/s);
  if (!match) return null;
  return { kind: match[1], step: match[2] === "" ? null : Number(match[2]), run: match[3] || null };
}
