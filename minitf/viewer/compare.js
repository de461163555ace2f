/* The view "Compare": the chosen head on the same words at another step, without a head, or in another run. */

import { fillSelect, make, onChange, percent, quoted, range } from "./dom.js";
import { firstStep, otherOf } from "./data.js";
import { isChanged } from "./edits.js";
import { headLook } from "./maps.js";
import { matrix, steering } from "./matrix.js";
import { atPosition } from "./next_token.js";
import { strongest } from "./words.js";

const [HEADINGS, PREDICTIONS, LABEL] = [76, 140, 66]; // pixels: above the matrices, below them if there is room, a word

export function compareView(map, { t, tooltip, actions }) {
  const { set } = actions;
  const what = make("select", { ariaLabel: t("compare_with") });
  const steps = make("select", { ariaLabel: t("step") });
  const picker = make("div", { class: "compare-with" }, make("label", {}, t("compare_with"), " ", what), make("label", {}, t("step"), " ", steps));
  what.addEventListener("change", () => {
    if (what.value === "head") return actions.compareHead();
    if (what.value === "plain") return set({ other: { kind: "plain" } });
    return set({ other: what.value === "step" ? firstStep(context.state, context.run) : { kind: "run", run: what.value.slice(4), step: null } });
  });
  steps.addEventListener("change", () => {
    const other = otherOf(context.state, context.run);
    set({ other: { ...other, step: steps.value === "" ? null : Number(steps.value) } });
  });
  const problem = make("p", { class: "missing" });
  const readout = make("p", { class: "said", ariaLive: "polite" });
  const sides = make("div", { class: "sides" });
  const element = make("div", { class: "compare" }, make("div", { class: "lead-row" }, picker, readout), problem, sides);
  let [plots, figures, context, side] = [[], [], null, 0];

  const build = onChange((second, same) => {
    const lines = (query, key) => compareLines(t, context, lookOf(context), query, key);
    const controls = { ...steering(map.size, actions, tooltip, () => context, lines), label: t("tab_compare") };
    const foreign = { onPoint: () => {}, onLeave: () => {}, onSelect: () => {}, onArrow: () => {}, label: t("tab_compare") };
    plots = [matrix(map.tokens, controls), matrix(second.tokens, same ? controls : foreign)];
    if (same) plots.push(matrix(map.tokens, controls));
    figures = plots.map((plot) => make("figure", {}, make("figcaption", {}, make("b"), make("span")), plot.element, make("div", { class: "next" })));
    sides.replaceChildren(...figures);
  });
  const paint = onChange((lookA, lookB, same) => {
    const { palette, space, map: shown, second } = context;
    const wide = space.width > 560;
    side = wide ? Math.min(space.width / plots.length - LABEL - 8, space.height - HEADINGS) : Math.min(space.width - LABEL, 300);
    sides.style.gridTemplateColumns = `repeat(${wide ? plots.length : 1}, max-content)`;
    const largest = Math.max(lookA.largest, lookB.largest);
    const difference = (a, b) => (lookB.isHidden(a, b) ? 0 : (lookB.value(a, b) - lookA.value(a, b)) / largest);
    plots.forEach((plot) => plot.fit(side, LABEL));
    plots[0].paint(palette.shares, lookA.share);
    plots[1].paint(palette.shares, lookB.share);
    plots[2]?.paint(palette.signs, (a, b) => (difference(a, b) + 1) / 2);
    [[t("side_a"), shown, ""], [t("side_b"), second, nameOfOther(t, context)]].forEach(([name, one, note], i) => {
      figures[i].firstChild.firstChild.textContent = name;
      figures[i].firstChild.lastChild.textContent = [one.step === null ? "" : t("step_at", { step: one.step.toLocaleString() }), note].filter(Boolean).join(" · ");
    });
    if (same) {
      figures[2].firstChild.firstChild.textContent = t("difference");
      figures[2].lastChild.replaceChildren(make("p", { class: "swatches" }, ...[["A", -0.7], ["B", 0.7]].flatMap(([name, value]) => {
        const swatch = make("i");
        swatch.style.background = palette.signed(value);
        return [swatch, t("more_in", { side: name })];
      })));
    }
  });

  function render(current) {
    context = current;
    const { state, run, second, query, key, palette, looks: [look], data, source } = context;
    const other = otherOf(state, run);
    const tag = run.sentences[state.sentence].tag;
    const runs = state.live ? [] : data.runs.filter((name) => name !== run.name && data.tags[name]?.includes(tag));
    const options = [["step", t("other_step")], ...(source.live && run.checkpoints.length ? [["head", t("other_head", look)]] : []), ...(isChanged(state) ? [["plain", t("other_plain")]] : []), ...runs.map((name) => [`run:${name}`, runName(t, run, name)])];
    fillSelect(what, options, other.kind === "run" ? `run:${other.run}` : other.kind);
    const theirSteps = other.kind === "run" ? (second ? [[second.step]] : []) : state.live ? run.checkpoints.map((step) => [step]) : run.sentences[state.sentence].looks;
    steps.parentNode.hidden = other.kind !== "step";
    fillSelect(steps, theirSteps.map(([step]) => [String(step ?? ""), String(step ?? "–")]), String(other.step ?? ""));
    const has = second && look.layer < second.layers && look.head < second.heads;
    problem.textContent = !second ? t("no_second") : !has ? t("no_such_head") : "";
    const same = Boolean(second) && map.tokens.join("\u0000") === second.tokens.join("\u0000");
    if (has && !same) problem.textContent = t("no_difference");
    problem.hidden = !problem.textContent;
    sides.hidden = readout.hidden = !has;
    if (!has) return;
    build([second.id, same].join("|"), second, same);
    const lookB = lookOf(context);
    paint([context.paintKey, second.stamp, context.space.width, context.space.height, nameOfOther(t, context)].join("|"), look, lookB, same);
    const at = key ?? strongest(look, query, 1)[0] ?? 0;
    readout.textContent = same ? [t("head_name", look), ": ", ...compareWords(t, context, lookB, query, at)].join("") : "";
    plots.forEach((plot, i) => (same || i === 0) && plot.mark(query, key, readout.textContent));
    const roomy = context.space.height - HEADINGS - side > PREDICTIONS || context.space.width <= 560;
    figures[0].lastChild.replaceChildren(...(roomy ? atPosition({ ...context.map, before: undefined }, query, t, palette) : []));
    figures[1].lastChild.replaceChildren(...(roomy && same ? atPosition({ ...second, before: undefined }, query, t, palette) : []));
  }
  function table(current) {
    const { second, looks: [look] } = current;
    const lookB = second && look.layer < second.layers && look.head < second.heads ? lookOf(current) : null;
    if (!lookB || map.tokens.join("\u0000") !== second.tokens.join("\u0000")) return { columns: [], rows: [] };
    const rows = range(map.size).flatMap((query) => range(query + 1).map((key) => {
      const [a, b] = [look.weight(query, key), lookB.weight(query, key)];
      return [look.layer, look.head, query, map.tokens[query], key, map.tokens[key], a, b, b - a];
    }));
    return { columns: ["layer", "head", "query_position", "query", "key_position", "key", "A", "B", "difference"], rows };
  }
  return { element, render, table };
}

