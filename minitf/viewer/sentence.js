/* The sentence, coloured by the weights of the selected query; with several heads, a bar for each. */

import { arrow, make, percent, visible } from "./dom.js";

/** Tokens as buttons in running text, with arrow keys to move among them, and their container. */
export function tokenRow(tokens, { onPoint, onLeave, onSelect }) {
  const buttons = tokens.map((token, i) => {
    const button = make("button", { type: "button", class: "token" }, make("span", {}, visible(token)), make("small"));
    if (token.startsWith(" ")) button.classList.add("spaced");
    button.addEventListener("pointerenter", () => onPoint(i));
    button.addEventListener("pointerleave", onLeave);
    button.addEventListener("click", () => onSelect(i));
    return button;
  });
  const element = make("div", { class: "sentence" }, ...buttons);
  element.addEventListener("keydown", (event) => {
    const at = buttons.indexOf(document.activeElement);
    const [down, right] = arrow(event);
    const next = buttons[at + right + down];
    if (at < 0 || !next) return;
    next.focus();
    onSelect(at + right + down);
  });
  return { element, buttons };
}

export function sentenceView(map, { t, set }) {
  const { element: row, buttons } = tokenRow(map.tokens, {
    onPoint: (query) => set({ point: { query, key: null } }),
    onLeave: () => set({ point: null }),
    onSelect: (query) => set({ query, key: null, point: null }),
  });
  row.setAttribute("role", "group");
  row.ariaLabel = t("pick_query");
  const readout = make("p", { class: "readout", ariaLive: "polite" });
  const element = make("section", { class: "reading" }, row, readout);

  function update({ looks, query, selected, palette, words }) {
    const [look] = looks;
    const single = looks.length === 1;
    buttons.forEach((button, key) => {
      const [name, share] = button.children;
      const shown = key <= query && !look.isHidden(query, key);
      const strength = shown ? look.share(query, key) : 0;
      name.style.background = single && shown ? palette.share(strength) : "";
      name.style.color = single && shown ? palette.ink(strength) : "";
      button.classList.toggle("future", key > query);
      button.classList.toggle("query", key === query);
      button.classList.toggle("new", map.prompt_length !== undefined && key >= map.prompt_length);
      button.ariaPressed = String(key === selected);
      button.tabIndex = key === selected ? 0 : -1;
      if (single) {
        share.textContent = shown && strength >= 0.01 ? (look.byNorm ? look.value(query, key).toFixed(2) : percent(look.weight(query, key))) : "";
      } else {
        share.replaceChildren(...(shown ? looks : []).map((one, i) => {
          const bar = make("i");
          bar.style.background = palette.heads[i];
          bar.style.height = `${Math.round(14 * one.share(query, key))}px`;
          return bar;
        }));
      }
    });
    readout.textContent = words;
  }
  return { element, update };
}
