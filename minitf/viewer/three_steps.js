/* The view "Three steps": match, weigh and gather of one head for one query, in numbers and bars. */

import { paintStrip } from "./colours.js";
import { button, make, number, onChange, oneStop, percent, quoted, range, rich, visible, withBold } from "./dom.js";
import { cutIn } from "./edits.js";
import { softmax, threeSteps } from "./maps.js";

const ROW = 25; // pixels
const [FEWEST_ROWS, MOST_ROWS, MOST_FUTURE] = [3, 14, 1]; // keys shown one by one; the others are summed up
const ROOM_TO_EXPLAIN = 520; // pixels of height from which on the explanations are open at first

const STEPS = ["match", "weigh", "gather"];
const COLUMNS = [["key", ""], ["dot", "match"], ["divided", "match"], ["mask", "match"], ["weight", "weigh"], ["value_vector", "gather"], ["value_times", "gather"]];

export function threeStepsView(map, { t, actions }) {
  const { set } = actions;
  const width = map.head_dim;
  const temperature = make("input", { type: "range", min: -100, max: 100, value: 0, ariaLabel: t("temperature") });
  const temperatureName = make("output");
  const reset = button(t("reset"), () => set({ temperature: 1 }), { class: "link" });
  temperature.addEventListener("input", () => set({ temperature: 10 ** (Number(temperature.value) / 100) }));
  const temperatureRow = make("label", { class: "temperature" }, t("temperature"), temperature, temperatureName, reset);
  const lead = make("p", { class: "lead" });
  const explain = button(t("explain"), () => set({ explain: !open() }), { class: "link" });
  const cards = make("ol", { class: "three" }, ...STEPS.map((name, i) => make("li", { class: `of-${name}` },
    make("h3", {}, make("b", {}, String(i + 1)), " ", t(`steps_${name}`)), rich(make("p"), t(`steps_${name}_text`, { width: width ?? "d" })))));
  const other = make("p", { class: "warning", role: "note" });
  /** Why the weights are not those of the standard formula. Maps of older runs do not say; an edited attention.py does. */
  const unusual = (shown, { edits, live }) => {
    if (shown.formula) return t(shown.rows_sum_to_one === false ? "variant_free_rows" : "variant", { formula: shown.formula });
    if (live && edits.length) return t("steps_edited");
    return shown.standard_formula === false ? t("other_formula") : "";
  };
  const table = make("table", { class: "steps-table" }, make("caption", { class: "unseen" }, t("tab_three_steps")));
  const stops = oneStop(table, ".row-key");
  const [detail, note] = [make("div", { class: "product" }), make("p", { class: "hint" })];
  const missing = make("p", { class: "missing" });
  const element = make("div", { class: "three-steps" }, make("div", { class: "lead-row" }, lead, temperatureRow, explain), other, cards, missing, table, detail, note);
  let [rows, parts, context] = [[], {}, null];
  const open = () => context.state.explain ?? context.space.height >= ROOM_TO_EXPLAIN;

  /** Rows for the keys shown; elements are reused while the keys stay the same. */
  const build = onChange((keys, rest, future, more) => {
    const heading = make("tr", {}, ...COLUMNS.map(([key, step]) => make("th", { scope: "col", class: step && `of-${step}` }, t(key, { width: width ?? "" }))));
    const cell = (step, ...children) => make("td", { class: `of-${step}` }, ...children);
    const strip = () => make("canvas", { class: "strip" });
    const signed = () => make("span", { class: "signed" }, make("b"), make("span", { class: "bar" }, make("i")));
    rows = keys.map((key) => {
      const name = button(visible(map.tokens[key]), (event) => { set({ focusKey: key }); actions.test(context.query, key, event); }, { class: "row-key" });
      const row = make("tr", {}, make("th", { scope: "row" }, name), cell("match", signed()), cell("match number"),
        cell("match mask", "0"), cell("weigh", bar()), cell("gather", strip()), cell("gather", strip()));
      row.addEventListener("pointerenter", () => set({ focusKey: key }));
      name.addEventListener("focus", () => context.state.focusKey !== key && set({ focusKey: key }));
      return { key, row };
    });
    const others = make("tr", { class: "others" }, make("th", { scope: "row", colSpan: 4 }), cell("weigh", bar()), cell("gather"), cell("gather", strip()));
    const masked = future.map((key) => make("tr", { class: "future" },
      make("th", { scope: "row", colSpan: 3 }, visible(map.tokens[key]), more ? ` ${t("more_future", { count: more })}` : ""), make("td", { class: "mask" }, t("masked")), make("td", {}, "0%"), make("td"), make("td")));
    const output = make("tr", { class: "output" }, make("th", { scope: "row", colSpan: 4 }, t("output")), make("td", {}, t("sum"), " 100%"), make("td"), make("td", {}, strip()));
    table.replaceChildren(table.caption, make("thead", {}, heading),
      make("tbody", {}, ...rows.map(({ row }) => row), ...(rest.length ? [others] : []), ...masked), make("tfoot", {}, output));
    parts = { others, output };
  });

  /** The weights and scores shown: at temperature 1 the model's own, as those from stored vectors are rounded. */
  function compute({ map: current, looks: [look], query, state }) {
    const vectors = current.vectors(look.layer, look.head);
    const steps = threeSteps(vectors, query, width);
    const shown = state.temperature === 1 ? steps.weights.map((_, key) => look.weight(query, key)) : softmax(steps.scores, state.temperature);
    return { ...steps, vectors, shown };
  }

  function render(current) {
    context = current;
    const { map: shownMap, looks, query, palette, state, space } = context;
    const [look] = looks;
    const text = t(looks.length > 1 ? "steps_lead_first" : "steps_lead", { query: "\u0001", layer: look.layer, head: look.head });
    lead.replaceChildren(...withBold(text, quoted(map.tokens[query])));
    const available = Boolean(shownMap.vectors);
    other.textContent = unusual(shownMap, state);
    other.hidden = !other.textContent;
    cards.hidden = !open() && available;
    explain.hidden = !available;
    explain.ariaExpanded = String(open());
    for (const part of [table, detail, note, temperatureRow]) part.hidden = !available;
    missing.hidden = available;
    missing.textContent = map.exact ? t("no_vectors_live") : [t("no_vectors"), context.whyNotLive ? "" : t("no_vectors_type")].join(" ");
    if (!available) return;
    const { q, dots, scores, weights, vectors, shown } = compute(context);
    const room = Math.floor((space.height - 240 - (open() ? 180 : 0)) / ROW);
    const count = Math.min(Math.max(room, FEWEST_ROWS), MOST_ROWS);
    const top = range(query + 1).sort((a, b) => weights[b] - weights[a]).slice(0, count);
    const keys = query < count ? range(query + 1) : [...new Set([...top.slice(0, count - 1), query])].sort((a, b) => a - b);
    const rest = range(query + 1).filter((key) => !keys.includes(key));
    const future = range(map.size).slice(query + 1, query + 1 + MOST_FUTURE);
    const more = Math.max(map.size - query - 1 - MOST_FUTURE, 0);
    build([keys, rest.length, future, more].join("|"), keys, rest, future, more);

    const largestDot = Math.max(...dots.map(Math.abs));
    const values = keys.map((key) => vectors.v(key));
    const largestValue = Math.max(...values.flatMap((v) => [...v.map(Math.abs)]));
    const focus = keys.includes(state.focusKey) ? state.focusKey : keys.reduce((a, b) => (shown[b] > shown[a] ? b : a));
    const cut = cutIn(state.live ? state.edits : [], look.layer, look.head).filter(([one]) => one === query).map(([, key]) => key);
    rows.forEach(({ key, row }, i) => {
      const cells = row.children;
      cells[3].textContent = cut.includes(key) ? t("masked") : "0";
      signedBar(cells[1].firstChild, dots[key] / largestDot, number(dots[key]));
      cells[2].textContent = number(scores[key]);
      shareBar(cells[4].firstChild, shown[key], palette);
      paintStrip(cells[5].firstChild, values[i], largestValue, palette);
      paintStrip(cells[6].firstChild, values[i].map((v) => v * shown[key]), largestValue, palette);
      row.classList.toggle("active", key === focus);
      row.firstChild.firstChild.ariaPressed = String(key === focus);
    });
    stops();
    const mixed = (of) => Float32Array.from({ length: width }, (_, i) => of.reduce((sum, key) => sum + shown[key] * vectors.v(key)[i], 0));
    if (rest.length) {
      parts.others.firstChild.textContent = t("others", { count: rest.length });
      shareBar(parts.others.children[1].firstChild, rest.reduce((sum, key) => sum + shown[key], 0), palette);
      paintStrip(parts.others.lastChild.firstChild, mixed(rest), largestValue, palette);
    }
    if (map.rows_sum_to_one === false) parts.output.children[1].textContent = `${t("sum")} ${percent(shown.reduce((a, b) => a + b, 0))}`;
    paintStrip(parts.output.lastChild.firstChild, mixed(range(query + 1)), largestValue, palette);
    showProduct(q, vectors.k(focus), focus, query, palette);
    temperature.value = Math.round(100 * Math.log10(state.temperature));
    temperatureName.textContent = number(state.temperature);
    reset.hidden = state.temperature === 1;
    const notes = [t(palette.theme === "dark" ? "scale_note_dark" : "scale_note", { width })];
    if (state.temperature !== 1) notes.unshift(t("temperature_moved", { value: number(state.temperature) }));
    note.textContent = notes.join(" ");
  }

  /** The element by element products that sum to one dot product. */
  function showProduct(q, k, key, query, palette) {
    const product = q.map((one, i) => one * k[i]);
    const largest = Math.max(...q.map(Math.abs), ...k.map(Math.abs));
    const strips = [
      [t("query_vector", { query: quoted(map.tokens[query]) }), q, largest],
      [t("key_vector", { key: quoted(map.tokens[key]) }), k, largest],
      [t("product"), product, Math.max(...product.map(Math.abs))],
    ];
    const terms = range(Math.min(3, width)).map((i) => `${number(q[i])} · ${number(k[i])}`).join(" + ");
    const sum = t("sum_of", { terms, sum: number(product.reduce((a, b) => a + b, 0)) });
    detail.replaceChildren(...strips.flatMap(([name, numbers, most]) => {
      const canvas = make("canvas", { class: "strip" });
      paintStrip(canvas, numbers, most, palette);
      return [make("span", {}, name), canvas];
    }), make("span", {}, t("dot", {})), make("code", {}, sum));
  }

  function rowsOf(current) {
    if (!current.map.vectors) return { columns: [], rows: [] };
    const { dots, scores, shown } = compute(current);
    const { query, state, looks: [look] } = current;
    const rows = range(query + 1).map((key) => [look.layer, look.head, query, map.tokens[query], key, map.tokens[key], dots[key], scores[key], state.temperature, shown[key]]);
    return { columns: ["layer", "head", "query_position", "query", "key_position", "key", "dot", "score", "temperature", "weight"], rows };
  }
  return { element, render, table: rowsOf };
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
