/* The view "Where predicted": the likeliest next token after each word, if the model stopped after each half-layer; the
 * colour is the probability of the token that came. Known as the logit lens. */

import { button, make, onChange, oneStop, percent, quoted, range, visible, withBold } from "./dom.js";
import { partName, probeOf } from "./probes.js";
import { problemText } from "./refusals.js";

export function lensView(map, { t, tooltip, actions }) {
  const { set } = actions;
  const lead = make("p", { class: "said", ariaLive: "polite" });
  const hint = make("p", { class: "hint" }, t("lens_hint"));
  const table = make("table", { class: "lens-table" });
  const scroll = make("div", { class: "scroll", tabIndex: 0, attributes: { role: "region", "aria-label": t("tab_lens") } }, table);
  const stops = oneStop(table, ".row-key");
  const waiting = make("p", { class: "missing" });
  const element = make("div", { class: "lens" }, lead, hint, waiting, scroll);
  let rows = [];

  const build = onChange((reply, palette) => {
    const { names, cell } = reply;
    const heading = make("tr", {}, make("th", { scope: "col" }, t("position")), ...names.map((name) => make("th", { scope: "col", title: partName(t, name) }, partName(t, name, true))), make("th", { scope: "col" }, t("came")));
    rows = range(map.size).map((position) => {
      const name = button(visible(map.tokens[position]), () => set({ query: position, key: null, point: null }), { class: "row-key" });
      const next = map.tokens[position + 1];
      const cells = names.map((half, i) => {
        const { token, share, actual, right } = cell(i, position);
        const shade = actual ?? share;
        const one = make("td", { class: right ? "right" : "" }, make("bdi", {}, visible(token)));
        Object.assign(one.style, { background: palette.share(shade), color: palette.ink(shade) });
        tooltip.attach(one, () => [
          { text: partName(t, half), strong: true }, `${quoted(token)} ${percent(share, 1)}`,
          actual === null ? "" : t("lens_true", { token: quoted(next), share: percent(actual, 1) }),
        ]);
        return one;
      });
      const row = make("tr", {}, make("th", { scope: "row" }, name), ...cells, make("td", { class: "came" }, next === undefined ? t("end") : visible(next)));
      row.addEventListener("click", () => set({ query: position, key: null, point: null }));
      return row;
    });
    table.replaceChildren(make("caption", { class: "unseen" }, t("lens_hint")), make("thead", {}, heading), make("tbody", {}, ...rows));
  });
  const follow = onChange((query) => {
    const row = rows[query];
    if (row.offsetTop - 30 < scroll.scrollTop || row.offsetTop + 30 > scroll.scrollTop + scroll.clientHeight) scroll.scrollTop = row.offsetTop - scroll.clientHeight / 2;
  });

  function render(context) {
    const { state, query, palette } = context;
    const probe = probeOf(context);
    const reply = readLens(probe?.replies[0], map);
    scroll.hidden = lead.hidden = hint.hidden = !reply;
    waiting.hidden = Boolean(reply);
    waiting.textContent = problemText(t, probe?.error) || t("loading_live");
    if (!reply) return;
    build(JSON.stringify([probe.of, palette.theme, reply.stamp]), reply, palette);
    rows.forEach((row, i) => {
      row.classList.toggle("active", i === query);
      row.firstChild.firstChild.ariaPressed = String(i === state.query);
    });
    stops();
    lead.replaceChildren(...lensWords(t, map, reply, query));
    follow(state.query, state.query);
  }
  function rowsOf(context) {
    const reply = readLens(probeOf(context)?.replies[0], map);
    const cells = reply ? range(map.size).flatMap((position) => reply.names.map((name, i) => {
      const { token, share, actual } = reply.cell(i, position);
      return [position, map.tokens[position], name, token, share, map.tokens[position + 1] ?? "", actual ?? ""];
    })) : [];
    return { columns: ["position", "token", "after", "likeliest", "probability", "actual", "probability_of_actual"], rows: cells };
  }
  return { element, render, table: rowsOf };
}

/** A reply as functions, or null if it is of other words. */
export function readLens(reply, map) {
  if (!reply?.rows || reply.tokens.length !== map.size) return null;
  const last = reply.rows.length - 1;
  const cell = (i, position) => {
    const { token, probability } = reply.rows[i].best[position];
    return { token, share: probability, actual: reply.rows[i].actual[position], right: token === reply.rows[last].best[position].token };
  };
  const stamp = reply.rows.map((row) => row.best.at(-1).probability).join();
  return { names: reply.rows.map((row) => row.after), cell, last, stamp };
}

/** From where on the final prediction is the likeliest, as a sentence. */
export function lensWords(t, map, { names, cell, last }, query) {
  const final = cell(last, query);
  let from = last;
  while (from > 0 && cell(from - 1, query).token === final.token) from--;
  const share = (i) => percent(cell(i, query).share);
  const values = { word: quoted(map.tokens[query]), token: "\u0001", part: partName(t, names[from]), share: share(from), end: share(last) };
  return withBold(t(from === 0 ? "lens_start" : from === last ? "lens_end" : "lens_from", values), quoted(final.token));
}
