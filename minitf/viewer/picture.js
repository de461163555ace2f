/* Pictures of what is on the page: an element as a drawing (SVG), and as pixels (PNG).
 *
 * The drawing is made of what the browser laid out: backgrounds, borders, lines of text, canvases and charts, each at its
 * place. It contains no HTML, so that every program that reads SVG shows it.
 */

import { svg } from "./dom.js";

const [MARGIN, ENLARGED] = [12, 8]; // pixels around the picture; pixels for each one of a canvas that is shown enlarged
const CONTROLS = "select, input, .link, .compare-with, .temperature, .choice [aria-checked=false]"; // not drawn
const CURVE_STYLES = ["fill", "stroke", "stroke-width", "stroke-dasharray", "opacity", "stroke-linejoin"];

/** The SVG of an element, whatever part of it is scrolled into view, with `title` above it. */
export function drawingOf(element, title) {
  const origin = element.getBoundingClientRect();
  const shift = { x: -origin.left, y: -origin.top };
  const size = { width: 0, height: 0 };
  const body = svg("g");
  walk(element, shift, body, size);
  const ground = getComputedStyle(element.closest(".attention-viewer")).backgroundColor;
  const ink = getComputedStyle(element).color;
  const [width, height] = [Math.ceil(Math.max(size.width, 320) + 2 * MARGIN), Math.ceil(size.height + 2 * MARGIN + 26)];
  const font = getComputedStyle(element).fontFamily;
  body.setAttribute("transform", `translate(${MARGIN} ${MARGIN + 26})`);
  return svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, "font-family": font },
    svg("rect", { width, height, fill: ground }),
    svg("text", { x: MARGIN, y: MARGIN + 13, "font-size": 14, "font-weight": 600, fill: ink }, title), body);
}

export const textOf = (drawing) => new XMLSerializer().serializeToString(drawing);

