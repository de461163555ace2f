"""When a run ends, and how often it logs, evaluates and saves until then."""

from pathlib import Path

import pytest
from helpers import rows, train_here

from minitf.checkpoints.checkpoint import load_checkpoint
from minitf.checkpoints.train_state import TrainState
from minitf.training.budget import estimate_num_steps
from minitf.training.step import TrainingStep
from minitf.training.trainer import Trainer
from minitf.training.trainer_config import TrainerConfig

STEP_S = 0.02  # of a step on the simulated machine


class Clock:
    """Stands in for the module `time`: it runs only in training steps."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def perf_counter(self) -> float:
        return self.now_s


@pytest.fixture
def simulated_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every training step takes STEP_S, whatever else the machine does."""
    clock = Clock()
    train_one_step = Trainer.train_one_step

    def timed_step(self: Trainer) -> None:
        train_one_step(self)
        clock.now_s += STEP_S

    monkeypatch.setattr("minitf.training.clock.time", clock)
    monkeypatch.setattr(Trainer, "train_one_step", timed_step)


def warm_up_measures(step_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainingStep, "measure", lambda *_, **__: step_s)


@pytest.mark.usefixtures("simulated_clock")
@pytest.mark.parametrize("max_steps", ["null", "1000000"])
def test_run_ends_at_its_time_limit(
    workdir: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch, max_steps: str
) -> None:
    warm_up_measures(STEP_S, monkeypatch)
    limits = [f"trainer.max_steps={max_steps}", "trainer.max_minutes=0.1"]
    assert train_here(*tiny, *limits, "run_dir=run", "trainer.eval_every=0", "trainer.log_every=0") == 0
    state = load_checkpoint("run", prefer="latest").state
    assert state["step"] == state["num_steps"] == rows("run")[-1]["step"]
    assert state["train_s"] == pytest.approx(6, abs=2 * STEP_S)
    assert 100 <= len(rows("run", "train")) <= 200
    assert len(rows("run", "val")) == 8


@pytest.mark.usefixtures("simulated_clock")
@pytest.mark.parametrize("measured_s", [0.1 * STEP_S, 5 * STEP_S])
def test_number_of_steps_is_corrected_by_the_speed_of_training(
    workdir: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch, measured_s: float
) -> None:
    warm_up_measures(measured_s, monkeypatch)
    limits = ["trainer.max_steps=null", "trainer.max_minutes=0.05", "trainer.eval_every=0", "trainer.log_every=2"]
    assert train_here(*tiny, *limits, "run_dir=run") == 0
    state = load_checkpoint("run", prefer="latest").state
    assert state["num_steps_final"]
    assert state["step"] == state["num_steps"] == pytest.approx(3 / STEP_S, abs=1)
    rates = [row["lr"] for row in rows("run", "train")]
    assert rates[-1] < 0.2 * max(rates)  # the schedule ends with the run


def test_estimated_number_of_steps_respects_both_limits() -> None:
    state = TrainState(step=100, train_s=30.0)
    by_time, by_both = TrainerConfig(max_minutes=1), TrainerConfig(max_minutes=1, max_steps=250)
    assert estimate_num_steps(by_time, state, step_s=0.1) == 400
    assert estimate_num_steps(by_both, state, step_s=0.1) == 250
    assert estimate_num_steps(by_both, state, step_s=1.0) == 130
    assert estimate_num_steps(by_time, TrainState(step=100, train_s=90.0), step_s=0.1) == 101  # one more, at least
    assert estimate_num_steps(TrainerConfig(max_steps=7), state, step_s=0.1) == 7


def test_short_runs_evaluate_less_often_but_save_as_often(workdir: Path, tiny: list[str]) -> None:
    # In 32 steps of 4 x 32 tokens evaluation may take a quarter of the time, at a third of a step's time a token.
    settings = [*tiny, "trainer.max_steps=32", "trainer.eval_every=0", "trainer.keep_checkpoints=50"]
    for times, eval_tokens in ((8, 3072 // 8), (4, 3072 // 4), (2, 1_000_000)):
        assert train_here(*settings, f"trainer.eval_tokens={eval_tokens}", f"run_dir=run{times}") == 0
        assert [row["step"] for row in rows(f"run{times}", "val")] == list(range(32 // times, 33, 32 // times))
        saved = sorted(path.name for path in Path(f"run{times}/checkpoints").glob("step_*"))
        assert saved == [f"step_{step:08d}" for step in range(4, 33, 4)]


def test_earlier_limit_ends_the_run(workdir: Path, tiny: list[str]) -> None:
    assert train_here(*tiny, "trainer.max_minutes=5", "run_dir=run") == 0
    assert rows("run")[-1]["step"] == 6
