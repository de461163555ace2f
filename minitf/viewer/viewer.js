/* The attention viewer: `mountViewer(root, data)` shows `data.maps`, each an AttentionMaps.to_viewer().
 *
 * The state says which map, which head and which query; `render` draws the page from it, and events only change it.
 */

import { darkScheme, lookAt } from "./weights.js";
import { clamp, headGrid, legend, make, matrix, nextTokens, percent, sentence, visible } from "./views.js";

export function mountViewer(root, data) {
  const probes = [...new Set(data.maps.map((map) => map.text))];
  const mapsOf = (probe) => data.maps.filter((map) => map.text === probe);
  const state = {
    probe: probes[0],
    step: mapsOf(probes[0]).length - 1, // index among the maps of the probe
    layer: 0,
    head: 0,
    query: 0, // selected
    key: null,
    point: null, // what the pointer is over, as {query, key}; shown instead of the selection
    hideFirst: false,
  };

  const probe = make("select", {}, ...probes.map((text) => make("option", { value: text }, text.replace(/\s+/g, " "))));
  const step = make("input", { type: "range", min: 0 });
  const stepName = make("output");
  const play = make("button", { type: "button" }, "▶ play");
  const stepBox = make("label", { class: "steps" }, "Step ", step, stepName);
  const hideFirst = make("input", { type: "checkbox" });
  const [heads, detail] = [make("section", { class: "heads" }), make("section", { class: "detail" })];
  const [name, scores] = [make("h2"), make("p", { class: "scores" })];
  const readout = make("p", { class: "readout", ariaLive: "polite" });
  const [next, scale] = [make("div", { class: "next" }), make("div", { class: "legend" })];
  root.classList.add("attention-viewer");
  root.replaceChildren(
    make("header", {}, make("h1", {}, data.title), make("p", {},
      "Reading a word, the model ", make("b", {}, "matches"), " its query with the key of every word so far, ",
      make("b", {}, "weighs"), " the matches into shares that sum to 100%, and ", make("b", {}, "gathers"),
      " the words’ values by these shares. Each head does so in its own way; shown are the shares.")),
    make("div", { class: "controls" }, make("label", {}, "Sentence ", probe), stepBox, play,
      make("label", { title: "Heads with nothing to look for often park their attention on the first token." },
        hideFirst, " hide first token (attention sink)")),
    make("div", { class: "columns" }, heads, detail),
    make("footer", {}, "A head’s label is what it does most, with a score from 0 to 1; “broad” looks at all words alike. ",
      "Colours show the square root of the weight. Weights are stored in 8 bits: each is within 0.2 percentage points."),
  );

  let grid, plot, words, map, painted;
  const set = (change) => { Object.assign(state, change); render(change); };

  function build() {
    const maps = mapsOf(state.probe);
    state.step = clamp(state.step, maps.length);
    map = maps[state.step];
    Object.assign(state, { query: map.tokens.length - 1, key: null, point: null });
    Object.assign(state, { layer: clamp(state.layer, map.layers), head: clamp(state.head, map.heads) });
    step.max = maps.length - 1;
    step.hidden = play.hidden = maps.length < 2;
    painted = "";
    const onLeave = () => set({ point: null });
    grid = headGrid(map, (layer, head) => set({ layer, head, point: null }));
    plot = matrix(map, {
      onLeave,
      onPoint: (query, key) => set({ point: { query, key } }),
      onSelect: (query, key) => set({ query, key }),
      onArrow: (down, right) => {
        const query = clamp(state.query + down, map.tokens.length);
        set({ query, key: clamp((state.key ?? query) + right, query + 1), point: null });
      },
    });
    words = sentence(map, {
      onLeave,
      onPoint: (query) => set({ point: { query, key: null } }),
      onSelect: (query) => set({ query, key: null }),
    });
    heads.replaceChildren(grid.element);
    const pair = make("div", { class: "pair" }, plot.element, make("div", {}, next, scale));
    detail.replaceChildren(name, scores, words.element, readout, pair);
  }

  /** Draw the state; the grid of heads only when what it shows has changed. */
  function render(change) {
    if ("probe" in change) build();
    map = mapsOf(state.probe)[state.step];
    if ("probe" in change || "step" in change || "hideFirst" in change) grid.paintAll(map, state.hideFirst);
    grid.mark(state.layer, state.head);
    step.value = state.step;
    stepBox.hidden = map.step === null;
    stepName.textContent = step.ariaValueText = map.step ?? "";
    const { query, key } = state.point ?? state;
    const view = lookAt(map, state.layer, state.head, state.hideFirst);
    const label = map.labels[state.layer][state.head];
    name.textContent = `Layer ${state.layer}, head ${state.head}` + (label && `: ${label}`);
    scores.textContent = Object.entries(map.scores)
      .map(([score, values]) => `${score.replace("_", " ")} ${values[state.layer][state.head].toFixed(2)}`).join(" · ");
    readout.textContent = describe(map, view, query, key);
    const painting = [state.probe, state.step, state.layer, state.head, state.hideFirst, darkScheme.matches].join();
    if (painting !== painted) plot.paint(view);
    painted = painting;
    plot.mark(query, key, readout.textContent);
    words.update(view, query);
    nextTokens(next, map, query);
    legend(scale, view.largest);
  }

  const numSteps = () => mapsOf(state.probe).length;
  let timer = 0;
  const stop = () => { clearInterval(timer); timer = 0; play.textContent = "▶ play"; };
  play.addEventListener("click", () => {
    if (timer) return stop();
    if (state.step === numSteps() - 1) set({ step: 0 });
    play.textContent = "⏸ pause";
    timer = setInterval(() => (state.step < numSteps() - 1 ? set({ step: state.step + 1 }) : stop()), 250);
  });
  probe.addEventListener("change", () => { stop(); set({ probe: probe.value }); });
  step.addEventListener("input", () => { stop(); set({ step: Number(step.value) }); });
  hideFirst.addEventListener("change", () => set({ hideFirst: hideFirst.checked }));
  darkScheme.addEventListener("change", () => set({ hideFirst: state.hideFirst }));
  new ResizeObserver(() => render({})).observe(detail);

  const labels = mapsOf(state.probe)[state.step].labels;
  const telling = labels.flatMap((row, layer) => row.map((text, head) => [text, layer, head]))
    .find(([text]) => text && !text.startsWith("broad"));
  if (telling) [, state.layer, state.head] = telling;
  set({ probe: state.probe });
}

/** What is pointed at, in words. */
function describe(map, view, query, key) {
  const quote = (i) => `“${visible(map.tokens[i])}”`;
  if (key !== null)
    return `${quote(query)} (query) gives ${percent(view.weight(query, key))} of its attention to ${quote(key)} (key).`;
  const keys = Array.from({ length: query + 1 }, (_, i) => i).filter((i) => !view.isHidden(query, i));
  const most = keys.sort((a, b) => view.weight(query, b) - view.weight(query, a)).slice(0, 3);
  const shares = most.map((i) => `${quote(i)} ${percent(view.weight(query, i))}`).join(", ");
  return `${quote(query)} looks most at ${shares || "nothing shown"}.`;
}
