/* The view "Matrix": a row for each query, a column for each key. The words stand on the diagonal, at the end of their
 * row and at the top of their column: nothing is above it, as no word looks at later ones. */

import { paintTriangle } from "./colours.js";
import { arrow, clamp, make, onChange, range, visible } from "./dom.js";
import { cutIn } from "./edits.js";
import { cellLines } from "./words.js";

const [LARGEST, READABLE, CAPTION, LABEL] = [34, 9.5, 24, 92]; // pixels: a cell at most, to have its word, a caption, a word

/** A matrix over a text's tokens: `paint(colours, of)` fills it, `mark(query, key, words)` points out a cell. */
export function matrix(tokens, { onPoint, onLeave, onSelect, onArrow, label }) {
  const size = tokens.length;
  const canvas = make("canvas");
  const [row, column, spot] = ["row", "column", "spot"].map((name) => make("div", { class: name }));
  const names = tokens.map((token) => make("bdi", { class: "name" }, visible(token)));
  const plot = make("div", { class: "plot", tabIndex: 0, attributes: { role: "application", "aria-roledescription": label } },
    canvas, row, column, spot, ...names);
  const element = make("div", { class: "matrix" }, plot);
  let cell = 1;
  const place = (event) => {
    const box = canvas.getBoundingClientRect();
    const query = clamp(Math.floor(((event.clientY - box.top) / box.height) * size), size);
    return [query, Math.min(clamp(Math.floor(((event.clientX - box.left) / box.width) * size), size), query)];
  };
  plot.addEventListener("pointermove", (event) => onPoint(event, ...place(event)));
  plot.addEventListener("pointerleave", onLeave);
  plot.addEventListener("click", (event) => onSelect(...place(event), event));
  plot.addEventListener("keydown", (event) => {
    const [down, right] = arrow(event);
    if (down || right) onArrow(down, right);
  });
  /** Fit into `side` pixels. */
  function fit(side, words = LABEL) {
    const exact = Math.min(side / size, LARGEST);
    cell = exact >= 3 ? Math.floor(exact) : exact;
    const width = cell * size;
    Object.assign(canvas.style, { width: `${width}px`, height: `${width}px` });
    canvas.classList.toggle("smooth", exact < 2);
    element.style.setProperty("--cell", `${cell}px`);
    Object.assign(plot.style, { width: `${width}px`, height: `${width}px` });
    element.style.width = `${width + words}px`;
    names.forEach((name, i) => Object.assign(name.style, { top: `${(i + 0.5) * cell}px`, left: `${(i + 1) * cell + 4}px` }));
    return width;
  }
  function mark(query, key, words) {
    Object.assign(row.style, { top: `${query * cell}px`, width: `${(query + 1) * cell}px`, height: `${cell}px` });
    column.hidden = spot.hidden = key === null;
    const at = key ?? 0;
    Object.assign(column.style, { top: `${at * cell}px`, left: `${at * cell}px`, width: `${cell}px`, height: `${(query - at + 1) * cell}px` });
    Object.assign(spot.style, { top: `${query * cell}px`, left: `${at * cell}px`, width: `${cell}px`, height: `${cell}px` });
    names.forEach((name, i) => {
      const active = i === query || i === key;
      name.classList.toggle("active", active);
      name.hidden = !active && cell < READABLE;
      name.style.fontSize = active ? "" : `${Math.min(cell * 0.95, 13)}px`;
    });
    plot.ariaLabel = words;
  }
  /** Cross out cells, [query, key]. */
  function cross(cells) {
    for (const old of plot.querySelectorAll(".cut")) old.remove();
    plot.append(...cells.map(([query, key]) => {
      const one = make("span", { class: "cut", attributes: { "aria-hidden": "true" } }, "×");
      Object.assign(one.style, { top: `${query * cell}px`, left: `${key * cell}px`, width: `${cell}px`, height: `${cell}px`, lineHeight: `${cell}px`, fontSize: `${Math.max(cell, 12)}px` });
      return one;
    }));
  }
  return { element, cross, paint: (colours, of) => paintTriangle(canvas, size, colours, of), mark, fit };
}

