/* The small menu at a look: forbid it, or move it to another word, in some heads or all. */

import { button, choices, clamp, make, moved, percent, quoted, range, visible } from "./dom.js";
import { leavesSome } from "./edits.js";

const AWAY = 8; // pixels from the pointer

export function lookMenu({ t, actions, palette }) {
  const title = make("h3");
  const body = make("div", { class: "test-body" });
  const element = make("div", { class: "look-menu", attributes: { role: "dialog", "aria-label": t("test_look") } }, title, body);
  element.hidden = true;
  let [look, opener, at] = [null, null, [0, 0]];
  const close = () => {
    if (element.hidden) return;
    element.hidden = true;
    if (opener?.isConnected) opener.focus({ preventScroll: true });
  };
  element.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    event.stopPropagation();
    close();
  });
  document.addEventListener("pointerdown", (event) => !element.hidden && !element.contains(event.target) && close());

  /** The heads of a scope: this one, those chosen, or null for all. */
  const headsOf = ({ heads }, scope) => (scope === "all" ? null : (scope === "one" ? heads.slice(0, 1) : heads).map(([layer, head]) => [layer, head]));

  function place() {
    const [x, y] = at;
    const { offsetWidth: width, offsetHeight: height } = element;
    const left = x + AWAY + width > innerWidth ? x - AWAY - width : x + AWAY;
    Object.assign(element.style, { left: `${clamp(left, innerWidth - width)}px`, top: `${clamp(y + AWAY, innerHeight - height)}px` });
  }

  /** Open at (x, y) for { map, look, query, key, state }; with `move`, at once with the words to move it to. */
  function open(x, y, context, move = false) {
    const { map, looks: [first], query, key, state } = context;
    look = context;
    at = [x, y];
    if (element.hidden) opener = document.activeElement;
    const weight = percent(first.weight(query, key), 1);
    title.replaceChildren(make("bdi", {}, `${quoted(map.tokens[query])} → ${quoted(map.tokens[key])}`), make("span", {}, ` ${weight} · ${t("head_name", first)}`));
    const several = state.heads.length > 1;
    const scopes = [["one", t("scope_one", first)], ...(several ? [["chosen", t("scope_chosen", { count: state.heads.length })]] : []), ["all", t("scope_all")]];
    const scope = scopes.some(([one]) => one === state.scope) ? state.scope : "all";
    const radio = choices("radiogroup", t("scope"), scopes, (one) => { actions.set({ scope: one }); look = { ...look, state: { ...look.state, scope: one } }; radio.update(one); });
    radio.update(scope);
    look = { ...context, state: { ...state, scope } };
    const forbid = button(t("forbid"), () => done({ kind: "block", query, keys: [key], heads: headsOf(state, look.state.scope) }), { class: "primary", disabled: !leavesSome(state.live ? state.edits : [], query, key) });
    if (forbid.disabled) forbid.title = t("nothing_left");
    const toward = button(t("move_to"), words, { class: "plain", attributes: { "aria-expanded": "false" } });
    body.replaceChildren(make("div", { class: "scope" }, make("span", {}, t("scope")), radio.element), make("div", { class: "test-actions" }, forbid, toward));
    element.hidden = false;
    place();
    if (move) words();
    else (forbid.disabled ? toward : forbid).focus({ preventScroll: true });

    /** The words it can be moved to, up to the one that reads. */
    function words() {
      const options = range(query + 1).filter((position) => position !== key);
      const items = options.map((to) => {
        const one = button(visible(map.tokens[to]), () => done({ kind: "move", query, keys: [key], to: [to], heads: headsOf(state, look.state.scope) }), { class: "word", ariaLabel: t("word_at", { word: quoted(map.tokens[to]), position: to + 1 }) });
        const share = first.share(query, to);
        Object.assign(one.style, { background: palette().share(share), color: palette().ink(share) });
        return one;
      });
      const list = make("div", { class: "words", attributes: { role: "group", "aria-label": t("move_where") } }, ...items);
      list.addEventListener("keydown", (event) => {
        const next = moved(event, items.indexOf(document.activeElement), items.length);
        if (next !== null) items[next].focus();
      });
      body.lastChild.replaceChildren(make("p", {}, t("move_where")), list);
      place();
      items[0]?.focus({ preventScroll: true });
      if (!items.length) close();
    }
  }
  function done(edit) {
    close();
    actions.edit(edit);
  }
  return { element, open, close };
}
