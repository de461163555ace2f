/* Curves over training steps, as paths. */

import { svg } from "./dom.js";

export const WIDTH = 1000; // units of every chart's width; the style sheet stretches it

/** A path through (step, value) points on the steps `from` to `to`, in a box of WIDTH x `height`. */
export function pathOf(points, [from, to], [low, high], height) {
  const x = (step) => ((step - from) / (to - from || 1)) * WIDTH;
  const y = (value) => height - 3 - ((value - low) / (high - low || 1)) * (height - 6);
  return points.filter(([, value]) => value !== null)
    .map(([step, value], i) => `${i ? "L" : "M"}${x(step).toFixed(1)} ${y(value).toFixed(1)}`).join("");
}

export function curve(className, d) {
  return svg("path", { class: className, d, "vector-effect": "non-scaling-stroke" });
}

export function chart(height) {
  return svg("svg", { viewBox: `0 0 ${WIDTH} ${height}`, preserveAspectRatio: "none", "aria-hidden": "true" });
}

/** The last value at or before a step, or null: no later value is shown as this step's. */
export function valueAt(points, step) {
  return points.findLast(([at]) => at <= step)?.[1] ?? null;
}

/** The curves of training and held-out loss, and the smallest and largest loss. */
export function lossCurves(curves, steps, height) {
  const all = [...curves.train, ...curves.val].map(([, loss]) => loss);
  const bounds = [Math.min(...all), Math.max(...all)];
  const paths = Object.entries(curves).map(([split, points]) => curve(`loss ${split}`, pathOf(points, steps, bounds, height)));
  return { bounds, paths };
}

/** The range from the first to the last step of everything shown. */
export function stepsOf(curves, looks) {
  const steps = [...curves.train, ...curves.val, ...looks].map(([step]) => step ?? 0);
  return [Math.min(...steps), Math.max(...steps)];
}
