"""The output of a benchmark: a table, a JSON file, plots."""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minitf.benchmark.comparison import Row

FORMAT = 1  # version of the JSON


@dataclass
class Request:
    """The command line's settings and the working directories."""

    work: Path  # a temporary directory for texts, runs and caches
    out: Path  # for the JSON and the plots
    nanogpt: Path | None = None
    text: Path | None = None
    repeats: int = 3
    seeds: int = 3
    quick: bool = False  # toy sizes, whose numbers mean nothing
    corpus_mb: tuple[int, ...] = (1, 10, 100)
    steps: int | None = None  # minitf's steps in shakespeare; None: the fewest that reach the loss


@dataclass
class Report:
    """The results of one benchmark, filled while it runs."""

    name: str
    rows: list[Row] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    plots: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, row: Row) -> None:
        self.rows.append(row)

    def skip(self, what: str, why: str) -> None:
        """Record a skipped measurement and the reason."""
        self.skipped.append(f"{what} skipped: {why}")

    def progress(self, line: str) -> None:
        """Print a line on stderr."""
        print(f"  {self.name}: {line}", file=sys.stderr, flush=True)

    def to_json(self) -> dict[str, Any]:
        rows = [row.to_json() for row in self.rows]
        return {"seconds": round(self.seconds, 1), "rows": rows, "skipped": self.skipped, "plots": self.plots}

    def table(self) -> str:
        """Rows as aligned columns; the spread is that of the ratios, or of the samples if there is no peer."""
        head = ("", "minitf", "peer", "", "ratio", "spread", "")
        lines = [head] if any(row.peer for row in self.rows) else []
        for row in self.rows:
            low, high = row.spread
            several = len(row.samples) > 1
            times = f"{row.ratio:.2f} x" if row.ratio is not None else ""
            spread = f"{number(low)} to {number(high)}" if several else ""
            peer = number(row.peer_median) if row.peer_median is not None else ""
            lines.append((f"{row.what}, {row.unit}", number(row.median), peer, row.peer, times, spread, row.note))
        widths = [max((len(line[i]) for line in lines), default=0) for i in range(len(head))]
        text = ["  ".join(map(_aligned, line, widths, range(len(head)))).rstrip() for line in lines]
        return "\n".join(f"  {line}" for line in [*text, *self.skipped])


def _aligned(cell: str, width: int, column: int) -> str:
    return cell.rjust(width) if column in (1, 2, 4) else cell.ljust(width)


def number(value: float) -> str:
    """Three significant digits without exponents: 0.0123, 1.23, 12.3, 123, 12,345."""
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    digits = 2
    small = abs(value)
    while small < 1 and digits < 8:
        small *= 10
        digits += 1
    return f"{value:.{digits if abs(value) < 10 else 1}f}"


def write_json(path: Path, environment: dict[str, Any], reports: list[Report]) -> None:
    """Write all raw samples with their environment."""
    content = {"format": FORMAT, **environment, "benchmarks": {report.name: report.to_json() for report in reports}}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
