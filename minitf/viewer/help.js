/* The help dialog: what one sees, the keys, and how exact the numbers are. And the keys themselves. */

import { button, make, rich } from "./dom.js";

const KEYS = [
  ["?", "keys_help"], ["1–9 0", "keys_view"], ["Space", "keys_play"], [", .", "keys_step"], ["[ ]", "keys_head"], ["j k", "keys_word"],
  ["t", "keys_type"], ["x", "keys_forbid"], ["m", "keys_move"], ["u", "keys_undo"], ["f", "keys_first"], ["s", "keys_save"], ["c", "keys_link"], ["Esc", "keys_escape"],
  ["← ↑ → ↓", "keys_arrows"], ["Home End", "keys_ends"], ["Enter", "keys_enter"], ["Ctrl", "keys_several"],
];

/** `actions` are the functions of the keys: { key: () => ... }; `notes()` are paragraphs about the numbers shown. */
export function helpDialog({ t, notes, isOn, turn }) {
  const body = make("div", { class: "help-body" });
  const close = button("×", () => dialog.close(), { class: "icon", title: t("close"), ariaLabel: t("close") });
  const dialog = make("dialog", { class: "help", ariaLabel: t("help") }, make("header", {}, make("h2", {}, t("help")), close), body);
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  function open() {
    const active = make("input", { type: "checkbox", checked: isOn() });
    active.addEventListener("change", () => turn(active.checked));
    body.replaceChildren(
      rich(make("p"), t("intro")), rich(make("p"), t("how_to_read")),
      make("h3", {}, t("keys")),
      make("dl", {}, ...KEYS.flatMap(([key, text]) => [make("dt", {}, make("kbd", {}, key)), make("dd", {}, t(text))])),
      make("label", { class: "check" }, active, " ", t("keys_on")),
      make("h3", {}, t("numbers")), ...notes().map((note) => rich(make("p"), note)),
    );
    dialog.showModal();
  }
  return { element: dialog, open };
}

/** Single keys, unless one types, or has turned them off (WCAG 2.1.4). */
export function listenToKeys(target, actions, isOn) {
  target.addEventListener("keydown", (event) => {
    if (!isOn() || event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented || event.isComposing) return;
    if (event.target.closest("input:not([type=checkbox], [type=range]), textarea, select, dialog, [role=dialog], [role=menu]")) return;
    if (event.key === " " && event.target.closest("button, input, summary")) return;
    const action = actions[event.key];
    if (!action) return;
    event.preventDefault();
    action();
  });
}

/** Ctrl and Z (or the command key), where one does not type and there is something to take back. */
export function listenToUndo(target, undo, isPossible) {
  target.addEventListener("keydown", (event) => {
    const isUndo = event.key.toLowerCase() === "z" && (event.ctrlKey || event.metaKey) && !event.shiftKey && !event.altKey;
    if (!isUndo || event.target.closest("input:not([type=checkbox], [type=range]), textarea") || !isPossible()) return;
    event.preventDefault();
    undo();
  });
}
