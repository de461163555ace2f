/* The first line of the page: run, sentence, typing, link, help, language, theme. */

import { button, fillSelect, make } from "./dom.js";
import { promptPanel } from "./prompt.js";
import { LANGUAGES } from "./texts.js";

export function controlBar({ t, actions, source, theme, help, chooseLanguage }) {
  const runs = make("select");
  const sentences = make("select");
  runs.addEventListener("change", () => actions.set({ run: runs.value }));
  sentences.addEventListener("change", () => actions.set({ live: null, edits: [], past: [], pair: null, target: null, sentence: Number(sentences.value), query: null, key: null }));
  const runLabel = make("label", { class: "run" }, make("span", {}, t("run")), runs);
  const sentenceLabel = make("label", { class: "grow" }, make("span", {}, t("sentence")), sentences);
  const typing = button(t("type_own"), () => actions.type(), { class: "plain" });
  const prompt = promptPanel({ t, actions, count: async (text) => (step === null ? {} : source.count?.(run, step, text) ?? {}) });
  const languages = Object.entries(LANGUAGES);
  const language = button("", () => chooseLanguage(other), { class: "plain language" });
  const icon = (text, key, onClick) => button(text, onClick, { class: "icon", title: t(key), ariaLabel: t(key) });
  const copy = button(t("copy_link"), actions.copyLink, { class: "plain" });
  const corner = make("div", { class: "corner" }, copy, icon("?", "help", help), language,
    ...(theme.toggle ? [icon("◐", "theme", () => theme.toggle())] : []));
  const element = make("header", { class: "controls" }, make("h1", { class: source.remote ? "unseen" : "", title: source.title }, source.title || t("title")), runLabel, sentenceLabel, typing, prompt.element, corner);
  let [run, step, other] = ["", null, "zh"];

  function render({ state, data, whyNotLive }) {
    const names = data.runs ?? [];
    runLabel.hidden = names.length < 2 && !(source.remote && names.length);
    copy.hidden = !data.map;
    fillSelect(runs, names.map((name) => [name, name]), state.run);
    const texts = data.run?.sentences ?? [];
    fillSelect(sentences, texts.map((one, i) => [String(i), one.text.replace(/\s+/g, " ")]), String(state.sentence ?? ""));
    sentenceLabel.hidden = typing.hidden = Boolean(state.live) || !texts.length;
    typing.setAttribute("aria-disabled", String(Boolean(whyNotLive)));
    typing.title = whyNotLive || t("type_why");
    prompt.element.hidden = !state.live;
    [run, step] = [state.run, data.run?.checkpoints.at(-1) ?? null];
    if (state.live) prompt.render(state.live, Boolean(data.map?.alignment || data.run?.sentences[0]?.text.includes(" => ")), step !== null);
    const [key, theirs] = languages.find(([one]) => one !== state.language);
    other = key;
    language.textContent = theirs.language;
    language.lang = key === "zh" ? "zh-Hans" : "en";
  }
  return { element, render, focusPrompt: () => prompt.focus() };
}
