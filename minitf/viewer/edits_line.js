/* What is done to the sentence: a row with a chip for each edit and undo, and one line that says what came of it. */

import { button, fillSelect, make, onChange } from "./dom.js";
import { editText, effectOf, effectText, isChanged, toggled } from "./edits.js";

export function editsLine({ t, actions }) {
  const chips = make("div", { class: "edit-chips", attributes: { role: "group", "aria-label": t("changes") } });
  const by = make("select", { class: "by", ariaLabel: t("by"), title: t("by_why") });
  by.addEventListener("change", () => actions.change({ by: by.value }));
  const undo = button(t("undo"), actions.undo, { class: "plain", title: t("undo_why") });
  const restore = button(t("restore"), actions.restore, { class: "plain" });
  const sentence = make("p", { class: "effect", attributes: { role: "status" } });
  const row = make("div", { class: "edit-row" }, chips, undo, restore);
  const element = make("div", { class: "edits" }, sentence);
  let focus = false;

  const list = onChange((map, { edits, live }) => {
    const chip = (text, remove) => button(make("span", {}, text, make("b", {}, " ×")), () => { focus = true; remove(); }, { class: "chip", ariaLabel: t("remove_change", { change: text }), title: t("remove") });
    const off = live.off.map((head) => chip(t("chip_off", { heads: t("head_lower", { layer: head[0], head: head[1] }) }), () => actions.change({ off: toggled(live.off, [head]) })));
    const looks = edits.map((edit, i) => chip(editText(t, map, edit), () => actions.change({ edits: edits.filter((_, other) => other !== i) })));
    chips.replaceChildren(...looks, ...off, ...(live.off.length ? [by] : []));
    fillSelect(by, ["zero", "mean"].map((one) => [one, t(`by_${one}`)]), live.by);
  });

  function render({ map, state, data }) {
    element.hidden = row.hidden = !isChanged(state);
    if (element.hidden) return;
    list(JSON.stringify([state.edits, state.live.off, state.live.by, map.stamp]), map, state);
    if (focus) (chips.querySelector("button") ?? undo).focus(); // the chip that had the focus is gone
    focus = false;
    // Until the reply is there, nothing is said of it.
    const text = map.before && !data.loading && map.of === JSON.stringify([state.edits, state.live.off, state.live.by]) ? effectText(t, map, state) : "";
    if (text && sentence.textContent !== text) {
      const { position } = effectOf(map);
      sentence.replaceChildren(button(text, () => actions.set({ query: position, key: null, view: "next_token" }), { class: "effect-link", title: `${text} ${t("effect_why")}` }));
    } else if (!text) sentence.textContent = "…";
  }
  return { row, element, render };
}
