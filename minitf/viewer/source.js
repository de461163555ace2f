/* The viewer's source of data within a page: the page itself. The Attention tab has another, in tab.js.
 *
 *   runs()                    -> names
 *   run(name)                 -> { sentences: [{ tag, text, looks: [[step, time]] }], curves, scores, importance, checkpoints }
 *   map(name, sentence, look) -> an AttentionMaps.to_viewer()
 *   live(request)             -> the same, exact; `live` is null where unavailable, and `why` is the reason
 */

export function embeddedSource(data) {
  const byText = Map.groupBy ? Map.groupBy(data.maps, (map) => map.text) : groupByText(data.maps);
  const sentences = [...byText.keys()].map((text) => ({
    tag: text, text, looks: byText.get(text).map((map, index) => [map.step, index]),
  }));
  const first = byText.get(sentences[0].text);
  const scored = first.filter((map) => Object.keys(map.scores).length);
  const scores = { steps: scored.map((map) => map.step), values: {} };
  for (const name of Object.keys(scored[0]?.scores ?? {}))
    scores.values[name] = scored[0].scores[name].map((row, layer) =>
      row.map((_, head) => scored.map((map) => map.scores[name][layer][head])));
  const curves = data.curves ?? { train: [], val: [] };
  return {
    title: data.title,
    live: null,
    why: "page",
    runs: async () => [""],
    run: async () => ({ sentences, curves, scores, importance: null, checkpoints: [] }),
    map: async (_, sentence, [, index]) => byText.get(sentence.text)[index],
  };
}

function groupByText(maps) {
  const groups = new Map();
  for (const map of maps) groups.set(map.text, [...(groups.get(map.text) ?? []), map]);
  return groups;
}
