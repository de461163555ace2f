"""When a run ends, and how often it logs, evaluates and saves until then. `test_budget.py` simulates more machines."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import assert_same_run, rows, train_here

from minitf.checkpoints.checkpoint import load_checkpoint
from minitf.training.decisions import RunDecisions
from minitf.training.step import TrainingStep
from minitf.training.trainer import Trainer

STEP_S = 0.04  # of a step on the simulated machine
# Without limits and intervals of their own.
BY_TIME = ["trainer.max_steps=null", "trainer.max_minutes=0.05", "trainer.eval_every=0", "trainer.log_every=0"]

Simulate = Callable[[Callable[[int], float]], None]


class Clock:
    """Stands in for the module `time`: it runs only in training steps."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def perf_counter(self) -> float:
        return self.now_s


@pytest.fixture
def simulate(monkeypatch: pytest.MonkeyPatch) -> Simulate:
    """Call it with a function: the seconds of a training step by its number, whatever else this machine does."""
    clock = Clock()
    train_one_step = Trainer.train_one_step
    monkeypatch.setattr("minitf.training.clock.time", clock)

    def simulate(step_s: Callable[[int], float]) -> None:
        def timed_step(self: Trainer) -> None:
            train_one_step(self)
            clock.now_s += step_s(self.state.step)

        monkeypatch.setattr(Trainer, "train_one_step", timed_step)
        monkeypatch.setattr(TrainingStep, "measure", lambda *_, **__: step_s(0))

    return simulate


@pytest.mark.parametrize("max_steps", ["null", pytest.param("1000000", marks=pytest.mark.slow)])
def test_run_ends_at_its_time_limit(workdir: Path, tiny: list[str], simulate: Simulate, max_steps: str) -> None:
    simulate(lambda step: STEP_S / 2)
    assert train_here(*tiny, *BY_TIME, f"trainer.max_steps={max_steps}", "run_dir=run") == 0
    state = load_checkpoint("run", prefer="latest").state
    assert state["step"] == state["num_steps"] == rows("run")[-1]["step"]
    assert state["train_s"] == pytest.approx(3, abs=STEP_S)
    assert 70 <= len(rows("run", "train")) <= 200
    assert len(rows("run", "val")) == 8


@pytest.mark.parametrize("measured", [0.1, pytest.param(5, marks=pytest.mark.slow)])
def test_time_that_the_warm_up_measures_decides_nothing(
    workdir: Path, tiny: list[str], simulate: Simulate, measured: float
) -> None:
    simulate(lambda step: STEP_S * (1 if step else measured))
    assert train_here(*tiny, *BY_TIME, "run_dir=run") == 0
    state = load_checkpoint("run", prefer="latest").state
    assert state["step"] == state["num_steps"] == pytest.approx(3 / STEP_S, abs=2)
    rates = [row["lr"] for row in rows("run", "train")]
    assert rates[-1] < 0.05 * max(rates)  # the schedule ends with the run
    assert sum(rate > 0.99 * max(rates) for rate in rates) / len(rates) == pytest.approx(0.6, abs=0.05)


@pytest.mark.parametrize("schedule", ["wsd", pytest.param("cosine", marks=pytest.mark.slow)])
def test_resumed_run_repeats_all_plans_whatever_the_speed_is_then(
    workdir: Path, tiny: list[str], simulate: Simulate, schedule: str
) -> None:
    """From a checkpoint in its middle and from its start, on a machine four times as slow."""
    simulate(lambda step: STEP_S * (3 if step < 20 or 70 < step < 80 else 1))
    settings = ["model.dropout=0.1", f"optim.schedule={schedule}", "trainer.keep_checkpoints=99", "run_dir=whole"]
    assert train_here(*tiny, *BY_TIME, *settings) == 0
    checkpoints = sorted(Path("whole/checkpoints").glob("step_*"))
    simulate(lambda step: 4 * STEP_S)
    for kept in (3, 0):
        shutil.rmtree("parts", ignore_errors=True)
        shutil.copytree("whole", "parts", symlinks=True)
        for checkpoint in checkpoints[kept:]:
            shutil.rmtree(Path("parts/checkpoints") / checkpoint.name)
        for link in ("latest", "best"):
            Path(f"parts/checkpoints/{link}").unlink()
        decisions = Path("parts/decisions.json")
        decisions.write_text(decisions.read_text().replace('"finished": true', '"finished": false'))
        assert train_here("resume=parts") == 0
        assert_same_run("parts", "whole")


