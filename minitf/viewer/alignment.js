/* The view "Alignment": for each target word the source words that the aligning heads look at. */

import { arrow, clamp, make, onChange, percent, prepare, quoted } from "./dom.js";

const SHOWN = 0.12; // smaller shares of a source word are not listed
const [LARGEST, READABLE] = [26, 9.5]; // pixels of a cell: at most, and to have its words

/** The word, as an index of `words`, that each token from `start` on begins in; -1 for a token of no word. */
export function wordsOfTokens(tokens, start, end, words) {
  const owners = words.flatMap((word, index) => [...word.replace(/\s/g, "")].map(() => index));
  let at = 0;
  return tokens.map((token, position) => {
    if (position < start || position >= end) return -1;
    const split = token.match(/\((\d+)\/\d+\)/); // a part of a character: its first part stands for it
    const count = split ? Number(split[1] === "1") : [...token.replace(/\s/g, "")].length;
    const owner = owners[Math.min(at, owners.length - 1)] ?? -1;
    at += count;
    return owner;
  });
}

/** Where the target begins: after the last special token that is not the last of all. */
export function targetStart(map) {
  if (map.prompt_length !== undefined) return map.prompt_length;
  return map.tokens.findLastIndex((token, i) => /^<\|.*\|>$/s.test(token) && i < map.size - 1) + 1;
}

export function alignmentView(map, { t, tooltip, actions }) {
  const { source, target } = map.alignment;
  const start = targetStart(map);
  const targets = wordsOfTokens(map.tokens, start, map.size, target);
  const canvas = make("canvas");
  const mark = make("div", { class: "row" });
  const plot = make("div", { class: "plot", tabIndex: 0, attributes: { role: "application", "aria-roledescription": t("tab_alignment") } }, canvas, mark);
  const names = (list, className) => make("div", { class: className }, ...list.map((word) => make("bdi", {}, word)));
  const [rows, columns] = [names(target, "rows"), names(source, "columns")];
  const readout = make("p", { class: "said", ariaLive: "polite" });
  const grid = make("div", { class: "alignment-matrix" }, make("div"), columns, rows, plot);
  const heads = make("p", { class: "hint" });
  const element = make("div", { class: "alignment" }, make("div", { class: "beside" }, readout, make("p", { class: "hint" }, t("alignment_lead")), heads, make("p", { class: "hint" }, t("alignment_axes"))), grid);
  let [context, chosen, weights, cell] = [null, 0, map.alignment.weights, LARGEST];

  const choose = (index) => {
    const query = targets.indexOf(index);
    if (query >= 0) actions.set({ query, key: null, point: null });
  };
  const place = (event) => {
    const box = canvas.getBoundingClientRect();
    return [clamp(Math.floor((event.clientY - box.top) / cell), target.length), clamp(Math.floor((event.clientX - box.left) / cell), source.length)];
  };
  plot.addEventListener("pointermove", (event) => {
    const [row, column] = place(event);
    tooltip.show(event.clientX, event.clientY, [{ text: `${quoted(target[row])} → ${quoted(source[column])}`, strong: true }, percent(weights[row][column], 1)]);
  });
  plot.addEventListener("pointerleave", tooltip.hide);
  plot.addEventListener("click", (event) => choose(place(event)[0]));
  rows.addEventListener("click", (event) => choose([...rows.children].indexOf(event.target)));
  plot.addEventListener("keydown", (event) => {
    const [down, right] = arrow(event);
    if (down || right) choose(clamp(chosen + down + right, target.length));
  });

  const paint = onChange((palette) => {
    const longest = (list) => 8 * Math.max(...list.map((word) => Math.min([...word].length, 14))) + 12;
    const { width, height } = context.space;
    const exact = Math.min((width - 280 - longest(target)) / source.length, (height - longest(source)) / target.length, LARGEST);
    cell = exact >= 3 ? Math.floor(exact) : Math.max(exact, 1.5);
    grid.style.setProperty("--cell", `${cell}px`);
    grid.classList.toggle("nameless", cell < READABLE);
    const drawing = prepare(canvas, source.length * cell, target.length * cell);
    weights.forEach((shares, i) => shares.forEach((share, j) => {
      drawing.fillStyle = palette.share(share);
      drawing.fillRect(j * cell, i * cell, cell - (cell > 4 ? 1 : 0), cell - (cell > 4 ? 1 : 0));
    }));
  });

  function render(current) {
    context = current;
    const { map: shown, query, palette, space } = context;
    element.classList.toggle("stale", !shown.alignment);
    if (!shown.alignment) { readout.textContent = t("no_alignment_yet"); return; }
    weights = shown.alignment.weights;
    paint([shown.stamp, palette.theme, space.width, space.height].join("|"), palette);
    chosen = Math.max(targets[query] >= 0 ? targets[query] : 0, 0);
    const shares = weights[chosen] ?? [];
    [...rows.children].forEach((name, i) => name.classList.toggle("active", i === chosen));
    [...columns.children].forEach((name, i) => name.classList.toggle("active", shares[i] >= SHOWN));
    Object.assign(mark.style, { top: `${chosen * cell}px`, width: `${source.length * cell}px`, height: `${cell}px` });
    const from = shares.map((share, i) => [share, i]).filter(([share]) => share >= SHOWN).sort((a, b) => b[0] - a[0]);
    const named = from.map(([share, i]) => `${quoted(source[i])} ${percent(share)}`).join(", ");
    readout.textContent = t("aligned_with", { word: quoted(target[chosen] ?? ""), words: named || t("many_words") });
    plot.ariaLabel = readout.textContent;
    heads.textContent = shown.found.aligns?.length
      ? t("alignment_heads", { heads: shown.found.aligns.map(([layer, head]) => t("head_short", { layer, head })).join(", ") }) : "";
  }
  function table({ map: shown }) {
    const rowsOf = (shown.alignment?.weights ?? []).flatMap((shares, i) => shares.map((share, j) => [i, target[i], j, source[j], share]));
    return { columns: ["target_position", "target", "source_position", "source", "share"], rows: rowsOf };
  }
  return { element, render, table };
}
