/* The view "Matrix": a row for each query, a column for each key, axes labelled with tokens. */

import { arrow, clamp, make, percent, range, visible } from "./dom.js";
import { paintTriangle } from "./maps.js";

/** A matrix over a text's tokens; `paint(colours, of)` fills it, `mark(query, key, words)` highlights a cell. */
export function matrix(tokens, t, side, { onPoint, onLeave, onSelect, onArrow }) {
  const size = tokens.length;
  const cell = Math.min(Math.max(Math.floor(side / size), side / size > 2 ? 2 : 1), 30);
  const canvas = make("canvas");
  const [row, spot] = [make("div", { class: "row" }), make("div", { class: "spot" })];
  const plot = make("div", { class: "plot", tabIndex: 0 }, canvas, row, spot);
  plot.setAttribute("role", "img");
  const names = (className) => make("div", { class: className }, ...tokens.map((token) => make("span", {}, visible(token))));
  const named = cell >= 9;
  const [queries, keys] = named ? [names("queries"), names("keys")] : [make("div", { class: "queries" }), make("div", { class: "keys" })];
  const element = make("div", { class: "matrix" },
    make("div", { class: "axis query-axis" }, t("query_axis")), queries, plot,
    keys, make("div", { class: "axis key-axis" }, t("key_axis")));
  element.style.setProperty("--cell", `${cell}px`);
  element.style.setProperty("--tokens", size);
  const place = (event) => {
    const box = canvas.getBoundingClientRect();
    const query = clamp(Math.floor(((event.clientY - box.top) / box.height) * size), size);
    return [query, Math.min(clamp(Math.floor(((event.clientX - box.left) / box.width) * size), size), query)];
  };
  plot.addEventListener("pointermove", (event) => onPoint(...place(event)));
  plot.addEventListener("pointerleave", onLeave);
  plot.addEventListener("click", (event) => onSelect(...place(event)));
  plot.addEventListener("keydown", (event) => {
    const [down, right] = arrow(event);
    if (down || right) onArrow(down, right);
  });
  const mark = (query, key, words) => {
    Object.assign(row.style, { top: `${query * cell}px`, width: `${(query + 1) * cell}px` });
    spot.hidden = key === null;
    Object.assign(spot.style, { top: `${query * cell}px`, left: `${(key ?? 0) * cell}px` });
    if (named)
      for (const [list, active] of [[queries, query], [keys, key]])
        [...list.children].forEach((name, i) => name.classList.toggle("active", i === active));
    plot.ariaLabel = words;
  };
  return { element, paint: (colours, of) => paintTriangle(canvas, size, colours, of), mark };
}

/** How pointer and keyboard change the viewer's state, in any matrix. */
export const steering = (size, set, now) => ({
  onPoint: (query, key) => set({ point: { query, key } }),
  onLeave: () => set({ point: null }),
  onSelect: (query, key) => set({ query, key, point: null }),
  onArrow: (down, right) => {
    const query = clamp(now().query + down, size);
    set({ query, key: clamp((now().key ?? query) + right, query + 1), point: null });
  },
});

export function matrixView(map, { t, set }) {
  const element = make("div", { class: "matrices" });
  let [plots, shape, painted, last] = [[], 0, "", { query: 0, key: null }];

  function update({ looks, query, key, palette, words, paintKey }) {
    last = { query, key };
    if (looks.length !== shape) {
      const side = looks.length === 1 ? 480 : looks.length === 2 ? 330 : 250;
      plots = looks.map(() => matrix(map.tokens, t, side, steering(map.size, set, () => last)));
      element.replaceChildren(...plots.map((plot) => make("figure", {}, make("figcaption"), plot.element)), make("div", { class: "scale" }));
      [shape, painted] = [looks.length, ""];
    }
    if (paintKey !== painted) {
      looks.forEach((look, i) => {
        plots[i].paint(palette.shares, look.share);
        const caption = element.children[i].firstChild;
        caption.hidden = looks.length === 1;
        caption.textContent = t("head_name", look);
        caption.style.color = palette.heads[i];
      });
      scale(element.lastChild, looks[0], palette);
      painted = paintKey;
    }
    plots.forEach((plot) => plot.mark(query, key, words));
  }
  return { element, update };
}

/** A colour bar with values. */
function scale(element, look, palette) {
  const strip = make("div", { class: "ramp" });
  strip.style.background = `linear-gradient(to right, ${range(17).map((i) => palette.share((i / 16) ** 2))})`;
  const say = (value) => (look.byNorm ? value.toFixed(2) : percent(value));
  element.replaceChildren(strip, ...[0, look.largest / 4, look.largest].map((value) => make("span", {}, say(value))));
}
