/* Tests of what needs no browser: the state and its address, where things are placed, and files. Run by test_viewer.py,
 * which puts the viewer's modules and the maps of a small model (2 layers of 4 heads, 8 tokens) next to this file. */

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import test from "node:test";

import { targetStart, wordsOfTokens } from "./alignment.js";
import { valueAt } from "./charts.js";
import { inkOn, luminance, paletteOf } from "./colours.js";
import { readContributions } from "./contributions.js";
import { runName } from "./compare.js";
import { createData, firstStep, otherOf } from "./data.js";
import { percent, quoted } from "./dom.js";
import { changed, cutIn, editText, effectOf, effectText, fromText, leavesSome, liveOf, requestOf, toText, toggled, undone, withEdit } from "./edits.js";
import { arrange, ordered, roleOf } from "./heads.js";
import { lensWords, readLens } from "./lens.js";
import { lineAt, spaced } from "./lines.js";
import { foundAt, headLook, readMap } from "./maps.js";
import { likeliest } from "./next_token.js";
import { curvesOf } from "./over_training.js";
import { readPatch } from "./patch.js";
import { partOf, probesOf } from "./probes.js";
import { csvOf, jsonOf } from "./save.js";
import {
  INITIAL, clickHead, createStore, defaultHead, defaultQuery, fitMap, fitRun, fromAddress, lastToken, lookAt, nearest, toAddress,
} from "./state.js";
import { translator } from "./texts.js";
import { describe } from "./words.js";

const raw = JSON.parse(readFileSync("map.json"));
const map = readMap(raw);
const settled = () => new Promise((resolve) => setTimeout(resolve, 20));

const EDITS = [
  { kind: "block", query: 7, keys: [1], heads: null }, { kind: "block", query: 6, keys: [1, 2], heads: [[0, 2], [1, 3]] },
  { kind: "move", query: 7, keys: [0, 1], to: [5], heads: [[1, 0]] }, { kind: "move", query: 7, keys: [1], to: [7], heads: null },
  { kind: "ablate", heads: [[0, 2]], by: "zero" }, { kind: "ablate", mlp: 1, by: "mean" },
];

test("the state comes back from its address", () => {
  const live = { text: "a & b = c # d", new_tokens: 3, temperature: 0.2, seed: 9, off: [[1, 2]], by: "zero", step: 40 };
  const changes = [
    { run: "a b/c", sentence: 2, step: 40, heads: [[1, 0, 0], [0, 3, 1]], query: 5, key: 2, view: "matrix", hideFirst: true },
    { run: "x", measure: "norm", temperature: 0.5, score: "watch/it>cat", filter: "induction", sort: "score" },
    { view: "compare", other: { kind: "run", step: null, run: "y:z" } },
    { view: "compare", other: { kind: "head" } },
    { view: "compare", other: { kind: "step", step: 7, run: null } },
    { live, view: "lines", edits: EDITS },
    { live: { ...live, by: "mean" } },
    { view: "compare", other: { kind: "plain" } },
    { view: "contributions", target: " cat, +" },
    { view: "patch", pair: { changed: "a & b = ü # d", position: 3 }, pairHeads: 1 },
    { live: { ...live, text: "你好 ", new_tokens: 0, temperature: 0.8, seed: 0, off: [], step: null } },
  ];
  for (const change of changes) {
    const state = { ...INITIAL, ...change };
    assert.deepEqual({ ...INITIAL, ...fromAddress(toAddress(state)) }, state);
  }
  assert.equal(fromAddress(toAddress({ ...INITIAL, step: null }, 12)).step, 12); // a link pins the step
});

test("a malformed address is ignored", () => {
  const addresses = ["%", "head=1", "head=-1.2&word=x", "step=1e9&sentence=-4", "view=none&measure=x", "temperature=NaN&with=run"];
  for (const address of addresses) assert.deepEqual({ ...INITIAL, ...fromAddress(address) }, INITIAL);
});

const runOf = (name, texts) => ({
  name, checkpoints: [], scores: { steps: [], values: {} },
  sentences: texts.map((text) => ({ tag: text, text, looks: [[0, 0], [9, 0]] })),
});

