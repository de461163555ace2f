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
    """(step, value) of every number in the rows of other splits, by the tag that TensorBoard has: "alignment/score".

    A row of a relation that the run watches has a number for each head, "watch/it>cat/layer0_head1", as one of the
    ablation of heads.
    """
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in metrics:
        if row["split"] not in ("train", "val"):
            for name, value in _numbers(row):
                curves.setdefault(name, []).append((row["step"], round(value, 4)))
    return _thinned(curves)


def _numbers(row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    place = "/".join([row["split"], *([row["relation"]] if "relation" in row else [])])
    for column, value in row.items():
        if column in ("weight", "bits_per_token") and isinstance(value, list):
            for layer, values in enumerate(value):
                yield from ((f"{place}/layer{layer}_head{head}", one) for head, one in enumerate(values))
        elif column != "step" and isinstance(value, int | float) and math.isfinite(value):
            yield f"{place}/{'probability_blocked' if column == 'blocked' else column}", value


def _thinned(curves: dict[str, list[tuple[int, float]]]) -> dict[str, list[tuple[int, float]]]:
    return {name: points[:: -(-len(points) // MAX_CURVE_POINTS) or 1] for name, points in curves.items()}
