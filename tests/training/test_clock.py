"""The training clock counts training steps, and nothing that runs while it is paused."""

import pytest

from minitf.checkpoints.train_state import TrainState
from minitf.training.clock import TrainingClock


class Time:
    """Stands in for the module `time`."""

    now_s = 100.0

    def perf_counter(self) -> float:
        return self.now_s


def test_only_time_outside_pauses_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    time = Time()
    monkeypatch.setattr("minitf.training.clock.time", time)
    state = TrainState(train_s=7.0, elapsed_s=10.0)
    synchronised: list[float] = []
    clock = TrainingClock(state, lambda: synchronised.append(time.now_s))
    with clock.paused():  # before it ever ran
        time.now_s += 1
    assert (state.train_s, state.elapsed_s, synchronised) == (7.0, 11.0, [])
    clock.run()
    time.now_s += 2
    clock.run()  # runs already
    time.now_s += 2
    with clock.paused():
        assert (state.train_s, state.elapsed_s) == (11.0, 15.0)
        time.now_s += 5
    assert (state.train_s, state.elapsed_s, synchronised) == (11.0, 20.0, [105.0])
    time.now_s += 1  # still paused
    clock.run()
    time.now_s += 3
    with clock.paused():
        pass
    assert (state.train_s, state.elapsed_s) == (14.0, 24.0)
