/* From logits to probabilities and to the next token, in the page. */

import { range } from "./dom.js";

/** The probability of each id, as a function: softmax of the logits. */
export function probabilitiesOf(logits) {
  let largest = -Infinity;
  for (const logit of logits) largest = Math.max(largest, logit);
  let sum = 0;
  for (const logit of logits) sum += Math.exp(logit - largest);
  return (id) => Math.exp(logits[id] - largest) / sum;
}

/** The places of the largest numbers, in descending order. */
export function likeliest(numbers, count) {
  const best = [];
  for (let i = 0; i < numbers.length; i++) {
    if (best.length === count && !(numbers[i] > numbers[best.at(-1)])) continue;
    let place = best.length;
    while (place > 0 && numbers[i] > numbers[best[place - 1]]) place--;
    best.splice(place, 0, i);
    if (best.length > count) best.pop();
  }
  return best;
}

/** The likeliest id at temperature 0, else one by its probability: the first at which their sum exceeds `random`. */
export function draw(logits, temperature, random) {
  const [best] = likeliest(logits, 1);
  if (temperature === 0) return best;
  const powers = logits.map((logit) => Math.exp((logit - logits[best]) / temperature));
  let left = random * powers.reduce((a, b) => a + b, 0);
  return Math.max(powers.findIndex((power) => (left -= power) < 0), 0);
}

/** Numbers from 0 to below 1, the same for the same seed: xorshift (Marsaglia, 2003). */
export function randomNumbers(seed) {
  let bits = Math.imul(seed + 1, 0x9e3779b1) | 1;
  const next = () => {
    bits ^= bits << 13;
    bits ^= bits >>> 17;
    bits ^= bits << 5;
    return (bits >>> 0) / 2 ** 32;
  };
  range(8).forEach(next); // the first numbers of neighbouring seeds are alike
  return next;
}
