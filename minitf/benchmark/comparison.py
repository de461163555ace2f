"""Rows of samples, and alternation between the sides of a comparison.

A machine is not equally fast from one minute to the next. So each round measures every side, the next round in the
opposite order, and ratios are taken within a round: a slow phase of minutes slows both terms.
"""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from minitf.errors import RequestError

Result = TypeVar("Result")


@dataclass(frozen=True)
class Row:
    """One line of a benchmark's table: samples, optionally with those of a peer from the same rounds.

    Attributes:
        what: the quantity.
        unit: the unit of the samples.
        samples: one value per round.
        peer: the name of the other side; empty if there is none.
        peer_samples: one value per round, as many as `samples`.
        more_is_better: false for times and memory.
        note: a short remark.
        raw: further measurements, for the JSON.
    """

    what: str
    unit: str
    samples: list[float]
    peer: str = ""
    peer_samples: list[float] = field(default_factory=list)
    more_is_better: bool = True
    note: str = ""
    raw: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.samples:
            raise ValueError(f"{self.what}: nothing was measured")
        if self.peer and len(self.samples) != len(self.peer_samples):
            raise ValueError(f"{self.what}: {len(self.samples)} and {len(self.peer_samples)} samples are no pairs")

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def peer_median(self) -> float | None:
        return statistics.median(self.peer_samples) if self.peer else None

    @property
    def ratios(self) -> list[float]:
        """By what factor minitf is better, round by round: above 1 is better, for speeds and for times."""
        pairs = zip(self.samples, self.peer_samples, strict=True) if self.peer else ()
        return [ours / theirs if self.more_is_better else theirs / ours for ours, theirs in pairs]

    @property
    def ratio(self) -> float | None:
        return statistics.median(self.ratios) if self.peer else None

    @property
    def spread(self) -> tuple[float, float]:
        """Smallest and largest ratio; without a peer, smallest and largest sample."""
        values = self.ratios or self.samples
        return min(values), max(values)

    def to_json(self) -> dict[str, Any]:
        """The row as a dictionary, with derived values."""
        derived = {"median": self.median, "peer_median": self.peer_median, "ratio": self.ratio, "spread": self.spread}
        return {**asdict(self), **derived, "ratios": self.ratios}


def alternate(
    sides: Mapping[str, Callable[[int], Result]], num_rounds: int, progress: Callable[[str], None] = lambda line: None
) -> dict[str, list[Result]]:
    """Call every side once per round with the number of the round; odd rounds run in the opposite order."""
    if num_rounds < 1:
        raise RequestError(f"--repeats {num_rounds} must be at least 1")
    results: dict[str, list[Result]] = {name: [] for name in sides}
    for number in range(num_rounds):
        names = list(sides) if number % 2 == 0 else list(sides)[::-1]
        for name in names:
            progress(f"round {number + 1} of {num_rounds}: {name}")
            results[name].append(sides[name](number))
    return results
