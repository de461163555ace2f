"""The attention viewer: JavaScript modules, and their assembly with data into one page that needs no network.

`viewer.js` exports `mountViewer(element, source, theme)`. The page's source is the data in the page itself; the source
of TensorBoard's Attention tab asks the server.
"""

import html
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
ROLES = {"alignment": "aligns", "reference": "refers"}  # by the split of a row of metrics.jsonl with heads
# Each imports only those before it.
MODULES = (
    "texts.js", "preferences.js", "dom.js", "refusals.js", "maps.js", "colours.js", "edits.js", "state.js", "probes.js",
    "model.js", "interventions.js", "tokenizer.js", "patterns.js", "sampling.js", "residual.js", "patching.js",
    "laboratory.js", "source.js", "data.js", "charts.js", "tooltip.js", "words.js", "timeline.js", "heads.js",
    "sentence.js", "edits_line.js", "look_menu.js", "head_line.js", "lines.js", "matrix.js", "alignment.js",
    "three_steps.js", "next_token.js", "lens.js", "contributions.js", "patch.js", "over_training.js", "compare.js",
    "views.js", "picture.js", "save.js", "address.js", "prompt.js", "controls.js", "help.js", "viewer.js",
)  # fmt: skip


def viewer_page(
    maps: list[dict[str, Any]],
    title: str,
    curves: Mapping[str, Sequence[tuple[int, float]]] | None = None,
    series: Mapping[str, Sequence[tuple[int, float]]] | None = None,
    found: Mapping[str, Any] | None = None,
    scored_on: str = "held_out",
    model: Mapping[str, Any] | None = None,
) -> str:
    """One self-contained HTML page with `maps`, each an `AttentionMaps.to_viewer()`.

    `curves` are the (step, loss) points of the run, by split ("train" and "val"), and `series` those of anything else
    it measured, by name ("alignment/score"). `found` are its `heads_found`. `scored_on` says what the heads' scores
    were measured on: "held_out" text or the "sentence" itself. `model` is a `page_model`, which the page computes with.
    """
    content = {"title": title, "maps": maps, "curves": curves, "series": series or {}, "found": found or {}}
    content |= {"scored_on": scored_on, "model": model}
    parts = {
        "title": html.escape(title.encode("utf-8", "replace").decode()),
        "style": (FOLDER / "viewer.css").read_text(encoding="utf-8"),
        # In a script element only "</script" and "<!--" have a meaning in HTML; without "<" neither can occur.
        "data": json.dumps(content, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
        "script": _script(),
    }
    template = (FOLDER / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda name: parts[name[1]], template)  # one pass: parts are not searched again


def heads_found(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[tuple[int, list[list[int]]]]]:
    """The heads that a run found to align words or to refer to one, of the rows of its metrics.jsonl.

    {"aligns": [(step, [[layer, head], ...]), ...], "refers": ...}, without what the run did not look for.
    """
    found: dict[str, list[tuple[int, list[list[int]]]]] = {}
    for row in rows:
        role = ROLES.get(row.get("split", ""))
        if role is not None and isinstance(row.get("heads"), list):
            found.setdefault(role, []).append((int(row["step"]), row["heads"]))
    return found


def _script() -> str:
    """All modules as one script: each becomes a function that returns its exports, so that names do not clash."""
    parts = ["const modules = {};"]
    for name in MODULES:
        source = (FOLDER / name).read_text(encoding="utf-8")
        exported = re.findall(r"^export (?:async )?(?:function|const) (\w+)", source, flags=re.MULTILINE)
        source = re.sub(
            r'^import (\{[^}]*\}) from "\./([\w.]+)";', r'const \1 = modules["\2"];', source, flags=re.MULTILINE
        )
        source = re.sub(r"^export (?=async|function|const)", "", source, flags=re.MULTILINE)
        parts.append(f'modules["{name}"] = (() => {{\n{source}\nreturn {{ {", ".join(exported)} }};\n}})();')
    return "\n".join(parts)
