"""Files of JSON rows in a run's directory: metrics.jsonl and attention.jsonl."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from minitf.system.files import write_whole

MAX_CURVE_POINTS = 500


class JsonRows:
    """A file of JSON objects, one a line, each with its `step`."""

    def __init__(self, path: Path, start_step: int) -> None:
        """Open the file to append to it, without the rows after `start_step` (all of them if it is 0)."""
        self.path = path
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            try:
                if json.loads(line)["step"] <= (start_step or -1):
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError, RecursionError):
                continue  # truncated when the run was killed
        write_whole(path, "".join(kept))
        self.file = path.open("a", encoding="utf-8")

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row and hand it to the operating system."""
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()

    def sync(self) -> None:
        """Have all rows on disk."""
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """All rows, read from the file."""
        with self.path.open(encoding="utf-8") as lines:
            yield from map(json.loads, lines)


def loss_curves(metrics: JsonRows) -> dict[str, list[tuple[int, float]]]:
    """(step, loss) of the training and held-out rows, thinned to at most MAX_CURVE_POINTS each."""
    curves: dict[str, list[tuple[int, float]]] = {"train": [], "val": []}
    for row in metrics:
        if row["split"] in curves:
            curves[row["split"]].append((row["step"], round(row["loss"], 4)))
    return _thinned(curves)


def other_curves(metrics: JsonRows) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of every number in the rows of other splits, by "split/column": "alignment/score"."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in metrics:
        if row["split"] not in ("train", "val"):
            for name, value in _numbers(row["split"], row):
                curves.setdefault(name, []).append((row["step"], round(value, 4)))
    return _thinned(curves)


def _numbers(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """The finite numbers in a row, at any depth, with the names of their columns joined by "/"."""
    if isinstance(value, Mapping):
        for column, inner in value.items():
            if column not in ("step", "split"):
                yield from _numbers(f"{name}/{column}", inner)
    elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        yield name, float(value)


def _thinned(curves: dict[str, list[tuple[int, float]]]) -> dict[str, list[tuple[int, float]]]:
    return {name: points[:: -(-len(points) // MAX_CURVE_POINTS) or 1] for name, points in curves.items()}