test("another run keeps the selection only where it has the same sentence", () => {
  const a = runOf("a", ["short", "the longer one"]);
  const state = { ...INITIAL, sentence: 0, step: 9, heads: [[1, 0, 0]], query: 4, key: 1 };
  assert.deepEqual(fitRun(INITIAL, a, null), { sentence: 1 });
  const same = { step: null, other: null, point: null, pair: null, pairHeads: null, target: null, sentence: 0 };
  assert.deepEqual(fitRun(state, runOf("b", ["short", "another"]), a), same);
  const other = fitRun({ ...state, sentence: 1 }, runOf("c", ["x", "yy"]), a);
  assert.deepEqual(other, { ...same, sentence: 1, heads: null, query: null, key: null });
  assert.deepEqual(fitRun(state, { ...a }, a), { sentence: 0 }); // the same run, reloaded
});

test("the selection is limited to the map", () => {
  const fit = (change) => fitMap({ ...INITIAL, ...change }, map);
  const large = fit({ heads: [[1, 2, 0], [7, 0, 1]], query: 99, key: 98 });
  assert.deepEqual([large.heads, large.query, large.key], [[[1, 2, 0]], 7, null]);
  const wrong = fit({ heads: [[5, 5, 0]], query: 3, key: 4, view: "alignment" });
  assert.deepEqual([wrong.heads.length, wrong.key, wrong.view], [1, null, "lines"]);
  assert.equal(fit({ query: Infinity }).query, 7);
  const kept = fit({ query: 3, key: 2, view: "compare" });
  assert.deepEqual([kept.query, kept.key, kept.view], [3, 2, "compare"]);
});

test("up to six heads are chosen, each keeps its colour", () => {
  let heads = [[0, 0, 0]];
  for (let head = 1; head < 6; head++) heads = clickHead(heads, 0, head, true);
  assert.deepEqual(heads, [0, 1, 2, 3, 4, 5].map((head) => [0, head, head]));
  assert.equal(clickHead(heads, 1, 0, true), null);
  const fewer = clickHead(heads, 0, 2, true);
  assert.deepEqual(fewer, [0, 1, 3, 4, 5].map((head) => [0, head, head]));
  assert.deepEqual(clickHead(fewer, 1, 0, true).at(-1), [1, 0, 2]);
  assert.deepEqual(clickHead(heads, 1, 1, false), [[1, 1, 0]]);
  assert.deepEqual(clickHead([[0, 0, 0]], 0, 0, true), [[0, 0, 0]]);
});

test("no value of a later step is shown", () => {
  assert.deepEqual([0, 10, 15, 99].map((step) => valueAt([[10, 3], [20, 2]], step)), [null, 3, 3, 2]);
  assert.deepEqual([null, 0, 15, 99].map((step) => lookAt([[5], [10], [20]], step)), [2, 0, 1, 2]);
  assert.deepEqual([null, 0, 14, 99].map((step) => nearest([10, 20], step)), [20, 10, 10, 20]);
  assert.equal(nearest([], 3), null);
});

test("heads fit into their box and stay large enough to hit", () => {
  for (const [layers, heads] of [[2, 4], [6, 6], [12, 12], [30, 9], [4, 16], [1, 1]]) {
    const { blocks, cell, labelled } = arrange(layers, heads, 486, 430);
    assert.ok(blocks * (22 + heads * cell) + 10 * (blocks - 1) <= 486);
    assert.ok(18 + Math.ceil(layers / blocks) * (cell + (labelled ? 28 : 0)) <= 430);
    assert.ok(cell >= 24, `${layers} x ${heads}: ${cell}`);
  }
});

test("a fork is compared with the run it continues, until something else is chosen", () => {
  const run = { checkpoints: [5, 9], sentences: [{ looks: [[5, 0], [9, 0]] }], forked_from: { run: "parent", step: 5 } };
  const state = { ...INITIAL, sentence: 0 };
  assert.deepEqual(otherOf(state, run), { kind: "run", run: "parent", step: null });
  assert.deepEqual(otherOf({ ...state, other: firstStep(state, run) }, run), { kind: "step", step: 5, run: null });
  assert.deepEqual(otherOf(state, { ...run, forked_from: null }), { kind: "step", step: 5, run: null });
  const [english, chinese] = ["en", "zh"].map((language) => runName(translator(language), run, "parent"));
  assert.equal(english, "run parent, which this one was forked from at step 5");
  assert.ok(chinese.includes("parent") && chinese.includes("5") && /分出/.test(chinese));
  assert.equal(runName(translator("en"), run, "another"), "run another");
});

