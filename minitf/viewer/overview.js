/* All heads at a glance: a thumbnail of each, labelled with its pattern. */

import { arrow, clamp, make, range } from "./dom.js";
import { headLook, paintTriangle } from "./maps.js";

export const PATTERN_ORDER = ["induction", "previous_token", "same_word", "nearby", "first_token", "this_token", "broad"];

/** The name of the pattern a head is named after, or "unclear". */
export function patternName(t, label) {
  if (!label) return t("unclear");
  return t(label[0] === "first_token" ? "first_token_sink" : label[0]);
}

export function overview(map, { t, onHead }) {
  const grid = make("div", { class: "grid" });
  grid.setAttribute("role", "group");
  grid.ariaLabel = t("heads");
  grid.style.gridTemplateColumns = `max-content repeat(${map.heads}, minmax(0, 1fr))`;
  const several = make("input", { type: "checkbox" });
  const patterns = make("div", { class: "patterns" });
  const top = make("div", { class: "panel-head" }, make("h2", {}, t("heads")),
    make("label", { title: t("several_why") }, several, " ", t("several")));
  const element = make("section", { class: "overview" }, top, patterns, grid);
  grid.append(make("span"), ...range(map.heads).map((head) => make("span", { class: "name" }, t("head", { n: head }))));
  const thumbs = [];
  for (let layer = 0; layer < map.layers; layer++) {
    grid.append(make("span", { class: "name" }, t("layer", { n: layer })));
    for (let head = 0; head < map.heads; head++) {
      const canvas = make("canvas");
      const button = make("button", { type: "button", class: "thumb" }, make("span", { class: "frame" }, canvas), make("span", { class: "label" }));
      button.addEventListener("click", (event) => onHead(layer, head, several.checked || event.ctrlKey || event.metaKey || event.shiftKey));
      button.addEventListener("keydown", (event) => {
        const [down, right] = arrow(event);
        if (!down && !right) return;
        const [l, h] = [clamp(layer + down, map.layers), clamp(head + right, map.heads)];
        if (!several.checked) onHead(l, h, false);
        thumbs[l * map.heads + h].button.focus();
      });
      thumbs.push({ button, canvas, layer, head });
      grid.append(button);
    }
  }

  /** Paint the heads of `current`, a map of the same shape as `map`. */
  function paint(current, settings, palette) {
    for (const { button, canvas, layer, head } of thumbs) {
      paintTriangle(canvas, current.size, palette.shares, headLook(current, layer, head, settings).share);
      const label = current.label(layer, head);
      const name = patternName(t, label);
      button.lastChild.replaceChildren(...(label ? [make("span", {}, name), " ", make("b", {}, label[1].toFixed(2))] : []));
      button.dataset.pattern = label ? label[0] : "";
      button.ariaLabel = button.title = `${t("head_name", { layer, head })}: ${name}${label ? " " + label[1].toFixed(2) : ""}`;
    }
    patterns.replaceChildren(...PATTERN_ORDER.flatMap((pattern) => {
      const named = thumbs.filter(({ layer, head }) => current.label(layer, head)?.[0] === pattern);
      if (!named.length) return [];
      const best = named.reduce((a, b) => (current.label(b.layer, b.head)[1] > current.label(a.layer, a.head)[1] ? b : a));
      const name = patternName(t, [pattern]);
      const chip = make("button", { type: "button", class: "chip", data: { pattern } }, `${name} `, make("b", {}, String(named.length)));
      chip.title = chip.ariaLabel = t("best_of", { pattern: name, layer: best.layer, head: best.head });
      chip.addEventListener("click", () => onHead(best.layer, best.head, false));
      return [chip];
    }));
  }
  /** `heads` are the selected heads as [layer, head], `off` those switched off. */
  function mark(heads, off, palette) {
    for (const { button, layer, head } of thumbs) {
      const place = heads.findIndex(([l, h]) => l === layer && h === head);
      button.ariaPressed = String(place >= 0);
      button.tabIndex = place === 0 ? 0 : -1;
      button.style.setProperty("--mark", heads.length > 1 && place >= 0 ? palette.heads[place] : "");
      const isOff = off.some(([l, h]) => l === layer && h === head);
      button.classList.toggle("off", isOff);
      button.dataset.off = isOff ? t("off_badge") : "";
    }
  }
  return { element, paint, mark };
}
