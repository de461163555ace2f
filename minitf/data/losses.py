"""What a tokenizer loses of a text: capital letters, line breaks, characters that its vocabulary lacks."""

import unicodedata
from collections import Counter
from collections.abc import Mapping

LOST = "lost "  # how their names begin among other counts


def losses(text: str, kept: str) -> Counter[str]:
    """How many characters of `text` are missing from `kept`, what its ids decode to, by kind."""
    if text == kept:
        return Counter()
    missing = Counter(text) - Counter(kept)
    found: Counter[str] = Counter()
    for char, count in missing.items():
        found[LOST + _kind(char)] += count
    return found or Counter({LOST + "spacing": 1})


def _kind(char: str) -> str:
    if char.isspace():
        return "line breaks" if char in "\r\n" else "spaces and tabs"
    if char.isupper() and char.isascii():
        return "capital letters"
    return f"{unicodedata.name(char, 'unnamed').split()[0]} characters"  # by script: LATIN, CJK


def describe_losses(counts: Mapping[str, int]) -> str:
    """For example "; the tokenizer loses 12 line breaks: bits per byte are of what it keeps"; "" for none."""
    lost = {name.removeprefix(LOST): count for name, count in counts.items() if name.startswith(LOST)}
    if not lost:
        return ""
    most = sorted(lost, key=lambda kind: -lost[kind])
    named = ", ".join(f"{lost[kind]:,} {kind}" for kind in most[:5])
    more = f" and {len(most) - 5} more kinds" if len(most) > 5 else ""
    return f"; the tokenizer loses {named}{more}: bits per byte are of what it keeps"
