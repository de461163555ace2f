/* Loads the data that the state asks for. `createData(source, store, changed)` calls `changed` whenever `data` changes.
 *
 *   runs, tags   names of the runs; the tags of each run's sentences
 *   run          the run shown, with its name    map, second   the maps shown, and those compared with
 *   mapRun       the run that `map` is of: not yet `run` while the maps of another run load
 *   secondOf     what `second` is: another step, a run, or the same without a head
 *   loading      what is loading for a while     error         { key, values } of the text that says what failed, or null
 *   probe        what a view asks about the map: { view, of, replies, count, error }, see probes.js
 */

import { isChanged, liveOf, requestOf } from "./edits.js";
import { foundAt, readMap } from "./maps.js";
import { probesOf } from "./probes.js";
import { problemOf, refusal } from "./refusals.js";
import { fitMap, fitRun, lookAt, nearest } from "./state.js";

const SLOW_MS = 150; // what loads faster is not announced
const MAX_MAPS = 300;

export function createData(source, store, changed) {
  const data = { runs: null, tags: {}, run: null, map: null, second: null, secondOf: null, mapRun: null, probe: null, loading: false, error: null };
  const [runs, maps] = [new Map(), new Map()];
  let [latest, wanted] = [0, ""];

  function update(change) {
    Object.assign(data, change);
    changed();
  }

  async function loadRun(name) {
    if (!runs.has(name)) runs.set(name, { ...(await source.run(name)), name });
    return runs.get(name);
  }

  /** A map with what the run says about its heads. */
  function withRun(name, raw, stamp) {
    const run = runs.get(name);
    return Object.assign(readMap({ ...raw, found: foundAt(run?.found, raw.step) }), { stamp, watched: watchedIn(run) });
  }

  function loadMap(run, sentence, look) {
    const key = [run, sentence.tag, ...look].join("\u0000");
    if (!maps.has(key)) {
      if (maps.size > MAX_MAPS) maps.delete(maps.keys().next().value);
      const loading = source.map(run, sentence, look).then((raw) => withRun(run, raw, key));
      maps.set(key, loading);
      loading.catch(() => maps.delete(key));
    }
    return maps.get(key);
  }

  /** The reply of the live model to a typed sentence; its labels are those of the run's nearest stored maps. */
  async function loadLive(run, live, edits) {
    const step = liveStep(run, live);
    if (step === null) throw refusal("no_checkpoint");
    const request = { run: run.name, step, ...requestOf(live, edits) };
    const key = JSON.stringify(request);
    if (!maps.has(key)) {
      const asked = source.live(request).then(async (raw) => {
        const sentence = run.sentences[0];
        const usual = await loadMap(run.name, sentence, sentence.looks[lookAt(sentence.looks, step)]).catch(() => null);
        const same = usual && usual.layers === raw.layers && usual.heads === raw.heads && Object.keys(usual.scores).length;
        return withRun(run.name, { ...raw, usual: same ? usual.labels : null, of: JSON.stringify([edits, live.off, live.by]) }, key);
      });
      maps.set(key, asked);
      asked.catch(() => maps.delete(key));
    }
    return maps.get(key);
  }

  async function loadSecond(state, run) {
    if (state.view !== "compare") return null;
    const sentence = run.sentences[state.sentence];
    const other = otherOf(state, run);
    if (other.kind === "head") {
      if (!source.live) return null;
      const live = state.live ?? liveOf(sentence.text, null);
      const off = state.heads?.map(([layer, head]) => [layer, head]) ?? [];
      return loadLive(run, { ...live, step: live.step ?? state.step, off: [...live.off, ...off] }, state.edits);
    }
    if (other.kind === "plain") return state.live ? loadLive(run, { ...state.live, off: [] }, []) : null;
    if (state.live) return loadLive(run, { ...state.live, step: other.step }, state.edits);
    const theirs = other.kind === "run" ? await loadRun(other.run) : run;
    const found = theirs.sentences.find((one) => one.tag === sentence.tag);
    // Another run at the step that is shown, or at its last one before.
    const step = other.kind === "run" ? sentence.looks[lookAt(sentence.looks, state.step)][0] : other.step;
    return found ? loadMap(theirs.name, found, found.looks[lookAt(found.looks, step)]) : null;
  }

  /** Load what the state asks for; if calls overlap, only the last one takes effect. */
  async function load() {
    const mine = ++latest;
    const timer = setTimeout(() => mine === latest && update({ loading: true }), SLOW_MS);
    try {
      const run = await loadRun(store.get().run);
      if (mine !== latest) return;
      const before = data.run;
      data.run = run;
      if (run !== before) store.set(fitRun(store.get(), run, before));
      if (mine !== latest) return; // the fit asked for something else
      const state = store.get();
      const looks = run.sentences[state.sentence].looks;
      const look = looks[lookAt(looks, state.step)];
      const map = state.live ? await loadLive(run, state.live, state.edits) : await loadMap(run.name, run.sentences[state.sentence], look);
      if (mine !== latest) return;
      const second = await loadSecond(state, run);
      if (mine !== latest) return;
      // Edits name positions: in another run's tokens they would be of other words.
      const foreign = data.mapRun && data.mapRun.name !== run.name && data.map?.tokens.join("\u0000") !== map.tokens.join("\u0000");
      const secondOf = { ...otherOf(state, run), head: state.heads?.[0] };
      Object.assign(data, { map, second, secondOf, mapRun: run, loading: false, error: null });
      store.set({ ...fitMap(store.get(), map), ...(foreign ? { edits: [], past: [], pair: null } : {}) });
      clearTimeout(timer);
      if (mine !== latest) return;
      prefetch(state, run, looks);
      await loadProbe(run, map, () => mine === latest);
    } catch (error) {
      if (mine === latest) update({ error: problemOf(error), loading: false, ...(store.get().live ? { map: null } : {}) });
    } finally {
      clearTimeout(timer);
    }
  }

  /** What the view asks about the map, reply by reply; what fails is said in the view. */
  async function loadProbe(run, map, isLatest) {
    const { view } = store.get();
    const { requests, stored } = probesOf(store.get(), run, map, source);
    if (!requests.length) return data.probe && update({ probe: null });
    const probe = { view, of: map.stamp, asked: requests[0], count: requests.length, replies: [], error: null, stored };
    try {
      for (const request of requests) {
        const reply = await asked(request);
        if (!isLatest()) return undefined;
        data.probe = { ...probe, replies: [...probe.replies, reply] };
        probe.replies.push(reply);
        changed();
      }
    } catch (error) {
      if (isLatest()) update({ probe: { ...probe, error: problemOf(error) } });
    }
    return undefined;
  }

  function asked(request) {
    const key = JSON.stringify(request);
    if (!maps.has(key)) {
      if (maps.size > MAX_MAPS) maps.delete(maps.keys().next().value);
      const asking = source.live(request);
      maps.set(key, asking);
      asking.catch(() => maps.delete(key));
    }
    return maps.get(key);
  }

  function prefetch(state, run, looks) {
    if (state.live || !source.remote) return;
    const index = lookAt(looks, state.step);
    for (const near of [index + 1, index - 1, index + 2, index - 2])
      if (looks[near]) loadMap(run.name, run.sentences[state.sentence], looks[near]).catch(() => {});
  }

  /** Reload the lists of runs and steps, which grow during training. */
  async function reload() {
    const timer = setTimeout(() => !data.map && update({ loading: true }), SLOW_MS);
    try {
      const { names, tags, logdir } = await source.runs();
      Object.assign(data, { runs: names, tags, logdir });
      if (!names.length) return update({ error: null, loading: false });
      const { run } = store.get();
      const name = names.includes(run) ? run : names.at(-1);
      const fresh = { ...(await source.run(name)), name };
      const same = JSON.stringify(fresh) === JSON.stringify(runs.get(name));
      if (!same) {
        runs.clear();
        runs.set(name, fresh);
      }
      if (name !== run) return store.set({ run: name });
      if (!same || !data.map || data.error) await load();
      else changed();
    } catch (error) {
      update({ error: problemOf(error), loading: false });
    } finally {
      clearTimeout(timer);
    }
  }

  store.subscribe((state) => {
    const { run, sentence, step, live, edits, view, other, heads, query, target, pair, pairHeads } = state;
    const compared = view === "compare" ? [other, other?.kind === "head" ? heads : null] : null;
    const probed = { lens: [view], contributions: [view, query, target], patch: [view, pair, pairHeads] }[view] ?? null;
    const needs = JSON.stringify([run, sentence, step, live, edits, compared, probed]);
    if (needs === wanted) return changed();
    wanted = needs;
    changed();
    load();
  });
  return { data, reload, retry: () => (data.run ? load() : reload()) };
}

/** The first words of the relations that a run watches: "it" of "it>cat". */
const watchedIn = (run) => [...new Set(Object.keys(run?.series ?? {}).map((name) => name.match(/^watch\/([^>]+)>/)?.[1]).filter(Boolean))];

/** The checkpoint that a typed sentence is read with. */
export const liveStep = (run, live) => nearest(run.checkpoints, live.step);

/** What *Compare* compares with: as chosen; or the run that this one was forked from, at the same step; or this run's
 * first step. */
export function otherOf(state, run) {
  if (state.other && (state.other.kind !== "plain" || isChanged(state))) return state.other;
  if (run.forked_from && !state.live) return { kind: "run", run: run.forked_from.run, step: null };
  return firstStep(state, run);
}

/** This run's first step, as what *Compare* compares with. */
export function firstStep(state, run) {
  const first = state.live ? run.checkpoints[0] : run.sentences[state.sentence]?.looks[0]?.[0];
  return { kind: "step", step: first ?? null, run: null };
}
