/* The view "Compare": two steps or two runs side by side, with the same head and query, and their difference. */

import { make, percent, quoted } from "./dom.js";
import { atPosition } from "./next_token.js";
import { headLook } from "./maps.js";
import { matrix, steering } from "./matrix.js";
import { patternName } from "./overview.js";

export function compareView(map, { t, set, other }) {
  const runs = make("select", { ariaLabel: t("run") }, ...other.runs.map((name) => make("option", { value: name }, name || "–")));
  const steps = make("select", { ariaLabel: t("step") });
  const picker = make("div", { class: "compare-with" }, make("b", {}, t("compare_with")), ...(other.runs.length > 1 ? [make("label", {}, t("run"), " ", runs)] : []), make("label", {}, t("step"), " ", steps));
  runs.addEventListener("change", () => set({ other: { run: runs.value, look: null } }));
  steps.addEventListener("change", () => set({ other: { run: runs.value, look: Number(steps.value) } }));
  const [sides, readout] = [make("div", { class: "sides" }), make("p", { class: "readout", ariaLive: "polite" })];
  const element = make("div", { class: "compare" }, picker, readout, sides);
  let [plots, shape, painted, last, listed] = [null, "", "", { query: 0, key: null }, ""];

  function build(second) {
    const same = map.tokens.join("\u0000") === second.tokens.join("\u0000");
    const side = same ? 204 : 300;
    const controls = steering(map.size, set, () => last);
    const foreign = { onPoint: () => {}, onLeave: () => {}, onSelect: () => {}, onArrow: () => {} };
    plots = [matrix(map.tokens, t, side, controls), matrix(second.tokens, t, side, same ? controls : foreign)];
    if (same) plots.push(matrix(map.tokens, t, side, controls));
    const figures = plots.map((plot, i) => make("figure", {}, make("figcaption", {}, make("b"), make("span")), plot.element, make("div", { class: "next" })));
    sides.replaceChildren(...figures);
    if (!same) sides.append(make("p", { class: "hint" }, t("no_difference")));
    return figures;
  }

  let figures = [];
  function update({ map: current, looks: [look], query, key, palette, paintKey, state, second, secondRun, secondLooks, secondLook, step }) {
    const listing = secondRun + JSON.stringify(secondLooks);
    if (listing !== listed) {
      runs.value = secondRun;
      steps.replaceChildren(...secondLooks.map(([at], i) => make("option", { value: i }, String(at ?? "–"))));
      listed = listing;
    }
    steps.value = secondLook;
    if (secondLooks.length < 2 && other.runs.length < 2) { element.replaceChildren(make("p", { class: "hint" }, t("compare_needs"))); return; }
    if (!second) return;
    last = { query, key };
    if (shape !== second.id) { figures = build(second); shape = second.id; painted = ""; }
    const has = look.layer < second.layers && look.head < second.heads;
    if (!has) { readout.textContent = t("no_such_head"); sides.hidden = true; return; }
    sides.hidden = false;
    const lookB = headLook(second, look.layer, look.head, state);
    const largest = Math.max(look.largest, lookB.largest);
    const difference = (a, b) => (lookB.isHidden(a, b) ? 0 : (lookB.value(a, b) - look.value(a, b)) / largest);
    const painting = paintKey + second.stamp;
    if (painting !== painted) {
      plots[0].paint(palette.shares, look.share);
      plots[1].paint(palette.shares, lookB.share);
      plots[2]?.paint(palette.signs, (a, b) => (difference(a, b) + 1) / 2);
      [[t("side_a"), step, current], [t("side_b"), second.step, second]].forEach(([name, at, one], i) => {
        figures[i].firstChild.firstChild.textContent = name;
        figures[i].firstChild.lastChild.textContent = [at === null ? "" : t("step_at", { step: at }), patternName(t, one.label(look.layer, look.head))].filter(Boolean).join(" · ");
      });
      if (figures[2]) {
        figures[2].firstChild.firstChild.textContent = t("difference");
        const key_ = [["A", -0.7], ["B", 0.7]].flatMap(([side, value]) => {
          const swatch = make("i");
          swatch.style.background = palette.signed(value);
          return [swatch, t("more_in", { side })];
        });
        figures[2].lastChild.replaceChildren(make("p", { class: "swatches" }, ...key_));
      }
      painted = painting;
    }
    const at = key ?? strongest(look, query);
    const say = (one) => (one.byNorm ? one.value(query, at).toFixed(2) : percent(one.weight(query, at)));
    const words = figures[2] ? t("compare_readout", { query: quoted(map.tokens[query]), key: quoted(map.tokens[at]), a: say(look), b: say(lookB) }) : "";
    readout.textContent = words;
    plots.forEach((plot, i) => (figures[2] || i === 0) && plot.mark(query, key, words));
    figures[0].lastChild.replaceChildren(...atPosition(current, query, t, [], palette));
    figures[1].lastChild.replaceChildren(...atPosition(second, Math.min(query, second.size - 1), t, [], palette));
  }
  return { element, update };
}

function strongest(look, query) {
  let best = 0;
  for (let key = 1; key <= query; key++) if (look.share(query, key) > look.share(query, best)) best = key;
  return best;
}
