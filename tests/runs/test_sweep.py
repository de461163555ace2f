"""Sweeps: each run has its own directory, in this process or in those of a launcher."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import train_here

from minitf.config.schema import load_config

SWEEP = [sys.executable, "-m", "minitf.train", "-m"]


def needs_joblib() -> None:
    if importlib.util.find_spec("joblib") is None or importlib.util.find_spec("hydra_plugins") is None:
        pytest.skip("hydra-joblib-launcher is not installed: pip install -e '.[sweep]'")
    if importlib.util.find_spec("hydra_plugins.hydra_joblib_launcher") is None:
        pytest.skip("hydra-joblib-launcher is not installed: pip install -e '.[sweep]'")


@pytest.mark.machines
@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["basic", "joblib"])
def test_a_sweep_compares_its_runs_by_what_it_varies(workdir: Path, tiny: list[str], launcher: str) -> None:
    """One of the runs of the second sweep fails: the others are trained, and the exit status is 1."""
    if launcher == "joblib":
        needs_joblib()
    chosen = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"] if launcher == "joblib" else []
    rates = "optim.learning_rate=1e-3,2e-3"
    done = subprocess.run(
        [*SWEEP, *tiny, *chosen, rates, "trainer.max_steps=4"], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    runs = sorted(path.parent for path in workdir.glob("runs/sweep/*/*/metrics.jsonl"))
    assert len(runs) == 2
    for run in runs:
        assert (run / "checkpoints/latest/model.safetensors").is_file()
        # Only the key that varies: TensorBoard shows the first five columns.
        assert hyperparameters(run) in ({"optim.learning_rate": 1e-3}, {"optim.learning_rate": 2e-3})
        json.loads((run / "environment.json").read_text(encoding="utf-8"))
    assert hyperparameters(runs[0]) != hyperparameters(runs[1])

    diverging = [*SWEEP, *tiny, *chosen, "optim.learning_rate=1e-3,1e30", "optim.grad_clip=0", "trainer.max_steps=4"]
    done = subprocess.run(diverging, capture_output=True, text=True, timeout=900)
    assert done.returncode == 1, done.stderr
    assert "the loss became" in done.stderr
    assert len(list(workdir.glob("runs/sweep/*/*/checkpoints/latest"))) == 3
    assert not list(workdir.glob("runs/.*"))


@pytest.mark.slow
def test_a_sweep_trains_each_combination_in_its_own_directory(workdir: Path, tiny: list[str]) -> None:
    assert train_here("-m", *tiny, "trainer.max_steps=1,2", "model.dropout=0,0.1", "hydra.sweep.dir=here") == 0
    runs = sorted(path.name for path in (workdir / "here").iterdir() if path.is_dir())
    assert runs == [
        "0_trainer.max_steps_1_model.dropout_0.0",
        "1_trainer.max_steps_1_model.dropout_0.1",
        "2_trainer.max_steps_2_model.dropout_0.0",
        "3_trainer.max_steps_2_model.dropout_0.1",
    ]
    for run in runs:
        config = load_config(workdir / "here" / run / "config.yaml")
        assert f"{config.trainer.max_steps}_model.dropout_{config.model.dropout}" in run
        assert (workdir / "here" / run / "checkpoints/latest/model.safetensors").is_file()
    assert not list(workdir.glob("runs/.*"))


def hyperparameters(run: Path) -> dict[str, float]:
    """The numbers in a run's event file for the HParams tab of TensorBoard."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    found: dict[str, float] = {}
    for file in run.glob("events.out.tfevents.*"):
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                if value.tag == "_hparams_/session_start_info":
                    data = HParamsPluginData.FromString(value.metadata.plugin_data.content)
                    for name, content in data.session_start_info.hparams.items():
                        found[name] = content.number_value
    return found
