/* What the viewer gives away: pictures and data of a view as files, and a link to what is shown. */

import { button, make, moved } from "./dom.js";
import { drawingOf, pixelsOf, textOf } from "./picture.js";

/** Rows under `columns` as CSV (RFC 4180). A cell that a spreadsheet would run as a formula is written as text. */
export function csvOf({ columns, rows }) {
  const cell = (value) => {
    const text = typeof value === "string" ? value.replace(/^(?=[=+\-@\t\r].)/s, "'") : String(value ?? "");
    return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  return [columns, ...rows].map((row) => row.map(cell).join(",")).join("\r\n") + "\r\n";
}

/** The same as JSON, with what it is of. */
export function jsonOf({ columns, rows }, about) {
  const records = rows.map((row) => Object.fromEntries(columns.map((name, i) => [name, row[i]])));
  return JSON.stringify({ ...about, rows: records }, null, 1);
}

export function download(name, content, type) {
  const link = make("a", { href: URL.createObjectURL(new Blob([content], { type })), download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch { // not allowed here: the old way
    const area = make("textarea", { value: text });
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  }
}

/** A button that opens a menu of `entries`, [text, action]. */
export function menu(text, entries, properties = {}) {
  const items = entries.map(([name, action]) => button(name, () => { close(true); action(); }, { attributes: { role: "menuitem", tabindex: "-1" } }));
  const list = make("div", { class: "menu-list", attributes: { role: "menu", "aria-label": text } }, ...items);
  list.hidden = true;
  const opener = button(text, () => (list.hidden ? open() : close(true)), { ...properties, attributes: { "aria-haspopup": "menu", "aria-expanded": "false" } });
  const element = make("div", { class: "menu" }, opener, list);
  function open() {
    list.hidden = false;
    opener.ariaExpanded = "true";
    items[0].focus();
  }
  function close(refocus) {
    list.hidden = true;
    opener.ariaExpanded = "false";
    if (refocus) opener.focus();
  }
  element.addEventListener("keydown", (event) => {
    if (list.hidden) return;
    if (event.key === "Escape") { event.stopPropagation(); return close(true); }
    const next = moved(event, items.indexOf(document.activeElement), items.length);
    if (next !== null) items[next].focus();
  });
  element.addEventListener("focusout", (event) => !element.contains(event.relatedTarget) && close(false));
  return { element, open, opener };
}

/** The menu "Save" of a view; `now()` is { element, table, title, name, about } of what is shown. */
export function saveMenu(t, now, say) {
  const guarded = (work) => async () => {
    try {
      await work(now());
    } catch (error) {
      say(t("not_saved", { reason: error.message }));
    }
  };
  const picture = ({ element, title }) => drawingOf(element, title);
  const entries = [
    [t("save_svg"), guarded((view) => download(`${view.name}.svg`, textOf(picture(view)), "image/svg+xml"))],
    [t("save_png"), guarded(async (view) => download(`${view.name}.png`, await pixelsOf(picture(view)), "image/png"))],
    [t("save_csv"), guarded((view) => download(`${view.name}.csv`, `\ufeff${csvOf(view.table())}`, "text/csv"))],
    [t("save_json"), guarded((view) => download(`${view.name}.json`, jsonOf(view.table(), view.about), "application/json"))],
    [t("print"), () => print()],
  ];
  return menu(t("save"), entries, { class: "plain" });
}
