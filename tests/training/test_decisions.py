"""Decisions of a run are kept, reused when it is resumed, and readable in their old form."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import assert_one_line, assert_same_run, interrupt_at, train_here

from minitf.backends import autotune
from minitf.errors import MinitfError
from minitf.model import ModelConfig
from minitf.system.comparison import Comparison
from minitf.training.decisions import RunDecisions

OLD_NAMES = {"reference": "false", "sdpa": "false", "compile": "true", "cpu": "native", "triton": "native"}


def write_old(run_dir: Path, content: dict[str, Any]) -> None:
    (run_dir / "choices.json").write_text(json.dumps(content), encoding="utf-8")


def make_old(run_dir: Path) -> None:
    """Give a run the file that earlier versions wrote, instead of decisions.json."""
    path = run_dir / "decisions.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    write_old(run_dir, {**content, "compile": OLD_NAMES[content.pop("backend")]})
    path.unlink()


def test_decisions_are_read_as_they_were_saved(tmp_path: Path) -> None:
    decisions = RunDecisions(device="cpu", backend="cpu", num_threads=2, plans=((0, 9), (4, 8)), finished=True)
    decisions.save(tmp_path)
    write_old(tmp_path, {"compile": "true"})  # of no account any more
    assert RunDecisions.load(tmp_path, ModelConfig()) == decisions


def test_run_without_decisions_has_empty_ones(tmp_path: Path) -> None:
    assert RunDecisions.load(tmp_path, ModelConfig()) == RunDecisions()


@pytest.mark.parametrize(
    ("device", "compiled", "attention", "backend"),
    [
        ("cpu", "native", "auto", "cpu"),
        ("cuda", "native", "auto", "triton"),
        ("cuda", "true", "auto", "compile"),
        ("cpu", "false", "auto", "reference"),
        ("cpu", "false", "sdpa", "sdpa"),
        ("cuda", "false", "auto", "sdpa"),
        ("cuda", "false", "explicit", "reference"),
        ("", "", "auto", ""),
    ],
)
def test_old_file_is_read(tmp_path: Path, device: str, compiled: str, attention: str, backend: str) -> None:
    write_old(tmp_path, {"device": device, "compile": compiled, "num_threads": 3, "finished": True})
    expected = RunDecisions(device=device, backend=backend, num_threads=3, finished=True)
    assert RunDecisions.load(tmp_path, ModelConfig(attention=attention)) == expected


@pytest.mark.parametrize(
    ("numbers", "plans"),
    [
        ({"num_steps": 9}, ((0, 9),)),
        ({"num_steps": 9, "corrected_at": 3, "corrected_num_steps": 7}, ((0, 7),)),
        ({"num_steps": 0, "corrected_at": 0, "corrected_num_steps": 0}, ()),
    ],
)
def test_numbers_of_steps_of_an_old_file_are_read(
    tmp_path: Path, numbers: dict[str, int], plans: tuple[tuple[int, int], ...]
) -> None:
    write_old(tmp_path, numbers)
    assert RunDecisions.load(tmp_path, ModelConfig()).plans == plans


@pytest.mark.parametrize(
    "content",
    [
        *({"num_steps": -1}, {"num_steps": "9"}, {"finished": 1}, {"compile": 3}),
        *({"plans": plans} for plans in (3, None, [3], [[0]], [[0, 0]], [[1, 9]], [[0, 9], [9, 8]], [[0, 9], [0, 9]])),
        *({"plans": plans} for plans in ([[0, "9"]], [[0, True]], [[0, 9.0]], [[0, 1 << 53]], {"0": 9})),
    ],
)
def test_damaged_file_is_named(tmp_path: Path, content: dict[str, Any]) -> None:
    write_old(tmp_path, content)
    with pytest.raises(MinitfError, match=r"choices\.json is damaged"):
        RunDecisions.load(tmp_path, ModelConfig())


def test_changes_name_only_what_was_decided_before() -> None:
    before = RunDecisions(backend="cpu", num_threads=4)
    assert RunDecisions(device="cpu", backend="compile", num_threads=4).changes(before) == [
        "backend compile instead of cpu"
    ]


@pytest.mark.parametrize("compiled", ["auto", pytest.param("false", marks=pytest.mark.slow)])
def test_old_run_is_resumed_bit_for_bit(
    workdir: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], compiled: str
) -> None:
    def compare(one: object, other: Callable[[], float], *_: object) -> Comparison:
        other()
        return Comparison(1.0, 0.5)

    monkeypatch.setattr(autotune, "compare", compare)  # on a busy machine both runs must come to the same backend
    settings = [*tiny, "trainer.max_steps=8", "model.dropout=0.1", f"trainer.compile={compiled}"]
    assert train_here(*settings, "run_dir=whole") == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, 5)
        assert train_here(*settings, "run_dir=parts") == 0
    make_old(Path("parts"))
    capsys.readouterr()
    assert train_here("resume=parts") == 0
    assert "instead of" not in capsys.readouterr().err.partition("step 6")[0].partition("resumed")[2]
    assert_same_run("parts", "whole")


def test_old_complete_run_is_complete(workdir: Path, tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert train_here(*tiny, "run_dir=run") == 0
    make_old(Path("run"))
    assert train_here("resume=run") == 2
    assert_one_line(capsys.readouterr().err, "complete at step 6")
