"""The attention viewer: static files, and the data they show, put together into one page that needs no network.

`viewer.js` exports `mountViewer(element, data)` and `viewer.css` styles it; another kind of page can use them as files.
"""

import html
import json
import re
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
MODULES = ("weights.js", "views.js", "viewer.js")  # each imports only those before it


def viewer_page(maps: list[dict[str, Any]], title: str) -> str:
    """One self-contained HTML page over `maps`, each an `AttentionMaps.to_viewer()`."""
    # In a script element only "</script" and "<!--" mean anything to HTML; without any "<" neither can occur.
    data = json.dumps({"title": title, "maps": maps}, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    template = (FOLDER / "page.html").read_text(encoding="utf-8")
    before_title, rest = template.split("{{title}}")
    before_style, rest = rest.split("{{style}}")
    before_data, rest = rest.split("{{data}}")
    before_script, after = rest.split("{{script}}")
    style = (FOLDER / "viewer.css").read_text(encoding="utf-8")
    script = "".join((FOLDER / name).read_text(encoding="utf-8") for name in MODULES)
    script = re.sub(r"^import .*\n|^export ", "", script, flags=re.MULTILINE)  # they have become one module
    title = html.escape(title.encode("utf-8", "replace").decode())
    return "".join([before_title, title, before_style, style, before_data, data, before_script, script, after])
