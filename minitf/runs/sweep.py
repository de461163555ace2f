"""`-m`: a run for each combination of values, in this process or by one of Hydra's launchers."""

import json
import os
import re
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from minitf.config.compose import check_sweep, run_hydra, to_config
from minitf.config.schema import flat
from minitf.errors import run_command
from minitf.runs.comparison import legend, read_outcome, table
from minitf.runs.start import train


def sweep(overrides: Sequence[str], flags: Sequence[str]) -> int:
    """Train all runs of the sweep and compare them; the exit status of the last one that failed, else 0."""
    swept = check_sweep(overrides, flags)
    # A launcher may run jobs in other processes, or on other machines that share this directory: they report by files.
    reports = Path("runs").absolute() / f".sweep_{os.getpid()}"
    shutil.rmtree(reports, ignore_errors=True)

    def job(composed: DictConfig) -> None:
        hydra = HydraConfig.get()
        run_dirs: list[Path | None] = []
        # One value that diverges is a result of a sweep, not its end.
        status = run_command(lambda: run_dirs.append(_train(composed, swept)))
        values = [word for word in hydra.overrides.task if word.lstrip("+").partition("=")[0] in swept]
        report = {"name": " ".join(values), "status": status, "runs": [str(path) for path in run_dirs if path]}
        reports.mkdir(parents=True, exist_ok=True)
        (reports / f"{hydra.job.num:06}").write_text(json.dumps(report), encoding="utf-8")

    run_hydra(job, overrides, ["--multirun", *flags])
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(reports.glob("*"))]
    shutil.rmtree(reports, ignore_errors=True)
    if lines := _comparison(found):
        print("\n".join(["", *lines]))
    return next((int(report["status"]) for report in reversed(found) if report["status"]), 0)


def _train(composed: DictConfig, swept: Sequence[str]) -> Path | None:
    """One run of the sweep; returns its directory."""
    config = to_config(composed)
    hydra = HydraConfig.get()
    settings = flat(config)
    choices = hydra.runtime.choices
    compared = {key: choices[key] if key in choices else settings.get(key, "") for key in swept}
    label = "_".join([str(hydra.job.num), *(f"{key}_{value}" for key, value in compared.items())])
    run_dir = Path(hydra.sweep.dir) / re.sub(r"[^\w.+-]+", "_", label)[:100].rstrip("_")
    return train(config, run_dir, compared=compared)


def _comparison(reports: Sequence[dict[str, Any]]) -> list[str]:
    """The table of the runs that ended, with the names of those that failed; nothing for a dry run."""
    outcomes = [read_outcome(Path(run)) for report in reports for run in report["runs"]]
    failed = [report["name"] for report in reports if report["status"]]
    if not outcomes:
        return table([], failed)
    (first, *_) = (Path(run) for report in reports for run in report["runs"])
    folder = shlex.quote(os.path.relpath(first.parent))
    return [*table(outcomes, failed), legend(outcomes), f"later: python -m minitf.evaluate --seeds {folder}"]
