"""A resumed run is the uninterrupted run, bit for bit."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import assert_one_line, assert_same_run, interrupt_at, losses, not_applicable, rows, train_here

from minitf.checkpoints.checkpoint import load_checkpoint
from minitf.training.actions import LogRow
from minitf.training.trainer import Trainer


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), 3, pytest.param(5, marks=pytest.mark.slow)])
def test_resuming_an_interrupted_run_equals_the_uninterrupted_run(
    workdir: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    settings = [*tiny, "model.dropout=0.1", "trainer.max_steps=8", "trainer.attention_every=2"]
    assert train_here(*settings, "run_dir=whole") == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, step)
        assert train_here(*settings, "run_dir=parts") == 0
    assert rows("parts", "train")[-1]["step"] == step
    assert load_checkpoint("parts", prefer="latest").step == step
    assert train_here("resume=parts") == 0
    assert_same_run("parts", "whole")
    maps = [json.loads(line) for line in Path("parts/attention.jsonl").read_text().splitlines()]
    assert [m["step"] for m in maps] == [
        json.loads(line)["step"] for line in Path("whole/attention.jsonl").read_text().splitlines()
    ]


def test_resuming_a_killed_run_logs_no_step_twice(
    workdir: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [*tiny, "trainer.max_steps=9", "model.dropout=0.1", "optim=adamw"]
    assert train_here(*settings, "run_dir=whole") == 0

    def killed(self: LogRow, trainer: Trainer) -> None:
        if trainer.state.step == 8:
            raise KeyboardInterrupt
        log_row(self, trainer)

    log_row = LogRow.__call__
    with monkeypatch.context() as patch:
        patch.setattr(LogRow, "__call__", killed)
        assert train_here(*settings, "run_dir=parts") == 130
    with Path("parts/metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "split": "tr')  # truncated
    assert [row[0] for row in losses("whole") if row[1] == "train"] == list(range(1, 10))
    assert train_here("resume=parts") == 0
    assert_same_run("parts", "whole")


@pytest.mark.slow
def test_rows_over_several_steps_are_the_same_after_resuming(
    workdir: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row is the mean of the steps since the last one, also where the run stopped between two rows."""
    settings = [*tiny, "trainer.max_steps=12", "trainer.log_every=4", "trainer.eval_every=6"]
    assert train_here(*settings, "run_dir=whole") == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, 7)
        assert train_here(*settings, "run_dir=parts") == 0
    assert train_here("resume=parts") == 0
    assert [row["step"] for row in rows("parts", "train")] == [4, 8, 12]
    assert_same_run("parts", "whole")


def test_ctrl_c_saves_and_the_run_can_be_resumed(workdir: Path, tiny: list[str]) -> None:
    """A real signal to a real process."""
    command = [sys.executable, "-m", "minitf.train", *tiny, "run_dir=run", "trainer.max_steps=100000"]
    with subprocess.Popen(
        [*command, "trainer.eval_every=100000", "optim.schedule=constant"], stderr=subprocess.PIPE, text=True
    ) as process:
        while process.poll() is None and not (Path("run/metrics.jsonl").exists() and len(rows("run")) > 3):
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        err = process.communicate(timeout=900)[1]
    assert process.returncode == 0
    assert "resume with: python -m minitf.train resume=run" in err
    step = load_checkpoint("run").step
    assert step is not None
    assert rows("run")[-1]["step"] == step
    assert train_here("resume=run", f"trainer.max_steps={step + 2}") == 0
    steps = [row["step"] for row in rows("run", "train")]
    assert steps == list(range(1, step + 3))


