/* The sentence, coloured by the weights of the chosen query; with several heads, a bar for each. Below it the readout. */

import { button, make, moved, onChange, visible } from "./dom.js";
import { describe, queryLines } from "./words.js";

const BAR = 14; // pixels of a bar of 100 %
const MANY = 48; // from this many tokens on, the shares are only at the pointer

export function sentencePanel(map, { t, tooltip, actions }) {
  const { set } = actions;
  let context = null;
  const buttons = map.tokens.map((token, i) => {
    const one = button("", () => set({ query: i, key: null, point: null }), { class: "token" });
    one.append(make("span", {}, visible(token)), make("small"));
    if (token.startsWith(" ")) one.classList.add("spaced");
    one.addEventListener("pointerenter", () => set({ point: { query: i, key: null } }));
    one.addEventListener("pointerleave", () => set({ point: null }));
    tooltip.attach(one, () => queryLines(t, context.map, context.looks, i, context.palette));
    return one;
  });
  const row = make("div", { class: "sentence", dir: "auto", attributes: { role: "group", "aria-label": t("pick_query") } }, ...buttons);
  row.classList.toggle("many", map.size > MANY);
  row.addEventListener("keydown", (event) => {
    const next = moved(event, buttons.indexOf(document.activeElement), buttons.length);
    if (next === null) return;
    set({ query: next, key: null, point: null });
    buttons[next].focus({ preventScroll: true });
  });
  const readout = make("p", { class: "readout", ariaLive: "polite" });
  const test = button(t("test_look"), (event) => actions.testChosen(event), { class: "link test" });
  const line = make("div", { class: "readout-row" }, readout, test);
  const element = make("section", { class: "reading", ariaLabel: t("sentence") }, row, line);

  const follow = onChange(() => {
    const one = buttons[context.state.query];
    const [top, bottom] = [one.offsetTop, one.offsetTop + one.offsetHeight]; // the row is their offset parent
    if (top < row.scrollTop || bottom > row.scrollTop + row.clientHeight) row.scrollTop = row.clientHeight < 3 * one.offsetHeight ? bottom + 1 - row.clientHeight : (top + bottom - row.clientHeight) / 2;
  });

  function render(current) {
    context = current;
    const { looks, query, palette, state } = context;
    const [look] = looks;
    const single = looks.length === 1;
    row.classList.toggle("several", !single);
    buttons.forEach((one, key) => {
      const [name, share] = one.children;
      const shown = key <= query && !look.isHidden(query, key);
      const strength = shown ? look.share(query, key) : 0;
      name.style.background = single && shown ? palette.share(strength) : "";
      name.style.color = single && shown ? palette.ink(strength) : "";
      one.classList.toggle("future", key > query);
      one.classList.toggle("query", key === query);
      one.classList.toggle("key", key === context.key);
      one.classList.toggle("new", context.map.prompt_length !== undefined && key >= context.map.prompt_length);
      one.ariaPressed = String(key === state.query);
      one.tabIndex = key === state.query ? 0 : -1;
      if (single) {
        share.textContent = shown && strength >= 0.01 ? look.say(query, key) : "";
      } else {
        share.replaceChildren(...(shown ? looks : []).map((each) => {
          const bar = make("i");
          bar.style.background = palette.heads[each.colour];
          bar.style.height = `${Math.round(BAR * Math.sqrt(each.share(query, key)))}px`; // as colours do
          return bar;
        }));
      }
    });
    test.title = context.whyNotLive || t("test_why");
    test.setAttribute("aria-disabled", String(Boolean(context.whyNotLive)));
    readout.textContent = readout.title = describe(t, context.map, looks, query, context.key);
    follow(`${state.query}|${context.map.stamp}|${row.clientWidth}|${row.clientHeight}`);
  }
  return { line, element, render };
}

