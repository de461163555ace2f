/* What is done to a sentence: looks forbidden and moved, heads switched off. Pure: immutable lists of
 *
 *   { kind: "block", query, keys, heads }      forbid the looks from one word to others; heads null: all
 *   { kind: "move", query, keys, to, heads }   exchange the weights of two words
 *   { kind: "ablate", heads, by } or { kind: "ablate", mlp, by }
 *
 * Positions are counted in tokens from 0, heads are [layer, head]. Heads that are switched off stand in `live.off`.
 */

import { percent, quoted } from "./dom.js";

export const MAX_EDITS = 64;
const MAX_PAST = 100;
const SMALL = 0.005; // a smaller change of a probability is none

/** A typed sentence with the defaults of everything else. */
export const liveOf = (text, step) => ({ text, new_tokens: 0, temperature: 0.8, seed: 0, off: [], by: "zero", step });

const same = (a, b) => JSON.stringify(a) === JSON.stringify(b);
export const isChanged = ({ live, edits }) => Boolean(live && (edits.length || live.off.length));

/** `edits` and one more; null if there are too many. An edit that is there already is not added again. */
export function withEdit(edits, edit) {
  if (edits.some((one) => same(one, edit))) return edits;
  return edits.length < MAX_EDITS ? [...edits, edit] : null;
}

/** Whether a word has something left to look at, in every head, if it may not look at `key` either. */
export function leavesSome(edits, query, key) {
  const forbidden = edits.filter((edit) => edit.kind === "block" && edit.query === query).flatMap((edit) => edit.keys);
  return new Set([...forbidden, key]).size <= query;
}

/** The looks, [query, key], that are forbidden in one head. */
export const cutIn = (edits, layer, head) => edits
  .filter((edit) => edit.kind === "block" && (!edit.heads || edit.heads.some(([l, h]) => l === layer && h === head)))
  .flatMap((edit) => edit.keys.map((key) => [edit.query, key]));

/** `list` of heads without those in `heads` if all are in it, else with them. */
export function toggled(list, heads) {
  const has = (all, [layer, head]) => all.some(([l, h]) => l === layer && h === head);
  return heads.every((head) => has(list, head)) ? list.filter((head) => !has(heads, head)) : [...list, ...heads.filter((head) => !has(list, head))];
}

/** The change of the state that edits its sentence: `next` is { edits, off, by }, each optional. A stored sentence, `text`,
 * becomes a typed one; what was generated, in `full`, becomes part of the text. What was before can be had back. */
export function changed(state, next, text, full) {
  const { live, edits, past } = state;
  const base = live ?? liveOf(text, state.step);
  const frozen = live?.new_tokens && full ? { text: full, new_tokens: 0 } : {};
  const now = { ...base, ...frozen, off: next.off ?? base.off, by: next.by ?? base.by };
  return { live: now, edits: next.edits ?? edits, past: [...past, { live, edits }].slice(-MAX_PAST) };
}

/** The change of the state that takes back the latest one, or null. Step and continuation stay as they are by now. */
export function undone({ live, past }) {
  const before = past.at(-1);
  if (!before || !live) return null;
  const rest = { edits: before.edits, past: past.slice(0, -1) };
  if (!before.live) return { ...rest, live: null, step: live.step };
  const { off, by, text } = before.live;
  return { ...rest, live: text === live.text ? { ...live, off, by } : { ...before.live, step: live.step } };
}

/** The fields of a live request. */
export function requestOf(live, edits = []) {
  const { text, new_tokens, temperature, seed, off, by } = live;
  const mean = by === "mean" && off.length ? [{ kind: "ablate", heads: off, by }] : [];
  return { text, new_tokens, temperature, seed, heads_off: mean.length ? [] : off, edits: [...edits, ...mean] };
}

// -- in the address: "b9-1@0.2" "m9-1-5+6" "a0.2+1.3:zero" "f0:mean", joined by "," -------------------------------------------

export function toText(edits) {
  const heads = (list) => list.map((head) => head.join(".")).join("+");
  return edits.map((edit) => {
    if (edit.kind === "ablate") return (edit.heads ? `a${heads(edit.heads)}` : `f${edit.mlp}`) + `:${edit.by}`;
    const places = [edit.query, edit.keys.join("+"), ...(edit.kind === "move" ? [edit.to.join("+")] : [])].join("-");
    return edit.kind[0] + places + (edit.heads ? `@${heads(edit.heads)}` : "");
  }).join(",");
}

/** The edits in an address; what is malformed is left out. */
export function fromText(text) {
  return (text ? text.split(",") : []).slice(0, MAX_EDITS).map(editOf).filter(Boolean);
}

