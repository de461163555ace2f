"""Which of two ways of computing is faster, on a machine that does other work now and then."""

import math
from collections.abc import Callable
from dataclasses import dataclass

MAX_ROUNDS = 5
CLEAR_AT_ONCE, CLEAR = 10.0, 1.5  # margins at which one round, and two, are enough
MEASURED_S = 2.0  # about: no further round after this many seconds of what was measured
THIN = 1.25  # a margin that may be an error: it is worth another look later


@dataclass(frozen=True)
class Comparison:
    """The shortest seconds of two ways. The other one is taken if it takes less than `limit` of the time of the one."""

    one_s: float
    other_s: float
    limit: float = 1.0

    @property
    def other_wins(self) -> bool:
        return self.other_s < self.limit * self.one_s

    @property
    def margin(self) -> float:
        """By what factor one of the times would have to change to turn the verdict, at least 1."""
        ratio = self.limit * self.one_s / self.other_s
        return max(ratio, 1 / ratio) if ratio else math.inf

    @property
    def is_thin(self) -> bool:
        return self.margin < THIN

    def with_shorter(self, again: "Comparison") -> "Comparison":
        """The shortest times of this comparison and of another one of the same two ways."""
        return Comparison(min(self.one_s, again.one_s), min(self.other_s, again.other_s), self.limit)


def compare(
    one: Callable[[], float], other: Callable[[], float], limit: float = 1.0, one_s: float | None = None
) -> Comparison:
    """Time two ways in turn, so that a burst of other work meets both, and take the shortest time of each.

    `one` and `other` return seconds; `one_s` is a time of `one` that is known already. The closer the two are, the more
    rounds. `other` is timed last. Several processes compare alike if they are given the same times.
    """
    found = Comparison(one() if one_s is None else one_s, other(), limit)
    measured_s = found.one_s + found.other_s
    for rounds in range(1, MAX_ROUNDS):
        if found.margin > (CLEAR_AT_ONCE if rounds == 1 else CLEAR) or measured_s > MEASURED_S:
            break
        again = Comparison(one(), other(), limit)
        measured_s += again.one_s + again.other_s
        found = found.with_shorter(again)
    return found