@pytest.mark.slow
def test_plan_is_saved_before_it_takes_effect(
    workdir: Path, tiny: list[str], simulate: Simulate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process dies right after the first step that follows a plan: the plan is on disk."""
    simulate(lambda step: STEP_S * (1 if step else 5))
    followed: list[int] = []
    timed_step = Trainer.train_one_step

    def step_with_the_saved_plan(self: Trainer) -> None:
        saved = RunDecisions.load(self.context.run_dir, self.context.model.config)
        assert saved.plans == self.budget.plans
        assert saved.plans[-1][1] == self.budget.rate.num_steps == self.state.num_steps
        followed.append(len(saved.plans))
        timed_step(self)

    monkeypatch.setattr(Trainer, "train_one_step", step_with_the_saved_plan)
    assert train_here(*tiny, *BY_TIME, "run_dir=run") == 0
    assert followed[-1] > 50


@pytest.mark.slow
def test_share_of_the_decay_is_reported_where_time_won(
    workdir: Path, tiny: list[str], simulate: Simulate, capsys: pytest.CaptureFixture[str]
) -> None:
    simulate(lambda step: STEP_S / 2 * (3 if step > 100 else 1))
    assert train_here(*tiny, *BY_TIME, "run_dir=run") == 0
    assert "the learning rate fell over the last 23% of them, not 40%" in capsys.readouterr().err
    simulate(lambda step: STEP_S)
    assert train_here(*tiny, *BY_TIME, "run_dir=steady") == 0
    assert "the learning rate fell" not in capsys.readouterr().err


def test_time_left_is_that_of_the_limit(
    workdir: Path, tiny: list[str], simulate: Simulate, capsys: pytest.CaptureFixture[str]
) -> None:
    simulate(lambda step: STEP_S * (4 if step < 30 else 1))
    assert train_here(*tiny, *BY_TIME, "run_dir=run") == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.endswith(" s left")]
    train_s = {row["step"]: row["train_s"] for row in rows("run", "train")}
    assert len(lines) > 10
    for line in lines:
        step, left_s = int(line.split()[1].partition("/")[0]), int(line.split()[-3])
        assert left_s == pytest.approx(3 - train_s[step], abs=1), line


@pytest.mark.slow
def test_old_timed_run_is_resumed_to_its_time_limit(workdir: Path, tiny: list[str], simulate: Simulate) -> None:
    """Versions before 2026-12 corrected the number of steps once, and kept it in choices.json."""
    simulate(lambda step: STEP_S)
    assert train_here(*tiny, *BY_TIME, "run_dir=run") == 0
    for checkpoint in sorted(Path("run/checkpoints").glob("step_*"))[1:]:
        shutil.rmtree(checkpoint)
    path = Path("run/decisions.json")
    content = json.loads(path.read_text())
    old = {"compile": "false", "num_steps": 700, "corrected_at": 16, "corrected_num_steps": 140, "finished": False}
    del content["plans"], content["backend"]
    Path("run/choices.json").write_text(json.dumps(content | old))
    path.unlink()
    assert train_here("resume=run") == 0
    state = load_checkpoint("run", prefer="latest").state
    assert state["step"] == state["num_steps"] == pytest.approx(3 / STEP_S, abs=2)


@pytest.mark.slow
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
