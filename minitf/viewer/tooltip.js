/* The note at the pointer: the value and the words of what is pointed at. One for the whole page; Escape hides it. */

import { make } from "./dom.js";

const AWAY = 14; // pixels from the pointer

export function createTooltip(root) {
  const element = make("div", { class: "tooltip", attributes: { "aria-hidden": "true" } });
  element.hidden = true;
  root.append(element);
  document.addEventListener("keydown", (event) => event.key === "Escape" && hide());

  /** Lines of text, or of { colour, text }, near the point (x, y) of the window. */
  function show(x, y, lines) {
    element.replaceChildren(...lines.filter(Boolean).map((line) => {
      const { text, colour, strong } = typeof line === "string" ? { text: line } : line;
      const row = make(strong ? "b" : "span", { class: "line" }, text);
      if (colour) {
        const swatch = make("i");
        swatch.style.background = colour;
        row.prepend(swatch);
      }
      return row;
    }));
    element.hidden = false;
    const { offsetWidth: width, offsetHeight: height } = element;
    const left = x + AWAY + width > innerWidth ? x - AWAY - width : x + AWAY;
    const top = y + AWAY + height > innerHeight ? y - AWAY - height : y + AWAY;
    Object.assign(element.style, { left: `${Math.max(left, 4)}px`, top: `${Math.max(top, 4)}px` });
  }
  function hide() {
    element.hidden = true;
  }
  /** Show `lines()` while the element is pointed at or has the focus. */
  function attach(target, lines) {
    target.addEventListener("pointermove", (event) => show(event.clientX, event.clientY, lines()));
    target.addEventListener("pointerleave", hide);
    target.addEventListener("focus", () => {
      if (!target.matches(":focus-visible")) return;
      const box = target.getBoundingClientRect();
      show(box.left, box.bottom - AWAY, lines());
    });
    target.addEventListener("blur", hide);
  }
  return { show, hide, attach, element };
}
