/* The view "Lines": from the reading words (left) to the words they look at (right); one colour per head, width and opacity by weight. */

import { arrow, clamp, make, percent, prepare, visible } from "./dom.js";

const BETWEEN = 240; // pixels between the two columns
const FAINTEST = 0.04; // smaller weights of unselected queries are not drawn

export function linesView(map, { t, set }) {
  const pitch = map.size > 60 ? 18 : map.size > 30 ? 22 : 26;
  const column = (side, role) => {
    const items = map.tokens.map((token, i) => {
      const item = make("li", {}, make("span", {}, visible(token)), make("small"));
      item.addEventListener("pointerenter", () => set({ point: side === "left" ? { query: i, key: null } : { query: api.query, key: Math.min(i, api.query) } }));
      item.addEventListener("click", () => set(side === "left" ? { query: i, key: null, point: null } : { key: Math.min(i, api.query), point: null }));
      return item;
    });
    const list = make("ol", { class: side, ariaLabel: role }, ...items);
    list.addEventListener("pointerleave", () => set({ point: null }));
    return { list, items };
  };
  const [left, right] = [column("left", t("query_axis")), column("right", t("key_axis"))];
  const canvas = make("canvas");
  canvas.setAttribute("aria-hidden", "true");
  left.list.tabIndex = 0;
  left.list.addEventListener("keydown", (event) => {
    const [down] = arrow(event);
    if (down) set({ query: clamp(api.query + down, map.size), key: null, point: null });
  });
  const body = make("div", { class: "lines-body" }, left.list, canvas, right.list);
  body.style.setProperty("--pitch", `${pitch}px`);
  const element = make("div", { class: "lines" },
    make("div", { class: "lines-head" }, make("span", {}, t("query_axis")), make("span", {}, t("key_axis"))), body);
  const api = { element, update, query: 0 };
  let followed = -1;

  function update({ looks, query, key, palette, selected }) {
    api.query = query;
    const context = prepare(canvas, BETWEEN, map.size * pitch);
    const y = (i) => (i + 0.5) * pitch;
    const line = (from, to, colour, share, alpha) => {
      context.beginPath();
      context.moveTo(0, y(from));
      context.bezierCurveTo(BETWEEN * 0.4, y(from), BETWEEN * 0.6, y(to), BETWEEN, y(to));
      context.lineWidth = 0.6 + 4.4 * share;
      context.strokeStyle = colour;
      context.globalAlpha = alpha;
      context.stroke();
    };
    const few = map.size <= 80;
    looks.forEach((look, i) => {
      if (!few) return;
      for (let from = 0; from < map.size; from++)
        for (let to = 0; from !== query && to <= from; to++) {
          const share = look.share(from, to);
          if (share >= FAINTEST) line(from, to, palette.heads[i], share * 0.5, 0.04 + 0.12 * share);
        }
    });
    looks.forEach((look, i) => {
      for (let to = 0; to <= query; to++) {
        const share = look.share(query, to);
        if (share >= 0.005) line(query, to, palette.heads[i], share, 0.25 + 0.75 * share);
      }
    });
    left.items.forEach((item, i) => item.classList.toggle("active", i === query));
    right.items.forEach((item, i) => {
      const [name, small] = item.children;
      const shown = i <= query && !looks[0].isHidden(query, i);
      const strongest = shown ? Math.max(...looks.map((look) => look.share(query, i))) : 0;
      name.style.background = looks.length === 1 && shown ? palette.share(strongest) : "";
      name.style.color = looks.length === 1 && shown ? palette.ink(strongest) : "";
      item.classList.toggle("future", i > query);
      item.classList.toggle("active", i === key);
      const best = looks.findIndex((look) => look.share(query, i) === strongest);
      small.textContent = shown && strongest >= 0.01
        ? looks[0].byNorm ? looks[Math.max(best, 0)].value(query, i).toFixed(2) : percent(looks[Math.max(best, 0)].weight(query, i)) : "";
      small.style.color = looks.length > 1 ? palette.heads[Math.max(best, 0)] : "";
    });
    if (selected !== followed && body.scrollHeight > body.clientHeight + 4) {
      body.scrollTop = y(selected) - body.clientHeight * 0.6;
      followed = selected;
    }
  }
  return api;
}
