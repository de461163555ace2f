/* Edits, as the state and a live request hold them, in the model of the page (model.js); the formulas are those of edits.py.
 *
 *   { kind: "block", query, keys, heads }      the query may not look at the keys: their scores are -∞
 *   { kind: "move", query, keys, to, heads }   the keys together get the weight of `to`, and the other way
 *   { kind: "ablate", heads, by: "zero" } or { kind: "ablate", mlp, by: "zero" }   the output of heads or of a layer is zero
 *
 * Positions count tokens from 0; heads are a list of [layer, head], or null for all.
 */

import { range } from "./dom.js";

/** The hook of `read` that applies the edits and switches heads off; undefined if there is nothing to do. Throws for what
 * a text of `size` tokens, or the model, does not have. */
export function placed(edits, headsOff, config, size) {
  const all = [...edits, ...(headsOff.length ? [{ kind: "ablate", heads: headsOff, by: "zero" }] : [])];
  const changes = all.map((edit) => place(edit, config, size));
  if (!changes.length) return undefined;
  return (step, layer, head, position, row) => {
    for (const { at, change, applies } of changes) if (at === step && applies(layer, head)) change(position, row);
  };
}

/** { at: the step, applies(layer, head), change(position, row) } of one edit. */
function place(edit, config, size) {
  const heads = edit.heads === null || edit.heads === undefined ? null : new Set(edit.heads.map((head) => nameOf(head, config)));
  const applies = (layer, head) => heads === null || heads.has(`${layer}.${head}`);
  if (edit.kind === "block") {
    const keys = positions(edit.keys, edit.query, size);
    if (keys.length > edit.query) throw new Error("this word has nothing left to look at: forbid fewer looks");
    return { at: "match", applies, change: (position, row) => position === edit.query && keys.forEach((key) => { row[key] = -Infinity; }) };
  }
  if (edit.kind === "move") {
    const [keys, to] = [positions(edit.keys, edit.query, size), positions(edit.to, edit.query, size)];
    if (keys.some((key) => to.includes(key))) throw new Error("a look is moved from one word to another: choose two");
    return { at: "weigh", applies, change: (position, row) => position === edit.query && exchange(row, keys, to) };
  }
  if (edit.kind !== "ablate" || edit.by !== "zero") throw new Error("this page can forbid and move looks, and set outputs to zero");
  if (edit.mlp === undefined || edit.mlp === null) return { at: "gather", applies, change: (_, row) => row.fill(0) };
  if (!range(config.num_layers).includes(edit.mlp)) throw new Error(`there is no layer ${edit.mlp}`);
  return { at: "mlp", applies: (layer) => layer === edit.mlp, change: (_, row) => row.fill(0) };
}

function nameOf([layer, head], { num_layers, num_heads }) {
  if (!range(num_layers).includes(layer) || !range(num_heads).includes(head))
    throw new Error(`there is no layer ${layer}, head ${head}: the model has ${num_layers} layers of ${num_heads} heads`);
  return `${layer}.${head}`;
}

/** The keys of a query, each once. */
function positions(keys, query, size) {
  if (!range(size).includes(query) || !keys.length || !keys.every((key) => range(query + 1).includes(key)))
    throw new Error("a word looks at itself and at earlier words only");
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
