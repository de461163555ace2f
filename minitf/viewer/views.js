/* The parts of the page. Each function makes its elements once and returns what updates them; tokens are set as text. */

import { colour, lookAt, paint } from "./weights.js";

const isBright = ([r, g, b]) => 0.3 * r + 0.59 * g + 0.11 * b > 140;
export const percent = (share) => (100 * share).toFixed(share === 0 || share >= 0.0995 ? 0 : 1) + "%";
export const visible = (token) => token.replace(/^ (?=\S)/, "").replace(/\s/g, "␣") || "∅";

/** An element with properties, and children that are elements or text. */
export function make(tag, properties = {}, ...children) {
  const { class: className, ...rest } = properties;
  const element = Object.assign(document.createElement(tag), rest);
  if (className) element.className = className;
  element.append(...children);
  return element;
}

/** All heads, layers by heads; returns what updates them. */
export function headGrid(map, onSelect) {
  const buttons = [];
  const element = make("div", { class: "grid" });
  element.style.gridTemplateColumns = `max-content repeat(${map.heads}, minmax(0, 1fr))`;
  element.append(make("span"));
  for (let head = 0; head < map.heads; head++) element.append(make("span", { class: "name" }, `head ${head}`));
  for (let layer = 0; layer < map.layers; layer++) {
    element.append(make("span", { class: "name" }, `layer ${layer}`));
    for (let head = 0; head < map.heads; head++) {
      const button = make("button", { type: "button", class: "thumb" }, make("canvas"), make("span"));
      button.addEventListener("click", () => onSelect(layer, head));
      button.addEventListener("keydown", (event) => {
        const [down, right] = arrow(event);
        if (!down && !right) return;
        const next = [clamp(layer + down, map.layers), clamp(head + right, map.heads)];
        onSelect(...next);
        buttons[next[0] * map.heads + next[1]].focus();
      });
      buttons.push(button);
      element.append(button);
    }
  }
  const paintAll = (current, hideFirst) =>
    buttons.forEach((button, i) => {
      const [layer, head] = [Math.floor(i / map.heads), i % map.heads];
      paint(button.firstChild, lookAt(current, layer, head, hideFirst), map.tokens.length);
      button.lastChild.textContent = current.labels[layer][head];
      button.ariaLabel = button.title = `layer ${layer}, head ${head} ${current.labels[layer][head]}`;
    });
  const mark = (layer, head) =>
    buttons.forEach((button, i) => {
      const selected = i === layer * map.heads + head;
      button.ariaPressed = String(selected);
      button.tabIndex = selected ? 0 : -1;
    });
  return { element, paintAll, mark };
}

/** The direction of an arrow key as [down, right]; it then does not scroll the page. */
function arrow(event) {
  const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
  if (step) event.preventDefault();
  return step ?? [0, 0];
}
export const clamp = (index, count) => Math.min(Math.max(index, 0), count - 1);

/** One head large, with a row for each query and a column for each key. */
export function matrix(map, { onPoint, onLeave, onSelect, onArrow }) {
  const numTokens = map.tokens.length;
  const cell = Math.min(Math.max(Math.floor(440 / numTokens), 3), 30);
  const canvas = make("canvas");
  const [row, spot] = [make("div", { class: "row" }), make("div", { class: "spot" })];
  const plot = make("div", { class: "plot", tabIndex: 0, role: "img" }, canvas, row, spot);
  const names = (side) => make("div", { class: side }, ...map.tokens.map((token) => make("span", {}, visible(token))));
  const [queries, keys] = [names("queries"), names("keys")];
  const element = make("div", { class: cell < 9 ? "matrix unnamed" : "matrix" },
    make("div", { class: "axis query-axis" }, "query: the word reading"), queries, plot,
    make("div", { class: "axis key-axis" }, "key: the words it looks at"), keys);
  element.style.setProperty("--cell", `${cell}px`);
  element.style.setProperty("--tokens", numTokens);

  const place = (event) => {
    const box = canvas.getBoundingClientRect();
    const query = clamp(Math.floor(((event.clientY - box.top) / box.height) * numTokens), numTokens);
    return [query, Math.min(clamp(Math.floor(((event.clientX - box.left) / box.width) * numTokens), numTokens), query)];
  };
  plot.addEventListener("pointermove", (event) => onPoint(...place(event)));
  plot.addEventListener("pointerleave", onLeave);
  plot.addEventListener("click", (event) => onSelect(...place(event)));
  plot.addEventListener("keydown", (event) => {
    const [down, right] = arrow(event);
    if (down || right) onArrow(down, right);
  });
  const mark = (query, key, label) => {
    Object.assign(row.style, { top: `${query * cell}px`, width: `${(query + 1) * cell}px` });
    spot.hidden = key === null;
    Object.assign(spot.style, { top: `${query * cell}px`, left: `${(key ?? 0) * cell}px` });
    [...queries.children].forEach((name, i) => name.classList.toggle("active", i === query));
    [...keys.children].forEach((name, i) => name.classList.toggle("active", i === key));
    plot.ariaLabel = label;
  };
  return { element, paint: (view) => paint(canvas, view, numTokens), mark };
}

