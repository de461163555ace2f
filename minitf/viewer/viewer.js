/* The attention viewer: `mountViewer(root, source, theme)`; for `source` see source.js.
 *
 * The state holds the selection. Events change it through `set`, which loads missing data and draws. The elements of a
 * view are created once per text and then only updated.
 */

import { clamp, choices, make, rich } from "./dom.js";
import { MAX_HEADS, headLook, paletteOf, readMap } from "./maps.js";
import { alignmentView } from "./alignment.js";
import { compareView } from "./compare.js";
import { nextTokenView } from "./next_token.js";
import { overTrainingView } from "./over_training.js";
import { linesView } from "./lines.js";
import { matrixView } from "./matrix.js";
import { overview, patternName } from "./overview.js";
import { preferredLanguage, remember } from "./preferences.js";
import { promptPanel } from "./prompt.js";
import { describe, defaultSentence, defaultHead, defaultQuery } from "./defaults.js";
import { sentenceView } from "./sentence.js";
import { LANGUAGES, translator } from "./texts.js";
import { timeline } from "./timeline.js";
import { threeStepsView } from "./three_steps.js";

const VIEWS = { alignment: alignmentView, lines: linesView, matrix: matrixView, three_steps: threeStepsView, next_token: nextTokenView, over_training: overTrainingView, compare: compareView };
const OWN = "\u0000own"; // the option "type a sentence"