/** How pointer and keyboard change the viewer's state, in any matrix; `now()` is the context that is shown. */
export const steering = (size, { set }, tooltip, now, lines) => ({
  onPoint: (event, query, key) => {
    set({ point: { query, key } });
    tooltip.show(event.clientX, event.clientY, lines(query, key));
  },
  onLeave: () => { tooltip.hide(); set({ point: null }); },
  onSelect: (query, key) => set({ query, key, point: null }),
  onArrow: (down, right) => {
    const { state } = now();
    const query = clamp(state.query + down, size);
    set({ query, key: clamp((state.key ?? query) + right, query + 1), point: null });
  },
});

/** The columns and the side of `count` matrices of equal size that fill a box best. */
export function tile(count, width, height) {
  let best = { columns: 1, side: 0 };
  for (let columns = 1; columns <= count; columns++) {
    const rows = Math.ceil(count / columns);
    const side = Math.min(width / columns - LABEL, height / rows - (count > 1 ? CAPTION : 0));
    if (side > best.side) best = { columns, side };
  }
  return { ...best, side: Math.max(best.side, 120) };
}

export function matrixView(map, { t, tooltip, actions }) {
  const sheet = make("div", { class: "matrices" });
  const notes = make("div", { class: "scale" });
  const element = make("div", { class: "matrix-view" }, sheet, make("div", { class: "beside" }, make("p", { class: "hint" }, t("matrix_axes")), notes));
  let [plots, context] = [[], null];

  const build = onChange((count) => {
    const controls = steering(map.size, actions, tooltip, () => context,
      (query, key) => cellLines(t, context.map, context.looks, query, key, context.palette));
    controls.onSelect = (query, key, event) => actions.test(query, key, event);
    plots = range(count).map(() => matrix(map.tokens, { ...controls, label: t("tab_matrix") }));
    sheet.replaceChildren(...plots.map((plot) => make("figure", {}, make("figcaption"), plot.element)));
  });
  const paint = onChange(() => {
    const { looks, palette, space } = context;
    const { columns, side } = tile(looks.length, space.width - 190, space.height - 4);
    sheet.style.gridTemplateColumns = `repeat(${columns}, max-content)`;
    looks.forEach((look, i) => {
      plots[i].fit(side);
      plots[i].paint(palette.shares, look.share);
      plots[i].cross(cutIn(context.state.live ? context.state.edits : [], look.layer, look.head));
      const caption = sheet.children[i].firstChild;
      caption.hidden = looks.length === 1;
      caption.textContent = t("head_name", look);
      caption.style.color = palette.heads[look.colour];
    });
    notes.replaceChildren(...scale(looks[0], palette));
  });
  function render(current) {
    context = current;
    build(String(context.looks.length), context.looks.length);
    paint([context.paintKey, context.space.width, context.space.height].join("|"));
    plots.forEach((plot) => plot.mark(context.query, context.key, context.words));
  }
  function table({ looks }) {
    const rows = looks.flatMap((look) => range(map.size).flatMap((query) => range(query + 1).map((key) =>
      [look.layer, look.head, query, map.tokens[query], key, map.tokens[key], look.weight(query, key)])));
    return { columns: ["layer", "head", "query_position", "query", "key_position", "key", "weight"], rows };
  }
  return { element, render, table };
}

/** A colour bar with values. */
export function scale(look, palette) {
  const strip = make("div", { class: "ramp" });
  strip.style.background = `linear-gradient(to right, ${range(17).map((i) => palette.share((i / 16) ** 2))})`;
  const say = (value) => (look.byNorm ? value.toFixed(2) : `${Math.round(100 * value)}%`);
  return [strip, ...[0, look.largest / 4, look.largest].map((value) => make("span", {}, say(value)))];
}