test("heads are sorted by score and importance", () => {
  const importance = { values: { "0,1": 0.2, "1,3": 0.9 } };
  assert.deepEqual(ordered(map, "layer", "", importance).slice(0, 2), [[0, 0], [0, 1]]);
  assert.deepEqual(ordered(map, "importance", "", importance).slice(0, 2), [[1, 3], [0, 1]]);
  const scored = readMap({ ...raw, labels: raw.labels.map((row, l) => row.map((_, h) => (h === 3 ? null : ["broad", l + h / 10]))) });
  const scores = ordered(scored, "score", "", null).map((head) => scored.label(...head)?.[1] ?? -1);
  assert.deepEqual(scores, [...scores].sort((a, b) => b - a));
  assert.equal(scores.length, 8);
});

test("written words do not touch", () => {
  assert.deepEqual([...spaced([50, 51, 52, 10, 129, 0, 3, 5], 2.5, 50)], [50, 10, 129, 0]);
});

test("tokens of a pair belong to its words", () => {
  const tokens = ["<|source|>", "a", "b", "<|target|>", "You", " sh", "all", ",", " 你(1/2)", "你(2/2)", "<|end|>"];
  assert.equal(targetStart({ tokens, size: tokens.length }), 4);
  assert.deepEqual(wordsOfTokens(tokens, 4, 10, ["You", "shall", ",", "你"]), [-1, -1, -1, -1, 0, 1, 1, 2, 3, 3, -1]);
});

test("text on every colour has a contrast of at least 4.5", () => {
  for (let r = 0; r < 256; r += 15)
    for (let g = 0; g < 256; g += 15)
      for (let b = 0; b < 256; b += 15) {
        const ground = luminance([r, g, b]);
        assert.ok((inkOn([r, g, b]) === "#000" ? (ground + 0.05) / 0.05 : 1.05 / (ground + 0.05)) >= 4.5);
      }
});

test("a difference of zero has the colour of zero", () => {
  for (const theme of ["light", "dark"]) {
    const { signs, signed } = paletteOf(theme);
    const rgb = (colour) => `rgb(${[0, 8, 16].map((bits) => (colour >> bits) & 255)})`;
    assert.deepEqual([127, 127.5, 128].map((place) => rgb(signs[Math.round(place)])), Array(3).fill(signed(0)));
    assert.notEqual(rgb(signs[129]), signed(0));
  }
});

test("what is likely only after a change is shown too", () => {
  const before = new Map([["a", 0.3], ["b", 0.2], ["c", 0.1], ["d", 0.08], ["e", 0.07], ["f", 0.06], ["g", 0.05], ["h", 0.04]]);
  const now = new Map([["z", 0.5], ["y", 0.06], ["b", 0.04]]);
  assert.deepEqual(likeliest(now, before), ["z", "a", "b", "c", "d", "e", "y", "f"]);
  assert.deepEqual(likeliest(before, null), ["a", "b", "c", "d", "e"]);
});

test("a small share is not none, and a norm has its unit", () => {
  assert.deepEqual([0, 0.0002, 0.0006, 0.0994, 0.2].map((share) => percent(share)), ["0%", "<0.1%", "0.1%", "9.9%", "20%"]);
  const say = (measure) => describe(translator("en"), map, [headLook(map, 0, 1, { measure, hideFirst: false }, 0)], 4, null);
  assert.match(say("norm"), /takes most from .* \d+\.\d\d.* \(weight × norm\)\.$/);
  assert.match(say("weight"), /looks most at “.*” \d+(\.\d)?%/);
});

test("a word read from right to left turns nothing around it", () => {
  assert.equal(quoted(" cat"), "“cat”");
  assert.equal(quoted("שלום"), "“\u2068שלום\u2069”");
  assert.equal(quoted("م(1/2)"), "“\u2068م(1/2)\u2069”");
});

test("saved data can be read by a spreadsheet and is no formula", () => {
  const table = { columns: ["token", "weight"], rows: [['a,"b"', 0.5], ["=SUM(A1)", 0.25], ["-", 1], ["x\ny", 0]] };
  assert.equal(csvOf(table), 'token,weight\r\n"a,""b""",0.5\r\n\'=SUM(A1),0.25\r\n-,1\r\n"x\ny",0\r\n');
  const content = JSON.parse(jsonOf(table, { run: "r" }));
  assert.deepEqual([content.run, content.rows[1]], ["r", { token: "=SUM(A1)", weight: 0.25 }]);
});

