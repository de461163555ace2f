/* The view "Over training": scores of the heads, and whatever else the run measured, below the loss on the same steps. */

import { chart, curve, lossCurves, pathOf, stepsOf, valueAt } from "./charts.js";
import { arrow, choices, clamp, make, number, onChange, range } from "./dom.js";
import { roleOf } from "./heads.js";

// A head is named after a pattern above its threshold, as in heads.py.
const THRESHOLDS = { nearby: 0.5, entropy: 0.6 };
const thresholdOf = (score) => THRESHOLDS[score] ?? 0.4;
const [HEIGHT, LOSS_HEIGHT] = [260, 70];
const ORDER = ["refers", "aligns", "induction", "previous_token", "same_word", "nearby", "first_token", "this_token", "entropy"];
const FEW = 8; // lines that are named at their ends

/** What can be shown: [key, { lines, threshold }] of every score, and of every group of series. A line is
 * { name, layer, head, points }, without layer and head if it is no head's. */
export function curvesOf(run) {
  const { steps, values } = run.scores;
  const scores = [...ORDER, ...Object.keys(values).filter((name) => !ORDER.includes(name))].filter((name) => values[name]);
  const found = scores.map((name) => [name, {
    threshold: thresholdOf(name),
    lines: values[name].flatMap((row, layer) => row.map((heads, head) => ({ layer, head, points: steps.map((step, i) => [step, heads[i]]) }))),
  }]);
  const groups = new Map();
  for (const [tag, points] of Object.entries(run.series ?? {})) {
    const parts = tag.split("/");
    const depth = parts[0] === "watch" && parts.length > 2 ? parts.length - 1 : 1;
    const [group, name] = [parts.slice(0, depth).join("/"), parts.slice(depth).join("/")];
    const head = name.match(/^(?:.*\/)?layer(\d+)_head(\d+)$/);
    const line = head ? { layer: Number(head[1]), head: Number(head[2]) } : { name };
    groups.set(group, [...(groups.get(group) ?? []), { ...line, points }]);
  }
  return [...[...groups].map(([group, lines]) => [group, { lines, threshold: null }]), ...found]
    .filter(([, { lines }]) => lines.some(({ points }) => points.length > 1));
}

