/* Helpers that build the page. Text from models and users is only ever inserted as text, never as HTML. */

/** An element with properties, and children that are elements or text. */
export function make(tag, properties = {}, ...children) {
  const { class: className, data, ...rest } = properties;
  const element = Object.assign(document.createElement(tag), rest);
  if (className) element.className = className;
  if (data) Object.assign(element.dataset, data);
  element.append(...children);
  return element;
}

export function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** One of our own texts, with <b> and <code> as elements. */
export function rich(element, text) {
  const parts = text.split(/<(b|code)>(.*?)<\/\1>/);
  element.replaceChildren(...parts.map((part, i) =>
    i % 3 === 0 ? part : i % 3 === 2 ? make(parts[i - 1], {}, part) : "").filter(Boolean));
  return element;
}

/** The direction of an arrow key as [down, right]; keeps the key from scrolling the page. */
export function arrow(event) {
  const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
  if (step) event.preventDefault();
  return step ?? [0, 0];
}

export const clamp = (index, count) => Math.min(Math.max(index, 0), Math.max(count - 1, 0));
export const range = (count) => Array.from({ length: count }, (_, i) => i);

/** 0.1234 as 12.3%, with fewer digits for larger shares. */
export function percent(share, digits = share === 0 || share >= 0.0995 ? 0 : 1) {
  return (100 * share).toFixed(digits) + "%";
}

export const number = (value, digits = 2) => value.toFixed(digits).replace("-", "−");
export const visible = (token) => token.replace(/^ (?=\S)/, "").replace(/\s/g, "␣") || "∅";
export const quoted = (token) => `“${visible(token)}”`;

/** Sizes a canvas to `width` x `height` CSS pixels of `ratio` device pixels; returns its cleared 2d context. */
export function prepare(canvas, width, height) {
  const ratio = globalThis.devicePixelRatio || 1;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  Object.assign(canvas.style, { width: `${width}px`, height: `${height}px` });
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  return context;
}

/** A group of buttons of which one is pressed; arrow keys move among them. `labels` are [key, text, title?]. */
export function choices(role, labels, onChoose) {
  const buttons = labels.map(([key, text, title = ""]) => {
    const button = make("button", { type: "button", title, data: { key } }, text);
    button.setAttribute("role", role === "tablist" ? "tab" : "radio");
    button.addEventListener("click", () => onChoose(key));
    return button;
  });
  const element = make("div", { class: role === "tablist" ? "tabs" : "choice" }, ...buttons);
  element.setAttribute("role", role);
  element.addEventListener("keydown", (event) => {
    const [down, right] = arrow(event);
    if (!down && !right) return;
    const next = buttons[(buttons.indexOf(document.activeElement) + down + right + buttons.length) % buttons.length];
    next.focus();
    onChoose(next.dataset.key);
  });
  const update = (chosen) => buttons.forEach((button) => {
    const is = button.dataset.key === chosen;
    button.setAttribute(role === "tablist" ? "aria-selected" : "aria-checked", String(is));
    button.tabIndex = is ? 0 : -1;
  });
  return { element, update };
}
