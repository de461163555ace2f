"""Labels of tokens for pictures, where a character may be split over several tokens."""

import re
from collections.abc import Sequence

_PART = re.compile(r"⟨[0-9a-f]{2}⟩|.", re.DOTALL)


def join_bytes(pieces: Sequence[str]) -> list[str]:
    """The pieces of one text, where the bytes of a split character are named after it: "你(1/3)", "你(2/3)", ...

    `pieces` are those of `Tokenizer.pieces`; bytes that form no character stay as they are ("⟨e4⟩").
    """
    parts = [[m[0] for m in _PART.finditer(piece)] for piece in pieces]
    stray = [(i, j, int(part[1:3], 16)) for i, row in enumerate(parts) for j, part in enumerate(row) if len(part) > 1]
    start = 0
    while start < len(stray):
        first = stray[start][2]
        length = 4 if first >= 0xF0 else 3 if first >= 0xE0 else 2
        run = stray[start : start + length]
        try:
            char = bytes(byte for _, _, byte in run).decode("utf-8")
        except UnicodeDecodeError:
            start += 1
            continue
        owners = sorted({i for i, _, _ in run})
        for number, owner in enumerate(owners, start=1):
            mine = [j for i, j, _ in run if i == owner]
            parts[owner][mine[0]] = f"{char}({number}/{len(owners)})"
            for j in mine[1:]:
                parts[owner][j] = ""
        start += length
    return ["".join(row) for row in parts]
