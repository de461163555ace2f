/* The typed sentence: its text, read by a checkpoint; generation token by token. */

import { button, make, onChange } from "./dom.js";

const COUNT_MS = 250; // after the last key, the tokens are counted

/** `count(text)` resolves to { tokens, limit }, for the counter. */
export function promptPanel({ t, actions, count }) {
  const { ask } = actions;
  const text = make("textarea", { rows: 1, placeholder: t("prompt_placeholder"), ariaLabel: t("prompt_label"), spellcheck: false, dir: "auto" });
  const temperature = make("input", { type: "number", min: 0, max: 5, step: 0.1, value: 0.8 });
  const read = () => ask({ text: text.value, new_tokens: 0, seed: Math.floor(Math.random() * 1e6) });
  const one = (key, onClick, className = "plain") => button(t(key), onClick, { class: className, title: t(`${key}_why`) });
  const remove = one("prompt_reset", () => ask({ new_tokens: 0 }));
  const onward = [one("prompt_next", () => ask({ text: text.value, add: 1 })), one("prompt_more", () => ask({ text: text.value, add: 10 })), remove,
    make("label", { class: "check" }, t("prompt_temperature"), " ", temperature)];
  const counter = make("span", { class: "counter", attributes: { role: "status" } });
  const back = button("×", actions.stopTyping, { class: "icon", title: t("prompt_back"), ariaLabel: t("prompt_back") });
  const element = make("section", { class: "prompt", ariaLabel: t("prompt_label") }, text, counter, one("prompt_run", read, "primary"), ...onward, back);
  text.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    read();
  });
  temperature.addEventListener("change", () => ask({ temperature: Number(temperature.value) }));

  let timer = 0;
  async function recount() {
    const asked = text.value;
    const { tokens, limit } = await count(asked).catch(() => ({}));
    if (asked !== text.value || tokens === undefined) return;
    counter.textContent = t("token_count", { tokens, limit });
    counter.classList.toggle("problem", tokens > limit);
  }
  function countSoon() {
    clearTimeout(timer);
    timer = setTimeout(recount, COUNT_MS);
  }
  text.addEventListener("input", countSoon);
  const recountOnce = onChange(countSoon);
  const fill = onChange((live) => { text.value = live.text; countSoon(); });

  /** `pair`: the model answers the text as a whole, so there is no token by token generation; `ready`: it can count. */
  function render(live, pair, ready) {
    for (const each of onward) each.hidden = pair;
    fill(live.text, live);
    recountOnce(ready);
    temperature.value = live.temperature;
    remove.disabled = !live.new_tokens;
  }
  return { element, render, focus: () => { text.focus(); text.select(); } };
}
