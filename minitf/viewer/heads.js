/* All heads at a glance: a small map of each, with the colour of its pattern; filtered, sorted, named on demand. */

import { paintBytes, paintTriangle } from "./colours.js";
import { arrow, button, clamp, fillSelect, make, onChange, range } from "./dom.js";
import { headLook } from "./maps.js";
import { MAX_HEADS, PATTERN_ORDER, SORTS } from "./state.js";

const [ROW_NAME, COLUMN_NAME, GAP, LABEL, LARGEST, LABELLED] = [22, 18, 10, 28, 150, 74]; // pixels
const FREE_HEIGHT = 340; // pixels where the page scrolls, and the grid is as high as its heads
const EDGE = 2; // pixels around the grid, for the frame of a chosen head

/** Whether a pattern is one of attention.patterns, which has no text of ours. */
export const isOwn = (pattern) => pattern !== "unclear" && !PATTERN_ORDER.includes(pattern);

/** The name of the pattern a head is named after, or "no clear pattern". */
export function patternName(t, label) {
  if (!label) return t("unclear");
  return isOwn(label[0]) ? label[0].replaceAll("_", " ") : t(label[0] === "first_token" ? "first_token_sink" : label[0]);
}

/** How `layers` x `heads` squares fit best into a box: the layers in `blocks` columns, squares of `cell` pixels. */
export function arrange(layers, heads, width, height) {
  let best = { blocks: 1, cell: 0, labelled: false };
  for (let blocks = 1; blocks <= layers; blocks++) {
    const rows = Math.ceil(layers / blocks);
    const across = (width - blocks * ROW_NAME - (blocks - 1) * GAP) / (blocks * heads);
    const down = (height - COLUMN_NAME) / rows;
    const large = Math.min(across, down - LABEL);
    const cell = Math.floor(Math.min(large >= LABELLED ? large : Math.min(across, down), LARGEST));
    if (cell > best.cell) best = { blocks, cell, labelled: large >= LABELLED };
  }
  return best;
}

/** The heads in the order of `sort`, as [layer, head]; a filter puts its pattern's heads first. */
export function ordered(map, sort, filter, importance) {
  const all = range(map.layers).flatMap((layer) => range(map.heads).map((head) => [layer, head]));
  if (sort === "layer") return all;
  const value = ([layer, head]) => {
    if (sort === "importance") return importance?.values[`${layer},${head}`] ?? -Infinity;
    if (filter && map.scores[filter]) return map.scores[filter][layer][head];
    return map.label(layer, head)?.[1] ?? -1;
  };
  const order = [...PATTERN_ORDER, "unclear"];
  const rank = (head) => (filter ? Number(matches(map, filter, head)) : -order.indexOf(patternOf(map, head)));
  return all.sort((a, b) => (sort === "score" ? rank(b) - rank(a) : 0) || value(b) - value(a));
}

/** What the run found a head to be for, besides its pattern: "refers", "aligns", or null. */
export const roleOf = (map, [layer, head]) =>
  ["refers", "aligns"].find((role) => map.found[role]?.some(([l, h]) => l === layer && h === head)) ?? null;
export const patternOf = (map, head) => roleOf(map, head) ?? map.label(...head)?.[0] ?? "unclear";
const matches = (map, filter, head) => patternOf(map, head) === filter;

/** What a head is, in lines: its name, what it usually does, what it does here, all scores, importance. */
export function headLines(t, map, importance, [layer, head], off = []) {
  const [label, here] = [map.label(layer, head), map.here(layer, head)];
  const differs = here !== undefined && (here?.[0] ?? "") !== (label?.[0] ?? "");
  const name = (one) => (one ? `${patternName(t, one)} ${one[1].toFixed(2)}` : patternName(t, one));
  const value = importance?.values[`${layer},${head}`];
  const role = roleOf(map, [layer, head]);
  return [
    { text: t("head_name", { layer, head }), strong: true },
    differs ? t("usually_here", { usual: name(label), here: name(here) }) : name(label),
    role && label?.[0] !== role ? t(`about_${role}`) : "",
    value === undefined ? "" : t("importance", { value: value.toFixed(4), step: importance.step }),
    off.some(([l, h]) => l === layer && h === head) ? t("off_now") : "",
  ];
}

