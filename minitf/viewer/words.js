/* Sentences about weights: for the line below the sentence, and for the note at the pointer. */

import { percent, quoted, range } from "./dom.js";

/** The keys that a query takes most from, the strongest first. */
export function strongest(look, query, count) {
  const keys = range(query + 1).filter((key) => !look.isHidden(query, key));
  return keys.sort((a, b) => look.value(query, b) - look.value(query, a)).slice(0, count);
}

/** The chosen query or cell, of the first chosen head, as a sentence. */
export function describe(t, map, looks, query, key) {
  const [look] = looks;
  const of = looks.length > 1 ? `${t("head_name", look)}: ` : "";
  const name = (i) => quoted(map.tokens[i]);
  if (key !== null) {
    const share = percent(look.weight(query, key), 1);
    if (!look.byNorm) return of + t("gives", { query: name(query), share, key: name(key) });
    const values = { norm: look.norm(key).toFixed(2), value: look.value(query, key).toFixed(2) };
    return of + t("contributes", { query: name(query), share, key: name(key), ...values });
  }
  const most = strongest(look, query, 3).map((i) => `${name(i)} ${look.say(query, i)}`);
  const text = look.byNorm ? "takes_most" : "looks_most";
  return of + t(text, { query: name(query), keys: most.join(", ") || t("nothing_shown") });
}

/** A cell, for the note at the pointer: both words, and the value in each chosen head. */
export function cellLines(t, map, looks, query, key, palette) {
  const title = { text: `${quoted(map.tokens[query])} → ${quoted(map.tokens[key])}`, strong: true };
  const value = (look) => (look.byNorm
    ? `${percent(look.weight(query, key), 1)} × ${look.norm(key).toFixed(2)} = ${look.value(query, key).toFixed(2)}` : percent(look.weight(query, key), 1));
  if (looks.length === 1) return [title, value(looks[0])];
  return [title, ...looks.map((look) => ({ text: `${t("head_short", look)}  ${value(look)}`, colour: palette.heads[look.colour] }))];
}

/** A word as query, for the note at the pointer: what it takes most from, in each chosen head. */
export function queryLines(t, map, looks, query, palette) {
  const most = (look) => strongest(look, query, 3).map((key) => `${quoted(map.tokens[key])} ${look.say(query, key)}`).join(", ");
  return [
    { text: t("word_at", { word: quoted(map.tokens[query]), position: query + 1 }), strong: true },
    ...looks.map((look) => ({ text: most(look) || t("nothing_shown"), colour: looks.length > 1 ? palette.heads[look.colour] : "" })),
  ];
}