const lookOf = ({ second, looks: [look], settings }) => headLook(second, look.layer, look.head, settings);

/** Another run by its name, and the one that this run was forked from by what it is to it. */
export const runName = (t, { forked_from: fork }, name) => (fork?.run === name ? t("other_fork", { run: name, step: fork.step }) : t("other_run", { run: name }));

/** What B is; while another loads, what is still shown. */
function nameOfOther(t, { run, data: { secondOf } }) {
  if (secondOf?.kind === "head" && secondOf.head) return t("other_head", { layer: secondOf.head[0], head: secondOf.head[1] });
  if (secondOf?.kind === "plain") return t("other_plain");
  return secondOf?.kind === "run" ? runName(t, run, secondOf.run) : "";
}

function compareWords(t, { map, looks: [look] }, lookB, query, key) {
  return [t("compare_readout", { query: quoted(map.tokens[query]), key: quoted(map.tokens[key]), a: look.say(query, key), b: lookB.say(query, key) })];
}

function compareLines(t, context, lookB, query, key) {
  const { map, looks: [look] } = context;
  const change = lookB.weight(query, key) - look.weight(query, key);
  return [
    { text: `${quoted(map.tokens[query])} → ${quoted(map.tokens[key])}`, strong: true },
    `A ${look.say(query, key, 1)}   B ${lookB.say(query, key, 1)}`,
    look.byNorm ? "" : `B − A ${change < 0 ? "−" : "+"}${percent(Math.abs(change), 1)}`,
  ];
}