const numbers = (text) => text.split("+").map(Number);
const headsIn = (text) => text.split("+").map((head) => head.split(".").map(Number));
const [PLACES, HEADS] = ["\\d{1,4}(?:\\+\\d{1,4})*", "\\d{1,4}\\.\\d{1,4}(?:\\+\\d{1,4}\\.\\d{1,4})*"];
const LOOK = new RegExp(`^([bm])(\\d{1,4})-(${PLACES})(?:-(${PLACES}))?(?:@(${HEADS}))?$`);
const ABLATE = new RegExp(`^(?:a(${HEADS})|f(\\d{1,4})):(zero|mean)$`);

function editOf(text) {
  const ablate = text.match(ABLATE);
  if (ablate) return { kind: "ablate", ...(ablate[1] ? { heads: headsIn(ablate[1]) } : { mlp: Number(ablate[2]) }), by: ablate[3] };
  const look = text.match(LOOK);
  if (!look || (look[1] === "m") !== Boolean(look[4])) return null;
  const edit = { kind: look[1] === "m" ? "move" : "block", query: Number(look[2]), keys: numbers(look[3]), ...(look[4] ? { to: numbers(look[4]) } : {}), heads: look[5] ? headsIn(look[5]) : null };
  return Math.max(...edit.keys, ...(edit.to ?? [])) <= edit.query ? edit : null;
}

// -- what came of it ----------------------------------------------------------------------------------------------------

/** Where a prediction changed most: { position, token, before, after, best, share, was } of a map with predictions `before`.
 * `token` is what came next in the text, after its last word the one that was likeliest; `best` is the likeliest by now. */
export function effectOf(map) {
  const last = map.size - 1;
  const from = map.full?.includes(" => ") || map.alignment ? Math.max((map.prompt_length ?? 1) - 1, 0) : 0; // of pairs, the answer
  let most = null;
  for (let position = from; position <= last; position++) {
    const [likeliest] = map.before.next_tokens[position];
    const token = position < last ? map.tokens[position + 1] : likeliest[0];
    const before = position < last ? map.before.actual[position] : likeliest[1];
    const after = position < last ? map.actual[position] : (map.next_tokens[position].find(([one]) => one === token)?.[1] ?? 0);
    const [best, share] = map.next_tokens[position][0];
    if (!most || Math.abs(after - before) > Math.abs(most.after - most.before)) most = { position, token, before, after, best, share, was: likeliest[0] };
  }
  return { ...most, small: Math.abs(most.after - most.before) < SMALL };
}

/** Heads as text: all, one by name, or how many. */
export function headsText(t, heads) {
  if (!heads) return t("all_heads");
  if (heads.length === 1) return t("head_lower", { layer: heads[0][0], head: heads[0][1] });
  return heads.length > 3 ? t("count_heads", { count: heads.length }) : t("heads_lower", { heads: heads.map((head) => head.join(".")).join(", ") });
}

/** What an edit is, for a chip: "it ⇸ cat". */
export function editText(t, map, edit) {
  const word = (position) => quoted(map.tokens[position] ?? "?");
  const words = (positions) => positions.map(word).join(" ");
  if (edit.kind === "ablate") return t(edit.heads ? "chip_off" : "chip_mlp", { heads: edit.heads ? headsText(t, edit.heads) : "", layer: edit.mlp });
  const values = { query: word(edit.query), keys: words(edit.keys), to: words(edit.to ?? []), heads: headsText(t, edit.heads) };
  return t(edit.kind === "move" ? "chip_move" : "chip_block", values);
}

/** One sentence: what was done, and what came of it. */
export function effectText(t, map, { edits, live }) {
  const effect = effectOf(map);
  const share = (value) => (value > 0 && value < 0.0005 ? "<0.1%" : percent(value));
  const values = {
    done: doneText(t, map, edits, live), token: quoted(effect.token), word: quoted(map.tokens[effect.position]),
    before: share(effect.before), after: share(effect.after), best: quoted(effect.best), share: share(effect.share),
  };
  const what = t(effect.small ? "effect_none" : effect.after < effect.before ? "effect_falls" : "effect_rises", values);
  const leads = effect.best === effect.token;
  const ending = effect.best === effect.was ? (leads ? "effect_same" : "effect_still") : leads ? "effect_first" : "effect_now";
  return what + t(effect.small ? "effect_end" : ending, values);
}

function doneText(t, map, edits, live) {
  if (edits.length + (live.off.length ? 1 : 0) > 1) return t("done_many", { count: edits.length + live.off.length });
  if (live.off.length) return t(live.by === "mean" ? "done_mean" : "done_off", { heads: headsText(t, live.off) });
  const [edit] = edits;
  const words = (positions) => positions.map((position) => quoted(map.tokens[position] ?? "?")).join(" ");
  if (edit.kind === "ablate") return edit.heads ? t(edit.by === "mean" ? "done_mean" : "done_off", { heads: headsText(t, edit.heads) }) : t("done_mlp", { layer: edit.mlp });
  return t(edit.kind === "move" ? "done_move" : "done_block", { query: words([edit.query]), keys: words(edit.keys), to: words(edit.to ?? []), heads: headsText(t, edit.heads) });
}