test("other curves of a run are grouped", () => {
  const points = [[0, 0], [9, 1]];
  const series = {
    "reference/exact": points, "reference/right/chance": points, "watch/it>cat/weight/layer1_head2": points, "alignment/score": [[0, 1]],
  };
  const found = curvesOf({ series, scores: { steps: [0, 9], values: { induction: [[[0, 1]]] } } });
  const names = found.map(([group, { lines }]) => [group, lines.map(({ name, layer, head }) => name ?? [layer, head])]);
  assert.deepEqual(names, [["reference", ["exact", "right/chance"]], ["watch/it>cat/weight", [[1, 2]]], ["induction", [[0, 0]]]]);
});

test("heads found for a purpose count from the step they were found at", () => {
  const found = { aligns: [[5, [[0, 1]]], [9, [[1, 1], [1, 2]]]] };
  assert.deepEqual([0, 5, 8, null].map((step) => foundAt(found, step).aligns), [[], [[0, 1]], [[0, 1]], [[1, 1], [1, 2]]]);
  const one = readMap({ ...raw, found: foundAt(found, 9) });
  assert.equal(roleOf(one, [1, 2]), "aligns");
  assert.equal(roleOf(one, [0, 1]), null);
  assert.equal(defaultHead(one)[0], 1);
});

test("the label is what a head usually does, and what it does here is told apart", () => {
  const usual = raw.labels.map((row) => row.map(() => ["induction", 0.9]));
  const live = readMap({ ...raw, usual });
  assert.deepEqual(live.label(1, 2), ["induction", 0.9]);
  assert.deepEqual(live.here(1, 2), raw.labels[1][2]);
  assert.equal(map.here(1, 2), undefined);
});

/** A source whose maps arrive when the test says so. */
function slowSource() {
  const waiting = [];
  const map_ = (run, sentence, [step]) => new Promise((resolve, reject) => waiting.push({ step, resolve: () => resolve({ ...raw, step }), reject }));
  const source = { live: null, runs: async () => ({ names: ["a"], tags: { a: ["text"] } }), run: async () => runOf("a", ["text"]), map: map_ };
  return { source, waiting };
}

test("edits in an address that are malformed are left out", () => {
  assert.deepEqual(fromText(toText(EDITS)), EDITS);
  const wrong = ["", "b", "b7", "b7-", "b7-8", "b-1", "x7-1", "m7-1", "b7-1-2", "b7-1@", "b7-1@0", "a0.2", "a:zero", "f1:half", "b7--1", "b99999-1"];
  for (const text of wrong) assert.deepEqual(fromText(text), [], text);
  assert.deepEqual(fromText(`b7-1,${wrong.join(",")},f0:zero`), [EDITS[0], { kind: "ablate", mlp: 0, by: "zero" }]);
  assert.equal(fromText(Array(100).fill("b7-1").join(",")).length, 64);
  assert.deepEqual(fromAddress("edits=b7-1").edits, undefined); // without a typed sentence there is nothing to edit
});

test("an edit is added once, and at most 64", () => {
  assert.equal(withEdit(EDITS, { ...EDITS[0] }), EDITS);
  const many = Array.from({ length: 64 }, (_, query) => ({ kind: "block", query, keys: [0], heads: null }));
  assert.equal(withEdit(many, EDITS[1]), null);
  assert.equal(withEdit(many.slice(1), EDITS[1]).length, 64);
  assert.deepEqual([leavesSome([], 0, 0), leavesSome([], 1, 0), leavesSome([{ ...EDITS[0], query: 1, keys: [1] }], 1, 0)], [false, true, false]);
  assert.deepEqual([cutIn(EDITS, 0, 2), cutIn(EDITS, 1, 0)], [[[7, 1], [6, 1], [6, 2]], [[7, 1]]]);
  assert.deepEqual(toggled([[0, 1]], [[0, 1], [1, 1]]), [[0, 1], [1, 1]]);
  assert.deepEqual(toggled([[0, 1], [1, 1]], [[1, 1]]), [[0, 1]]);
});