/** A drawing as the bytes of a PNG, `scale` pixels for each of its own. */
export async function pixelsOf(drawing, scale = 2) {
  const image = new Image();
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(textOf(drawing))}`;
  await image.decode();
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [image.width * scale, image.height * scale];
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
  return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
}

function walk(element, shift, body, size) {
  const style = getComputedStyle(element);
  if (style.display === "none" || style.visibility === "hidden" || element.classList.contains("unseen")) return;
  const box = element.getBoundingClientRect();
  const at = { x: box.left + shift.x, y: box.top + shift.y, width: box.width, height: box.height };
  const grow = () => {
    size.width = Math.max(size.width, at.x + at.width);
    size.height = Math.max(size.height, at.y + at.height);
  };
  if (element.matches(CONTROLS)) return;
  if (element instanceof HTMLCanvasElement) { grow(); return body.append(imageOf(element, at)); }
  if (element instanceof SVGSVGElement) { grow(); return body.append(chartOf(element, at)); }
  const group = style.opacity < 1 ? svg("g", { opacity: style.opacity }) : body;
  if (group !== body) body.append(group);
  paintBox(style, at, group, element);
  const moved = { x: shift.x + element.scrollLeft, y: shift.y + element.scrollTop };
  for (const child of element.childNodes) {
    if (child.nodeType === Node.ELEMENT_NODE) walk(child, moved, group, size);
    else if (child.nodeType === Node.TEXT_NODE && child.data.trim()) paintText(child, style, moved, group, size);
  }
}

function paintBox(style, at, body, element) {
  const clear = /^rgba\(.*, 0\)$|^transparent$/;
  const round = Math.min(Number.parseFloat(style.borderTopLeftRadius) || 0, at.height / 2);
  if (!clear.test(style.backgroundColor) && !element.matches(".panel, .scroll, thead th"))
    body.append(svg("rect", { x: at.x, y: at.y, width: at.width, height: at.height, rx: round, fill: style.backgroundColor }));
  if (style.backgroundImage.startsWith("linear-gradient")) body.append(...gradientOf(style.backgroundImage, at));
  const sides = [["Top", 0, 0, 1, 0], ["Bottom", 0, 1, 1, 1], ["Left", 0, 0, 0, 1], ["Right", 1, 0, 1, 1]];
  for (const [side, x1, y1, x2, y2] of sides) {
    const width = Number.parseFloat(style[`border${side}Width`]);
    if (!width || style[`border${side}Style`] === "none") continue;
    body.append(svg("line", { x1: at.x + x1 * at.width, y1: at.y + y1 * at.height, x2: at.x + x2 * at.width, y2: at.y + y2 * at.height,
      stroke: style[`border${side}Color`], "stroke-width": width }));
  }
  const outline = style.outlineStyle === "solid" && !element.matches(":focus-visible") ? Number.parseFloat(style.outlineWidth) : 0;
  if (outline) body.append(svg("rect", { x: at.x, y: at.y, width: at.width, height: at.height, fill: "none", stroke: style.outlineColor, "stroke-width": outline }));
}

/** The steps of a gradient from left to right as boxes. */
function gradientOf(image, at) {
  const colours = image.match(/rgba?\([^)]*\)/g) ?? [];
  return colours.map((fill, i) => svg("rect", { x: at.x + (i * at.width) / colours.length, y: at.y, width: at.width / colours.length + 0.5, height: at.height, fill }));
}

/** A text node, a <text> for each line that the browser broke it into. */
function paintText(node, style, shift, body, size) {
  const range = document.createRange();
  const lines = [];
  for (let i = 0; i < node.length; i++) {
    range.setStart(node, i);
    range.setEnd(node, i + 1);
    const box = range.getBoundingClientRect();
    if (!box.width && !box.height) continue;
    const line = lines.at(-1);
    if (line && Math.abs(line.top - box.top) < 2) {
      line.text += node.data[i];
      line.left = Math.min(line.left, box.left);
      line.right = Math.max(line.right, box.right);
    } else lines.push({ text: node.data[i], top: box.top, bottom: box.bottom, left: box.left, right: box.right });
  }
  const vertical = style.writingMode !== "horizontal-tb";
  for (const line of vertical ? lines.slice(0, 1) : lines) {
    const text = svg("text", { "font-size": style.fontSize, "font-weight": style.fontWeight, fill: style.color, "xml:space": "preserve" }, vertical ? node.data : line.text);
    if (style.fontFamily.includes("mono")) text.setAttribute("font-family", "monospace");
    const middle = (line.top + line.bottom) / 2 + shift.y;
    if (vertical) {
      range.selectNodeContents(node);
      const box = range.getBoundingClientRect();
      text.setAttribute("transform", `translate(${(box.left + box.right) / 2 + shift.x} ${box.bottom + shift.y}) rotate(-90)`);
      text.setAttribute("dy", "0.35em");
    } else {
      Object.entries({ x: line.left + shift.x, y: middle, dy: "0.35em", textLength: line.right - line.left, lengthAdjust: "spacingAndGlyphs" })
        .forEach(([name, value]) => text.setAttribute(name, value));
    }
    size.width = Math.max(size.width, line.right + shift.x);
    size.height = Math.max(size.height, line.bottom + shift.y);
    body.append(text);
  }
}

/** A canvas as an image; one that the page shows enlarged has its pixels enlarged, so that they stay sharp. */
function imageOf(canvas, at) {
  const scale = at.width > canvas.width * 1.5 ? ENLARGED : 1;
  const large = document.createElement("canvas");
  [large.width, large.height] = [canvas.width * scale, canvas.height * (canvas.height === 1 ? 1 : scale)];
  const context = large.getContext("2d");
  context.imageSmoothingEnabled = false;
  context.drawImage(canvas, 0, 0, large.width, large.height);
  return svg("image", { ...at, href: large.toDataURL(), preserveAspectRatio: "none" });
}

/** A chart of the page, with the styles that the page gives its curves. */
function chartOf(chart, at) {
  const copy = chart.cloneNode(true);
  for (const [name, value] of Object.entries(at)) copy.setAttribute(name, value);
  copy.setAttribute("overflow", "visible");
  const originals = chart.querySelectorAll("*");
  [...copy.querySelectorAll("*")].forEach((one, i) => {
    const style = getComputedStyle(originals[i]);
    for (const name of CURVE_STYLES) one.setAttribute(name, style.getPropertyValue(name));
  });
  return copy;
}
