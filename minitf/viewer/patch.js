/* The view "Two sentences": what the model computed at one place of one sentence is put into the other, and the cell says
 * how much of the difference between both predictions that place carries. Known as activation patching. */

import { button, make, number, onChange, oneStop, percent, quoted, range, visible } from "./dom.js";
import { probeOf } from "./probes.js";
import { problemText } from "./refusals.js";

const WAYS = ["restores", "breaks"];

export function patchView(map, { t, tooltip, actions }) {
  const { set } = actions;
  const text = make("textarea", { rows: 1, spellcheck: false, ariaLabel: t("patch_changed"), dir: "auto" });
  const run = () => set({ pair: { changed: text.value, position: at }, pairHeads: null });
  text.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    run();
  });
  const go = button(t("patch_run"), run, { class: "primary" });
  const after = make("span", { class: "hint" });
  const bar = make("progress", { max: 1, ariaLabel: t("patch_progress") });
  const said = make("p", { class: "said", attributes: { role: "status" } });
  const back = button(t("patch_layers"), () => set({ pairHeads: null }), { class: "link" });
  const hint = make("p", { class: "hint" }, t("patch_hint"));
  const problem = make("p", { class: "missing" });
  const table = make("table", { class: "patch-table" });
  const scroll = make("div", { class: "scroll", tabIndex: 0, attributes: { role: "region", "aria-label": t("tab_patch") } }, table);
  const stops = oneStop(table, ".row-key");
  const form = make("div", { class: "patch-form" }, make("label", {}, t("patch_changed"), text), go, after, bar);
  const element = make("div", { class: "patch" }, form, make("div", { class: "lead-row" }, said, back), hint, problem, scroll);
  let at = 0;

  const fill = onChange((value) => { text.value = value; });
  const build = onChange((found, palette) => {
    const { columns, first, pair } = found;
    const name = (column) => (found.layer !== null ? t("head", { n: column })
      : button(t("layer", { n: column }), () => set({ pairHeads: column }), { class: "link", title: t("patch_open"), disabled: !found.canOpen }));
    const groups = make("tr", {}, make("td"), ...WAYS.map((way) => make("th", { scope: "colgroup", colSpan: columns.length, title: t(`patch_${way}_why`) }, t(`patch_${way}`))));
    const heading = make("tr", {}, make("th", { scope: "col" }, t("word")), ...WAYS.flatMap(() => columns.map((column) => make("th", { scope: "col" }, name(column)))));
    const rows = range(pair.clean.length).slice(first).map((position) => {
      const [one, other] = [pair.clean[position], pair.changed[position]];
      const word = button(one === other ? visible(one) : `${visible(one)} / ${visible(other)}`, () => set({ query: position, key: null }), { class: one === other ? "row-key" : "row-key differs" });
      const cells = WAYS.flatMap((way) => columns.map((column, i) => {
        const share = found.share(way, i, position);
        const cell = make("td", {}, share === null ? "" : percentOf(share));
        if (share === null) return cell;
        Object.assign(cell.style, { background: palette.signed(share), color: palette.signedInk(share) });
        tooltip.attach(cell, () => [{ text: t(found.layer === null ? "patch_place" : "patch_head_place", { word: quoted(one), column, layer: found.layer }), strong: true }, t(`patch_${way}_cell`, { share: percentOf(share), ...answers(pair) })]);
        return cell;
      }));
      return make("tr", { data: { position } }, make("th", { scope: "row" }, word), ...cells);
    });
    table.replaceChildren(make("caption", { class: "unseen" }, t("patch_hint")), make("thead", {}, groups, heading), make("tbody", {}, ...rows));
  });

  const follow = onChange(() => {
    const row = table.querySelector("tr.active");
    if (row && row.offsetTop + row.offsetHeight > scroll.scrollTop + scroll.clientHeight) scroll.scrollTop = row.offsetTop - scroll.clientHeight / 2;
  });

  function render(context) {
    const { state, map: current, palette, query } = context;
    const probe = probeOf(context);
    at = query;
    const sentence = current.full ?? current.text;
    fill(JSON.stringify([state.pair?.changed, sentence]), state.pair?.changed ?? sentence);
    form.hidden = Boolean(probe?.stored);
    after.textContent = t("patch_after", { word: quoted(current.tokens[query]) });
    const found = state.pair || probe?.stored ? readPatch(probe, state.pairHeads) : null;
    bar.hidden = !state.pair || !probe || Boolean(probe.error) || probe.replies.length >= probe.count;
    if (!bar.hidden) bar.value = probe.replies.length / probe.count;
    problem.hidden = !probe?.error;
    problem.textContent = problemText(t, probe?.error);
    scroll.hidden = said.hidden = !found;
    hint.hidden = Boolean(found);
    back.hidden = !found || found.layer === null;
    if (!found) return;
    build(JSON.stringify([found.pair.clean, found.pair.changed, found.pair.answers, found.layer, probe.replies.length, palette.theme, found.pair.difference]), found, palette);
    for (const row of table.tBodies[0].rows) row.classList.toggle("active", Number(row.dataset.position) === query);
    stops();
    follow([state.pairHeads, probe.replies.length, query].join());
    said.textContent = patchWords(t, found);
  }
  function rowsOf(context) {
    const { state } = context;
    const found = readPatch(probeOf(context), state.pairHeads);
    if (!found) return { columns: [], rows: [] };
    const rows = range(found.pair.clean.length).flatMap((position) => found.columns.map((column, i) =>
      [position, found.pair.clean[position], found.pair.changed[position], found.layer ?? column, found.layer === null ? "" : column, ...WAYS.map((way) => found.share(way, i, position) ?? "")]));
    return { columns: ["position", "clean", "changed", "layer", "head", ...WAYS], rows };
  }
  return { element, render, table: rowsOf };
}

