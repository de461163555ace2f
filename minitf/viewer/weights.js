/* Weights of attention heads: from the bytes of a map to numbers and colours. */

const DARK_RAMP = [
  [34, 32, 48], [66, 28, 104], [118, 32, 122], [176, 46, 106], [224, 80, 66], [248, 140, 36], [252, 200, 80], [252, 252, 200],
];
const LIGHT_RAMP = [
  [243, 241, 246], [252, 214, 150], [248, 150, 70], [226, 86, 78], [178, 48, 112], [118, 32, 122], [66, 24, 100], [28, 14, 50],
];
export const darkScheme = matchMedia("(prefers-color-scheme: dark)");

/** Colour of a share from 0 to 1; of its square root, so that small weights do not all look alike. */
export function colour(share) {
  const ramp = darkScheme.matches ? DARK_RAMP : LIGHT_RAMP;
  const place = Math.sqrt(Math.min(Math.max(share, 0), 1)) * (ramp.length - 1);
  const below = Math.min(Math.floor(place), ramp.length - 2);
  return ramp[below].map((start, i) => Math.round(start + (ramp[below + 1][i] - start) * (place - below)));
}

/** The weights of a map, as `weight(layer, head, query, key)`; kept, because decoding takes time. */
const decoded = new WeakMap();
function weightsOf(map) {
  if (!decoded.has(map)) {
    const bytes = Uint8Array.from(atob(map.weights), (character) => character.charCodeAt(0));
    const size = (map.tokens.length * (map.tokens.length + 1)) / 2; // lower triangle, row by row
    const weight = (layer, head, query, key) =>
      bytes[(layer * map.heads + head) * size + (query * (query + 1)) / 2 + key] / 255;
    decoded.set(map, weight);
  }
  return decoded.get(map);
}

/** One head as the views see it: its weights, what is hidden, and the weight that gets the strongest colour. */
export function lookAt(map, layer, head, hideFirst) {
  const weight = weightsOf(map);
  const isHidden = (query, key) => hideFirst && key === 0;
  let largest = hideFirst ? 0 : 1;
  if (hideFirst) {
    for (let query = 1; query < map.tokens.length; query++)
      for (let key = 1; key <= query; key++) largest = Math.max(largest, weight(layer, head, query, key));
  }
  largest = largest || 1;
  return {
    largest,
    isHidden,
    weight: (query, key) => weight(layer, head, query, key),
    colour: (query, key) => colour(isHidden(query, key) ? 0 : weight(layer, head, query, key) / largest),
  };
}

/** Paint a head, one pixel a weight; the style sheet enlarges the pixels. */
export function paint(canvas, view, numTokens) {
  canvas.width = canvas.height = numTokens;
  const image = new ImageData(numTokens, numTokens);
  for (let query = 0; query < numTokens; query++)
    for (let key = 0; key <= query; key++)
      image.data.set([...view.colour(query, key), 255], 4 * (query * numTokens + key));
  canvas.getContext("2d").putImageData(image, 0, 0);
}