test("every change of edits and heads is taken back in turn, down to the stored sentence", () => {
  const stored = { ...INITIAL, step: 9 };
  let state = stored;
  const apply = (change) => { state = { ...state, ...change }; };
  apply(changed(state, { edits: [EDITS[0]] }, "a text", undefined));
  assert.deepEqual([state.live, state.edits], [liveOf("a text", 9), [EDITS[0]]]);
  apply(changed(state, { off: [[0, 1]] }, "", undefined));
  apply(changed(state, { by: "mean" }, "", undefined));
  apply({ live: { ...state.live, step: 4, new_tokens: 2 } }); // the slider moves, the text goes on
  apply(changed(state, { edits: [] , off: [] }, "", "a text goes on"));
  assert.deepEqual([state.live.text, state.live.new_tokens, state.live.off], ["a text goes on", 0, []]);
  apply(undone(state));
  assert.deepEqual([state.live.text, state.live.new_tokens, state.live.off, state.live.by, state.edits], ["a text", 2, [[0, 1]], "mean", [EDITS[0]]]);
  apply(undone(state));
  assert.deepEqual([state.live.by, state.live.step], ["zero", 4]);
  apply(undone(state));
  assert.deepEqual([state.live.off, state.edits], [[], [EDITS[0]]]);
  apply(undone(state));
  assert.deepEqual([state.live, state.edits, state.step, state.past], [null, [], 4, []]);
  assert.equal(undone(state), null);
});

test("heads at their mean are an edit, heads at zero a field of their own", () => {
  const live = { ...liveOf("a", 3), off: [[0, 1]] };
  assert.deepEqual(requestOf(live, [EDITS[0]]), { text: "a", new_tokens: 0, temperature: 0.8, seed: 0, heads_off: [[0, 1]], edits: [EDITS[0]] });
  const mean = requestOf({ ...live, by: "mean" });
  assert.deepEqual([mean.heads_off, mean.edits], [[], [{ kind: "ablate", heads: [[0, 1]], by: "mean" }]]);
  assert.deepEqual(requestOf({ ...live, by: "mean", off: [] }).edits, []);
});

/** The map after an edit that took the token after position 2 from 0.9 to 0.2. */
const edited = readMap({
  ...raw, prompt_length: 8, actual: raw.actual.map((_, i) => (i === 2 ? 0.2 : 0.5)),
  before: { next_tokens: raw.next_tokens.map((top, i) => (i === 2 ? [[raw.tokens[3], 0.9]] : top)), actual: raw.actual.map((_, i) => (i === 2 ? 0.9 : 0.5)) },
  next_tokens: raw.next_tokens.map((top, i) => (i === 2 ? [["other", 0.7], [raw.tokens[3], 0.2]] : top)),
});

test("one sentence says what was done and what came of it", () => {
  const effect = effectOf(edited);
  assert.deepEqual([effect.position, effect.token, effect.before, effect.after, effect.small], [2, raw.tokens[3], 0.9, 0.2, false]);
  const english = translator("en");
  const [q, k, next] = [7, 1, 3].map((i) => `“${raw.tokens[i].trim()}”`);
  const live = liveOf("a", null);
  assert.equal(effectText(english, edited, { edits: [EDITS[0]], live }),
    `Without the look from ${q} to ${k} (all heads), ${next} after “${raw.tokens[2].trim()}” falls from 90% to 20%; likeliest is now “other” (70%).`);
  assert.match(effectText(english, edited, { edits: [], live: { ...live, off: [[0, 1]], by: "mean" } }), /^With the output of layer 0, head 1 at its mean, /);
  assert.match(effectText(english, edited, { edits: EDITS, live }), /^With these 6 changes, /);
  const same = readMap({ ...raw, before: { next_tokens: raw.next_tokens, actual: raw.actual } });
  assert.match(effectText(english, same, { edits: [EDITS[0]], live }), /no prediction changes much/);
  for (const language of ["en", "zh"])
    for (const edit of EDITS) assert.ok(!/[{}]|undefined|null/.test(editText(translator(language), map, edit)));
});

