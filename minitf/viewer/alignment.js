/* The view "Alignment": for each target word the source words it comes from, as text and as a matrix. */

import { arrow, clamp, make, percent, prepare, quoted } from "./dom.js";

const gap = (words, i) => (/^[\p{P}]$/u.test(words[i]) || words.every((word) => word.length === 1) ? "" : " ");
const SHOWN = 0.12; // smaller shares of a source word are not listed

export function alignmentView(map, { t }) {
  const { source, target } = map.alignment;
  const cell = Math.min(Math.max(Math.floor(620 / Math.max(source.length, target.length)), 11), 26);
  const canvas = make("canvas");
  const row = make("div", { class: "row" });
  const plot = make("div", { class: "plot", tabIndex: 0 }, canvas, row);
  plot.setAttribute("role", "img");
  const names = (list, className) => make("div", { class: className }, ...list.map((word) => make("span", {}, word)));
  const [rows, columns] = [names(target, "rows"), names(source, "columns")];
  const readout = make("p", { class: "readout", ariaLive: "polite" });
  const sentence = (list, label) => {
    const words = list.map((word) => make("span", { class: "word" }, word));
    const line = make("p", { class: "pair-side" }, make("b", {}, label), ...words.flatMap((word, i) => [gap(list, i), word]));
    return { words, line };
  };
  const [old, made] = [sentence(source, t("source")), sentence(target, t("target"))];
  made.words.forEach((word, i) => {
    word.addEventListener("pointerenter", () => point(i));
    word.addEventListener("click", () => point(i));
  });
  const grid = make("div", { class: "alignment-matrix" }, make("div"), columns, rows, plot);
  grid.style.setProperty("--cell", `${cell}px`);
  const element = make("div", { class: "alignment" }, make("p", { class: "hint" }, t("alignment_lead")), old.line, made.line, readout,
    grid, make("p", { class: "hint" }, t("alignment_axes")));
  plot.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect();
    point(clamp(Math.floor(((event.clientY - box.top) / box.height) * target.length), target.length));
  });
  plot.addEventListener("keydown", (event) => {
    const [down] = arrow(event);
    if (down) point(clamp(chosen + down, target.length));
  });

  let [chosen, weights, palette, painted] = [0, map.alignment.weights, null, ""];
  function point(index) {
    chosen = index;
    const shares = weights[chosen] ?? [];
    rows.childNodes.forEach((name, i) => name.classList.toggle("active", i === chosen));
    made.words.forEach((word, i) => word.classList.toggle("active", i === chosen));
    old.words.forEach((word, i) => {
      word.style.background = shares[i] > 0.02 ? palette.share(shares[i]) : "";
      word.style.color = shares[i] > 0.02 ? palette.ink(shares[i]) : "";
      columns.childNodes[i].classList.toggle("active", shares[i] >= SHOWN);
    });
    Object.assign(row.style, { top: `${chosen * cell}px`, width: `${source.length * cell}px`, height: `${cell}px` });
    const from = shares.map((share, i) => [share, i]).filter(([share]) => share >= SHOWN).sort((a, b) => b[0] - a[0]);
    const named = from.map(([share, i]) => `${quoted(source[i])} ${percent(share)}`).join(", ");
    readout.textContent = t("made_from", { word: quoted(target[chosen] ?? ""), words: named || t("many_words") });
    plot.ariaLabel = readout.textContent;
  }
  function paint() {
    const context = prepare(canvas, source.length * cell, target.length * cell);
    weights.forEach((shares, i) => shares.forEach((share, j) => {
      context.fillStyle = palette.share(share);
      context.fillRect(j * cell, i * cell, cell - 1, cell - 1);
    }));
  }
  function update({ map: current, palette: colours, paintKey }) {
    if (!current.alignment) return;
    [weights, palette] = [current.alignment.weights, colours];
    const key = current.stamp + colours.theme;
    if (key !== painted) { paint(); painted = key; }
    point(clamp(chosen, target.length));
  }
  return { element, update };
}