const percentOf = (share) => `${number(100 * share, 0).replace(/^−0$/, "0")}%`;
const answers = ({ answers: [one, other] }) => ({ one: quoted(one), other: quoted(other) });

/** Replies by layer, or a stored result, as a table: of all layers, or of the heads of one; null if there is none yet. */
export function readPatch(probe, heads) {
  const pair = probe?.replies[0];
  if (!pair?.clean) return null;
  const first = pair.clean.findIndex((token, i) => token !== pair.changed[i]);
  const stored = Array.isArray(pair.restores[0]);
  const layers = stored ? pair.restores.length : probe.count - (heads === null ? 0 : 1);
  const ofLayer = (way, layer) => (stored ? pair[way][layer] : probe.replies.find((one) => one.layer === layer && !one.heads)?.[way]);
  const ofHeads = (way) => (stored ? pair[`head_${way}`]?.[heads] : probe.replies.find((one) => one.heads && one.layer === heads)?.[way]);
  const opened = heads !== null && ofHeads("restores");
  const columns = range(opened ? ofHeads("restores").length : layers);
  const share = (way, i, position) => (opened ? ofHeads(way)[i] : ofLayer(way, i))?.[position] ?? null;
  return { pair, first, columns, layer: opened ? heads : null, canOpen: !stored || Boolean(pair.head_restores), share };
}

/** What is compared, and the place that carries most beyond the first layer, as one text. */
function patchWords(t, { pair, columns, first, layer, share }) {
  const shares = pair.probabilities?.map(([one, other]) => [percent(one), percent(other)]);
  const values = { ...answers(pair), clean: shares?.[0][0] ?? "", changed: shares?.[1][1] ?? "" };
  const alike = pair.probabilities?.[1][0] > pair.probabilities?.[1][1]; // the changed sentence leads to the same
  const lead = t(shares ? "patch_lead" : "patch_lead_plain", values) + (alike ? t("patch_alike", values) : "");
  const places = range(pair.clean.length).slice(first).flatMap((position) => columns.map((column) => ({ position, column, value: share("restores", column, position) ?? 0 })));
  const best = places.filter(({ column }) => layer !== null || column > 0).sort((a, b) => b.value - a.value)[0];
  if (!best) return lead;
  return lead + t(layer === null ? "patch_best" : "patch_best_head", { word: quoted(pair.clean[best.position]), column: best.column, layer, share: percentOf(best.value) });
}
