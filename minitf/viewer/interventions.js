/* Edits, as the state and a live request hold them, in the model of the page (model.js); the formulas are those of edits.py.
 *
 *   { kind: "block", query, keys, heads }      the query may not look at the keys: their scores are -∞
 *   { kind: "move", query, keys, to, heads }   the keys together get the weight of `to`, and the other way
 *   { kind: "ablate", heads, by } or { kind: "ablate", mlp, by }   the output of heads or of a feed-forward layer is
 *                                              zero everywhere (by: "zero"), or its mean over the text ("mean")
 *
 * Positions count tokens from 0; heads are a list of [layer, head], or null for all.
 */

import { range } from "./dom.js";
import { refusal } from "./refusals.js";

/** The hook of `read` that applies the edits and switches heads off; undefined if there is nothing to do. Throws for what
 * a text of `size` tokens, or the model, does not have. */
export function placed(edits, headsOff, config, size) {
  const all = [...edits, ...(headsOff.length ? [{ kind: "ablate", heads: headsOff, by: "zero" }] : [])];
  if (all.length) checkSomethingIsLeft(all, config);
  const changes = all.map((edit) => place(edit, config, size));
  if (!changes.length) return undefined;
  return (step, layer, head, first, rows) => {
    for (const { at, change, applies } of changes) if (at === step && applies(layer, head)) change(rows, first);
  };
}

/** { at: the step, applies(layer, head), change(rows, first) } of one edit. */
function place(edit, config, size) {
  const heads = edit.heads === null || edit.heads === undefined ? null : new Set(edit.heads.map((head) => nameOf(head, config)));
  const applies = (layer, head) => heads === null || heads.has(`${layer}.${head}`);
  const atQuery = (change) => (rows, first) => rows[edit.query - first] && change(rows[edit.query - first]);
  if (edit.kind === "block") {
    const keys = positions(edit.keys, edit.query, size);
    return { at: "match", applies, change: atQuery((row) => keys.forEach((key) => { row[key] = -Infinity; })) };
  }
  if (edit.kind === "move") {
    const [keys, to] = [positions(edit.keys, edit.query, size), positions(edit.to, edit.query, size)];
    if (keys.some((key) => to.includes(key))) throw refusal("invalid");
    return { at: "weigh", applies, change: atQuery((row) => exchange(row, keys, to)) };
  }
  const change = { zero: (rows) => rows.forEach((row) => row.fill(0)), mean: (rows) => average(rows) }[edit.by];
  if (edit.kind !== "ablate" || !change) throw refusal("invalid");
  if (edit.mlp === undefined || edit.mlp === null) return { at: "gather", applies, change };
  if (!range(config.num_layers).includes(edit.mlp)) throw refusal("no_layer", { layer: edit.mlp });
  return { at: "mlp", applies: (layer) => layer === edit.mlp, change };
}

/** Throws if a query has no key left in a head: softmax would divide by zero. */
function checkSomethingIsLeft(edits, { num_layers, num_heads }) {
  const every = range(num_layers).flatMap((layer) => range(num_heads).map((head) => [layer, head]));
  const forbidden = new Map();
  for (const { query, keys, heads } of edits.filter(({ kind }) => kind === "block"))
    for (const head of heads ?? every) {
      const place = `${head} ${query}`;
      forbidden.set(place, new Set([...(forbidden.get(place) ?? []), ...keys]));
      if (forbidden.get(place).size > query) throw refusal("nothing_left", { position: query + 1 });
    }
}

/** Every row becomes the mean of all. */
function average(rows) {
  const mean = rows[0].map((_, i) => rows.reduce((sum, row) => sum + row[i], 0) / rows.length);
  for (const row of rows) row.set(mean);
}

function nameOf([layer, head], { num_layers, num_heads }) {
  if (!range(num_layers).includes(layer) || !range(num_heads).includes(head))
    throw refusal("no_head", { layer, head });
  return `${layer}.${head}`;
}

/** The keys of a query, each once. */
function positions(keys, query, size) {
  if (!range(size).includes(query) || !keys.length || !keys.every((key) => range(query + 1).includes(key)))
    throw refusal("invalid");
  return [...new Set(keys)];
}

/** Both groups of keys exchange what they get together; within a group its own proportions stay. */
function exchange(weights, one, other) {
  const share = (keys) => {
    const total = keys.reduce((sum, key) => sum + weights[key], 0);
    return { total, shares: keys.map((key) => (total > 0 ? weights[key] / total : 1 / keys.length)) };
  };
  const [first, second] = [share(one), share(other)];
  one.forEach((key, i) => { weights[key] = first.shares[i] * second.total; });
  other.forEach((key, i) => { weights[key] = second.shares[i] * first.total; });
}
