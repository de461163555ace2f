/* The view "Lines": from the reading words (left) to the words they look at (right); one colour per head, width and
 * opacity by weight. All words fit: where there are too many to write, those that matter are written. */

import { arrow, clamp, make, onChange, prepare, range, visible } from "./dom.js";
import { cutIn } from "./edits.js";
import { cellLines, queryLines, strongest } from "./words.js";

const [LARGEST, READABLE, LINE] = [26, 10.5, 13]; // pixels per word: at most, to be written, between written ones
const [HEAD, BETWEEN] = [20, 0.34]; // pixels of the headings; share of the width between the columns
const [FAINTEST, WRITTEN] = [0.04, 0.005]; // smaller weights of other queries, and of the chosen one, are not drawn
const [POINTED, NEAR] = [0.03, 0.4]; // a line is pointed at from this weight on, at this distance in words
const [MANY, FAINTEST_OF_MANY] = [80, 0.3]; // tokens

export function linesView(map, { t, tooltip, actions }) {
  const { set } = actions;
  let context = null;
  const canvas = make("canvas", { attributes: { "aria-hidden": "true" } });
  const column = (side) => map.tokens.map((token) => make("li", { class: side }, make("bdi", {}, visible(token)), make("small")));
  const [left, right] = [column("left"), column("right")];
  const body = make("div", { class: "lines-body", tabIndex: 0, attributes: { role: "application", "aria-label": t("lines_label") } },
    make("ol", { attributes: { "aria-hidden": "true" } }, ...left), canvas, make("ol", { attributes: { "aria-hidden": "true" } }, ...right));
  const element = make("div", { class: "lines" },
    make("div", { class: "lines-head" }, make("span", {}, t("query_axis")), make("span", {}, t("key_axis"))), body);
  let pitch = LARGEST;

  /** The word and the side under the pointer. */
  const at = (event) => {
    const box = body.getBoundingClientRect();
    const index = clamp(Math.floor((event.clientY - box.top) / pitch), map.size);
    const between = canvas.getBoundingClientRect();
    const across = (event.clientX - between.left) / between.width;
    const line = across > 0 && across < 1 ? lineAt(context, across, (event.clientY - box.top) / pitch - 0.5) : null;
    if (line !== null) return { query: null, key: line };
    return (event.clientX - box.left) / box.width < 0.5 ? { query: index, key: null } : { query: null, key: index };
  };
  body.addEventListener("pointermove", (event) => {
    const { query, key } = at(event);
    const chosen = context.state.query;
    set({ point: query === null ? { query: chosen, key: Math.min(key, chosen) } : { query, key: null } });
    const { looks, palette } = context;
    tooltip.show(event.clientX, event.clientY, query === null
      ? cellLines(t, context.map, looks, chosen, Math.min(key, chosen), palette) : queryLines(t, context.map, looks, query, palette));
  });
  body.addEventListener("pointerleave", () => { tooltip.hide(); set({ point: null }); });
  body.addEventListener("click", (event) => {
    const { query, key } = at(event);
    if (query === null) actions.test(context.state.query, Math.min(key, context.state.query), event);
    else set({ query, key: null, point: null });
  });
  body.addEventListener("keydown", (event) => {
    const [down, across] = arrow(event);
    const { query, key } = context.state;
    if (across) set({ key: clamp((key ?? strongest(context.looks[0], query, 1)[0] ?? query) + across, query + 1), point: null });
    else if (down) set({ query: clamp(query + down, map.size), key: null, point: null });
  });

  function draw({ looks, query, palette, space }) {
    const width = Math.max(Math.round(body.clientWidth * BETWEEN), 90);
    const drawing = prepare(canvas, width, map.size * pitch);
    const y = (i) => (i + 0.5) * pitch;
    const line = (from, to, look, share, alpha) => {
      drawing.beginPath();
      drawing.moveTo(0, y(from));
      drawing.bezierCurveTo(width * 0.4, y(from), width * 0.6, y(to), width, y(to));
      drawing.lineWidth = 0.6 + Math.min(4.4, space.height / map.size / 3 + 2) * share;
      drawing.strokeStyle = palette.heads[look.colour];
      drawing.globalAlpha = alpha;
      drawing.stroke();
    };
    const faintest = map.size > MANY ? FAINTEST_OF_MANY : FAINTEST;
    for (const look of looks)
      for (let from = 0; from < map.size; from++)
        for (let to = 0; from !== query && to <= from; to++) {
          const share = look.share(from, to);
          if (share >= faintest) line(from, to, look, share * 0.5, 0.05 + 0.12 * share);
        }
    for (const look of looks)
      for (let to = 0; to <= query; to++) {
        const share = look.share(query, to);
        if (share >= WRITTEN) line(query, to, look, share, 0.25 + 0.75 * share);
      }
  }

  /** What is forbidden to the chosen query, as broken lines. */
  function drawCuts({ state, looks, query }) {
    const drawing = canvas.getContext("2d");
    const width = canvas.clientWidth;
    Object.assign(drawing, { globalAlpha: 1, lineWidth: 1.6, strokeStyle: getComputedStyle(canvas).getPropertyValue("--positive") });
    drawing.setLineDash([2, 6]);
    for (const { layer, head } of looks)
      for (const [from, to] of cutIn(state.live ? state.edits : [], layer, head).filter(([one]) => one === query)) {
        const [y, down] = [(from + 0.5) * pitch, (to + 0.5) * pitch];
        drawing.beginPath();
        drawing.moveTo(0, y);
        drawing.bezierCurveTo(width * 0.4, y, width * 0.6, down, width, down);
        drawing.stroke();
      }
  }

  const painted = onChange((current) => { draw(current); drawCuts(current); });
  function render(current) {
    context = current;
    const { looks, query, key, palette, space } = context;
    const room = space.height - HEAD;
    pitch = Math.min(room / map.size, LARGEST);
    body.style.setProperty("--pitch", `${pitch}px`);
    body.style.height = `${pitch * map.size}px`;
    painted([context.paintKey, query, space.width, space.height].join("|"), context);
    const best = (i) => (i <= query ? Math.max(...looks.map((look) => look.share(query, i))) : 0);
    const write = (items, chosen, order) => {
      const shown = pitch >= READABLE ? null : spaced(order, pitch, chosen);
      items.forEach((item, i) => {
        item.hidden = shown !== null && !shown.has(i);
        item.style.top = `${(i + 0.5) * pitch}px`;
        item.classList.toggle("active", i === chosen);
      });
    };
    const others = range(map.size).filter((i) => i % Math.ceil(LINE / pitch) === 0);
    write(left, query, [query, ...others]);
    write(right, key, [...(key === null ? [] : [key]), ...range(query + 1).filter((i) => best(i) >= 0.02).sort((a, b) => best(b) - best(a)), ...others]);
    right.forEach((item, i) => {
      const [name, small] = item.children;
      const shown = i <= query && !looks[0].isHidden(query, i);
      name.style.background = looks.length === 1 && shown ? palette.share(best(i)) : "";
      name.style.color = looks.length === 1 && shown ? palette.ink(best(i)) : "";
      item.classList.toggle("future", i > query);
      const said = looks.filter((look) => shown && look.share(query, i) >= 0.01);
      if (looks.length === 1) small.textContent = said.length ? said[0].say(query, i) : "";
      else small.replaceChildren(...said.map((look) => {
        const value = make("span", {}, look.say(query, i));
        value.style.color = palette.heads[look.colour];
        return value;
      }));
    });
  }

  function table({ looks, query }) {
    const rows = looks.flatMap((look) => range(query + 1).map((i) =>
      [look.layer, look.head, query, map.tokens[query], i, map.tokens[i], look.weight(query, i)]));
    return { columns: ["layer", "head", "query_position", "query", "key_position", "key", "weight"], rows };
  }
  return { element, render, table };
}

