/* What a head does in one text: its scores for known patterns, and the pattern it is named after; as in heads.py. */

import { range } from "./dom.js";

const [ACTIVE, RESTING] = [["previous_token", "induction", "same_word"], ["first_token", "this_token"]];
const [PATTERN_THRESHOLD, NEARBY_THRESHOLD, BROAD_THRESHOLD] = [0.4, 0.5, 0.6];
const NEARBY = 4; // tokens before the query's own

/** The scores of one head, each a mean over queries; `row(query)` are its weights on the keys up to the query. */
export function patternScores(row, size) {
  const mean = (first, value) => {
    const values = range(size).slice(first).map((query) => value(row(query), query));
    return values.length ? Math.min(Math.max(values.reduce((a, b) => a + b, 0) / values.length, 0), 1) : 0;
  };
  const entropy = (weights) => -weights.reduce((sum, weight) => sum + (weight > 0 ? weight * Math.log(weight) : 0), 0);
  return {
    entropy: mean(1, (weights, query) => entropy(weights) / Math.log(query + 1)),
    previous_token: mean(2, (weights, query) => weights[query - 1]),
    first_token: mean(2, (weights) => weights[0]),
    this_token: mean(2, (weights, query) => weights[query]),
    nearby: mean(2 * NEARBY, (weights, query) => weights.subarray(query - NEARBY, query).reduce((a, b) => a + b, 0)),
  };
}

/** [pattern, score] of a head with these scores, or null if none is clear. */
export function headPattern(scores) {
  for (const patterns of [ACTIVE, RESTING]) {
    const [best] = patterns.filter((name) => name in scores).sort((a, b) => scores[b] - scores[a]);
    if (scores[best] >= PATTERN_THRESHOLD) return [best, scores[best]];
  }
  if (scores.nearby >= NEARBY_THRESHOLD) return ["nearby", scores.nearby];
  return scores.entropy >= BROAD_THRESHOLD ? ["broad", scores.entropy] : null;
}
