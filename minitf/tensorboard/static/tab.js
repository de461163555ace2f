/* The Attention tab: the viewer in TensorBoard's frame, with the plugin's routes as its source of data.
 *
 * All URLs are relative to the plugin's own, so that TensorBoard's --path_prefix works.
 */

import { preferredLanguage } from "./preferences.js";
import { problemOf, problemText } from "./refusals.js";
import { translator } from "./texts.js";
import { mountViewer } from "./viewer.js";

const NAME = "minitf_attention";
const STATE = `p.${NAME}.state`; // TensorBoard leaves parameters of this form to the plugin

const RELOAD_MS = 15000;
const PAGE = Math.random().toString(36).slice(2); // a newer request of a page ends its older ones

async function fetchJson(address, options) {
  const reply = await fetch(address, options);
  const content = await reply.json();
  return accepted(reply, content);
}

/** The content of a reply; a refusal is thrown with the code that every language has a text for. */
function accepted(reply, content) {
  if (!reply.ok) throw Object.assign(new Error(content.error ?? reply.statusText), { code: content.code, values: content.values });
  return content;
}

const query = (values) => new URLSearchParams(values).toString();

async function tabSource() {
  const { live, why } = await fetchJson("./runs");
  const source = {
    title: "",
    remote: true,
    live: null,
    why,
    scoredOn: "held_out",
    address: tabAddress(),
    runs: async () => {
      const { runs, tags, logdir } = await fetchJson("./runs");
      return { names: runs, tags, logdir };
    },
    run: (name) => fetchJson(`./run?${query({ run: name })}`),
    // The URL contains the time of writing, so that maps rewritten by a resumed run do not come from the browser's cache.
    map: (run, sentence, [step, time]) => fetchJson(`./map?${query({ run, tag: sentence.tag, step, time })}`),
    onReload(listener) {
      listenToTensorBoard("experimental.DataReloaded", listener);
      setInterval(() => document.visibilityState === "visible" && listener(), RELOAD_MS);
    },
  };
  if (live) {
    source.live = (request) => askModel({ ...request, page: PAGE });
    source.kinds = ["lens", "contributions", "patch"];
    source.count = (run, step, text) => askModel({ run, step, text, count_only: true });
  }
  return source;
}

async function askModel(request) {
  const options = { method: "POST", body: JSON.stringify(request), headers: { "Content-Type": "application/json", "X-Minitf-Attention": "1" } };
  for (let attempt = 0; ; attempt++) {
    const reply = await fetch("./live", options);
    if (reply.status === 503 && attempt < 20) { // busy: the server runs one sentence at a time
      await new Promise((resolve) => setTimeout(resolve, 100 + 50 * attempt));
      continue;
    }
    return accepted(reply, await reply.json());
  }
}

/** The state is kept in TensorBoard's own address, among the parameters that belong to this plugin. */
function tabAddress() {
  const page = window.parent;
  const parameters = () => new URLSearchParams(page.location.hash.slice(1));
  const hashWith = (text) => `#${NAME}&${STATE}=${encodeURIComponent(text)}`;
  return {
    read: () => parameters().get(STATE) ?? "",
    write(text) {
      if (parameters().has(NAME)) page.history.replaceState(page.history.state, "", hashWith(text));
    },
    link: (text) => page.location.href.split("#")[0] + hashWith(text),
  };
}

/** TensorBoard sends messages to a plugin's frame over a channel that the frame opens. */
function listenToTensorBoard(kind, listener) {
  const channel = new MessageChannel();
  channel.port1.onmessage = ({ data }) => {
    const message = typeof data === "string" ? JSON.parse(data) : data;
    if (message.isReply || message.type !== kind) return;
    listener();
    channel.port1.postMessage(JSON.stringify({ type: kind, id: message.id, payload: null, error: null, isReply: true }));
  };
  window.parent.postMessage("experimental.bootstrap", "*", [channel.port2]);
}

/** TensorBoard's theme, known only from a class of its body element. */
function tensorBoardTheme() {
  const body = window.parent.document.body;
  const now = () => (body.classList.contains("dark-mode") ? "dark" : "light");
  const show = () => { document.documentElement.dataset.theme = now(); };
  show();
  return {
    now,
    onChange: (listener) => new MutationObserver(() => { show(); listener(); }).observe(body, { attributes: true, attributeFilter: ["class"] }),
  };
}

/** Called by TensorBoard once the frame exists. */
export async function render() {
  const style = Object.assign(document.createElement("link"), { rel: "stylesheet", href: new URL("./viewer.css", import.meta.url).href });
  const main = document.createElement("main");
  document.title = "Attention";
  document.documentElement.lang = preferredLanguage() === "zh" ? "zh-Hans" : "en";
  document.head.append(style);
  document.body.append(main);
  const t = translator(preferredLanguage());
  main.textContent = t("loading");
  await new Promise((resolve) => { style.onload = style.onerror = resolve; });
  try {
    await mountViewer(main, await tabSource(), tensorBoardTheme());
  } catch (error) {
    main.replaceChildren(problemText(t, problemOf(error)));
  }
}
