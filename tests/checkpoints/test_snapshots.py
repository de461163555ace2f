"""Snapshots: weights alone at every look, bounded, whole or not at all."""

import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from helpers import assert_one_line, assert_same_run, interrupt_at, train_here
from safetensors.torch import load_file

import minitf
from minitf.checkpoints import snapshots
from minitf.checkpoints.checkpoint import load_checkpoint
from minitf.checkpoints.snapshots import max_snapshots, one_too_many
from minitf.cli.evaluate import main as evaluate
from minitf.errors import MinitfError
from minitf.interpretability.page import main as attention
from minitf.tensorboard.folders import RunFolders

LOOKS = ["trainer.max_steps=10", "trainer.attention_every=5", "trainer.eval_every=5"]


def steps(run: Path | str) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in Path(run).glob("snapshots/step_*"))


def test_a_run_keeps_its_weights_at_every_look(
    workdir: Path, tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_here(*tiny, *LOOKS, "run_dir=runs/one") == 0
    assert steps("runs/one") == [0, 1, 2, 4, 5, 8, 10]
    exact = load_file("runs/one/checkpoints/step_00000010/model.safetensors")
    rounded = load_file("runs/one/snapshots/step_00000010/model.safetensors")
    assert rounded.keys() == exact.keys()
    for name, value in rounded.items():
        assert torch.equal(value, exact[name].bfloat16()), name
    # A snapshot is a model: it loads, generates, is looked into and evaluated, and never resumed.
    snapshot = "runs/one/snapshots/step_00000004"
    checkpoint = load_checkpoint(snapshot)
    assert (checkpoint.step, checkpoint.state["data"]["kind"]) == (4, "text")
    assert minitf.load(snapshot).generate("The cat", max_tokens=3)
    assert attention(["The cat sat", "--run", snapshot, "--json"]) == 0
    assert evaluate(["--run", snapshot, "--max-tokens", "200"]) == 0
    assert train_here(f"resume={snapshot}") == 2
    assert_one_line(capsys.readouterr().err, "weights alone", "init_from=")
    # The tab reads a sentence with all of them, and with the exact weights where there are such.
    folders = RunFolders("runs")
    assert folders.steps("one") == [0, 1, 2, 4, 5, 8, 10]
    kinds = {step: path.parent.name for step in folders.steps("one") if (path := folders.checkpoint("one", step))}
    assert kinds == {**dict.fromkeys([0, 1, 2, 4, 8], "snapshots"), 5: "checkpoints", 10: "checkpoints"}


@pytest.mark.slow
def test_a_resumed_run_has_the_snapshots_of_the_uninterrupted_one(
    workdir: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [*tiny, *LOOKS, "model.dropout=0.1"]
    assert train_here(*settings, "trainer.snapshots=none", "run_dir=without") == 0
    assert not Path("without/snapshots").exists()
    assert train_here(*settings, "run_dir=whole") == 0
    assert_same_run("whole", "without")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        assert train_here(*settings, "run_dir=parts") == 0
    # Left by a process that was killed: of a step that is repeated, and half written.
    shutil.copytree("parts/snapshots/step_00000002", "parts/snapshots/step_00000007")
    shutil.copytree("parts/snapshots/step_00000002", "parts/snapshots/.step_00000005.partial")
    assert RunFolders(".").steps("parts") == [0, 1, 2, 3, 7]
    assert train_here("resume=parts") == 0
    assert sorted(path.name for path in Path("parts/snapshots").iterdir()) == [
        f"step_{step:08d}" for step in steps("whole")
    ]
    for step in steps("whole"):
        files = (load_file(f"{run}/snapshots/step_{step:08d}/model.safetensors") for run in ("parts", "whole"))
        found, expected = files
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_torn_snapshot_is_ignored(workdir: Path, tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert train_here(*tiny, *LOOKS, "run_dir=one") == 0
    Path("one/snapshots/step_00000004/tokenizer.json").unlink()
    weights = Path("one/snapshots/step_00000008/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    shutil.move("one/snapshots/step_00000002", "elsewhere")
    Path("one/snapshots/step_00000002").symlink_to(Path("elsewhere").absolute())
    assert not {2, 4} & set(RunFolders(".").steps("one"))
    with pytest.raises(MinitfError, match="is damaged"):
        load_checkpoint("one/snapshots/step_00000008")
    capsys.readouterr()
    assert attention(["The cat", "--run", "one", "--json"]) == 0  # the run itself is unharmed


def test_a_snapshot_that_cannot_be_written_does_not_end_the_run(
    workdir: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(snapshots, "write_model", full)
    assert train_here(*tiny, *LOOKS, "run_dir=one") == 0
    assert steps("one") == []
    assert capsys.readouterr().err.count("no more snapshots") == 1


def test_the_number_is_bounded_and_early_steps_stay(tmp_path: Path, tiny: list[str], workdir: Path) -> None:
    kept: list[int] = []
    for step in sorted({0, *(1 << power for power in range(11)), *range(100, 2001, 100)}):
        kept.append(step)
        if len(kept) > 10:
            kept.remove(one_too_many(kept))
    assert kept[0] == 0
    assert kept[-1] == 2000
    assert len([step for step in kept if step <= 32]) >= 4
    assert max((after + 1) / (before + 1) for before, after in pairwise(kept)) <= 8
    assert train_here(*tiny, *LOOKS, "trainer.snapshots=4", "run_dir=one") == 0
    assert len(steps("one")) == 4
    assert {0, 10} <= set(steps("one"))


def test_snapshots_fit_into_200_megabytes_unless_a_number_is_set() -> None:
    assert max_snapshots("auto", 2_000_000) == 100
    assert max_snapshots("auto", 150_000_000) == 0
    assert max_snapshots(7, 150_000_000) == 7
    assert max_snapshots("none", 1) == 0


@pytest.mark.parametrize("value", ["1", "all", "2.5", "true", "[1]"])
def test_a_wrong_number_is_refused(value: str, tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert train_here(*tiny, f"trainer.snapshots={value}") == 2
    assert_one_line(capsys.readouterr().err, "trainer.snapshots")


def test_all_checkpoints_are_kept_on_request(
    workdir: Path, tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [*tiny, "trainer.save_every=1", "trainer.keep_checkpoints=all", "run_dir=one"]
    assert train_here(*settings) == 0
    assert len(list(Path("one/checkpoints").glob("step_*"))) == 6
    assert train_here("resume=one", "trainer.max_steps=8") == 0
    assert len(list(Path("one/checkpoints").glob("step_*"))) == 8
    assert train_here(*tiny, "trainer.keep_checkpoints=0") == 2
    assert_one_line(capsys.readouterr().err, "trainer.keep_checkpoints=0")
