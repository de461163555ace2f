"""`-m`: a run for each combination of values, in this process or by one of Hydra's launchers."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from minitf.config.compose import check_sweep, run_hydra, to_config
from minitf.config.schema import flat
from minitf.errors import run_command
from minitf.runs.start import train


def sweep(overrides: Sequence[str], flags: Sequence[str]) -> int:
    """Train all runs of the sweep; the exit status of the last one that failed, else 0."""
    swept = check_sweep(overrides, flags)

    def one_run(composed: DictConfig) -> None:
        config = to_config(composed)
        hydra = HydraConfig.get()
        settings = flat(config)
        choices = hydra.runtime.choices
        compared = {key: choices[key] if key in choices else settings.get(key, "") for key in swept}
        label = "_".join([str(hydra.job.num), *(f"{key}_{value}" for key, value in compared.items())])
        run_dir = Path(hydra.sweep.dir) / re.sub(r"[^\w.+-]+", "_", label)[:100].rstrip("_")
        train(config, run_dir, compared=compared)

    def job(composed: DictConfig) -> None:
        # One value that diverges is a result of a sweep, not its end.
        if status := run_command(lambda: one_run(composed)):
            failed.parent.mkdir(parents=True, exist_ok=True)
            failed.write_text(str(status), encoding="utf-8")

    # A launcher may run jobs in other processes, or on other machines that share this directory: they report by a file.
    failed = Path("runs").absolute() / f".failed_{os.getpid()}"
    failed.unlink(missing_ok=True)
    run_hydra(job, overrides, ["--multirun", *flags])
    status = int(failed.read_text(encoding="utf-8")) if failed.exists() else 0
    failed.unlink(missing_ok=True)
    return status
