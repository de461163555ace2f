/* The prompt panel: a typed sentence, run through a checkpoint; generation token by token; heads switched off. */

import { make } from "./dom.js";

export function promptPanel({ t, ask }) {
  const text = make("textarea", { rows: 2, placeholder: t("prompt_placeholder"), ariaLabel: t("prompt_label"), spellcheck: false });
  const button = (key, className, onClick) => {
    const element = make("button", { type: "button", class: className }, t(key));
    element.addEventListener("click", onClick);
    return element;
  };
  const temperature = make("input", { type: "number", min: 0, max: 5, step: 0.1, value: 0.8 });
  const read = () => ask({ text: text.value, new_tokens: 0, seed: Math.floor(Math.random() * 1e6) });
  const more = (count) => ask({ text: text.value, add: count });
  const onward = [button("prompt_next", "", () => more(1)), button("prompt_more", "", () => more(10)),
    button("prompt_reset", "", () => ask({ new_tokens: 0 })), make("label", {}, t("prompt_temperature"), " ", temperature)];
  const row = make("div", { class: "prompt-row" }, button("prompt_run", "primary", read), ...onward);
  const [status, off] = [make("p", { class: "status", role: "status" }), make("div", { class: "off-heads" })];
  const full = make("p", { class: "full" });
  const element = make("section", { class: "prompt" }, text, row, off, full, status);
  text.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); read(); }
  });
  temperature.addEventListener("change", () => ask({ temperature: Number(temperature.value) }));

  /** `pair`: the model answers the text as a whole, so there is no token by token generation. */
  function update(live, message, pair) {
    for (const one of onward) one.hidden = pair;
    if (document.activeElement !== text && text.value !== live.text) text.value = live.text;
    const generated = live.map?.prompt_length < live.map?.tokens.length;
    full.replaceChildren(...(generated ? [make("span", {}, live.map.full)] : []));
    full.title = generated ? t("prompt_new") : "";
    off.replaceChildren(...(live.off.length ? [make("span", {}, t("off_heads")), ...live.off.map(([layer, head]) => {
      const chip = make("button", { type: "button", class: "chip", title: t("switch_on") }, t("head_name", { layer, head }), " ×");
      chip.addEventListener("click", () => ask({ off: live.off.filter(([l, h]) => l !== layer || h !== head) }));
      return chip;
    }), button("all_on", "link", () => ask({ off: [] }))] : []));
    status.textContent = message || t(pair ? "prompt_pair" : "prompt_hint");
    status.classList.toggle("problem", Boolean(message));
  }
  return { element, update, focus: () => text.focus() };
}
