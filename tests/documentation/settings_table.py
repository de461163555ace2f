"""Write the tables of presets and settings into .github/configuration.md: python tests/documentation/settings_table.py.

They come from where `--help` has them; a test compares the page with them.
"""

import re
from pathlib import Path

from minitf.config.presets import GROUPS, SECTIONS, options, settings

PAGE = Path(__file__).parents[2] / ".github/configuration.md"


def presets_table() -> str:
    """Every option of every group, with the description in its first line."""
    rows = [(f"`{group}={name}`", text) for group in GROUPS for name, text in options(group).items()]
    return table(("preset", "what it is"), rows)


def settings_table() -> str:
    """Every setting with its default and the comment next to its field."""
    found = [setting for section in SECTIONS for setting in settings(section)]
    return table(("setting", "default", ""), [(f"`{s.key}`", f"`{s.default}`", s.comment) for s in found])


def table(heading: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [heading, tuple("---" for _ in heading), *rows]
    escaped = (tuple(re.sub(r"([|<])", r"\\\1", cell) for cell in line) for line in lines)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in escaped)


def with_tables(page: str) -> str:
    """The page with both tables renewed: each follows its marker and ends at the next heading."""
    for marker, rows in (("presets", presets_table()), ("settings", settings_table())):
        block = f"<!-- {marker}: written by tests/documentation/settings_table.py -->\n\n{rows}"
        page = re.sub(rf"<!-- {marker}\b.*?(?=\n## |\Z)", lambda _, block=block: block, page, flags=re.DOTALL)
    return page


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