export function overTrainingView(map, { t, tooltip, actions }, run) {
  const shown = new Map(curvesOf(run));
  const title = (key) => (key.startsWith("watch/") ? key.slice(6) : t(key));
  const pick = choices("radiogroup", t("score"), [...shown.keys()].map((key) => [key, title(key)]), (score) => actions.set({ score }));
  const [lossChart, scores] = [chart(LOSS_HEIGHT), chart(HEIGHT)];
  const wrap = (className, ...children) => make("div", { class: className }, ...children);
  const nows = [wrap("now"), wrap("now")];
  const [axisY, axisX] = [wrap("axis-y"), wrap("axis-x")];
  const plot = wrap("score-plot", scores, nows[1], axisY);
  Object.assign(plot, { tabIndex: 0, role: "application", ariaRoleDescription: t("tab_over_training") });
  const [said, legend] = [make("p", { class: "said", ariaLive: "polite" }), make("p", { class: "legend" })];
  const element = make("div", { class: "over-training" }, make("div", { class: "lead-row" }, pick.element, legend), said,
    wrap("loss-plot", lossChart, nows[0], make("span", { class: "name" }, t("loss"))), plot, axisX);
  const allSteps = [...shown.values()].flatMap(({ lines }) => lines.flatMap(({ points }) => points.map(([step]) => [step])));
  const span = stepsOf(run.curves, allSteps.length ? [[Math.min(...allSteps.flat())], [Math.max(...allSteps.flat())]] : [[0]]);
  axisX.replaceChildren(...range(5).map((i) => make("span", {}, Math.round(span[0] + (i / 4) * (span[1] - span[0])).toLocaleString())));
  axisX.lastChild.prepend(`${t("step")} `);
  if (run.curves.train.length) lossChart.replaceChildren(...lossCurves(run.curves, span, LOSS_HEIGHT).paths);
  let [lines, bounds, context, spot] = [[], [0, 1], null, null]; // spot: the curve and the step that the keyboard chose

  const known = (name) => (t(`curve_${name}`) === `curve_${name}` ? name : t(`curve_${name}`));
  const nameOf = ({ name, layer, head }) => (name === undefined ? t("head_name", { layer, head })
    : name.endsWith("/chance") ? t("of_chance", { name: known(name.slice(0, -7)) }) : known(name));
  const isSecond = ({ name }) => /chance|control|blocked/.test(name ?? "");
  const isHead = (line) => line.layer !== undefined;

  const draw = onChange((score, palette) => {
    const { threshold, lines: found } = shown.get(score);
    spot = null;
    const values = found.flatMap(({ points }) => points.map(([, value]) => value)).filter((value) => value !== null);
    bounds = [Math.min(0, ...values), score === "ablation" ? Math.max(...values) : Math.max(1, ...values)];
    const layers = Math.max(...found.map((one) => one.layer ?? 0)) + 1;
    const kinds = [...new Set(found.filter((one) => !isHead(one)).map(({ name }) => kindOf(name)))];
    lines = found.map((one) => {
      const path = curve("series", pathOf(one.points, span, bounds, HEIGHT));
      const passes = threshold === null || one.points.some(([, value]) => value >= threshold);
      path.classList.toggle("notable", passes);
      path.classList.toggle("chance", isSecond(one));
      const colour = isHead(one) ? palette.layer(one.layer, layers) : palette.curves[kinds.indexOf(kindOf(one.name)) % palette.curves.length];
      return { ...one, path, colour };
    });
    const level = threshold === null ? [] : [curve("threshold", pathOf([[span[0], threshold], [span[1], threshold]], span, bounds, HEIGHT))];
    scores.replaceChildren(...level, ...lines.map(({ path }) => path));
    axisY.replaceChildren(...[1, 0.75, 0.5, 0.25, 0].map((share) => make("span", {}, number(bounds[0] + share * (bounds[1] - bounds[0])))));
    said.textContent = threshold === null ? "" : appeared(lines, threshold, run.curves.train, t);
    plot.ariaLabel = [`${title(score)}.`, said.textContent, t("curves_keys")].filter(Boolean).join(" ");
    const named = lines.filter((one) => !isHead(one));
    const everyHead = lines.some(isHead) ? key(palette.layer(0, layers), t("heads")) : [];
    legend.replaceChildren(...(named.length && named.length <= FEW * 2 ? [...named.flatMap((one) => key(one.colour, nameOf(one), isSecond(one))), ...everyHead]
      : lines.some(isHead) && layers > 1 ? [...key(palette.layer(0, layers), t("layer", { n: 0 })), ...key(palette.layer(layers - 1, layers), t("layer", { n: layers - 1 }))] : []));
  });

  const near = (event) => {
    const area = plot.getBoundingClientRect();
    const step = span[0] + ((event.clientX - area.left) / area.width) * (span[1] - span[0]);
    const value = bounds[0] + (1 - (event.clientY - area.top) / area.height) * (bounds[1] - bounds[0]);
    const at = ({ points }) => points.reduce((best, point) => (Math.abs(point[0] - step) < Math.abs(best[0] - step) ? point : best), points[0] ?? [0, null]);
    return lines.map((line) => ({ line, point: at(line) })).filter(({ point }) => point[1] !== null)
      .reduce((a, b) => (!a || Math.abs(b.point[1] - value) < Math.abs(a.point[1] - value) ? b : a), null);
  };
  /** Say one point of one curve, next to it. */
  function tell(line, [step, value], x, y) {
    const loss = valueAt(run.curves.train, step);
    const words = [nameOf(line), `${number(value)} · ${t("step_at", { step: step.toLocaleString() })}`, loss === null ? "" : `${t("loss_train")} ${number(loss)}`];
    tooltip.show(x, y, [{ text: words[0], strong: true, colour: line.colour }, ...words.slice(1)]);
    lines.forEach((one) => one.path.classList.toggle("near", one === line));
    return words.filter(Boolean).join(", ");
  }
  function leave() {
    tooltip.hide();
    lines.forEach((one) => one.path.classList.remove("near"));
  }
  plot.addEventListener("pointermove", (event) => {
    const found = near(event);
    if (found) tell(found.line, found.point, event.clientX, event.clientY);
  });
  plot.addEventListener("pointerleave", leave);
  plot.addEventListener("blur", leave);
  // Left and right move along a curve, up and down to the next one; Enter chooses its head.
  plot.addEventListener("keydown", (event) => {
    const told = lines.filter(({ points }) => points.some(([, value]) => value !== null));
    if (event.key === "Enter" && spot && isHead(spot.line)) return actions.choose(spot.line.layer, spot.line.head, false);
    const [down, across] = arrow(event);
    if ((!down && !across) || !told.length) return undefined;
    const chosen = told.findIndex(({ layer, head }) => context.state.heads.some(([l, h]) => l === layer && h === head));
    const from = spot ? told.indexOf(spot.line) : -1;
    const line = told[from < 0 ? Math.max(chosen, 0) : clamp(from + down, told.length)];
    const points = line.points.filter(([, value]) => value !== null);
    const nearest = points.reduce((best, [step], i) => (Math.abs(step - (spot?.step ?? context.map.step)) < Math.abs(points[best][0] - (spot?.step ?? context.map.step)) ? i : best), 0);
    const point = points[clamp(nearest + (from < 0 ? 0 : across), points.length)];
    spot = { line, step: point[0] };
    const box = plot.getBoundingClientRect();
    const [x, y] = [(point[0] - span[0]) / (span[1] - span[0] || 1), (bounds[1] - point[1]) / (bounds[1] - bounds[0])];
    plot.ariaLabel = tell(line, point, box.left + x * box.width, box.top + y * box.height);
    return undefined;
  });
  plot.addEventListener("click", (event) => {
    const line = near(event)?.line;
    if (line && isHead(line)) actions.choose(line.layer, line.head, event.ctrlKey || event.metaKey || event.shiftKey);
  });

  function scoreOf({ map: current, state }) {
    const role = { refers: "reference", aligns: "alignment" }[roleOf(current, state.heads[0])];
    const pattern = current.label(...state.heads[0])?.[0];
    const own = role ?? (pattern === "broad" ? "entropy" : pattern);
    return [state.score, own].find((name) => shown.has(name)) ?? [...shown.keys()][0];
  }
  function render(current) {
    context = current;
    const { state, map: currentMap, palette } = context;
    const score = scoreOf(context);
    draw([score, palette.theme].join("|"), score, palette);
    pick.update(score);
    for (const { layer, head, path, colour } of lines) {
      const chosen = state.heads.find(([l, h]) => l === layer && h === head);
      path.classList.toggle("selected", Boolean(chosen));
      path.style.stroke = chosen ? palette.heads[chosen[2]] : colour;
      if (chosen) scores.append(path);
    }
    for (const now of nows) {
      now.hidden = currentMap.step === null;
      now.style.left = `${(100 * (currentMap.step - span[0])) / (span[1] - span[0] || 1)}%`;
    }
  }
  function table(current) {
    const score = scoreOf(current);
    const rows = shown.get(score).lines.flatMap(({ name, layer, head, points }) => points.map(([step, value]) => [score, name ?? "", layer ?? "", head ?? "", step, value]));
    return { columns: ["score", "curve", "layer", "head", "step", "value"], rows };
  }
  return { element, render, table };
}

