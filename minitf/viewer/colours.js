/* Colours of weights and of heads, and painting maps with them. */

const RAMPS = { // evenly rising (dark) or falling (light) lightness, after Matplotlib's "inferno"
  dark: [[34, 32, 48], [66, 28, 104], [118, 32, 122], [176, 46, 106], [224, 80, 66], [248, 140, 36], [252, 200, 80], [252, 252, 200]],
  light: [[243, 241, 246], [252, 222, 170], [250, 170, 92], [232, 98, 78], [186, 54, 110], [124, 32, 124], [70, 24, 104], [28, 14, 50]],
};
const DIVERGING = { // below zero, zero, above zero
  dark: [[110, 190, 255], [38, 84, 150], [30, 30, 40], [160, 76, 20], [255, 178, 84]],
  light: [[20, 84, 170], [128, 178, 226], [246, 245, 248], [240, 148, 120], [184, 28, 60]],
};
/** Colours of several heads shown together, distinguishable with colour blindness (after Okabe and Ito). */
export const HEAD_COLOURS = {
  dark: ["#ffb454", "#5cc8ff", "#5fd7a0", "#ff8a7a", "#d6a2ff", "#f2e66b"],
  light: ["#a8247f", "#0067a3", "#00704e", "#b34708", "#6a4bbd", "#6f5d00"],
};

function between(ramp, place) {
  const at = Math.min(Math.max(place, 0), 1) * (ramp.length - 1);
  const below = Math.min(Math.floor(at), ramp.length - 2);
  return ramp[below].map((start, i) => Math.round(start + (ramp[below + 1][i] - start) * (at - below)));
}

const linear = (channel) => (channel <= 0.04045 ? channel / 12.92 : ((channel + 0.055) / 1.055) ** 2.4);
/** The relative luminance of [r, g, b] in 0..255, as WCAG 2 defines it. */
export const luminance = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
/** Black or white, whichever has more contrast: at least 4.5 to 1 on any colour. */
export const inkOn = (rgb) => (luminance(rgb) > 0.179 ? "#000" : "#fff");

/** Colours of a theme: of a share from 0 to 1, by its square root so that small weights can be told apart, and of a
 * signed number from -1 to 1. */
export function paletteOf(theme) {
  const [ramp, diverging] = [RAMPS[theme], DIVERGING[theme]];
  const table = (of) => Uint32Array.from({ length: 256 }, (_, i) => {
    const [r, g, b] = of(i / 255);
    return ((255 << 24) | (b << 16) | (g << 8) | r) >>> 0;
  });
  const shareRgb = (share) => between(ramp, Math.sqrt(Math.min(Math.max(share, 0), 1)));
  const signedRgb = (value) => between(diverging, (Math.sign(value) * Math.sqrt(Math.min(Math.abs(value), 1)) + 1) / 2);
  return {
    theme,
    shares: table(shareRgb),
    signs: table((place) => signedRgb(Math.abs(2 * place - 1) < 0.005 ? 0 : 2 * place - 1)), // the two in the middle are zero
    share: (share) => `rgb(${shareRgb(share)})`,
    signed: (value) => `rgb(${signedRgb(value)})`,
    ink: (share) => inkOn(shareRgb(share)),
    signedInk: (value) => inkOn(signedRgb(value)),
    heads: HEAD_COLOURS[theme],
    curves: [...HEAD_COLOURS[theme], ...(theme === "dark" ? ["#b9b4c8", "#9fb3ff"] : ["#5d5a6e", "#3a51c9"])],
    /** Of a layer, from the first to the last of `count`. */
    layer: (layer, count) => `rgb(${between(theme === "dark" ? [[110, 170, 255], [255, 150, 90]] : [[40, 90, 190], [200, 70, 10]], count > 1 ? layer / (count - 1) : 0)})`,
  };
}

/** Paint the stored bytes of a lower triangle, row by row: each is the index of its colour. */
export function paintBytes(canvas, size, colours, bytes) {
  canvas.width = canvas.height = size;
  const image = new ImageData(size, size);
  const dots = new Uint32Array(image.data.buffer);
  let at = 0;
  for (let query = 0; query < size; query++)
    for (let key = 0; key <= query; key++) dots[query * size + key] = colours[bytes[at++]];
  canvas.getContext("2d").putImageData(image, 0, 0);
}

/** Paint a lower triangle with one pixel per weight; the style sheet enlarges it. `of(query, key)` is in 0..1. */
export function paintTriangle(canvas, size, colours, of) {
  canvas.width = canvas.height = size;
  const image = new ImageData(size, size);
  const dots = new Uint32Array(image.data.buffer);
  for (let query = 0; query < size; query++)
    for (let key = 0; key <= query; key++)
      dots[query * size + key] = colours[Math.round(255 * Math.min(Math.max(of(query, key), 0), 1))];
  canvas.getContext("2d").putImageData(image, 0, 0);
}

/** A vector as a strip of colours. */
export function paintStrip(canvas, numbers, largest, palette) {
  canvas.width = numbers.length;
  canvas.height = 1;
  const image = new ImageData(numbers.length, 1);
  const dots = new Uint32Array(image.data.buffer);
  numbers.forEach((one, i) => {
    dots[i] = palette.signs[Math.round(127.5 * (Math.min(Math.max(one / (largest || 1), -1), 1) + 1))];
  });
  canvas.getContext("2d").putImageData(image, 0, 0);
}