/** `theme` is { now(): "light" | "dark", onChange(listener), toggle? }. */
export async function mountViewer(root, source, theme) {
  const state = {
    language: preferredLanguage(), run: null, sentence: null, look: null, heads: null, query: null, key: null, point: null,
    hideFirst: false, measure: "weight", view: null, temperature: 1, focusKey: null, score: "", live: null, other: null,
  };
  const known = { runs: [], run: null, map: null, second: null, otherRun: null, error: "" };
  const [runCache, mapCache] = [new Map(), new Map()];
  let [ui, latest, following] = [null, 0, true];
  root.classList.add("attention-viewer");

  // -- data ---------------------------------------------------------------------------------------------------------

  async function loadRun(name, fresh = false) {
    if (fresh || !runCache.has(name)) runCache.set(name, await source.run(name));
    return runCache.get(name);
  }
  async function loadMap(run, sentence, look) {
    const key = [run, sentence.tag, ...look].join("\u0000");
    if (!mapCache.has(key)) {
      if (mapCache.size > 300) mapCache.delete(mapCache.keys().next().value);
      const loading = source.map(run, sentence, look).then((raw) => Object.assign(readMap(raw), { stamp: key }));
      mapCache.set(key, loading);
      loading.catch(() => mapCache.delete(key));
    }
    return mapCache.get(key);
  }
  const sentenceOf = (run) => run.sentences[clamp(state.sentence, run.sentences.length)];
  const looks = () => (state.live ? known.run.checkpoints.map((step) => [step]) : sentenceOf(known.run).looks);

  /** Load the data of the current state; if calls overlap, only the last one takes effect. */
  async function load() {
    const mine = ++latest;
    try {
      const run = await loadRun(state.run);
      if (mine !== latest) return;
      const changed = known.run !== run;
      known.run = run;
      state.sentence ??= defaultSentence(run.sentences);
      const all = looks();
      if (state.look === null || state.look >= all.length || (following && changed)) state.look = all.length - 1;
      let map = known.map;
      if (state.live) map = state.live.map ?? (await askModel());
      else map = await loadMap(state.run, sentenceOf(run), all[state.look]);
      if (mine !== latest || !map) return;
      await loadSecond(mine);
      if (mine !== latest) return;
      Object.assign(known, { map, error: "" });
      fit(map);
      prefetch(all);
    } catch (error) {
      if (mine !== latest) return;
      known.error = error.message === "damaged" || error instanceof SyntaxError ? translator(state.language)("damaged") : error.message;
    }
    draw();
  }
  async function loadSecond(mine) {
    if (state.view !== "compare") return;
    state.other ??= { run: known.runs.find((name) => name !== state.run) ?? state.run, look: known.runs.length > 1 ? null : 0 };
    const other = await loadRun(state.other.run);
    if (mine !== latest) return;
    const text = sentenceOf(known.run).text;
    const sentence = other.sentences.find((one) => one.text === text) ?? other.sentences[0];
    state.other.look = state.other.look === null ? sentence.looks.length - 1 : clamp(state.other.look, sentence.looks.length);
    known.otherRun = { looks: sentence.looks };
    known.second = await loadMap(state.other.run, sentence, sentence.looks[state.other.look]);
  }
  function prefetch(all) {
    if (state.live || !source.remote) return;
    for (const index of [state.look + 1, state.look - 1, state.look + 2, state.look - 2])
      if (all[index]) loadMap(state.run, sentenceOf(known.run), all[index]).catch(() => {});
  }
  /** Clamp the selection to the map; for the first map, choose the defaults. */
  function fit(map) {
    state.heads = (state.heads ?? []).filter(([layer, head]) => layer < map.layers && head < map.heads);
    if (!state.heads.length) state.heads = [defaultHead(map)];
    state.query = state.query === null ? defaultQuery(map, state.heads[0]) : Math.min(state.query, map.size - 1); // Infinity: the last query
    Object.assign(state, { point: null, key: state.key !== null && state.key > state.query ? null : state.key });
    state.view ??= map.alignment ? "alignment" : "lines"; // pairs open with the alignment
    if (state.view === "alignment" && !map.alignment) state.view = "lines";
  }

  // -- the live model -----------------------------------------------------------------------------------------------

  async function askModel() {
    const live = state.live;
    const step = known.run.checkpoints[state.look];
    if (step === undefined) throw new Error(translator(state.language)("no_checkpoint"));
    const request = { run: state.run, step, text: live.text, new_tokens: live.new_tokens, temperature: live.temperature, seed: live.seed, heads_off: live.off };
    const raw = await source.live(request);
    if (state.live !== live) return null;
    live.map = Object.assign(readMap(raw), { stamp: JSON.stringify(request) });
    return live.map;
  }
  function ask({ add = 0, ...change }) {
    const live = { ...state.live, ...change };
    if (add) live.new_tokens = (change.text === state.live.text ? live.new_tokens : 0) + add;
    set({ live: { ...live, map: null }, ...(add || "new_tokens" in change ? { query: Infinity } : {}) });
  }
  function switchOff([layer, head]) {
    const off = state.live?.off ?? [];
    const rest = off.filter(([l, h]) => l !== layer || h !== head);
    const next = rest.length < off.length ? rest : [...off, [layer, head]];
    if (state.live) return ask({ off: next });
    set({ live: { ...newLive(sentenceOf(known.run).text), off: next }, look: nearestCheckpoint(), view: "next_token" });
  }
  const newLive = (text) => ({ text, new_tokens: 0, temperature: 0.8, seed: 0, off: [], map: null });
  function nearestCheckpoint() {
    const step = state.live ? 0 : looks()[state.look]?.[0] ?? 0;
    const all = known.run.checkpoints;
    return all.reduce((best, at, i) => (Math.abs(at - step) < Math.abs(all[best] - step) ? i : best), 0);
  }

  // -- state --------------------------------------------------------------------------------------------------------

  function set(change) {
    if ("look" in change && !("live" in change)) following = change.look === looks().length - 1;
    Object.assign(state, change);
    if ("language" in change) { remember(change.language); ui = null; }
    if (state.live && "look" in change && !("live" in change)) state.live = { ...state.live, map: null };
    const loads = ["run", "sentence", "look", "live", "other"].some((key) => key in change) || (change.view === "compare" && state.view === "compare");
    if (loads) load();
    else draw();
  }

  // -- page ---------------------------------------------------------------------------------------------------------

  function buildFrame() {
    const t = translator(state.language);
    root.lang = state.language === "zh" ? "zh-Hans" : "en";
    const languages = choices("radiogroup", Object.entries(LANGUAGES).map(([key, texts]) => [key, texts.language]), (language) => set({ language }));
    const themeButton = make("button", { type: "button", class: "icon", title: t("theme"), ariaLabel: t("theme") }, "◐");
    themeButton.hidden = !theme.toggle;
    themeButton.addEventListener("click", () => theme.toggle?.());
    const runs = make("select");
    const sentences = make("select");
    runs.addEventListener("change", () => set({ run: runs.value, look: null, ...(state.live ? { live: { ...state.live, off: [], map: null } } : {}) }));
    sentences.addEventListener("change", () => {
      if (sentences.value === OWN) set({ live: newLive(sentenceOf(known.run).text), look: nearestCheckpoint() });
      else set({ live: null, sentence: Number(sentences.value), query: null, key: null, look: state.live ? null : state.look });
    });
    const hideFirst = make("input", { type: "checkbox" });
    hideFirst.addEventListener("change", () => set({ hideFirst: hideFirst.checked }));
    const measure = choices("radiogroup", ["weight", "norm"].map((key) => [key, t(`measure_${key}`), key === "norm" ? t("measure_norm_why") : ""]), (chosen) => set({ measure: chosen }));
    const tabs = choices("tablist", Object.keys(VIEWS).map((key) => [key, t(`tab_${key}`)]), (view) => set({ view }));
    const line = timeline({ t, onLook: (look) => set({ look }) });
    const prompt = promptPanel({ t, ask });
    const parts = { t, runs, sentences, hideFirst, measure, tabs, line, prompt, languages, built: "", views: {}, painted: "" };
    parts.error = make("p", { class: "problem", role: "alert" });
    parts.heads = make("div");
    parts.title = make("div", { class: "head-title" });
    parts.reading = make("div");
    parts.panel = make("div", { class: "panel", role: "tabpanel" });
    parts.note = make("footer");
    const runLabel = make("label", {}, make("span", {}, t("run")), runs);
    runLabel.hidden = known.runs.length < 2 && !source.live;
    parts.main = make("div", { class: "columns" }, parts.heads, make("section", { class: "detail" }, parts.title, parts.reading, tabs.element, parts.panel));
    parts.promptBox = make("div", {}, prompt.element);
    root.replaceChildren(
      make("header", {}, make("div", { class: "title-row" }, make("h1", {}, source.title ?? "Attention"), make("div", { class: "corner" }, languages.element, themeButton)), rich(make("p", { class: "intro" }), t("intro"))),
      make("div", { class: "controls" }, runLabel, make("label", { class: "grow" }, make("span", {}, t("sentence")), sentences), measure.element,
        make("label", { class: "check", title: t("hide_first_why") }, hideFirst, t("hide_first"))),
      parts.promptBox, line.element, parts.error, parts.main, parts.note,
    );
    return parts;
  }

  function buildViews(map) {
    const api = { t: ui.t, set, other: { runs: known.runs } };
    ui.views = {};
    ui.makeView = (name) => (ui.views[name] ??= VIEWS[name](name === "over_training" ? known.run : map, api));
    ui.overview = overview(map, { t: ui.t, onHead: chooseHead });
    ui.sentence = sentenceView(map, api);
    ui.heads.replaceChildren(ui.overview.element);
    ui.reading.replaceChildren(ui.sentence.element);
    ui.painted = "";
  }
  function chooseHead(layer, head, several) {
    const rest = state.heads.filter(([l, h]) => l !== layer || h !== head);
    if (!several) return set({ heads: [[layer, head]], focusKey: null });
    if (rest.length < state.heads.length) return set({ heads: rest.length ? rest : state.heads });
    return set({ heads: [...state.heads, [layer, head]].slice(-MAX_HEADS) });
  }

  function draw() {
    const palette = paletteOf(theme.now());
    root.dataset.theme = palette.theme;
    ui ??= buildFrame();
    const { t } = ui;
    ui.languages.update(state.language);
    ui.error.textContent = known.error && !state.live ? t("failed", { reason: known.error }) : "";
    ui.error.hidden = !ui.error.textContent;
    ui.main.hidden = !known.map;
    if (!known.run) return;
    drawControls(palette);
    const { map } = known;
    if (!map) return;
    const building = map.id + known.run.scores.steps.length + known.runs.length + (map.prompt_length ?? "");
    if (building !== ui.built) { buildViews(map); ui.built = building; }
    const settings = { hideFirst: state.hideFirst, measure: state.measure };
    const paintKey = [map.stamp, JSON.stringify(settings), palette.theme, JSON.stringify(state.heads)].join("|");
    const overviewKey = [map.stamp, JSON.stringify(settings), palette.theme].join("|");
    if (overviewKey !== ui.painted) { ui.overview.paint(map, settings, palette); ui.painted = overviewKey; }
    ui.overview.mark(state.heads, state.live?.off ?? [], palette);
    const point = state.point ?? { query: state.query, key: state.key };
    const lookList = state.heads.map(([layer, head]) => headLook(map, layer, head, settings));
    const words = describe(t, map, lookList[0], point.query, point.key);
    const context = {
      map, looks: lookList, query: Math.min(point.query, map.size - 1), key: point.key, selected: state.query, palette, words, state, paintKey,
      step: map.step, second: known.second, secondRun: state.other?.run ?? state.run, secondLooks: known.otherRun?.looks ?? [], secondLook: state.other?.look ?? 0,
    };
    drawTitle(map, palette);
    ui.sentence.update(context);
    const view = ui.makeView(state.view);
    if (ui.panel.firstChild !== view.element) ui.panel.replaceChildren(view.element);
    view.update(context);
    const notes = [t(state.live ? "note_scores_own" : "note_scores"), t("note_colour"), t(map.exact ? "note_exact" : "note_stored")].join(" ");
    const why = source.live ? "" : t(`why_${source.why}`);
    ui.note.replaceChildren(make("p", {}, notes), rich(make("p"), why));
  }

  function drawControls(palette) {
    const { t } = ui;
    const list = JSON.stringify([known.runs, known.run.sentences.map((one) => one.text), known.run.checkpoints.length > 0]);
    if (list !== ui.listed) {
      ui.runs.replaceChildren(...known.runs.map((name) => make("option", { value: name }, name)));
      const own = source.live && known.run.checkpoints.length ? [make("option", { value: OWN }, t("type_own"))] : [];
      ui.sentences.replaceChildren(...known.run.sentences.map((one, i) => make("option", { value: i }, one.text.replace(/\s+/g, " "))), ...own);
      ui.listed = list;
    }
    [ui.runs.value, ui.sentences.value] = [state.run, state.live ? OWN : state.sentence];
    ui.hideFirst.checked = state.hideFirst;
    ui.measure.update(state.measure);
    ui.measure.element.hidden = known.map !== null && !known.map.hasNorms;
    ui.tabs.update(state.view);
    ui.tabs.element.firstChild.hidden = !known.map?.alignment;
    ui.promptBox.hidden = !state.live;
    if (state.live) ui.prompt.update(state.live, known.error, Boolean(known.map?.alignment));
    ui.line.update(known.run.curves, looks().length ? looks() : [[null]], clamp(state.look, looks().length));
  }

  function drawTitle(map, palette) {
    const { t } = ui;
    const several = state.heads.length > 1;
    const [layer, head] = state.heads[0];
    const label = map.label(layer, head);
    const scores = Object.entries(map.scores).map(([name, values]) => `${t(name)} ${values[layer][head].toFixed(2)}`).join(" · ");
    const off = state.live?.off.some(([l, h]) => l === layer && h === head);
    const toggle = make("button", { type: "button", class: off ? "switch is-off" : "switch" }, t(off ? "switch_on" : "switch_off"));
    toggle.hidden = !source.live || several || !known.run.checkpoints.length;
    toggle.addEventListener("click", () => switchOff([layer, head]));
    const importance = known.run.importance?.values[`${layer},${head}`];
    const names = several ? state.heads.map(([l, h], i) => {
      const name = make("span", { class: "swatch" }, t("head_name", { layer: l, head: h }));
      name.style.setProperty("--colour", palette.heads[i]);
      return name;
    }) : [t("head_name", { layer, head }), " ", make("span", { class: "badge", data: { pattern: label?.[0] ?? "" } }, patternName(t, label), ...(label ? [" ", make("b", {}, label[1].toFixed(2))] : []))];
    const about = several ? [] : [make("p", { class: "scores" }, t(`about_${label?.[0] ?? "unclear"}`), ...(scores ? [make("br"), scores] : []),
      ...(importance === undefined ? [] : [make("br"), t("importance", { value: importance.toFixed(4), step: known.run.importance.step })]))];
    const content = JSON.stringify([state.heads, label, scores, off, importance, palette.theme, toggle.hidden]);
    if (content === ui.titled) return;
    ui.titled = content;
    ui.title.replaceChildren(make("div", {}, make("h2", {}, ...names), toggle), ...about);
  }

  // -- start --------------------------------------------------------------------------------------------------------

  /** Reload the lists of runs and steps, which grow during training. */
  async function reload() {
    try {
      known.runs = await source.runs();
      if (!known.runs.length) {
        root.replaceChildren(make("p", { class: "problem" }, translator(state.language)("no_runs")));
        ui = null;
        return;
      }
      if (!known.runs.includes(state.run)) state.run = known.runs.at(-1);
      const before = JSON.stringify(runCache.get(state.run));
      const fresh = await source.run(state.run);
      if (JSON.stringify(fresh) === before && known.map) return;
      runCache.clear();
      runCache.set(state.run, fresh);
    } catch (error) {
      known.error = error.message;
      draw();
      return;
    }
    await load();
  }
  theme.onChange(draw);
  source.onReload?.(reload);
  await reload();
}
