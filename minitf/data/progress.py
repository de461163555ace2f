"""The progress of a long preparation: a bar in a terminal, otherwise a line about every ten seconds."""

import sys
import time
from collections.abc import Callable, Mapping

LOG_EVERY_S = 10.0

Counts = Mapping[str, int]
Totals = Mapping[str, int | None]  # the counts at the end, by the same names; None: unknown


def share_done(counts: Counts, totals: Totals) -> float | None:
    """The share of the work done, by the first total that is known; None where none is."""
    known = [counts[name] / total for name, total in totals.items() if total]
    return min(1.0, known[0]) if known else None


def amount_done(counts: Counts, totals: Totals) -> str:
    """For example "12.5 MB of text (40%)"."""
    share = share_done(counts, totals)
    return f"{counts['bytes'] / 1e6:,.1f} MB of text" + (f" ({share:.0%})" if share is not None else "")


class Progress:
    """A context manager; call `start` when the length of the work is known, then `update` after each part."""

    def __init__(self, log: Callable[[str], None], description: str) -> None:
        """`description` is shown before `start`."""
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bar

        columns = (TextColumn("{task.description}"), BarColumn(None), TextColumn("{task.fields[numbers]}"))
        self._bar = Bar(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
        self._task = self._bar.add_task(description, total=None, numbers="")
        self._log = log

    def __enter__(self) -> "Progress":
        if not self._bar.disable:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._bar.disable:
            self._bar.stop()

    def start(self, counts: Counts, totals: Totals) -> None:
        """Start the clock at `counts`, which an earlier process reached."""
        self._totals = totals
        self._first_bytes = counts["bytes"]
        self._first_share = share_done(counts, totals) or 0.0
        self._started = self._logged = time.monotonic()
        self.update(counts)

    def update(self, counts: Counts) -> None:
        now = time.monotonic()
        share = share_done(counts, self._totals)
        numbers = self._numbers(counts, share, elapsed_s=max(now - self._started, 1e-9))
        total = None if share is None else 1.0
        self._bar.update(self._task, description="preparing", total=total, completed=share or 0.0, numbers=numbers)
        if self._bar.disable and now - self._logged >= LOG_EVERY_S:
            self._logged = now
            self._log(f"preparing: {numbers}")

    def _numbers(self, counts: Counts, share: float | None, elapsed_s: float) -> str:
        rate = (counts["bytes"] - self._first_bytes) / 1e6 / elapsed_s
        numbers = f"{counts['bytes'] / 1e6:,.0f} MB of text, {rate:.1f} MB/s"
        if share is None or share <= self._first_share:
            return numbers
        left_s = elapsed_s * (1 - share) / (share - self._first_share)
        return f"{numbers}, {share:.0%}, {int(left_s // 60)}:{int(left_s % 60):02d} min left"
