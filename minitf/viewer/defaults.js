/* The initial selection of head, sentence and query, and the description of the weight under the pointer. */

import { percent, quoted, range } from "./dom.js";
import { PATTERN_ORDER } from "./overview.js";

/** The head selected first: the one with the highest score of the most interesting pattern found. */
export function defaultHead(map) {
  const all = range(map.layers).flatMap((layer) => range(map.heads).map((head) => [layer, head]));
  for (const pattern of PATTERN_ORDER) {
    const named = all.filter(([layer, head]) => map.label(layer, head)?.[0] === pattern);
    if (named.length) return named.sort((a, b) => map.label(...b)[1] - map.label(...a)[1])[0];
  }
  return [map.layers - 1, 0];
}

/** The sentence selected first: the longest that is still easy to read. */
export function defaultSentence(sentences) {
  const length = (index) => Math.min(sentences[index].text.length, 160);
  return range(sentences.length).reduce((best, index) => (length(index) > length(best) ? index : best), 0);
}

/** The query selected first: the last one whose largest weight, not counting the first token, is large. */
export function defaultQuery(map, [layer, head]) {
  const late = range(map.size).slice(Math.floor(map.size / 2));
  const strength = (query) => Math.max(0, ...range(query + 1).slice(1).map((key) => map.weight(layer, head, query, key)));
  return late.reduce((best, query) => (strength(query) >= 0.7 * strength(best) ? query : best), map.size - 1);
}

/** The weight under the pointer as a sentence. */
export function describe(t, map, look, query, key) {
  query = Math.min(query, map.size - 1);
  const name = (i) => quoted(map.tokens[i]);
  if (key !== null) {
    const share = percent(look.weight(query, key), 1);
    if (!look.byNorm) return t("gives", { query: name(query), share, key: name(key) });
    return t("contributes", { query: name(query), share, norm: look.norm(key).toFixed(2), value: look.value(query, key).toFixed(2), key: name(key) });
  }
  const keys = range(query + 1).filter((i) => !look.isHidden(query, i));
  const most = keys.sort((a, b) => look.value(query, b) - look.value(query, a)).slice(0, 3);
  const say = (i) => (look.byNorm ? look.value(query, i).toFixed(2) : percent(look.weight(query, i)));
  return t("looks_most", { query: name(query), keys: most.map((i) => `${name(i)} ${say(i)}`).join(", ") || t("nothing_shown") });
}
