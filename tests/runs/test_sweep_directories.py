"""A sweep trains each of its runs in a directory of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import assert_one_line, rows, train_here

from minitf.checkpoints.checkpoint import load_checkpoint
from minitf.checkpoints.locate import find_checkpoint


@pytest.mark.slow
def test_sweep_of_two_values_is_two_runs(workdir: Path, tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-m", "minitf.train", "-m", *tiny, "name=sweep", "optim.learning_rate=1e-3,2e-3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    runs = sorted(path.parent for path in workdir.glob("runs/sweep/*/*/metrics.jsonl"))
    assert len(runs) == 2
    assert [rows(run, "train")[0]["lr"] for run in runs] == [1e-3, 2e-3]
    assert all((run / "checkpoints/latest/config.json").is_file() for run in runs)
    assert load_checkpoint("latest").directory == find_checkpoint(runs[1])
    assert not [name for name in os.listdir(workdir) if name != "runs"]  # nothing of Hydra's own lies about

    assert train_here(*command[3:], "model.num_heads=5") == 2
    assert_one_line(capsys.readouterr().err, "model.num_heads=5")
    assert train_here(*tiny, "--cfg", "job") == 0
    assert "context_length: 32" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["-m", "resume=latest"], ["-m", "run_dir=x", "seed=1,2"], ["--foo"], ["-x=1"]])
def test_flags_that_do_not_go_with_a_sweep_are_one_line(
    workdir: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert train_here(*arguments) == 2
    assert_one_line(capsys.readouterr().err)
    assert not list(Path().iterdir())
