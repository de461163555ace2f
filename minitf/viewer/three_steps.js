/* The view "Three steps": match, weigh and gather of one head for one query, in numbers and bars. */

import { make, number, percent, quoted, range, rich, visible } from "./dom.js";
import { paintStrip, softmax, threeSteps } from "./maps.js";

const MAX_ROWS = 14; // keys shown one by one; the others are summed up
const MOST_FUTURE = 2;

export function threeStepsView(map, { t, set }) {
  const temperature = make("input", { type: "range", min: -100, max: 100, value: 0, ariaLabel: t("temperature") });
  const temperatureName = make("output");
  const reset = make("button", { type: "button", class: "link" }, t("reset"));
  temperature.addEventListener("input", () => set({ temperature: 10 ** (Number(temperature.value) / 100) }));
  reset.addEventListener("click", () => set({ temperature: 1 }));
  const lead = make("p", { class: "lead" });
  // Maps of older runs do not say; a model with an edited attention.py does.
  const other = map.standard_formula === false ? [make("p", { class: "warning", role: "note" }, t("other_formula"))] : [];
  const width = map.head_dim;
  const step = (number_, name, text) => make("li", {}, make("h3", {}, make("b", {}, String(number_)), " ", t(name)), rich(make("p"), t(text, { width })));
  const steps = make("ol", { class: "three" }, step(1, "steps_match", "steps_match_text"), step(2, "steps_weigh", "steps_weigh_text"), step(3, "steps_gather", "steps_gather_text"));
  steps.children[1].append(make("label", { class: "temperature" }, t("temperature"), temperature, temperatureName), reset);
  const [table, detail, note] = [make("table", { class: "steps-table" }), make("div", { class: "product" }), make("p", { class: "hint" })];
  const element = make("div", { class: "three-steps" }, lead, ...other, steps, table, detail, note);
  let [rows, built] = [[], ""];

  /** Rows for the keys shown; elements are reused while the keys stay the same. */
  function build(keys, rest, future, more) {
    const head = make("tr", {}, ...["key", "dot", "divided", "mask", "weight", "value_vector", "value_times"].map((key, i) =>
      make("th", { scope: "col", class: i > 0 && i < 4 ? "of-match" : i === 4 ? "of-weigh" : i > 4 ? "of-gather" : "" }, t(key, { width: width ?? "" }))));
    rows = keys.map((key) => {
      const row = make("tr", { tabIndex: 0 }, make("th", { scope: "row" }, visible(map.tokens[key])), make("td", { class: "of-match" }, make("span", { class: "signed" }, make("b"), make("span", { class: "bar" }, make("i")))), make("td", { class: "of-match number" }),
        make("td", { class: "of-match mask" }, "0"), make("td", { class: "of-weigh" }, bar()), make("td", {}, make("canvas", { class: "strip" })), make("td", {}, make("canvas", { class: "strip" })));
      row.addEventListener("pointerenter", () => set({ focusKey: key }));
      row.addEventListener("focus", () => set({ focusKey: key }));
      return { key, row };
    });
    const others = make("tr", { class: "others" }, make("th", { scope: "row" }, t("others", { count: rest.length })), ...range(3).map(() => make("td", { class: "of-match" })), make("td", { class: "of-weigh" }, bar()), make("td"), make("td", {}, make("canvas", { class: "strip" })));
    const masked = future.map((key) => make("tr", { class: "future" }, make("th", { scope: "row" }, visible(map.tokens[key])),
      make("td", { class: "of-match" }), make("td"), make("td", { class: "mask" }, t("masked")), make("td", {}, "0%"), make("td"), make("td")));
    if (more) masked.push(make("tr", { class: "future" }, make("th", { scope: "row", colSpan: 7 }, t("more_future", { count: more }))));
    const output = make("tr", { class: "output" }, make("th", { scope: "row", colSpan: 4 }, t("output")), make("td", {}, t("sum"), " 100%"), make("td"), make("td", {}, make("canvas", { class: "strip" })));
    table.replaceChildren(make("thead", {}, head), make("tbody", {}, ...rows.map(({ row }) => row), ...(rest.length ? [others] : []), ...masked), make("tfoot", {}, output));
    return { others, output };
  }
  let parts = {};

  function update({ map: current, looks: [look], query, palette, state }) {
    rich(lead, t("steps_lead", { query: "\u0001", layer: look.layer, head: look.head }));
    lead.replaceChildren(...lead.textContent.split("\u0001").flatMap((text, i) => (i ? [make("b", {}, quoted(map.tokens[query])), text] : [text])));
    const available = Boolean(map.vectors);
    for (const part of [table, detail, steps]) part.hidden = !available && part !== steps;
    if (!available) { note.textContent = t("no_vectors"); return; }
    const vectors = map.vectors(look.layer, look.head);
    const { q, dots, scores, weights } = threeSteps(vectors, query, width);
    // At temperature 1 show the weights of the model; those from the stored, rounded vectors are approximate.
    const shown = state.temperature === 1 ? weights.map((_, key) => look.weight(query, key)) : softmax(scores, state.temperature);
    const top = range(query + 1).sort((a, b) => weights[b] - weights[a]).slice(0, MAX_ROWS);
    const keys = query < MAX_ROWS ? range(query + 1) : [...new Set([...top.slice(0, MAX_ROWS - 1), query])].sort((a, b) => a - b);
    const rest = range(query + 1).filter((key) => !keys.includes(key));
    const future = range(map.size).slice(query + 1, query + 1 + MOST_FUTURE);
    const more = Math.max(map.size - query - 1 - MOST_FUTURE, 0);
    const building = [keys, future, more].join("|");
    if (building !== built) { parts = build(keys, rest, future, more); built = building; }

    const largestDot = Math.max(...dots.map(Math.abs));
    const values = keys.map((key) => vectors.v(key));
    const largestValue = Math.max(...values.flatMap((v) => [...v.map(Math.abs)]));
    const focus = keys.includes(state.focusKey) ? state.focusKey : keys.reduce((a, b) => (shown[b] > shown[a] ? b : a));
    rows.forEach(({ key, row }, i) => {
      const cells = row.children;
      signedBar(cells[1].firstChild, dots[key] / largestDot, number(dots[key]));
      cells[2].textContent = number(scores[key]);
      shareBar(cells[4].firstChild, shown[key], palette);
      paintStrip(cells[5].firstChild, values[i], largestValue, palette);
      paintStrip(cells[6].firstChild, values[i].map((v) => v * shown[key]), largestValue, palette);
      row.classList.toggle("active", key === focus);
    });
    const mixed = (of) => Float32Array.from({ length: width }, (_, i) => of.reduce((sum, key) => sum + shown[key] * vectors.v(key)[i], 0));
    if (rest.length) {
      parts.others.querySelector("th").textContent = t("others", { count: rest.length });
      shareBar(parts.others.children[4].firstChild, rest.reduce((sum, key) => sum + shown[key], 0), palette);
      paintStrip(parts.others.children[6].firstChild, mixed(rest), largestValue, palette);
    }
    paintStrip(parts.output.lastChild.firstChild, mixed(range(query + 1)), largestValue, palette);
    showProduct(q, vectors.k(focus), focus, query, palette);
    temperature.value = Math.round(100 * Math.log10(state.temperature));
    temperatureName.textContent = number(state.temperature);
    reset.hidden = state.temperature === 1;
    const notes = [t(palette.theme === "dark" ? "scale_note_dark" : "scale_note", { width })];
    if (state.temperature !== 1) notes.unshift(t("temperature_moved", { value: number(state.temperature) }));
    if (current.standard_formula === false) notes.unshift(t("other_formula"));
    note.textContent = notes.join(" ");
  }

  /** The element by element products that sum to one dot product. */
  function showProduct(q, k, key, query, palette) {
    const product = q.map((one, i) => one * k[i]);
    const largest = Math.max(...q.map(Math.abs), ...k.map(Math.abs));
    const strips = [[t("query_vector", { query: quoted(map.tokens[query]) }), q, largest], [t("key_vector", { key: quoted(map.tokens[key]) }), k, largest],
      [t("product"), product, Math.max(...product.map(Math.abs))]];
    const terms = range(Math.min(3, width)).map((i) => `${number(q[i])} · ${number(k[i])}`).join(" + ");
    detail.replaceChildren(...strips.flatMap(([name, numbers, most]) => {
      const canvas = make("canvas", { class: "strip" });
      paintStrip(canvas, numbers, most, palette);
      return [make("span", {}, name), canvas];
    }), make("span", {}, t("dot", {})), make("code", {}, t("sum_of", { terms, sum: number(product.reduce((a, b) => a + b, 0)) })));
  }
  return { element, update };
}

const bar = () => make("span", { class: "bar" }, make("i"), make("b"));

function signedBar(element, share, text) {
  const [name, track] = element.children;
  const fill = track.firstChild;
  Object.assign(fill.style, { width: `${50 * Math.abs(share)}%`, left: `${share < 0 ? 50 - 50 * Math.abs(share) : 50}%` });
  fill.classList.toggle("negative", share < 0);
  name.textContent = text;
}

function shareBar(element, share, palette) {
  const [fill, name] = element.children;
  Object.assign(fill.style, { width: `${100 * share}%`, background: palette.heads[0] });
  name.textContent = percent(share, 1);
}
