"""The clock of a run: the seconds that its training steps take, and all seconds since its start."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from minitf.checkpoints.train_state import TrainState


class TrainingClock:
    """Adds to `train_s` and `elapsed_s` of a TrainState. Everything but training steps runs while it is paused."""

    def __init__(self, state: TrainState, synchronize: Callable[[], None]) -> None:
        """`synchronize` waits until the device has done its work."""
        self.state = state
        self.synchronize = synchronize
        self.started = time.perf_counter() - state.elapsed_s
        self.step_started: float | None = None  # when the clock last began to run

    def run(self) -> None:
        """Let the clock run, if it does not yet."""
        if self.step_started is None:
            self.step_started = time.perf_counter()

    @property
    def train_s(self) -> float:
        """Seconds of training so far, as seen from here: the device may not have done all of its work."""
        running_s = 0.0 if self.step_started is None else time.perf_counter() - self.step_started
        return self.state.train_s + running_s

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock until the next `run`. Both times in the state are current inside and afterwards."""
        if self.step_started is not None:
            self.synchronize()
            self.state.train_s += time.perf_counter() - self.step_started
            self.step_started = None
        self._count_elapsed()
        yield
        self._count_elapsed()

    def _count_elapsed(self) -> None:
        self.state.elapsed_s = time.perf_counter() - self.started