export function headsPanel(map, { t, tooltip, actions }) {
  const { set, choose } = actions;
  const several = make("input", { type: "checkbox" });
  several.addEventListener("change", () => set({ several: several.checked }));
  const sort = make("select", { ariaLabel: t("sort") });
  sort.addEventListener("change", () => set({ sort: sort.value }));
  const patterns = make("div", { class: "patterns", attributes: { role: "group", "aria-label": t("patterns") } });
  const grid = make("div", { class: "grid", attributes: { role: "group", "aria-label": t("heads") } });
  const box = make("div", { class: "grid-box" }, grid);
  const top = make("div", { class: "panel-head" }, make("h2", {}, t("heads")), sort,
    make("label", { class: "check", title: t("several_why", { count: MAX_HEADS }) }, several, " ", t("several")));
  const element = make("section", { class: "overview", ariaLabel: t("heads") }, top, patterns, box);
  const columns = range(map.heads).map((head) => make("span", { class: "name" }, String(head)));
  let [shown, state, run, thumbs, order] = [map, null, null, [], []];

  for (let layer = 0; layer < map.layers; layer++)
    for (let head = 0; head < map.heads; head++) {
      const canvas = make("canvas");
      const thumb = button(canvas, (event) => choose(layer, head, event.ctrlKey || event.metaKey || event.shiftKey), { class: "thumb" });
      thumb.append(make("span", { class: "label" }));
      thumb.addEventListener("keydown", (event) => step(event, thumbs.findIndex((one) => one.thumb === thumb)));
      tooltip.attach(thumb, () => headLines(t, shown, run.importance, [layer, head], state.live?.off ?? []));
      thumbs.push({ thumb, canvas, layer, head });
    }

  /** Arrow keys move in the grid as it is shown. */
  function step(event, index) {
    const [down, right] = arrow(event);
    if (!down && !right) return;
    const place = order.findIndex(([l, h]) => l * map.heads + h === index);
    const next = state.sort === "layer"
      ? [clamp(order[place][0] + down, map.layers), clamp(order[place][1] + right, map.heads)]
      : order[clamp(place + right + down * perRow, order.length)];
    if (!state.several) choose(...next, false);
    thumbs[next[0] * map.heads + next[1]].thumb.focus();
  }
  let perRow = 1;

  /** Place the heads: layers in blocks next to each other, or in the order of a score. */
  const place = onChange((fixed) => {
    const [width, height] = [(box.clientWidth || 460) - 2 * EDGE, (fixed ? box.clientHeight || 420 : FREE_HEIGHT) - 2 * EDGE];
    const { blocks, cell, labelled } = arrange(map.layers, map.heads, width, height);
    const rows = Math.ceil(map.layers / blocks);
    const inOrder = state.sort === "layer";
    grid.style.setProperty("--cell", `${cell}px`);
    grid.classList.toggle("labelled", labelled);
    grid.classList.toggle("fine", map.size > cell * (globalThis.devicePixelRatio || 1));
    grid.classList.toggle("ordered", !inOrder);
    perRow = inOrder ? map.heads : Math.max(Math.floor(width / cell), 1);
    const block = `${ROW_NAME}px repeat(${map.heads}, ${cell}px)`;
    grid.style.gridTemplateColumns = inOrder ? Array(blocks).fill(block).join(` ${GAP}px `) : `repeat(${perRow}, ${cell}px)`;
    const put = (one, row, column) => { one.style.gridArea = `${row} / ${column}`; return one; };
    const names = inOrder ? range(blocks).flatMap((b) => [
      ...columns.map((name, head) => put(b ? name.cloneNode(true) : name, 1, b * (map.heads + 2) + head + 2)),
      ...range(Math.min(rows, map.layers - b * rows)).map((row) =>
        put(make("span", { class: "name row-name" }, String(b * rows + row)), row + 2, b * (map.heads + 2) + 1)),
    ]) : [];
    order.forEach(([layer, head], i) => {
      const { thumb } = thumbs[layer * map.heads + head];
      if (inOrder) put(thumb, (layer % rows) + 2, Math.floor(layer / rows) * (map.heads + 2) + head + 2);
      else put(thumb, Math.floor(i / perRow) + 1, (i % perRow) + 1);
      thumb.dataset.name = `${layer}.${head}`;
    });
    grid.replaceChildren(...names, ...order.map(([layer, head]) => thumbs[layer * map.heads + head].thumb));
  });

  const paint = onChange((settings, palette) => {
    for (const { thumb, canvas, layer, head } of thumbs) {
      paintHead(canvas, shown, headLook(shown, layer, head, settings), palette);
      const label = shown.label(layer, head);
      const name = patternName(t, label);
      const role = roleOf(shown, [layer, head]);
      thumb.lastChild.replaceChildren(...(role ? [make("span", {}, t(role))] : label ? [make("span", {}, name), " ", make("b", {}, label[1].toFixed(2))] : []));
      thumb.dataset.pattern = label ? label[0] : "unclear";
      if (role) thumb.dataset.pattern = role;
      thumb.ariaLabel = `${t("head_name", { layer, head })}: ${role ? `${t(role)}, ` : ""}${name}${label ? " " + label[1].toFixed(2) : ""}`;
    }
  });

  const list = onChange(() => {
    const own = [...new Set(thumbs.map(({ layer, head }) => patternOf(shown, [layer, head])))].filter(isOwn);
    const chips = [...own, ...PATTERN_ORDER, "unclear"].flatMap((pattern) => {
      const found = thumbs.filter(({ layer, head }) => matches(shown, pattern, [layer, head]));
      if (!found.length) return [];
      const score = ({ layer, head }) => shown.label(layer, head)?.[1] ?? 0;
      const best = found.reduce((a, b) => (score(b) > score(a) ? b : a));
      const name = pattern === "unclear" ? t("unclear") : patternName(t, [pattern]);
      const chip = button(name, () => {
        if (state.filter === pattern) return set({ filter: "" });
        set({ filter: pattern });
        if (!state.heads.some((head) => matches(shown, pattern, head))) choose(best.layer, best.head, false);
      }, { class: "chip", data: { pattern }, title: isOwn(pattern) ? t("about_own") : t(`about_${pattern}`), ariaPressed: String(state.filter === pattern) });
      chip.append(" ", make("b", {}, `×${found.length}`));
      return [chip];
    });
    const focused = patterns.contains(document.activeElement) ? document.activeElement.dataset.pattern : "";
    patterns.replaceChildren(...chips);
    if (focused) patterns.querySelector(`[data-pattern="${CSS.escape(focused)}"]`)?.focus();
  });

  /** `context.map` has the shape of `map`. */
  function render(context) {
    ({ state, run } = context);
    shown = context.map;
    const { palette } = context;
    const importance = run.importance;
    several.checked = state.several;
    fillSelect(sort, SORTS.filter((one) => one !== "importance" || importance).map((one) => [one, t(`sort_${one}`)]), state.sort);
    const labels = JSON.stringify([shown.stamp, state.sort, state.filter, importance?.step]);
    paint(JSON.stringify([shown.stamp, context.settings, palette.theme]), context.settings, palette);
    list(JSON.stringify([labels, state.filter]));
    const off = state.live?.off ?? [];
    order = ordered(shown, state.sort, state.filter, importance);
    const { oneScreen } = context.space;
    place(JSON.stringify([order.join(" "), box.clientWidth, oneScreen && box.clientHeight]), oneScreen);
    for (const { thumb, layer, head } of thumbs) {
      const chosen = state.heads.find(([l, h]) => l === layer && h === head);
      thumb.ariaPressed = String(Boolean(chosen));
      thumb.tabIndex = chosen && chosen === state.heads[0] ? 0 : -1;
      thumb.style.setProperty("--mark", chosen && state.heads.length > 1 ? palette.heads[chosen[2]] : "");
      thumb.classList.toggle("dim", Boolean(state.filter) && !matches(shown, state.filter, [layer, head]));
      const isOff = off.some(([l, h]) => l === layer && h === head);
      thumb.classList.toggle("off", isOff);
      thumb.dataset.off = isOff ? t("off_badge") : "";
    }
  }
  return { element, render, box };
}

/** Paint one head; stored weights are colours at once, without arithmetic. */
function paintHead(canvas, map, look, palette) {
  const bytes = look.isPlain ? map.bytes(look.layer, look.head) : null;
  if (bytes) paintBytes(canvas, map.size, palette.shares, bytes);
  else paintTriangle(canvas, map.size, palette.shares, look.share);
}

/** The scores of a head as text. */
export function scoreLines(t, map, layer, head) {
  return Object.entries(map.scores).map(([name, values]) => `${t(name)} ${values[layer][head].toFixed(2)}`);
}
