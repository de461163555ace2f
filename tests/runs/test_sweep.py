"""Sweeps: every run in a directory of its own, in this process or in those of a launcher."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

SWEEP = [sys.executable, "-m", "minitf.train", "-m"]


def needs_joblib() -> None:
    if importlib.util.find_spec("joblib") is None or importlib.util.find_spec("hydra_plugins") is None:
        pytest.skip("hydra-joblib-launcher is not installed: pip install -e '.[sweep]'")
    if importlib.util.find_spec("hydra_plugins.hydra_joblib_launcher") is None:
        pytest.skip("hydra-joblib-launcher is not installed: pip install -e '.[sweep]'")


@pytest.mark.machines
@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["basic", "joblib"])
def test_runs_of_a_sweep_are_side_by_side_with_their_hyperparameters(
    workdir: Path, tiny: list[str], launcher: str
) -> None:
    """One of the three fails, which is its own business until the exit status."""
    if launcher == "joblib":
        needs_joblib()
    chosen = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"] if launcher == "joblib" else []
    rates = "optim.learning_rate=1e-3,2e-3"
    done = subprocess.run(
        [*SWEEP, *tiny, *chosen, rates, "trainer.max_steps=4"], capture_output=True, text=True, timeout=150
    )
    assert done.returncode == 0, done.stderr
    runs = sorted(path.parent for path in workdir.glob("runs/sweep/*/*/metrics.jsonl"))
    assert len(runs) == 2
    for run in runs:
        assert (run / "checkpoints/latest/model.safetensors").is_file()
        # What was swept and nothing else: TensorBoard shows the first five columns.
        assert hyperparameters(run) in ({"optim.learning_rate": 1e-3}, {"optim.learning_rate": 2e-3})
        json.loads((run / "environment.json").read_text(encoding="utf-8"))
    assert hyperparameters(runs[0]) != hyperparameters(runs[1])

    diverging = [*SWEEP, *tiny, *chosen, "optim.learning_rate=1e-3,1e30", "optim.grad_clip=0", "trainer.max_steps=4"]
    done = subprocess.run(diverging, capture_output=True, text=True, timeout=150)
    assert done.returncode == 1, done.stderr
    assert "the loss became" in done.stderr
    assert len(list(workdir.glob("runs/sweep/*/*/checkpoints/latest"))) == 3
    assert not list(workdir.glob("runs/.*"))


def hyperparameters(run: Path) -> dict[str, float]:
    """The numbers TensorBoard's HParams tab finds in a run's file."""
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