/** The sentence: tokens coloured by what the query gives them, and arcs from the query to them. */
export function sentence(map, { onPoint, onLeave, onSelect }) {
  const arcs = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const tokens = map.tokens.map((token, i) => {
    const button = make("button", { type: "button" }, make("span", {}, visible(token)), make("small"));
    if (token.startsWith(" ")) button.classList.add("spaced");
    button.addEventListener("pointerenter", () => onPoint(i));
    button.addEventListener("pointerleave", onLeave);
    button.addEventListener("click", () => onSelect(i));
    return button;
  });
  const element = make("div", { class: "sentence" }, arcs, ...tokens);
  const update = (view, query) => {
    tokens.forEach((button, i) => {
      const shown = i <= query && !view.isHidden(query, i);
      const fill = shown ? view.colour(query, i) : null;
      const [name, share] = button.children;
      name.style.background = fill ? `rgb(${fill})` : "";
      name.style.color = fill ? (isBright(fill) ? "#111" : "#fff") : "";
      share.textContent = shown && view.weight(query, i) >= 0.01 ? percent(view.weight(query, i)) : "";
      button.classList.toggle("future", i > query);
      button.ariaPressed = String(i === query);
    });
    arcs.replaceChildren(...tokens.slice(0, query).flatMap((button, key) => {
      const share = view.isHidden(query, key) ? 0 : view.weight(query, key);
      return share < 0.02 ? [] : [arc(tokens[query], button, share)];
    }));
  };
  return { element, update };
}

function arc(from, to, share) {
  const [x1, y1] = [from.offsetLeft + from.offsetWidth / 2, from.offsetTop + 2];
  const [x2, y2] = [to.offsetLeft + to.offsetWidth / 2, to.offsetTop + 2];
  const rise = Math.min(12 + 0.12 * Math.abs(x1 - x2), 40);
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  path.setAttribute("d", `M${x1} ${y1} C${x1} ${y1 - rise} ${x2} ${y2 - rise} ${x2} ${y2}`);
  path.setAttribute("stroke-width", 1 + 5 * share);
  path.setAttribute("opacity", 0.25 + 0.75 * share);
  return path;
}

export function nextTokens(element, map, query) {
  element.replaceChildren(
    make("h3", {}, "After “", make("b", {}, visible(map.tokens[query])), "” the model expects"),
    ...map.next_tokens[query].map(([token, probability]) => {
      const bar = make("i");
      bar.style.width = `${100 * probability}%`;
      const name = make("code", {}, visible(token));
      return make("div", { class: "guess" }, name, make("span", {}, bar), percent(probability));
    }),
  );
}

/** A strip of colours with the weights they stand for. */
export function legend(element, largest) {
  const colours = Array.from({ length: 17 }, (_, i) => `rgb(${colour((i / 16) ** 2)})`);
  const strip = make("div");
  strip.style.background = `linear-gradient(to right, ${colours})`;
  element.replaceChildren(strip, ...[0, largest / 4, largest].map((weight) => make("span", {}, percent(weight))));
}
