/* The loss curve with the step slider below it; the slider stops at the steps with attention maps. */

import { clamp, make, number, svg } from "./dom.js";

const [WIDTH, HEIGHT] = [1000, 72];

/** A path through (step, value) points on the steps `from` to `to`, in a box of WIDTH x `height`. */
export function pathOf(points, [from, to], [low, high], height = HEIGHT) {
  const x = (step) => ((step - from) / (to - from || 1)) * WIDTH;
  const y = (value) => height - 3 - ((value - low) / (high - low || 1)) * (height - 6);
  return points.filter(([, value]) => value !== null)
    .map(([step, value], i) => `${i ? "L" : "M"}${x(step).toFixed(1)} ${y(value).toFixed(1)}`).join("");
}

/** The last value at or before a step. */
export function valueAt(points, step) {
  return points.findLast(([at]) => at <= step)?.[1] ?? points[0]?.[1] ?? null;
}

export function lossPaths(curves, steps, height = HEIGHT) {
  const all = [...curves.train, ...curves.val].map(([, loss]) => loss);
  const bounds = [Math.min(...all), Math.max(...all)];
  return {
    bounds,
    paths: Object.entries(curves).map(([split, points]) =>
      svg("path", { class: `loss ${split}`, d: pathOf(points, steps, bounds, height), "vector-effect": "non-scaling-stroke" })),
  };
}

/** The range from the first to the last step of everything shown. */
export function stepsOf(curves, looks) {
  const steps = [...curves.train, ...curves.val, ...looks].map(([step]) => step ?? 0);
  return [Math.min(...steps), Math.max(...steps)];
}

export function timeline({ t, onLook }) {
  const chart = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", "aria-hidden": "true" });
  const now = make("div", { class: "now" });
  const ticks = make("div", { class: "ticks" });
  const plot = make("div", { class: "plot-area" }, chart, now, ticks);
  const slider = make("input", { type: "range", ariaLabel: t("step") });
  const play = make("button", { type: "button", class: "play", title: t("play"), ariaLabel: t("play") }, "▶");
  const [readout, highest, lowest] = [make("p", { class: "losses" }), make("span", { class: "highest" }), make("span", { class: "lowest" })];
  const legend = make("p", { class: "key" }, make("i", { class: "train" }), t("loss_train"), make("i", { class: "val" }), t("loss_val"));
  plot.append(highest, lowest);
  const element = make("section", { class: "timeline" }, make("div", { class: "side" }, play), make("div", { class: "chart" }, plot, slider),
    make("div", { class: "losses-box" }, readout, legend));
  let [looks, index, timer] = [[], 0, 0];

  const nearest = (step) => looks.reduce((best, [at], i) => (Math.abs(at - step) < Math.abs(looks[best][0] - step) ? i : best), 0);
  const stop = () => { clearInterval(timer); timer = 0; play.textContent = "▶"; play.ariaLabel = play.title = t("play"); };
  const go = (next) => { if (next !== index) onLook(next); else slider.value = looks[index][0]; };
  slider.addEventListener("input", () => { stop(); go(nearest(Number(slider.value))); });
  slider.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, Home: -Infinity, End: Infinity }[event.key];
    if (!by) return;
    event.preventDefault();
    stop();
    go(clamp(index + by, looks.length));
  });
  plot.addEventListener("pointerdown", (event) => {
    const box = plot.getBoundingClientRect();
    const [from, to] = [Number(slider.min), Number(slider.max)];
    stop();
    go(nearest(from + ((event.clientX - box.left) / box.width) * (to - from)));
  });
  play.addEventListener("click", () => {
    if (timer) return stop();
    if (index === looks.length - 1) onLook(0);
    play.textContent = "❚❚";
    play.ariaLabel = play.title = t("pause");
    timer = setInterval(() => (index < looks.length - 1 ? onLook(index + 1) : stop()), 450);
  });

  let drawn = "";
  /** `looks` are [step, ...] in ascending order; `index` is the one shown. */
  function update(curves, currentLooks, currentIndex) {
    [looks, index] = [currentLooks, currentIndex];
    const some = curves.train.length + curves.val.length > 0;
    element.hidden = looks[0]?.[0] === null || (looks.length < 2 && !some);
    if (element.hidden) return;
    const [from, to] = stepsOf(curves, looks);
    const drawing = JSON.stringify([curves.train.length, curves.val.length, curves.train.at(-1), looks.map(([step]) => step)]);
    if (drawing !== drawn) {
      const { paths, bounds } = lossPaths(curves, [from, to]);
      chart.replaceChildren(...paths);
      highest.textContent = some ? number(bounds[1], 1) : "";
      lowest.textContent = some ? number(bounds[0], 1) : "";
      Object.assign(slider, { min: from, max: to, step: 1 });
      ticks.replaceChildren(...looks.map(([step]) => {
        const tick = make("i");
        tick.style.left = `${(100 * (step - from)) / (to - from || 1)}%`;
        return tick;
      }));
      drawn = drawing;
    }
    const step = looks[index][0];
    slider.value = step;
    slider.disabled = play.disabled = looks.length < 2;
    now.style.left = `${(100 * (step - from)) / (to - from || 1)}%`;
    const losses = [["loss_train", curves.train], ["loss_val", curves.val]]
      .filter(([, points]) => points.length).map(([key, points]) => `${t(key)} ${number(valueAt(points, step))}`);
    slider.ariaValueText = [t("step_at", { step }), ...losses].join(", ");
    readout.replaceChildren(make("b", {}, t("step_at", { step: step.toLocaleString() })), ...losses.map((loss) => make("span", {}, loss)));
    legend.hidden = !some;
  }
  return { element, update, stop };
}
