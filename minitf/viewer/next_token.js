/* The view "Next token": the prediction at each position and the probability of each word; with heads off, before and after. */

import { make, percent, quoted, visible } from "./dom.js";
import { tokenRow } from "./sentence.js";

export function nextTokenView(map, { t, set }) {
  const select = { onPoint: (query) => set({ point: { query, key: null } }), onLeave: () => set({ point: null }), onSelect: (query) => set({ query, key: null, point: null }) };
  const { element: row, buttons } = tokenRow(map.tokens, select);
  const position = make("div", { class: "here" });
  const body = make("tbody");
  const rows = map.tokens.map((token, i) => {
    const tr = make("tr", {}, make("th", { scope: "row" }, visible(token)), make("td", { class: "guesses" }), make("td", { class: "came" }));
    tr.addEventListener("click", () => set({ query: i, key: null, point: null }));
    return tr;
  });
  body.append(...rows);
  const table = make("table", { class: "predictions" }, make("thead", {}, make("tr", {}, ...["position", "expects", "came"].map((key) => make("th", { scope: "col" }, t(key))))), body);
  const element = make("div", { class: "next-token" }, make("p", { class: "hint" }, t("next_token_lead")), row, position, make("div", { class: "scroll" }, table));
  let painted = "";

  function update({ map: current, query, selected, palette, paintKey, state }) {
    if (painted !== paintKey) {
      buttons.forEach((button, i) => {
        const probability = i === 0 || !current.actual ? null : current.actual[i - 1];
        const [name, share] = button.children;
        name.style.background = probability === null ? "" : palette.share(probability);
        name.style.color = probability === null ? "" : palette.ink(probability);
        share.textContent = probability === null ? "" : percent(probability);
      });
      rows.forEach((tr, i) => {
        const next = current.tokens[i + 1];
        tr.children[1].replaceChildren(...current.next_tokens[i].slice(0, 5).map(([token, p]) => guess(token, p, token === next)));
        tr.children[2].replaceChildren(...(next === undefined ? [t("end")] : [quoted(next), " ", make("b", {}, current.actual ? percent(current.actual[i]) : "")]));
      });
      painted = paintKey;
    }
    buttons.forEach((button, i) => { button.ariaPressed = String(i === selected); button.tabIndex = i === selected ? 0 : -1; button.classList.toggle("query", i === query); });
    rows.forEach((tr, i) => tr.classList.toggle("active", i === query));
    position.replaceChildren(...atPosition(current, query, t, state.live?.off ?? [], palette));
  }
  return { element, update };
}

function guess(token, probability, isActual) {
  const element = make("span", { class: isActual ? "guess actual" : "guess" }, make("i"), make("code", {}, visible(token)), make("b", {}, percent(probability)));
  element.firstChild.style.width = `${100 * probability}%`;
  return element;
}

/** The most probable tokens after one position as bars; with heads off, next to those of the unablated model. */
export function atPosition(map, query, t, off, palette) {
  const title = make("h3", {}, ...t("after", { token: "\u0001" }).split("\u0001").flatMap((text, i) => (i ? [make("b", {}, quoted(map.tokens[query])), text] : [text])));
  const now = new Map(map.next_tokens[query]);
  const before = map.before ? new Map(map.before.next_tokens[query]) : null;
  const tokens = [...new Set([...(before ? before.keys() : []), ...now.keys()])].slice(0, before ? 8 : 5);
  const rows = tokens.map((token) => make("div", { class: before ? "likely changed" : "likely" }, make("code", {}, visible(token)),
    ...(before ? [bar(before.get(token), "whole", palette)] : []), bar(now.get(token), before ? "off" : "", palette)));
  const legend = before ? [make("p", { class: "likely changed heading" }, make("span"), make("span", {}, t("whole")),
    make("span", {}, t("with_off", { heads: off.map(([layer, head]) => `${layer}.${head}`).join(", ") })))] : [];
  return [title, ...legend, ...rows];
}

function bar(probability, kind, palette) {
  const fill = make("i", { class: kind });
  fill.style.width = `${100 * (probability ?? 0)}%`;
  if (kind !== "whole") fill.style.background = palette.heads[0];
  return make("span", { class: "bar" }, fill, make("b", {}, probability === undefined ? "–" : percent(probability)));
}