test("a run on pronouns opens at the pronoun it watches, where the head refers", () => {
  const tokens = ["The", " cat", " sat", ".", " It", " its", "elf", "."];
  const refers = Object.assign(readMap({ ...raw, tokens, found: { refers: [[1, 2]] } }), { watched: ["it"] });
  assert.equal(defaultQuery(refers, [1, 2]), 4);
  assert.notEqual(defaultQuery(Object.assign(refers, { watched: ["him"] }), [1, 2]), -1);
  assert.deepEqual(["it", "itself", "none", "", "."].map((word) => lastToken(tokens, word)), [4, 6, -1, -1, 7]);
  assert.equal(lastToken(["猫", "坐", "下", "它", "睡"], "它"), 3);
});

test("a line is pointed at where it is drawn", () => {
  const looks = [{ share: (query, key) => (key === 2 || key === 7 ? 0.5 : 0) }];
  assert.equal(lineAt({ looks, query: 7 }, 0.99, 2), 2);
  assert.equal(lineAt({ looks, query: 7 }, 0.5, 4.5), 2); // halfway between both ends
  assert.equal(lineAt({ looks, query: 7 }, 0.5, 7), 7);
  assert.equal(lineAt({ looks, query: 7 }, 0.5, 0), null);
});

test("the views ask for what they show, of the model as it is changed", () => {
  const run = { ...runOf("a", ["text"]), checkpoints: [5, 9] };
  const source = { live: () => {}, kinds: ["lens", "contributions", "patch"] };
  const state = { ...INITIAL, sentence: 0, step: 4, query: 2, live: liveOf("b", 6), edits: [EDITS[0]] };
  const asked = (change, from = source) => probesOf({ ...state, ...change }, run, map, from).requests;
  assert.deepEqual(asked({ view: "lines" }), []);
  assert.deepEqual(asked({ view: "lens" }, { ...source, kinds: [] }), []);
  const [lens] = asked({ view: "lens" });
  assert.deepEqual([lens.kind, lens.step, lens.text, lens.edits], ["lens", 5, "b", [EDITS[0]]]);
  const [parts] = asked({ view: "contributions", target: " cat", live: null, edits: [] });
  assert.deepEqual([parts.text, parts.position, parts.token, parts.step], ["text", 2, " cat", 5]);
  const pair = { changed: "c", position: 3 };
  assert.deepEqual(asked({ view: "patch" }), []);
  const patch = asked({ view: "patch", pair, pairHeads: 1 });
  assert.deepEqual(patch.map(({ layer, heads, edits }) => [layer, heads, edits.length]), [[0, false, 0], [1, false, 0], [1, true, 0]]);
});

test("replies and stored results are read alike", () => {
  const found = { clean: ["a", "b", "c"], changed: ["a", "x", "c"], answers: ["d", "e"], difference: 2 };
  const replies = [0, 1].map((layer) => ({ ...found, layer, heads: false, restores: [0, 1 - layer, layer], breaks: [0, 1, 0] }));
  const some = readPatch({ replies: replies.slice(0, 1), count: 2 }, null);
  assert.deepEqual([some.first, some.columns, some.share("restores", 0, 1), some.share("restores", 1, 2)], [1, [0, 1], 1, null]);
  const stored = { ...found, restores: replies.map((one) => one.restores), breaks: replies.map((one) => one.breaks), head_restores: [[[0, 0.5, 0]], [[0, 0, 1]]], head_breaks: [[[0, 0, 0]], [[0, 0, 0]]] };
  const whole = readPatch({ replies: [stored], count: 1 }, 1);
  assert.deepEqual([whole.layer, whole.columns, whole.share("restores", 0, 2)], [1, [0], 1]);
  const heads = { ...found, layer: 1, heads: true, restores: [[0, 0, 1]], breaks: [[0, 0, 0]] };
  assert.equal(readPatch({ replies: [...replies, heads], count: 3 }, 1).share("restores", 0, 2), 1);
  assert.equal(readPatch({ replies: [], count: 2 }, null), null);
  const parts = readContributions({ token: "d", logit: 1, parts: { embedding: 0.5, "layer 0 head 1": -1, "layer 1 MLP": 1.5 } });
  assert.deepEqual([parts.parts[0][0], parts.sum], ["layer 1 MLP", 1]);
  assert.deepEqual(["embedding", "layer 3 head 12", "layer 0 MLP", "layer 1 attention"].map((name) => partOf(name).kind), ["embedding", "head", "MLP", "attention"]);
});

