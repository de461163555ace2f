/* What the browser tests measure on the page. */

/** Where the parts of the page are, in pixels: [left, top, right, bottom]. */
const inside = () => {
  const boxes = (name) => [...document.querySelectorAll(name)].filter((one) => one.checkVisibility()).map((one) => {
    const box = one.getBoundingClientRect();
    return [Math.round(box.left), Math.round(box.top), Math.round(box.right), Math.round(box.bottom)];
  });
  const parts = [".controls", ".timeline", ".overview", ".head-title", ".sentence", ".token.query", ".readout", ".panel"];
  return { parts: Object.fromEntries(parts.map((name) => [name, boxes(name)])), thumbs: boxes(".thumb"),
    window: [innerWidth, innerHeight], scrolls: document.documentElement.scrollHeight - innerHeight };
};

/** Texts with a contrast below 4.5, as WCAG 2 computes it. */
const lowContrast = () => {
  const linear = (c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
  const pixel = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (text) => {
    pixel.clearRect(0, 0, 1, 1);
    pixel.fillStyle = text;
    pixel.fillRect(0, 0, 1, 1);
    return [...pixel.getImageData(0, 0, 1, 1).data];
  };
  const over = ([r, g, b, a], ground) => [r, g, b].map((one, i) => one * (a / 255) + ground[i] * (1 - a / 255));
  const groundOf = (element) => {
    if (!element) return [255, 255, 255];
    const colour = rgba(getComputedStyle(element).backgroundColor);
    return colour[3] === 255 ? colour.slice(0, 3) : over(colour, groundOf(element.parentElement));
  };
  const low = [];
  for (const element of document.querySelectorAll(".attention-viewer *")) {
    const own = [...element.childNodes].some((node) => node.nodeType === Node.TEXT_NODE && node.data.trim());
    if (!own || !element.checkVisibility() || element.closest("[disabled]") || element.closest("svg")) continue;
    const style = getComputedStyle(element);
    const ground = groundOf(element);
    const [a, b] = [light(over(rgba(style.color), ground)), light(ground)];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) low.push(`${element.className || element.tagName} ${element.textContent.slice(0, 20)}: ${ratio.toFixed(2)}`);
  }
  return low;
};
