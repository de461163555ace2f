/* The line above the sentence: which heads are chosen, what they do, and switching them off. */

import { button, fillSelect, make, onChange } from "./dom.js";
import { headLines, isOwn, patternName, roleOf, scoreLines } from "./heads.js";

export function headLine({ t, tooltip, actions }) {
  const title = make("h2");
  const badge = button("", () => showScores(), { class: "badge" });
  const about = make("span", { class: "about" });
  const measure = make("select", { ariaLabel: t("show"), title: t("measure_norm_why") });
  measure.addEventListener("change", () => actions.set({ measure: measure.value }));
  const hideFirst = make("input", { type: "checkbox" });
  hideFirst.addEventListener("change", () => actions.set({ hideFirst: hideFirst.checked }));
  const toggle = button("", () => actions.switchOff(context.state.heads.map(([layer, head]) => [layer, head])), { class: "switch" });
  const element = make("div", { class: "head-title" }, title, badge, about, measure,
    make("label", { class: "check", title: t("hide_first_why") }, hideFirst, " ", t("hide_first")), toggle);
  let context = null;

  const lines = () => {
    const { map, run, state } = context;
    const [layer, head] = state.heads[0];
    const scores = scoreLines(t, map, layer, head);
    return [...headLines(t, map, run.importance, [layer, head], state.live?.off), ...(scores.length ? ["", ...scores] : [])];
  };
  const showScores = () => {
    const box = badge.getBoundingClientRect();
    tooltip.show(box.left, box.bottom - 10, lines());
  };
  tooltip.attach(badge, lines);

  const write = onChange(() => {
    const { map, state, palette } = context;
    const several = state.heads.length > 1;
    const [layer, head] = state.heads[0];
    const label = map.label(layer, head);
    const here = map.here(layer, head);
    title.replaceChildren(...(several ? state.heads.map(([l, h, colour]) => {
      const name = make("span", { class: "swatch" }, t(state.heads.length > 2 ? "head_short" : "head_name", { layer: l, head: h }));
      name.style.setProperty("--colour", palette.heads[colour]);
      return name;
    }) : [t("head_name", { layer, head })]));
    badge.hidden = several;
    const role = roleOf(map, state.heads[0]);
    badge.dataset.pattern = role ?? label?.[0] ?? "unclear";
    badge.replaceChildren(...(role ? [t(role)] : [patternName(t, label), ...(label ? [" ", make("b", {}, label[1].toFixed(2))] : [])]));
    const differs = here !== undefined && (here?.[0] ?? "") !== (label?.[0] ?? "");
    const what = label && isOwn(label[0]) ? t("about_own") : t(`about_${label?.[0] ?? "unclear"}`);
    const name = (one) => patternName(t, one);
    about.textContent = several ? t("first_leads") : differs ? t("usually_here", { usual: name(label), here: `${name(here)}${here ? ` ${here[1].toFixed(2)}` : ""}` })
      : role ? t(`about_${role}`) : what;
    about.title = about.textContent;
  });

  function render(current) {
    context = current;
    const { map, state, palette, whyNotLive } = context;
    write(JSON.stringify([map.stamp, state.heads, palette.theme]));
    fillSelect(measure, ["weight", "norm"].map((key) => [key, t(`measure_${key}`)]), state.measure);
    measure.hidden = !map.hasNorms;
    hideFirst.checked = state.hideFirst;
    const off = state.heads.every(([layer, head]) => state.live?.off.some(([l, h]) => l === layer && h === head));
    toggle.textContent = t(off ? "switch_on" : "switch_off");
    toggle.classList.toggle("is-off", off);
    toggle.setAttribute("aria-disabled", String(Boolean(whyNotLive)));
    toggle.title = whyNotLive || t("switch_why");
  }
  return { element, render };
}
