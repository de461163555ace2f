"""A backend chosen by a thin margin is measured again after some seconds; a switch is recorded, and repeated."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import assert_same_run, interrupt_at, train_here

from minitf.backends import autotune
from minitf.backends.autotune import Selection
from minitf.backends.sdpa import Sdpa, SdpaAttention
from minitf.system.comparison import Comparison
from minitf.training.trainer import Trainer
from minitf.training.tuned_step import TunedStep

SWITCH_AT = 4


@pytest.fixture
def settings(tiny: list[str]) -> list[str]:
    return [*tiny, "trainer.max_steps=9", "model.dropout=0.1", "trainer.keep_checkpoints=9", "trainer.compile=auto"]


@pytest.fixture
def doubtful(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Call it with the seconds of a step by fused attention, where one by the reference takes 1, as measured later.

    At first the reference is chosen by a thin margin.
    """
    choose = TunedStep.choose_backend

    def chosen(self: TunedStep, wanted: str, *arguments: object) -> Selection:
        if wanted != "auto":
            return choose(self, wanted)
        return Selection("reference", 1.0, "simulated", ("reference", "sdpa"))

    def later(fused_s: float) -> None:
        def race(base: object, candidate: Sdpa, model: object, optimizer: object, measure: Callable[..., float]):  # type: ignore[no-untyped-def]
            measure(False)  # moves gradients, averages and random states
            candidate.install(model, optimizer)  # type: ignore[arg-type]
            measure(False)
            return Comparison(1.0, fused_s)

        monkeypatch.setattr(autotune, "race", race)

    monkeypatch.setattr(TunedStep, "choose_backend", chosen)
    monkeypatch.setattr(Trainer, "_is_time_to_look", lambda self, train_s: self.state.step == SWITCH_AT)
    return later


def switches(run: str) -> list[list[object]]:
    found: list[list[object]] = json.loads(Path(run, "decisions.json").read_text())["switches"]
    return found


def test_looking_again_changes_nothing_if_the_verdict_stands(
    workdir: Path, settings: list[str], doubtful: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    doubtful(2.0)
    assert train_here(*settings, "run_dir=looked") == 0
    assert switches("looked") == []
    monkeypatch.setattr(Trainer, "_is_time_to_look", lambda *_: False)
    assert train_here(*settings, "run_dir=blind") == 0
    assert_same_run("looked", "blind")


@pytest.mark.slow
def test_switch_is_recorded_and_a_resumed_run_repeats_it(
    workdir: Path,
    settings: list[str],
    doubtful: Callable[[float], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    doubtful(0.5)
    used: list[tuple[int, bool]] = []
    train_one_step = Trainer.train_one_step

    def watched(self: Trainer) -> None:
        train_one_step(self)
        attention = self.context.model.model.layers[0].self_attn  # type: ignore[index, union-attr]
        used.append((self.state.step, isinstance(attention, SdpaAttention)))

    monkeypatch.setattr(Trainer, "train_one_step", watched)
    assert train_here(*settings, "run_dir=whole") == 0
    assert switches("whole") == [[SWITCH_AT, "sdpa", torch.get_num_threads()]]
    assert "measured again: by sdpa on " in (err := capsys.readouterr().err)
    assert " from step 5 on" in err
    assert used == [(step, step > SWITCH_AT) for step in range(1, 10)]

    doubtful(2.0)  # measured now, the verdict would be another
    for interrupted_at in (SWITCH_AT - 2, SWITCH_AT, SWITCH_AT + 2):
        shutil.rmtree("parts", ignore_errors=True)
        with monkeypatch.context() as patch:
            interrupt_at(patch, interrupted_at)
            doubtful(0.5)
            assert train_here(*settings, "run_dir=parts") == 0
        shutil.copy("whole/decisions.json", "parts/decisions.json")  # killed later, its last checkpoint was this one
        unfinished = Path("parts/decisions.json").read_text().replace('"finished": true', '"finished": false')
        Path("parts/decisions.json").write_text(unfinished)
        doubtful(2.0)
        used.clear()
        assert train_here("resume=parts") == 0
        assert used == [(step, step > SWITCH_AT) for step in range(interrupted_at + 1, 10)]
        assert_same_run("parts", "whole")
