"""Hydra's own command line, for several runs of one command: `-m` and what else begins with a dash."""

import os
import re
import sys
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from minitf.config.help import CONF
from minitf.config.schema import check_overrides, flat, register_schema, to_config
from minitf.errors import run_command
from minitf.runs.start import new_run_dir, train, whole_context


def sweep(args: list[str]) -> int:
    """Hand over to Hydra's own command line: `-m` sweeps, `--cfg job`, `--hydra-help`, ..."""
    given = check_overrides([arg for arg in args if "=" in arg and not arg.startswith("-")])
    swept = [override.key_or_group for override in given if override.is_sweep_override()]

    def one_run(composed: Any) -> None:
        config = to_config(composed, HydraConfig.get().runtime.choices)
        config = whole_context(config, HydraConfig.get().overrides.task)
        sweep_dir = Path(HydraConfig.get().sweep.dir)
        settings, choices = flat(config), HydraConfig.get().runtime.choices
        compared = {key: choices[key] if key in choices else settings.get(key, "") for key in swept}
        label = "_".join([str(HydraConfig.get().job.num), *(f"{key}_{value}" for key, value in compared.items())])
        run_dir = sweep_dir / re.sub(r"[^\w.+-]+", "_", label)[:100].rstrip("_")
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            train(config, run_dir, compared=compared)
        else:
            train(config, new_run_dir(config))

    def job(composed: Any) -> None:
        # One value that diverges is a result of a sweep, not its end.
        if status := run_command(lambda: one_run(composed)):
            failed.parent.mkdir(parents=True, exist_ok=True)
            failed.write_text(str(status), encoding="utf-8")

    # A launcher may run jobs in other processes, or on other machines that share this directory: a file brings word.
    failed = Path("runs").absolute() / f".failed_{os.getpid()}"
    failed.unlink(missing_ok=True)
    register_schema()
    # Hydra's parser takes flags only before overrides.
    sys.argv[1:] = sorted(args, key=lambda arg: "=" in arg and not arg.startswith("-"))
    hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")(job)()
    status = int(failed.read_text(encoding="utf-8")) if failed.exists() else 0
    failed.unlink(missing_ok=True)
    return status
