/* The view "Next token": the prediction after each word and the probability of each word; after a change, next to what it
 * was before. */

import { button, make, onChange, oneStop, percent, quoted, visible, withBold } from "./dom.js";

export function nextTokenView(map, { t, actions }) {
  const { set } = actions;
  const position = make("div", { class: "here", ariaLive: "polite" });
  const rows = map.tokens.map((token, i) => {
    const name = button(visible(token), () => set({ query: i, key: null, point: null }), { class: "row-key" });
    const tr = make("tr", {}, make("th", { scope: "row" }, name), make("td", { class: "guesses" }), make("td", { class: "came" }));
    tr.addEventListener("click", () => set({ query: i, key: null, point: null }));
    return tr;
  });
  const heading = make("tr", {}, ...["position", "expects", "came"].map((key) => make("th", { scope: "col" }, t(key))));
  const scroll = make("div", { class: "scroll", tabIndex: 0, attributes: { role: "region", "aria-label": t("every_position") } },
    make("table", { class: "predictions" }, make("thead", {}, heading), make("tbody", {}, ...rows)));
  const element = make("div", { class: "next-token" }, position, scroll);
  const stops = oneStop(scroll, ".row-key");

  const list = onChange((current, palette) => rows.forEach((tr, i) => {
    const next = current.tokens[i + 1];
    tr.children[1].replaceChildren(...current.next_tokens[i].slice(0, 4).map(([token, p]) => guess(token, p, token === next)));
    if (next === undefined) return tr.children[2].replaceChildren(t("end"));
    const was = current.before?.actual?.[i];
    const moved = was !== undefined && Math.abs(was - current.actual[i]) >= 0.005;
    const came = make("b", { class: "share" }, current.actual ? (moved ? `${percent(was)} → ${percent(current.actual[i])}` : percent(current.actual[i])) : "");
    if (current.actual) Object.assign(came.style, { background: palette.share(current.actual[i]), color: palette.ink(current.actual[i]) });
    return tr.children[2].replaceChildren(quoted(next), " ", came);
  }));
  const follow = onChange((query) => {
    const tr = rows[query];
    const top = tr.offsetTop - 30;
    if (top < scroll.scrollTop || top + 60 > scroll.scrollTop + scroll.clientHeight) scroll.scrollTop = top - scroll.clientHeight / 2;
  });

  function render({ map: current, query, palette, paintKey, state }) {
    list(paintKey, current, palette);
    rows.forEach((tr, i) => {
      tr.classList.toggle("active", i === query);
      tr.firstChild.firstChild.ariaPressed = String(i === state.query);
    });
    stops();
    position.replaceChildren(...atPosition(current, query, t, palette));
    follow(state.query, state.query);
  }
  function table({ map: current }) {
    const rowsOf = current.tokens.flatMap((token, i) => current.next_tokens[i].map(([next, p], rank) =>
      [i, token, rank + 1, next, p, current.tokens[i + 1] ?? "", current.actual?.[i] ?? ""]));
    return { columns: ["position", "token", "rank", "next", "probability", "actual", "probability_of_actual"], rows: rowsOf };
  }
  return { element, render, table };
}

function guess(token, probability, isActual) {
  const element = make("span", { class: isActual ? "guess actual" : "guess" }, make("i"), make("code", {}, make("bdi", {}, visible(token))), make("b", {}, percent(probability)));
  element.firstChild.style.width = `${100 * probability}%`;
  return element;
}

/** The most probable tokens after one position as bars; after a change, next to those before it. */
export function atPosition(map, query, t, palette) {
  const title = make("h3", {}, ...withBold(t("after", { token: "\u0001" }), quoted(map.tokens[query])));
  const now = new Map(map.next_tokens[query]);
  const before = map.before ? new Map(map.before.next_tokens[query]) : null;
  const tokens = likeliest(now, before);
  const rows = tokens.map((token) => make("div", { class: before ? "likely changed" : "likely" }, make("code", {}, make("bdi", {}, visible(token))),
    ...(before ? [bar(before.get(token), "whole", palette)] : []), bar(now.get(token), before ? "off" : "", palette)));
  const legend = before ? [make("p", { class: "likely changed heading" }, make("span"), make("span", {}, t("whole")),
    make("span", {}, t("with_changes")))] : [];
  return [title, ...legend, ...rows];
}

/** The tokens to show, likeliest first: of `now`, or whichever are likely before a change or after it. */
export function likeliest(now, before) {
  const highest = (token) => Math.max(now.get(token) ?? 0, before?.get(token) ?? 0);
  const tokens = [...new Set([...now.keys(), ...(before?.keys() ?? [])])];
  return tokens.sort((one, other) => highest(other) - highest(one)).slice(0, before ? 8 : 5);
}

function bar(probability, kind, palette) {
  const fill = make("i", { class: kind });
  fill.style.width = `${100 * (probability ?? 0)}%`;
  if (kind !== "whole") fill.style.background = palette.heads[0];
  return make("span", { class: "bar" }, fill, make("b", {}, probability === undefined ? "–" : percent(probability)));
}
