/* Helpers that build the page. Text from models and users is only ever inserted as text, never as HTML. */

/** An element with properties, and children that are elements or text; `attributes` are set as they are. */
export function make(tag, properties = {}, ...children) {
  const { class: className, data, attributes, ...rest } = properties;
  const element = Object.assign(document.createElement(tag), rest);
  if (className) element.className = className;
  if (data) Object.assign(element.dataset, data);
  for (const [name, value] of Object.entries(attributes ?? {})) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

export function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** A button with a listener. */
export function button(text, onClick, properties = {}) {
  const element = make("button", { type: "button", ...properties }, text);
  element.addEventListener("click", onClick);
  return element;
}

/** One of our own texts, with <b> and <code> as elements. */
export function rich(element, text) {
  const parts = text.split(/<(b|code)>(.*?)<\/\1>/);
  element.replaceChildren(...parts.map((part, i) =>
    i % 3 === 0 ? part : i % 3 === 2 ? make(parts[i - 1], {}, part) : "").filter(Boolean));
  return element;
}

/** A text with `value` in bold where the text has {name}; the value comes from a model or a user. */
export function withBold(text, value) {
  return text.split("\u0001").flatMap((part, i) => (i ? [make("b", {}, make("bdi", {}, value)), part] : [part]));
}

/** The direction of an arrow key as [down, right]; keeps the key from scrolling the page. */
export function arrow(event) {
  const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
  if (!step || event.altKey || event.ctrlKey || event.metaKey) return [0, 0];
  event.preventDefault();
  return step;
}

/** The index that an arrow key, Home or End moves to among `count` items, or null for another key. */
export function moved(event, index, count) {
  const to = { Home: 0, End: count - 1 }[event.key];
  if (to !== undefined) {
    event.preventDefault();
    return to;
  }
  const [down, right] = arrow(event);
  return down || right ? clamp(index + down + right, count) : null;
}

/** Makes the buttons of a list one stop of the Tab key, at the one that is pressed; arrow keys, Home and End move among them.
 * Returns a function to be called after buttons have changed. */
export function oneStop(element, selector) {
  const all = () => [...element.querySelectorAll(selector)];
  element.addEventListener("keydown", (event) => {
    const items = all();
    const index = items.indexOf(document.activeElement);
    const next = index < 0 ? null : moved(event, index, items.length);
    if (next !== null) items[next].focus();
  });
  function update() {
    const items = all();
    const stop = items.find((one) => one === document.activeElement) ?? items.find((one) => one.ariaPressed === "true") ?? items[0];
    for (const one of items) one.tabIndex = one === stop ? 0 : -1;
  }
  element.addEventListener("focusin", update);
  return update;
}

export const clamp = (index, count) => Math.min(Math.max(index, 0), Math.max(count - 1, 0));
export const range = (count) => Array.from({ length: count }, (_, i) => i);

/** 0.1234 as 12%, with a decimal for small shares. */
export function percent(share, digits = share === 0 || share >= 0.0995 ? 0 : 1) {
  if (share > 0 && share < 0.0005 && digits === 1) return "<0.1%";
  return (100 * share).toFixed(digits) + "%";
}

export const number = (value, digits = 2) => value.toFixed(digits).replace("-", "−");
export const visible = (token) => token.replace(/^ (?=\S)/, "").replace(/\s/g, "␣") || "∅";
/** A token within a sentence of ours. One that is read from right to left stands by itself, so that it turns nothing else. */
export const quoted = (token) => (RIGHT_TO_LEFT.test(token) ? `“\u2068${visible(token)}\u2069”` : `“${visible(token)}”`);
const RIGHT_TO_LEFT = /[\p{Script=Arabic}\p{Script=Hebrew}\p{Script=Syriac}\p{Script=Thaana}\p{Script=Nko}]/u;

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

/** Calls `work` only when `key` differs from the last call's. */
export function onChange(work) {
  let last = null;
  return (key, ...values) => {
    if (key === last) return;
    last = key;
    work(...values);
  };
}

/** Options of a select, replaced only if they changed; `options` are [value, text, disabled?]. */
export function fillSelect(select, options, value) {
  const listed = JSON.stringify(options);
  if (select.dataset.listed !== listed) {
    select.replaceChildren(...options.map(([key, text, disabled = false]) => make("option", { value: key, disabled }, text)));
    select.dataset.listed = listed;
  }
  select.value = value;
}

/** A group of buttons of which one is pressed; arrow keys, Home and End move among the visible ones.
 * `labels` are [key, text, title?]; a tab controls the element with the id `panel`. */
export function choices(role, name, labels, onChoose, panel = "") {
  const isTabs = role === "tablist";
  const buttons = labels.map(([key, text, title = ""]) => {
    const attributes = { role: isTabs ? "tab" : "radio", ...(isTabs ? { "aria-controls": panel, id: `tab-${key}` } : {}) };
    return button(text, () => onChoose(key), { title, data: { key }, attributes });
  });
  const element = make("div", { class: isTabs ? "tabs" : "choice", attributes: { role, "aria-label": name } }, ...buttons);
  element.addEventListener("keydown", (event) => {
    const shown = buttons.filter((one) => !one.hidden);
    const next = shown[moved(event, shown.indexOf(document.activeElement), shown.length) ?? -1];
    if (!next) return;
    next.focus();
    onChoose(next.dataset.key);
  });
  const update = (chosen, isShown = () => true) => buttons.forEach((one) => {
    const is = one.dataset.key === chosen;
    one.hidden = !isShown(one.dataset.key);
    one.setAttribute(isTabs ? "aria-selected" : "aria-checked", String(is));
    one.tabIndex = is ? 0 : -1;
  });
  return { element, update };
}