/** A curve, its chance and its control have one colour; the latter two are dashed. */
const kindOf = (name) => (name === "control" ? "knockout" : name.replace(/[/_](chance|control|blocked)$/, ""));

function key(colour, text, dashed) {
  const swatch = make("i", { class: dashed ? "dashed" : "" });
  swatch.style.setProperty("--colour", colour);
  return [make("span", {}, swatch, text)];
}

/** When the first head passed the threshold, and the loss at that step. */
export function appeared(lines, threshold, train, t) {
  let first = null;
  for (const { layer, head, points } of lines) {
    const i = points.findIndex(([, value]) => value >= threshold);
    if (i >= 0 && (!first || i < first.i || (i === first.i && points[i][1] > first.value))) first = { layer, head, i, value: points[i][1], points };
  }
  if (!first) return t("never_appeared", { threshold });
  const { layer, head, i, points } = first;
  if (i === 0) return t("appeared_start", { layer, head, threshold });
  const [from, to] = [points[i - 1][0], points[i][0]];
  const loss = (step) => { const value = valueAt(train, step); return value === null ? "–" : number(value); };
  const plain = t("appeared_plain", { layer, head, threshold, from, to });
  return loss(from) === "–" ? plain : `${plain} ${t("appeared_loss", { before: loss(from), after: loss(to) })}`;
}