test("the lens says from where on the prediction stands", () => {
  const row = (after, tokens) => ({ after, best: tokens.map((token) => ({ token, probability: 0.5 })), actual: tokens.map((_, i) => (i < 7 ? 0.25 : null)) });
  const same = Array(8).fill("b");
  const reply = readLens({ tokens: map.tokens, rows: [row("embedding", Array(8).fill("a")), row("layer 0 attention", same), row("layer 0 MLP", same)] }, map);
  assert.deepEqual(reply.cell(0, 3), { token: "a", share: 0.5, actual: 0.25, right: false });
  const keys = [];
  lensWords((key, values) => { keys.push([key, values?.part]); return key; }, map, reply, 7);
  assert.equal(keys.at(-1)[0], "lens_from");
  assert.equal(readLens({ tokens: ["other"], rows: [] }, map), null);
});

test("a superseded question stops, and its late replies are ignored", async () => {
  const waiting = [];
  const run = { ...runOf("a", ["text"]), checkpoints: [9] };
  const live = (request) => new Promise((resolve, reject) => waiting.push({ request, resolve, reject }));
  const source = { live, kinds: ["patch", "lens"], runs: async () => ({ names: ["a"], tags: { a: ["text"] } }), run: async () => run, map: async () => raw };
  const store = createStore({ view: "patch" });
  const { data, reload } = createData(source, store, () => {});
  reload();
  await settled();
  store.set({ pair: { changed: "one", position: 3 } });
  await settled();
  store.set({ pair: { changed: "two", position: 3 } });
  await settled();
  assert.deepEqual(waiting.map(({ request }) => request.changed), ["one", "two"]);
  waiting[0].resolve({ layer: 0 });
  await settled();
  assert.equal(waiting.length, 2); // no second layer of the first question
  assert.equal(data.probe?.replies.length ?? 0, 0);
  waiting[1].resolve({ layer: 0 });
  await settled();
  assert.deepEqual([data.probe.replies.length, data.probe.count, waiting[2].request.layer], [1, 2, 1]);
  waiting[2].reject(new Error("too long"));
  await settled();
  assert.deepEqual([data.probe.error, data.error, Boolean(data.map)], [{ key: "failed", values: { reason: "too long" } }, null, true]);
});

test("only the newest of overlapping loads takes effect, and a later failure keeps the map", async () => {
  const { source, waiting } = slowSource();
  const store = createStore({});
  const { data, reload } = createData(source, store, () => {});
  const started = reload();
  await settled();
  store.set({ step: 0 });
  await settled();
  assert.deepEqual(waiting.map(({ step }) => step), [9, 0]);
  waiting[1].resolve();
  await settled();
  waiting[0].resolve();
  await started;
  await settled();
  assert.equal(data.map.step, 0);
  assert.equal(store.get().view, "lines");
  store.set({ step: 5, query: 2 });
  assert.equal(data.error, null);
  source.map = async () => { throw new TypeError("Failed to fetch"); };
  store.set({ sentence: 0, step: 9 }); // loaded before: no request
  await settled();
  assert.equal(data.map.step, 9);
});

test("without an answer the error says so", async () => {
  const { source } = slowSource();
  source.map = async () => { throw new TypeError("Failed to fetch"); };
  const { data, reload } = createData(source, createStore({}), () => {});
  await reload();
  await settled();
  assert.deepEqual(data.error, { key: "no_answer", values: {} });
});

test("another run is compared at the step that is shown, or at its last one before", async () => {
  const steps = { a: [0, 5, 9], b: [0, 4, 8] };
  const source = {
    live: null,
    runs: async () => ({ names: ["a", "b"], tags: { a: ["text"], b: ["text"] } }),
    run: async (name) => ({ ...runOf(name, ["text"]), sentences: [{ tag: "text", text: "text", looks: steps[name].map((step) => [step]) }] }),
    map: async (run, sentence, [step]) => ({ ...raw, step }),
  };
  const store = createStore({ run: "a" });
  const { data, reload } = createData(source, store, () => {});
  await reload();
  store.set({ view: "compare", other: { kind: "run", step: null, run: "b" } });
  for (const [step, mine, theirs] of [[5, 5, 4], [0, 0, 0], [null, 9, 8]]) {
    store.set({ step });
    await settled();
    assert.deepEqual([data.map.step, data.second.step], [mine, theirs]);
  }
});
