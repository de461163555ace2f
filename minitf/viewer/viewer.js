/* The attention viewer: `mountViewer(root, source, theme)`; for `source` see source.js.
 *
 * state.js    the selection: what one looks at          data.js    loads what the selection asks for
 * viewer.js   puts the parts on the page, and shows state and data in all of them after every change
 *
 * A view is made by `xView(map, api)` once per text: { element, render(context), table(context) }. `render` shows the
 * context, and only that; `table` is what it shows as rows. Events change the state through `api.actions`.
 */

import { addressKeeper } from "./address.js";
import { controlBar } from "./controls.js";
import { createData, liveStep } from "./data.js";
import { button, choices, make, onChange, rich } from "./dom.js";
import { changed, liveOf, toggled, undone, withEdit } from "./edits.js";
import { editsLine } from "./edits_line.js";
import { headLine } from "./head_line.js";
import { headsPanel } from "./heads.js";
import { helpDialog, listenToKeys, listenToUndo } from "./help.js";
import { lookMenu } from "./look_menu.js";
import { headLook } from "./maps.js";
import { paletteOf } from "./colours.js";
import { preferredLanguage, remember, remembered } from "./preferences.js";
import { problemText } from "./refusals.js";
import { saveMenu } from "./save.js";
import { sentencePanel } from "./sentence.js";
import { MAX_HEADS, VIEWS, clickHead, createStore, lookAt } from "./state.js";
import { translator } from "./texts.js";
import { timeline } from "./timeline.js";
import { createTooltip } from "./tooltip.js";
import { describe, strongest } from "./words.js";
import { MAKERS, isPossible } from "./views.js";

const PADDING = 6; // pixels above a view

