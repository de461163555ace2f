/* The views, and what each needs. */

import { alignmentView } from "./alignment.js";
import { compareView } from "./compare.js";
import { contributionsView } from "./contributions.js";
import { lensView } from "./lens.js";
import { linesView } from "./lines.js";
import { matrixView } from "./matrix.js";
import { nextTokenView } from "./next_token.js";
import { curvesOf, overTrainingView } from "./over_training.js";
import { patchView } from "./patch.js";
import { PROBES, canProbe } from "./probes.js";
import { threeStepsView } from "./three_steps.js";

export const MAKERS = {
  alignment: alignmentView, lines: linesView, matrix: matrixView, three_steps: threeStepsView, next_token: nextTokenView,
  lens: lensView, contributions: contributionsView, patch: patchView, over_training: overTrainingView, compare: compareView,
};

/** Whether a view has something to show; it is left out where it has not. */
export function isPossible(view, { map, run, data, state, source }) {
  if (view === "alignment") return Boolean(map.alignment);
  if (view === "over_training") return curvesOf(run).length > 0;
  if (PROBES.includes(view)) return canProbe(view, run, map, source);
  if (view !== "compare") return true;
  const { tag, looks } = run.sentences[state.sentence];
  return looks.length > 1 || Boolean(source.live && run.checkpoints.length) || data.runs.some((name) => name !== run.name && data.tags[name]?.includes(tag));
}
