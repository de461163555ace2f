/* The time line: the loss curves with the step slider on them; the slider stops at the steps that have maps. */

import { chart, lossCurves, stepsOf, valueAt } from "./charts.js";
import { button, clamp, make, moved, number, onChange } from "./dom.js";

const HEIGHT = 40;
const PLAY_MS = 450;

/** `onStep(step)` is called with null for the latest step. */
export function timeline({ t, tooltip, onStep }) {
  const curves = chart(HEIGHT);
  const [now, ticks] = [make("div", { class: "now" }), make("div", { class: "ticks" })];
  const slider = make("input", { type: "range", ariaLabel: t("step") });
  const plot = make("div", { class: "plot-area" }, curves, now, ticks);
  const play = button("▶", toggle, { class: "play", title: t("play"), ariaLabel: t("play") });
  const readout = make("p", { class: "losses" });
  const element = make("section", { class: "timeline", ariaLabel: t("time_line") }, play,
    make("div", { class: "chart" }, plot, slider), readout);
  element.hidden = true; // until there are steps
  let [looks, index, timer, span, shown] = [[], 0, 0, [0, 1], { train: [], val: [] }];

  const nearest = (step) => looks.reduce((best, [at], i) => (Math.abs(at - step) < Math.abs(looks[best][0] - step) ? i : best), 0);
  const stepAt = (x) => {
    const box = plot.getBoundingClientRect();
    return span[0] + ((x - box.left) / box.width) * (span[1] - span[0]);
  };
  function go(next) {
    if (next !== index) onStep(next === looks.length - 1 ? null : looks[next][0]);
    else slider.value = looks[index][0];
  }
  function stop() {
    clearInterval(timer);
    timer = 0;
    play.textContent = "▶";
    play.ariaLabel = play.title = t("play");
  }
  function toggle() {
    if (timer) return stop();
    if (looks.length < 2) return;
    if (index === looks.length - 1) go(0);
    play.textContent = "❚❚";
    play.ariaLabel = play.title = t("pause");
    timer = setInterval(() => (index < looks.length - 1 ? go(index + 1) : stop()), PLAY_MS);
  }
  slider.addEventListener("input", () => { stop(); go(nearest(Number(slider.value))); });
  slider.addEventListener("keydown", (event) => {
    const flipped = { ArrowUp: "ArrowRight", ArrowDown: "ArrowLeft" }[event.key]; // up is later, as in every slider
    const next = moved(flipped ? { key: flipped, preventDefault: () => event.preventDefault() } : event, index, looks.length);
    if (next === null) return;
    stop();
    go(next);
  });
  plot.addEventListener("pointerdown", (event) => {
    stop();
    go(nearest(stepAt(event.clientX)));
    plot.setPointerCapture(event.pointerId);
  });
  plot.addEventListener("pointermove", (event) => {
    const at = looks[nearest(stepAt(event.clientX))][0];
    if (event.buttons) go(nearest(stepAt(event.clientX)));
    tooltip.show(event.clientX, event.clientY, [{ text: t("step_at", { step: at.toLocaleString() }), strong: true }, ...losses(at).map((one) => one.text)]);
  });
  plot.addEventListener("pointerleave", tooltip.hide);

  const losses = (step) => [["loss_train", "train"], ["loss_val", "val"]].filter(([, split]) => shown[split].length).map(([key, split]) => {
    const value = valueAt(shown[split], step);
    return { split, text: `${t(key)} ${value === null ? "–" : number(value)}` };
  });
  const draw = onChange(() => {
    curves.replaceChildren(...(shown.train.length + shown.val.length ? lossCurves(shown, span, HEIGHT).paths : []));
    Object.assign(slider, { min: span[0], max: span[1], step: 1 });
    ticks.replaceChildren(...looks.map(([step]) => {
      const tick = make("i");
      tick.style.left = `${(100 * (step - span[0])) / (span[1] - span[0] || 1)}%`;
      return tick;
    }));
  });

  /** `currentLooks` are [step, ...] in ascending order; `note` says what kind of steps these are, if not the usual. */
  function render(currentCurves, currentLooks, currentIndex, note = "") {
    [shown, looks, index] = [currentCurves, currentLooks, currentIndex];
    const some = shown.train.length + shown.val.length > 0;
    element.hidden = !looks.length || looks[0][0] === null || (looks.length < 2 && !some);
    if (element.hidden) return stop();
    span = stepsOf(shown, looks);
    draw(JSON.stringify([shown.train.length, shown.val.length, shown.train.at(-1), looks.map(([step]) => step)]));
    const step = looks[index][0];
    slider.value = step;
    slider.disabled = play.disabled = looks.length < 2;
    now.style.left = `${(100 * (step - span[0])) / (span[1] - span[0] || 1)}%`;
    const texts = losses(step);
    slider.ariaValueText = [t("step_at", { step }), ...texts.map((one) => one.text), note].filter(Boolean).join(", ");
    readout.replaceChildren(make("b", {}, t("step_at", { step: step.toLocaleString() })),
      ...(note ? [make("span", { class: "note" }, note)] : []),
      ...texts.map(({ split, text }) => make("span", {}, make("i", { class: split }), text)));
  }
  const move = (by) => { stop(); go(clamp(index + by, looks.length)); };
  return { element, render, stop, toggle, move };
}
