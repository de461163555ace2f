"""A run that cannot start or continue ends in one line, and keeps what was saved."""

import fcntl
import json
import math
from pathlib import Path

import pytest
import torch
from helpers import EXERCISE, assert_one_line, losses, tensors, train_here

from minitf.checkpoints.checkpoint import load_checkpoint


@pytest.mark.parametrize(("num_steps", "rate"), [(1, "1e+39"), (6, "1e+30")])
def test_infinite_loss_ends_the_run_in_one_line(
    workdir: Path, tiny: list[str], capsys: pytest.CaptureFixture[str], num_steps: int, rate: str
) -> None:
    settings = [f"optim.learning_rate={rate.replace('+', '')}", "optim.warmup_fraction=0", "optim.schedule=constant"]
    assert train_here(*tiny, *settings, f"trainer.max_steps={num_steps}", "run_dir=run") == 1
    assert_one_line(capsys.readouterr().err, "step", rate, "nothing was saved yet", "optim.learning_rate")
    assert not list(Path("run").glob("checkpoints/step_*"))
    for line in Path("run/metrics.jsonl").read_text().splitlines():
        assert math.isfinite(json.loads(line)["loss"])


def test_infinite_loss_names_the_last_good_checkpoint(
    workdir: Path, tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_here(*tiny, "run_dir=run") == 0
    capsys.readouterr()
    assert train_here("resume=run", "trainer.max_steps=20", "optim.learning_rate=1e30") == 1
    assert_one_line(capsys.readouterr().err, "run/checkpoints/step_00000006")
    assert load_checkpoint("run", prefer="latest").step == 6
    assert all(value.isfinite().all() for value in tensors("run").values())


def test_checkpoints_between_evaluations_hold_only_finite_models(
    workdir: Path, tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    rates = ["optim.learning_rate=1e30", "optim.matrix_learning_rate=1e30", "optim.warmup_fraction=0"]
    often = ["trainer.save_every=1", "trainer.eval_every=100", "trainer.max_steps=6", "trainer.attention_every=-1"]
    assert train_here(*tiny, *rates, *often, "run_dir=run") == 1
    saved = sorted(path.name for path in Path("run/checkpoints").glob("step_*"))
    assert_one_line(capsys.readouterr().err, f"the last good checkpoint is run/checkpoints/{saved[-1]}")
    for name in saved:
        model = load_checkpoint(Path("run/checkpoints") / name).model
        assert model(torch.arange(16)[None]).isfinite().all(), name


@pytest.mark.parametrize("exercise", [False, True])
def test_diverged_weights_are_neither_logged_nor_saved(
    workdir: Path, tiny: list[str], capsys: pytest.CaptureFixture[str], exercise: bool
) -> None:
    settings = [*EXERCISE, "attention.ablation=true"] if exercise else tiny
    rates = ["optim.learning_rate=1e30", "optim.matrix_learning_rate=1e30", "optim.warmup_fraction=0"]
    often = ["trainer.attention_every=1", "trainer.log_every=100", "trainer.eval_every=100", "trainer.save_every=100"]
    assert train_here(*settings, *rates, *often, "trainer.max_steps=6", "run_dir=run") == 1
    assert_one_line(capsys.readouterr().err, "the loss became", "nothing was saved yet", "optim.learning_rate")
    for written in ("metrics", "attention"):  # json.loads accepts the NaN that other readers refuse
        for line in Path(f"run/{written}.jsonl").read_text().splitlines():
            json.loads(line, parse_constant=pytest.fail)
    for kept in Path("run/snapshots").glob("step_*"):
        assert all(value.isfinite().all() for value in load_checkpoint(kept).model.state_dict().values()), kept


def test_failed_run_can_be_started_again_in_its_directory(workdir: Path, tiny: list[str]) -> None:
    settings = [*tiny, "trainer.attention_every=3", "trainer.max_steps=3", "trainer.eval_every=1000"]
    for name, rates in (("run", ["optim.learning_rate=1e30"]), ("run", []), ("expected", [])):
        assert train_here(*settings, *rates, f"run_dir={name}") == (1 if rates else 0)
    assert losses("run") == losses("expected")
    counts = {name: len(Path(name, "attention.jsonl").read_text().splitlines()) for name in ("run", "expected")}
    assert counts["run"] == counts["expected"] > 0


def test_locked_run_directory_is_not_touched(
    workdir: Path, tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_here(*tiny, "run_dir=run") == 0
    before = Path("run/metrics.jsonl").read_bytes()
    with Path("run/.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert train_here("resume=run", "trainer.max_steps=9") == 1
        assert_one_line(capsys.readouterr().err, "run is in use by another process")
    assert Path("run/metrics.jsonl").read_bytes() == before
    assert train_here("resume=run", "trainer.max_steps=9") == 0


def test_earlier_run_is_not_overwritten(workdir: Path, tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert train_here(*tiny, "run_dir=run") == 0
    before = {path: path.read_bytes() for path in Path("run").rglob("*.*") if path.is_file()}
    assert train_here(*tiny, "run_dir=run") == 2
    assert_one_line(capsys.readouterr().err, "run_dir=run", "resume=run")
    assert {path: path.read_bytes() for path in before} == before


def test_runs_started_in_the_same_second_get_two_directories(workdir: Path, tiny: list[str]) -> None:
    for _ in range(2):
        assert train_here(*tiny, "name=n", "trainer.max_steps=1") == 0
    assert len(list(Path("runs/n").iterdir())) == 2


@pytest.mark.parametrize("where", ["file", "file/below"])
def test_unwritable_directory_is_one_line(
    workdir: Path, tiny: list[str], capsys: pytest.CaptureFixture[str], where: str
) -> None:
    Path("file").touch()
    assert train_here(*tiny, f"run_dir={where}") == 1
    assert_one_line(capsys.readouterr().err, f"cannot write in {where}", "run_dir")


def test_unwritable_file_ends_the_run_in_one_line(
    workdir: Path, tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("run").mkdir()
    interrupted = [*tiny, "run_dir=run"]
    (Path("run") / "environment.json").mkdir()
    assert train_here(*interrupted) == 1
    assert_one_line(capsys.readouterr().err, "environment.json")


def own_shape(tiny: list[str]) -> list[str]:
    """The tiny settings without those of shape and tokenizer, which `init_from` brings."""
    return [setting for setting in tiny if not setting.startswith(("model.", "tokenizer"))]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["data.files=[nowhere.txt]"], "nowhere.txt"),
        (["model.context_length=100000"], "context"),
        (["init_from=nowhere"], "nowhere does not exist"),
        (["trainer.device=cuda:77"], "device"),
    ],
)
def test_wrong_request_is_one_line_and_leaves_no_checkpoint(
    workdir: Path, tiny: list[str], capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert train_here(*(own_shape(tiny) if "init_from=nowhere" in arguments else tiny), *arguments) == 2
    assert_one_line(capsys.readouterr().err, words)
    assert not list(workdir.rglob("checkpoints"))