/** `theme` is { now(): "light" | "dark", onChange(listener), toggle? }. */
export async function mountViewer(root, source, theme) {
  const store = createStore({ language: preferredLanguage() });
  const address = addressKeeper(source.address, store);
  const { data, reload, retry } = createData(source, store, draw);
  let ui = null;
  root.classList.add("attention-viewer");

  // -- actions ----------------------------------------------------------------------------------------------------------

  const set = (change) => store.set(change);
  const t = (key, values) => translator(store.get().language)(key, values);

  function choose(layer, head, several) {
    const heads = clickHead(store.get().heads, layer, head, several || store.get().several);
    if (heads) set({ heads, focusKey: null });
    else ui.say(t("heads_full", { count: MAX_HEADS }));
  }

  /** Why no sentence can be typed and no head switched off, or "". */
  function whyNotLive() {
    if (!source.live) return t(`why_${source.why}`).replace(/<\/?code>/g, "");
    return data.run && !data.run.checkpoints.length ? t("refused_no_checkpoint") : "";
  }
  function type(change = {}) {
    const why = whyNotLive();
    if (why) return ui.say(why);
    const { live, sentence, step } = store.get();
    set({ live: live ?? { ...liveOf(data.run.sentences[sentence].text, step), ...change } });
    if (!Object.keys(change).length) ui.controls.focusPrompt();
    return undefined;
  }
  /** Back to the stored sentence; in another one the most telling word is chosen anew. */
  function stopTyping() {
    const { live, sentence } = store.get();
    const same = live?.text === data.run?.sentences[sentence]?.text && !live?.new_tokens;
    set({ live: null, edits: [], past: [], pair: null, ...(same ? {} : { query: null, key: null }) });
  }
  function ask({ add = 0, ...change }) {
    const { live, edits } = store.get();
    const next = { ...live, ...change };
    if (add) next.new_tokens = (next.text === live.text ? live.new_tokens : 0) + add;
    // Edits name positions: they end with the text they are of.
    const kept = next.text === live.text ? (next.new_tokens ? edits : edits.filter((edit) => !(edit.query >= (data.map?.prompt_length ?? 0)))) : [];
    const past = next.text === live.text && kept.length === edits.length ? {} : { edits: kept, past: [] };
    set({ live: next, ...past, ...(next.text === live.text ? {} : { pair: null, target: null }), ...(add || "new_tokens" in change ? { query: Infinity, key: null } : {}) });
  }
  /** Change what is done to the sentence: { edits, off, by }. */
  function change(next) {
    const why = whyNotLive();
    if (why) return ui.say(why);
    return set(changed(store.get(), next, data.run.sentences[store.get().sentence].text, data.map?.full));
  }
  function edit(one) {
    const edits = withEdit(store.get().edits, one);
    if (edits) change({ edits });
    else ui.say(t("too_many_edits", { count: store.get().edits.length }));
  }
  const undo = () => {
    const before = undone(store.get());
    if (before) set(before);
    else ui.say(t("nothing_to_undo"));
  };
  const restore = () => change({ edits: [], off: [] });
  /** Choose a look, and offer to test it where one clicked, or at the element of the event. */
  function test(query, key, event, move = false) {
    set({ query, key, point: null });
    if (whyNotLive()) return;
    const box = event.currentTarget?.getBoundingClientRect?.() ?? { left: 0, bottom: 0 };
    const [x, y] = event.clientX || event.clientY ? [event.clientX, event.clientY] : [box.left, box.bottom];
    ui.tooltip.hide();
    ui.menu.open(x, y, { ...contextOf(), query, key }, move);
  }
  /** The same for the word chosen and the word it looks at: the one chosen, else the one it looks at most. */
  function testChosen(event, move = false) {
    const why = whyNotLive();
    if (why) return ui.say(why);
    const { looks, state } = contextOf();
    const key = state.key ?? strongest(looks[0], state.query, 1)[0] ?? state.query;
    return test(state.query, key, event ?? { currentTarget: ui.sentence.element.querySelector(".token.query") }, move);
  }
  /** Switch heads off, or on again. */
  const switchOff = (heads) => change({ off: toggled(store.get().live?.off ?? [], heads) });
  function compareHead() {
    if (!store.get().live) type({});
    set({ other: { kind: "head" } });
  }
  async function copyLink() {
    ui.say(t((await address.copy(data.map?.step)) ? "link_copied" : "link_not_copied"));
  }
  const actions = { set, choose, type, stopTyping, ask, change, edit, undo, restore, test, testChosen, switchOff, compareHead, copyLink };

  // -- page -------------------------------------------------------------------------------------------------------------

  function build() {
    const { language } = store.get();
    root.lang = language === "zh" ? "zh-Hans" : "en";
    document.documentElement.lang = root.lang;
    const tooltip = createTooltip(root);
    const api = { t: translator(language), tooltip, actions };
    const status = make("p", { class: "toast", attributes: { role: "status" } });
    let timer = 0;
    const say = (text) => {
      status.textContent = text;
      clearTimeout(timer);
      timer = setTimeout(() => { status.textContent = ""; }, 6000);
    };
    const keysOn = () => remembered("keys") !== "off";
    const help = helpDialog({ t: api.t, notes, isOn: keysOn, turn: (on) => remember("keys", on ? "on" : "off") });
    const line = timeline({ t: api.t, tooltip, onStep });
    const controls = controlBar({ ...api, source, theme, help: help.open, chooseLanguage });
    const title = headLine(api);
    const tabs = choices("tablist", t("views"), VIEWS.map((key) => [key, t(`tab_${key}`)]), (view) => set({ view }), "panel");
    const save = saveMenu(api.t, saved, say);
    const panel = make("div", { class: "panel", id: "panel", attributes: { role: "tabpanel" } });
    const [heads, reading, problem] = [make("div", { class: "heads" }), make("div"), make("div", { class: "problem-box", role: "alert" })];
    const busy = make("p", { class: "busy", attributes: { role: "status" } });
    const edits = editsLine(api);
    const menu = lookMenu({ ...api, palette: () => paletteOf(theme.now()) });
    reading.append(edits.element);
    const detail = make("div", { class: "detail" }, title.element, reading, make("div", { class: "tab-row" }, tabs.element, save.element), panel);
    const main = make("div", { class: "columns" }, heads, detail);
    root.replaceChildren(controls.element, line.element, problem, main, busy, status, help.element, menu.element, tooltip.element);
    const resized = new ResizeObserver(draw);
    resized.observe(panel);
    resized.observe(heads);
    ui = { ...api, say, help, line, controls, title, tabs, save, panel, heads, reading, edits, menu, problem, busy, main, keysOn, views: {}, built: "" };
  }
  function chooseLanguage(language) {
    remember("language", language);
    set({ language });
    build();
    draw();
  }
  const onStep = (step) => (store.get().live ? ask({ step }) : set({ step }));

  /** The parts that depend on the text: made anew for another one. */
  const buildViews = (map) => {
    ui.views = {};
    ui.headsPanel = headsPanel(map, ui);
    ui.sentence = sentencePanel(map, ui);
    ui.heads.replaceChildren(ui.headsPanel.element);
    ui.sentence.line.append(ui.edits.row);
    ui.reading.replaceChildren(ui.sentence.element, ui.edits.element);
  };

  function contextOf() {
    const { map, run, second } = data;
    const state = { ...store.get(), query: Math.min(store.get().query, map.size - 1) };
    const settings = { hideFirst: state.hideFirst, measure: state.measure };
    const looks = state.heads.map(([layer, head, colour]) => headLook(map, layer, head, settings, colour));
    const point = state.point ?? state;
    const query = Math.min(point.query, map.size - 1);
    const key = point.key === null ? null : Math.min(point.key, query);
    const palette = paletteOf(theme.now());
    const oneScreen = isOneScreen();
    return {
      t, state, data, source, map, run, second, settings, looks, query, key, palette, whyNotLive: whyNotLive(),
      words: describe(t, map, looks, query, key),
      paintKey: [map.stamp, JSON.stringify([settings, state.heads]), palette.theme].join("|"),
      space: { width: ui.panel.clientWidth, height: oneScreen ? ui.panel.clientHeight - PADDING : 400, oneScreen },
    };
  }
  /** Whether the style sheet fits everything into the window; else the page scrolls and views have their own height. */
  const isOneScreen = () => getComputedStyle(root).overflowY === "hidden";

  function draw() {
    root.dataset.theme = theme.now();
    if (!ui) build();
    const state = store.get();
    const { map, run, error } = data;
    drawProblem(error);
    drawBusy();
    ui.controls.render({ state, data, whyNotLive: whyNotLive() });
    if (run && state.sentence !== null) drawLine(state, run);
    ui.main.hidden = !map;
    // Until the maps of another run or sentence are there, what is shown stays as it was, dimmed.
    if (!map || run !== data.mapRun || !state.heads || !state.view || state.query === null) return;
    const building = [map.id, run.scores.steps.length, Object.keys(run.series ?? {}).length, map.prompt_length ?? "", run.name].join("|");
    if (building !== ui.built) {
      buildViews(map);
      ui.built = building;
    }
    const context = contextOf();
    ui.main.dataset.run = run.name; // whose maps these are
    ui.headsPanel.render(context);
    ui.title.render(context);
    ui.edits.render(context);
    ui.sentence.render(context);
    ui.tabs.update(state.view, (view) => isPossible(view, context));
    ui.panel.setAttribute("aria-labelledby", `tab-${state.view}`);
    const view = (ui.views[state.view] ??= MAKERS[state.view](map, ui, run));
    if (ui.panel.firstChild !== view.element) ui.panel.replaceChildren(view.element);
    view.render(context);
    address.update();
  }

  function drawLine(state, run) {
    if (!state.live) {
      const { looks } = run.sentences[state.sentence];
      return ui.line.render(run.curves, looks, lookAt(looks, state.step));
    }
    const steps = run.checkpoints;
    const note = source.remote ? t("checkpoints_kept", { count: steps.length }) : t("model_of_page");
    return ui.line.render(run.curves, steps.map((step) => [step]), Math.max(steps.indexOf(liveStep(run, state.live)), 0), note);
  }
  function drawBusy() {
    ui.main.classList.toggle("stale", data.loading);
    ui.main.ariaBusy = String(data.loading);
    ui.busy.textContent = data.loading ? t(store.get().live ? "loading_live" : "loading") : "";
  }
  const drawProblem = (error) => {
    const none = data.runs && !data.runs.length;
    ui.problem.hidden = !error && !none;
    ui.main.classList.toggle("failed", Boolean(error));
    const key = none ? "no_runs" : error?.key;
    const content = JSON.stringify([key, error?.values]);
    if (ui.problem.dataset.content === content || ui.problem.hidden) return;
    ui.problem.dataset.content = content;
    const text = none ? rich(make("p"), t(key)) : make("p", {}, problemText(t, error));
    if (none && data.logdir) text.append(" ", make("code", {}, data.logdir));
    ui.problem.replaceChildren(...(none ? [make("h2", {}, t("no_runs_title"))] : []), text, button(t("retry"), retry, { class: "plain" }));
  };
  const notes = () => {
    const own = Boolean(store.get().live) || source.scoredOn === "sentence";
    return [t(own && !data.map?.usual ? "note_scores_own" : "note_scores"), t("note_colour"), t(!data.map?.exact ? "note_stored" : source.remote ? "note_exact" : "note_exact_page"), source.live ? whyNotLive() : t(`why_${source.why}`)].filter(Boolean);
  };

  /** What *Save* saves. */
  function saved() {
    const context = contextOf();
    const { state, map, run, looks } = context;
    const view = ui.views[state.view];
    const heads = looks.map(({ layer, head }) => `${layer}.${head}`);
    const title = [t(`tab_${state.view}`), looks.map((look) => t("head_name", look)).join(", "), run.name || source.title, map.step === null ? "" : t("step_at", { step: map.step })].filter(Boolean).join(" · ");
    return {
      element: view.element, table: () => view.table(context), title,
      name: ["attention", state.view, heads[0], map.step ?? ""].filter((part) => part !== "").join("_"),
      about: { view: state.view, run: run.name || source.title, step: map.step, text: map.text, heads, heads_off: state.live?.off ?? [], edits: state.live ? state.edits : [], word: state.query, exact: map.exact },
    };
  }

  // -- start ------------------------------------------------------------------------------------------------------------

  const view = (number) => () => {
    const shown = VIEWS.filter((one) => isPossible(one, contextOf()));
    if (shown[number - 1]) set({ view: shown[number - 1] });
  };
  const nextHead = (by) => () => {
    const { map } = data;
    const [layer, head] = store.get().heads[0];
    const at = (layer * map.heads + head + by + map.layers * map.heads) % (map.layers * map.heads);
    choose(Math.floor(at / map.heads), at % map.heads, false);
  };
  const nextWord = (by) => () => set({ query: Math.min(Math.max(store.get().query + by, 0), data.map.size - 1), key: null });
  const whenReady = (action) => () => data.map && store.get().heads && action();
  listenToKeys(document, {
    "?": () => ui.help.open(), " ": () => ui.line.toggle(), ",": () => ui.line.move(-1), ".": () => ui.line.move(1),
    "[": whenReady(nextHead(-1)), "]": whenReady(nextHead(1)), j: whenReady(nextWord(-1)), k: whenReady(nextWord(1)),
    x: whenReady(() => testChosen()), m: whenReady(() => testChosen(undefined, true)), u: undo,
    t: () => type(), f: () => set({ hideFirst: !store.get().hideFirst }), s: () => ui.save.open(), c: copyLink,
    ...Object.fromEntries(VIEWS.map((_, i) => [String((i + 1) % 10), whenReady(view(i + 1))])),
  }, () => ui?.keysOn());
  listenToUndo(document, undo, () => store.get().past.length > 0);
  theme.onChange(draw);
  source.onReload?.(reload);
  draw();
  await reload();
}