@pytest.mark.slow
def test_timed_run_repeats_all_steps_that_it_had_logged_before_it_was_killed(
    workdir: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the clock said then and says now: its plans were saved before they took effect."""
    limits = ["trainer.max_steps=null", "trainer.max_minutes=1", "trainer.save_every=10", "trainer.eval_every=0"]
    command = [sys.executable, "-m", "minitf.train", *tiny, *limits, "model.dropout=0.1", "run_dir=run"]

    def plans() -> list[list[int]]:
        return json.loads(Path("run/decisions.json").read_text())["plans"]  # type: ignore[no-any-return]

    with subprocess.Popen([*command, "optim.schedule=cosine"], stderr=subprocess.DEVNULL) as process:
        while process.poll() is None:
            if Path("run/metrics.jsonl").exists() and len(rows("run")) > 25 and len(plans()) > 3:
                break
            time.sleep(0.02)
        process.kill()
    logged = {row["step"]: (row["loss"], row["lr"]) for row in rows("run", "train")}
    decided = plans()
    assert len(decided) > 3
    interrupt_at(monkeypatch, max(logged) + 1)
    assert train_here("resume=run") == 0
    again = {row["step"]: (row["loss"], row["lr"]) for row in rows("run", "train")}
    assert {step: again[step] for step in logged} == logged
    assert plans()[: len(decided)] == decided


def test_complete_run_is_resumed_only_with_a_later_end(
    workdir: Path, tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_here(*tiny, "run_dir=run", "optim.schedule=constant") == 0
    before = Path("run/metrics.jsonl").read_bytes()
    assert train_here("resume=run") == 2
    assert_one_line(capsys.readouterr().err, "complete at step 6", "trainer.max_steps")
    for number in (3, 6):
        assert train_here("resume=run", f"trainer.max_steps={number}") == 2, number
        assert_one_line(capsys.readouterr().err, "step 6", "trainer.max_steps")
    assert Path("run/metrics.jsonl").read_bytes() == before
    assert train_here("resume=run", "trainer.max_steps=9") == 0
    assert train_here(*tiny, "run_dir=whole", "optim.schedule=constant", "trainer.max_steps=9") == 0
    assert_same_run("run", "whole")


@pytest.mark.parametrize("dying", [pytest.param("warm_up", marks=pytest.mark.slow), "run"])
def test_later_end_is_kept_if_the_process_dies_before_saving(
    workdir: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch, dying: str
) -> None:
    """The run is extended to step 9 and dies before its first checkpoint: resuming it still ends at step 9."""
    assert train_here(*tiny, "run_dir=run") == 0

    def die(self: Trainer) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, dying, die)
        assert train_here("resume=run", "trainer.max_steps=9") == 130
    assert train_here("resume=run") == 0
    assert load_checkpoint("run", prefer="latest").step == 9


@pytest.mark.slow
def test_latest_run_and_an_older_checkpoint_can_be_resumed(workdir: Path, tiny: list[str]) -> None:
    assert train_here(*tiny, "name=first") == 0
    (run,) = Path("runs/first").iterdir()
    assert train_here("resume=latest", "trainer.max_steps=7") == 0
    assert rows(run)[-1]["step"] == 7
    assert train_here(f"resume={run}/checkpoints/step_00000006", "trainer.max_steps=8") == 0
    assert [row["step"] for row in rows(run, "train")] == list(range(1, 9))
    assert load_checkpoint(run, prefer="latest").step == 8


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["model.num_layers=3"], "model.num_layers=3"),
        (["data=kjv"], "data=kjv"),
        (["seed=3"], "seed=3"),
        (["optim=adamw"], "optim=adamw"),
        (["optim.kind=adamw"], "optim.kind"),
        (["trainer.max_step=3"], "did you mean trainer.max_steps?"),
    ],
)
def test_resuming_refuses_settings_that_cannot_change(
    workdir: Path,
    tiny: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    interrupt_at(monkeypatch, 2)
    assert train_here(*tiny, "run_dir=run") == 0
    before = {path: path.read_bytes() for path in Path("run").glob("*.*")}
    assert train_here("resume=run", *arguments) == 2
    assert_one_line(capsys.readouterr().err, words)
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("setting", ["trainer.batch_size=3", "trainer.grad_accumulation=2", "optim.kind=adamw"])
def test_resuming_refuses_another_batch_size_or_optimiser(
    workdir: Path, trained_run: Path, capsys: pytest.CaptureFixture[str], setting: str
) -> None:
    assert train_here(f"resume={trained_run}", "trainer.max_steps=99", setting) == 2
    assert_one_line(capsys.readouterr().err, setting)


def test_damaged_checkpoint_is_reported_and_the_previous_one_resumed(
    workdir: Path, tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    constant = [*tiny, "optim.schedule=constant"]
    assert train_here(*constant, "run_dir=whole", "trainer.max_steps=9") == 0
    assert train_here(*constant, "run_dir=run") == 0
    shutil.copytree("run", "copy", symlinks=True)
    capsys.readouterr()
    for run, step in (("copy", 6), ("run", 6), ("run", 3)):
        file = Path(f"{run}/checkpoints/step_0000000{step}/trainer_state.safetensors")
        file.write_bytes(file.read_bytes()[:-100])
    assert train_here("resume=copy", "trainer.max_steps=9") == 0
    reports = [line for line in capsys.readouterr().err.splitlines() if line.startswith("minitf: ")]
    assert len(reports) == 1
    assert "step_00000006/trainer_state.safetensors is damaged" in reports[0]
    assert "passed over for step_00000003" in reports[0]
    assert_same_run("copy", "whole")
    assert train_here("resume=run", "trainer.max_steps=9") == 1  # there is no other one
    assert_one_line(capsys.readouterr().err, "step_00000003/trainer_state.safetensors is damaged")


def test_damaged_checkpoint_named_explicitly_is_not_resumed(
    workdir: Path, tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_here(*tiny, "run_dir=run") == 0
    file = Path("run/checkpoints/latest/model.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    assert train_here("resume=run/checkpoints/latest", "trainer.max_steps=9") == 1
    assert_one_line(capsys.readouterr().err, "model.safetensors is damaged")
    assert train_here("resume=nowhere") == 2
    assert_one_line(capsys.readouterr().err, "nowhere is not a run")


def test_resuming_refuses_a_changed_text(
    workdir: Path, tiny: list[str], text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = Path("own.txt")
    own.write_text(text_file.read_text())
    assert train_here(*tiny, "data.files=[own.txt]", "run_dir=run") == 0
    own.write_text(text_file.read_text().replace("e", "i"))
    assert train_here("resume=run", "trainer.max_steps=9") == 2
    assert_one_line(capsys.readouterr().err, "the text of run has changed")


def test_resuming_uses_the_token_cache(workdir: Path, tiny: list[str]) -> None:
    cache = workdir / "cache"
    assert train_here(*tiny, f"data.cache_dir={cache}", "run_dir=run") == 0
    assert len(list(cache.iterdir())) == 1
    assert train_here("resume=run", "trainer.max_steps=9") == 0
    assert len(list(cache.iterdir())) == 1


@pytest.mark.slow
def test_a_text_may_move_if_it_stays_the_same(
    workdir: Path, tiny: list[str], text_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("own.txt").write_text(text_file.read_text())
    settings = [*tiny, "data.files=[own.txt]", "trainer.max_steps=2", "data.cache_dir=cache"]
    assert train_here(*settings, "run_dir=a run") == 0
    assert "train 'resume=a run' trainer.max_steps=4" in capsys.readouterr().err
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    assert train_here("resume=../a run", "trainer.max_steps=3") == 0  # found from another directory
    monkeypatch.chdir(workdir)
    Path("own.txt").rename("renamed.txt")
    assert train_here("resume=a run", "trainer.max_steps=4") == 0  # by its prepared text
    shutil.rmtree("cache")
    assert train_here("resume=a run", "trainer.max_steps=5") == 2
    assert_one_line(capsys.readouterr().err, "own.txt does not exist", "resume the run with data.files=[FILE]")
    Path("other.txt").write_text("Other words. " * 200)
    assert train_here("resume=a run", "trainer.max_steps=5", "data.files=[other.txt]") == 2
    assert_one_line(capsys.readouterr().err, "the text of a run has changed since", "'init_from=\"a run\"'")
    assert train_here("resume=a run", "trainer.max_steps=5", "data.files=[renamed.txt]") == 0
    assert train_here("resume=a run", "trainer.max_steps=6") == 0  # the new name is kept
    assert rows("a run", "train")[-1]["step"] == 6


def test_a_copy_that_follows_links_is_resumed(workdir: Path, tiny: list[str]) -> None:
    """As zip, `rsync -L`, cloud drives and Windows copy: `latest` and `best` become directories."""
    assert train_here(*tiny, "run_dir=runs/a/one") == 0
    shutil.copytree("runs/a/one", "runs/a/copy")  # follows links
    assert not Path("runs/a/copy/checkpoints/latest").is_symlink()
    assert train_here("resume=runs/a/copy", "trainer.max_steps=8") == 0
    assert train_here("resume=runs/a/one", "trainer.max_steps=8") == 0
    assert_same_run("runs/a/copy", "runs/a/one")
    for name in ("latest", "best"):
        link = Path("runs/a/copy/checkpoints", name)
        assert link.is_symlink() or name == "best"
    left = {path.name for path in Path("runs/a/copy/checkpoints").iterdir()}
    assert left <= {"latest", "best"} | {path.name for path in Path("runs/a/copy/checkpoints").glob("step_*")}


def test_a_copy_without_links_is_found_and_resumed(workdir: Path, tiny: list[str]) -> None:
    assert train_here(*tiny, "run_dir=runs/a/one") == 0
    for link in ("latest", "best"):
        Path("runs/a/one/checkpoints", link).unlink()
    assert load_checkpoint("latest").step == load_checkpoint("runs/a").step == 6
    assert train_here("resume=runs/a/one", "trainer.max_steps=7") == 0
    assert Path("runs/a/one/checkpoints/latest").is_symlink()


def test_what_a_resumed_run_keeps_and_what_may_change_are_said_without_contradiction(
    trained_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_here(f"resume={trained_run}", "trainer.batch_size=8") == 2
    assert_one_line(capsys.readouterr().err, "trainer.* but trainer.batch_size and trainer.grad_accumulation")


def test_a_file_whose_name_is_no_text_is_trained_on_and_resumed(
    workdir: Path, tiny: list[str], text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = os.fsdecode(b"\xff odd.txt")
    try:
        Path(name).write_text(text_file.read_text())
    except OSError:
        not_applicable("this file system takes names in UTF-8 only")
    settings = [*tiny, f'data.files=["{name}"]', "trainer.max_steps=1"]
    assert train_here(*settings, "run_dir=run") == 0
    assert train_here("resume=run", "trainer.max_steps=2") == 0
    capsys.readouterr()
    directory = os.fsdecode(b"dir\xfe")  # TensorBoard cannot write there: refused before anything is trained
    assert train_here(*settings, f'run_dir="{directory}"') == 2
    assert_one_line(capsys.readouterr().err, "need a path in UTF-8; choose another")
    assert not Path(directory).exists()