/** The key whose line from the chosen query passes a point, or null: `across` from 0 to 1, `down` in words. */
export function lineAt({ looks, query }, across, down) {
  // The curve is x = 1.2 s (1 - s) + s^3 + ..., y = 3 s^2 - 2 s^3: its control points are at 0.4 and 0.6 of the width.
  const x = (s) => 1.2 * s * (1 - s) ** 2 + 1.8 * s ** 2 * (1 - s) + s ** 3;
  let [low, high] = [0, 1];
  while (high - low > 1e-4) (x((low + high) / 2) < across ? (low = (low + high) / 2) : (high = (low + high) / 2));
  const share = 3 * low ** 2 - 2 * low ** 3;
  const distance = (key) => Math.abs(query + (key - query) * share - down);
  const drawn = range(query + 1).filter((key) => looks.some((look) => look.share(query, key) >= POINTED) && distance(key) <= NEAR);
  return drawn.length ? drawn.reduce((best, key) => (distance(key) < distance(best) ? key : best)) : null;
}

/** Of positions in order of importance, those that can be written without touching one another. */
export function spaced(order, pitch, chosen) {
  const shown = new Set(chosen === null ? [] : [chosen]);
  for (const i of order)
    if ([...shown].every((other) => other === i || Math.abs(other - i) * pitch >= LINE)) shown.add(i);
  return shown;
}
