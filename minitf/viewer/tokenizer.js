/* Text <-> ids in the page, as tokenizer.py does it: byte-level BPE, single characters, bytes. Made from the page's data:
 *
 *   labels    of every id, as a picture shows it       start   ids before every text       end     of the end of a text
 *   kind      "bytes": `bytes` are the ids of the 256 bytes, `merges` are [left, right, id, left, ...], the first first
 *             "characters": `characters` are those of the ids 0, 1, ...
 *             "none": another tokenizer; only the texts of `known`, { text: ids }, can be read
 */

import { range } from "./dom.js";
import { refusal } from "./refusals.js";

/** The pieces of a text that BPE joins within: contractions, words, numbers, signs, spaces; as GPT-2 splits it. */
const PIECES = /'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\p{White_Space}\p{L}\p{N}]+|\p{White_Space}+(?!\P{White_Space})|\p{White_Space}+/gu;
const LONE_SURROGATE = /\p{Surrogate}/u;

/** { encode(text), encodePrompt(text), decode(ids), labels(ids), label(id), idOf(label) }; throws for a text that has no ids. */
export function createTokenizer(data) {
  const make = { bytes: byBytes, characters: byCharacter, none: onlyKnown }[data.kind];
  const { encode, decode } = make(data);
  const checked = (text) => {
    if (LONE_SURROGATE.test(text)) throw refusal("surrogate");
    return [...data.start, ...encode(text)];
  };
  return {
    encode: checked,
    /** The ids of a text to continue: an empty one begins as a new text does in training. */
    encodePrompt: (text) => (text || data.start.length ? checked(text) : [data.end]),
    decode,
    label: (id) => data.labels[id],
    /** The id with this label. */
    idOf(label) {
      if (!data.labels.includes(label)) throw refusal("no_token", { token: label });
      return data.labels.indexOf(label);
    },
    labels: (ids) => joinBytes(ids.map((id) => data.labels[id])),
  };
}

function byBytes({ bytes, merges }) {
  const ranks = new Map(); // "left right" -> [rank, id]
  const spelt = new Map(bytes.map((id, byte) => [id, [byte]]));
  for (let i = 0; i < merges.length; i += 3) {
    const [left, right, id] = merges.slice(i, i + 3);
    ranks.set(`${left} ${right}`, [i, id]);
    spelt.set(id, [...spelt.get(left), ...spelt.get(right)]);
  }

  /** Join the neighbours that come first among the merges, everywhere, until none is left. A merge's parts are made by
   * earlier ones, so this is the same as joining one pair after another. */
  function merged(ids) {
    for (;;) {
      let first = null;
      for (let i = 0; i + 1 < ids.length; i++) {
        const found = ranks.get(`${ids[i]} ${ids[i + 1]}`);
        if (found && (!first || found[0] < first[0])) first = [...found, ids[i], ids[i + 1]];
      }
      if (!first) return ids;
      const [, id, left, right] = first;
      const joined = [];
      for (let i = 0; i < ids.length; i++) {
        if (ids[i] === left && ids[i + 1] === right) {
          joined.push(id);
          i++;
        } else joined.push(ids[i]);
      }
      ids = joined;
    }
  }
  const utf8 = new TextEncoder();
  return {
    encode: (text) => (text.match(PIECES) ?? []).flatMap((piece) => merged([...utf8.encode(piece)].map((byte) => bytes[byte]))),
    decode: (ids) => new TextDecoder("utf-8", { ignoreBOM: true }).decode(Uint8Array.from(ids.flatMap((id) => spelt.get(id) ?? []))),
  };
}

function byCharacter({ characters }) {
  const all = [...characters];
  const ids = new Map(all.map((character, id) => [character, id]));
  return {
    encode: (text) => [...text].map((character) => {
      if (!ids.has(character)) throw refusal("unknown_character", { character });
      return ids.get(character);
    }),
    decode: (some) => some.map((id) => all[id] ?? "").join(""),
  };
}

function onlyKnown({ known }) {
  const unknown = () => refusal("only_known");
  return {
    encode(text) {
      if (!Object.hasOwn(known, text)) throw unknown();
      return known[text];
    },
    decode() {
      throw unknown();
    },
  };
}

/** The labels of one text, where the bytes of a split character are named after it, as in token_labels.py. */
function joinBytes(labels) {
  const parts = labels.map((label) => label.match(/⟨[0-9a-f]{2}⟩|./gsu) ?? []);
  const stray = parts.flatMap((row, owner) => row.map((part, at) => ({ owner, at, byte: Number.parseInt(part.slice(1, 3), 16), isByte: /^⟨[0-9a-f]{2}⟩$/.test(part) })))
    .filter((part) => part.isByte);
  for (let start = 0; start < stray.length;) {
    const first = stray[start].byte;
    const run = stray.slice(start, start + (first >= 0xf0 ? 4 : first >= 0xe0 ? 3 : 2));
    let character = "";
    try {
      character = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(Uint8Array.from(run, ({ byte }) => byte));
    } catch {
      start += 1;
      continue;
    }
    const owners = [...new Set(run.map(({ owner }) => owner))];
    owners.forEach((owner, i) => {
      const mine = run.filter((part) => part.owner === owner);
      for (const { at } of mine) parts[owner][at] = "";
      parts[owner][mine[0].at] = `${character}(${i + 1}/${owners.length})`;
    });
    start += run.length;
  }
  return range(labels.length).map((i) => parts[i].join(""));
}
