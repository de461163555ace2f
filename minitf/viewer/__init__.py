"""The attention viewer: plain files, and the data they show put together with them into one page that needs no network.

`viewer.js` exports `mountViewer(element, source, theme)`; the page gives it the data it carries as the source, the
Attention tab of TensorBoard one that asks the server.
"""

import html
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
# Each imports only those before it.
MODULES = (
    "texts.js", "preferences.js", "dom.js", "maps.js", "source.js", "timeline.js", "overview.js", "sentence.js",
    "lines.js", "matrix.js", "alignment.js", "three_steps.js", "next_token.js", "over_training.js", "compare.js",
    "prompt.js", "defaults.js", "viewer.js",
)  # fmt: skip


def viewer_page(
    maps: list[dict[str, Any]], title: str, curves: Mapping[str, Sequence[tuple[int, float]]] | None = None
) -> str:
    """One self-contained HTML page over `maps`, each an `AttentionMaps.to_viewer()`.

    `curves` are the (step, loss) points of the run, by split ("train" and "val").
    """
    # In a script element only "</script" and "<!--" mean anything to HTML; without any "<" neither can occur.
    content = {"title": title, "maps": maps, "curves": curves}
    data = json.dumps(content, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    template = (FOLDER / "page.html").read_text(encoding="utf-8")
    before_title, rest = template.split("{{title}}")
    before_style, rest = rest.split("{{style}}")
    before_data, rest = rest.split("{{data}}")
    before_script, after = rest.split("{{script}}")
    style = (FOLDER / "viewer.css").read_text(encoding="utf-8")
    title = html.escape(title.encode("utf-8", "replace").decode())
    return "".join([before_title, title, before_style, style, before_data, data, before_script, _script(), after])


def _script() -> str:
    """All modules as one: each a function that returns what it exports, so that their names stay apart."""
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
