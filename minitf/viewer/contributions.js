/* The view "What added": what each head and each feed-forward layer adds to the score of a next token. Known as direct
 * logit attribution. */

import { button, make, number, onChange, oneStop, percent, quoted, visible, withBold } from "./dom.js";
import { partName, partOf, probeOf } from "./probes.js";
import { problemText } from "./refusals.js";

const MOST = 5; // next tokens to choose from

export function contributionsView(map, { t, actions }) {
  const { set, choose } = actions;
  const lead = make("p", { class: "said", ariaLive: "polite" });
  const tokens = make("div", { class: "targets", attributes: { role: "group", "aria-label": t("next_token_shown") } });
  const hint = make("p", { class: "hint" }, t("contributions_hint"));
  const list = make("ol", { class: "parts", attributes: { "aria-label": t("tab_contributions") } });
  const scroll = make("div", { class: "scroll", tabIndex: 0, attributes: { role: "region", "aria-label": t("tab_contributions") } }, list);
  const stops = oneStop(list, ".link");
  const waiting = make("p", { class: "missing" });
  const element = make("div", { class: "contributions" }, make("div", { class: "lead-row" }, lead, tokens), hint, waiting, scroll);

  const build = onChange((reply) => {
    const { parts } = reply;
    const largest = Math.max(...parts.map(([, value]) => Math.abs(value)), 1e-9);
    list.replaceChildren(...parts.map(([name, value]) => {
      const { kind, layer, head } = partOf(name);
      const label = kind === "head" ? button(partName(t, name), () => choose(layer, head, false), { class: "link" }) : make("span", {}, partName(t, name));
      const fill = make("i", { class: value < 0 ? "negative" : "" });
      const width = 50 * Math.abs(value) / largest;
      Object.assign(fill.style, { width: `${width}%`, left: `${value < 0 ? 50 - width : 50}%` });
      return make("li", {}, label, make("span", { class: "bar" }, fill), make("b", {}, `${value < 0 ? "" : "+"}${number(value)}`));
    }));
  });
  const offer = onChange((chosen, shown) => {
    tokens.replaceChildren(...shown.map(([token, text]) =>
      button(text, () => set({ target: token }), { class: "chip", ariaPressed: String(token === chosen) })));
  });

  function render(context) {
    const { state, query, map: current } = context;
    const probe = probeOf(context);
    const reply = readContributions(probe?.replies[0]);
    const next = current.tokens[query + 1];
    const likely = current.next_tokens[query].slice(0, MOST).filter(([token]) => token !== next).map(([token, p]) => [token, `${visible(token)} ${percent(p)}`]);
    const came = next === undefined ? [null, t("likeliest")] : [null, t("came_next", { token: visible(next) })];
    tokens.hidden = Boolean(probe?.stored);
    offer(JSON.stringify([state.target, query, current.stamp]), state.target, [came, ...likely]);
    lead.hidden = hint.hidden = scroll.hidden = !reply;
    waiting.hidden = Boolean(reply);
    waiting.textContent = problemText(t, probe?.error) || t("loading_live");
    if (!reply) return;
    build(JSON.stringify([probe.of, reply.position, reply.token, reply.logit]), reply);
    stops();
    const best = reply.parts.find(([, value]) => value > 0) ?? reply.parts[0];
    const position = reply.position ?? map.size - 1;
    const text = t("contributions_lead", { token: "\u0001", word: quoted(map.tokens[position]), part: partName(t, best[0]), value: `${best[1] < 0 ? "" : "+"}${number(best[1])}`, sum: number(reply.sum), logit: number(reply.logit) });
    lead.replaceChildren(...withBold(text, quoted(reply.token)));
  }
  function rowsOf(context) {
    const reply = readContributions(probeOf(context)?.replies[0]);
    const rows = reply ? reply.parts.map(([name, value]) => [reply.position ?? map.size - 1, reply.token, name, value]) : [];
    return { columns: ["position", "next", "part", "adds"], rows };
  }
  return { element, render, table: rowsOf };
}

/** A reply with its parts, the largest first, and their sum. */
export function readContributions(reply) {
  if (!reply?.parts) return null;
  const parts = Object.entries(reply.parts).sort(([, a], [, b]) => Math.abs(b) - Math.abs(a));
  return { ...reply, parts, sum: parts.reduce((sum, [, value]) => sum + value, 0) };
}
