/* The view "Over training": head scores below the loss, on the same steps. */

import { choices, make, number, svg } from "./dom.js";
import { lossPaths, pathOf, stepsOf, valueAt } from "./timeline.js";

// A head is named after a pattern above its threshold, as in heads.py.
const THRESHOLDS = { nearby: 0.5, entropy: 0.6 };
const thresholdOf = (score) => THRESHOLDS[score] ?? 0.4;
const [WIDTH, HEIGHT, LOSS_HEIGHT] = [1000, 260, 90];
const ORDER = ["induction", "previous_token", "same_word", "nearby", "first_token", "this_token", "entropy"];

export function overTrainingView(run, { t, set }) {
  const names = ORDER.filter((name) => run.scores.values[name]);
  const { steps } = run.scores;
  if (!names.length || steps.length < 2)
    return { element: make("p", { class: "hint" }, t("one_look")), update: () => {} };
  const pick = choices("radiogroup", names.map((name) => [name, t(name)]), (score) => set({ score }));
  const box = (height) => svg("svg", { viewBox: `0 0 ${WIDTH} ${height}`, preserveAspectRatio: "none" });
  const [lossChart, chart] = [box(LOSS_HEIGHT), box(HEIGHT)];
  lossChart.setAttribute("aria-hidden", "true");
  chart.setAttribute("role", "img");
  const wrap = (className, ...children) => make("div", { class: className }, ...children);
  const [said, hover] = [make("p", { class: "said", ariaLive: "polite" }), make("p", { class: "hint" })];
  const nows = [make("div", { class: "now" }), make("div", { class: "now" })];
  const axis = [1, 0.8, 0.6, 0.4, 0.2, 0].map((value) => make("span", {}, String(value)));
  const plot = wrap("score-plot", chart, nows[1], wrap("axis-y", ...axis));
  const ends = wrap("axis-x", make("span"), make("span"));
  const element = make("div", { class: "over-training" }, make("p", { class: "hint" }, t("training_lead")), pick.element,
    wrap("loss-plot", lossChart, nows[0]), plot, ends, said, hover);
  const span = stepsOf(run.curves, steps.map((step) => [step]));
  [ends.firstChild.textContent, ends.lastChild.textContent] = span.map((step) => t("step_at", { step: step.toLocaleString() }));
  if (run.curves.train.length) lossChart.replaceChildren(...lossPaths(run.curves, span, LOSS_HEIGHT).paths);
  let drawn = "";
  let lines = [];

  function draw(score) {
    const level = thresholdOf(score);
    const threshold = pathOf([[span[0], level], [span[1], level]], span, [0, 1], HEIGHT);
    lines = run.scores.values[score].flatMap((row, layer) => row.map((values, head) => {
      const points = steps.map((step, i) => [step, values[i]]);
      const line = svg("path", { class: "series", d: pathOf(points, span, [0, 1], HEIGHT), "vector-effect": "non-scaling-stroke" });
      line.style.setProperty("--depth", row.length && run.scores.values[score].length > 1 ? layer / (run.scores.values[score].length - 1) : 0);
      return { layer, head, points, line };
    }));
    chart.replaceChildren(svg("path", { class: "threshold", d: threshold, "vector-effect": "non-scaling-stroke" }), ...lines.map(({ line }) => line));
    said.textContent = appeared(lines, level, run.curves.train, t);
    chart.setAttribute("aria-label", `${t(score)}. ${said.textContent}`);
  }

  const at = (event) => {
    const area = plot.getBoundingClientRect();
    const step = span[0] + ((event.clientX - area.left) / area.width) * (span[1] - span[0]);
    const value = 1 - (event.clientY - area.top) / area.height;
    const i = steps.reduce((best, one, j) => (Math.abs(one - step) < Math.abs(steps[best] - step) ? j : best), 0);
    const near = lines.reduce((a, b) => (Math.abs((b.points[i][1] ?? 9) - value) < Math.abs((a.points[i][1] ?? 9) - value) ? b : a));
    return { ...near, i };
  };
  plot.addEventListener("pointermove", (event) => {
    const { layer, head, points, i } = at(event);
    hover.textContent = t("training_hover", { layer, head, value: number(points[i][1] ?? 0), step: steps[i] });
    lines.forEach((one) => one.line.classList.toggle("near", one.layer === layer && one.head === head));
  });
  plot.addEventListener("click", (event) => {
    const { layer, head } = at(event);
    set({ heads: [[layer, head]] });
  });

  function update({ map, state, step, palette }) {
    const pattern = map.label(...state.heads[0])?.[0];
    const own = pattern === "broad" ? "entropy" : pattern;
    const score = [state.score, own].find((name) => names.includes(name)) ?? names[0];
    if (score !== drawn) draw((drawn = score));
    pick.update(score);
    lines.forEach(({ layer, head, line }) => {
      const place = state.heads.findIndex(([l, h]) => l === layer && h === head);
      line.classList.toggle("selected", place >= 0);
      line.style.stroke = place >= 0 ? palette.heads[place] : "";
      if (place >= 0) chart.append(line);
    });
    nows.forEach((now) => {
      now.hidden = step === null;
      now.style.left = `${(100 * (step - span[0])) / (span[1] - span[0] || 1)}%`;
    });
  }
  return { element, update };
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
  const loss = (step) => (train.length ? number(valueAt(train, step)) : "–");
  return t("appeared", { layer, head, threshold, from, to, before: loss(from), after: loss(to) });
}
