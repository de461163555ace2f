"""Start a new run."""

import shlex
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from minitf.checkpoints.locate import RUNS
from minitf.checkpoints.run_directory import create_run_dir
from minitf.config.schema import Config
from minitf.distributed.process_group import SINGLE, ProcessGroup
from minitf.errors import RequestError
from minitf.interpretability.own_patterns import OwnPatterns
from minitf.runs.dry_run import dry_run
from minitf.runs.execute import execute
from minitf.runs.prepare import prepare
from minitf.training.decisions import RunDecisions
from minitf.variants import trust


def train(
    config: Config, run_dir: Path, group: ProcessGroup = SINGLE, compared: Mapping[str, Any] | None = None
) -> Path | None:
    """Train a new model in `run_dir`, or, if that is in use and not set by the user, in `run_dir`_2, _3, ...

    Raises RequestError before the directory is made. Of several processes rank 0 alone writes. `compared`: the settings
    in which the runs of a sweep differ, by key. Returns the run's directory, None for a dry run.
    """
    config = replace(config, data=config.data.located())
    if config.model.attention_class:  # named by the user, not by a run
        trust(config.model.attention_class)
    if config.attention.patterns:
        OwnPatterns.trust(config.attention.patterns)
    context = prepare(config, run_dir, group, RunDecisions())
    if config.trainer.dry_run:
        dry_run(context)
        return None
    with create_run_dir(run_dir, numbered=not config.run_dir) if group.is_main else nullcontext(run_dir) as created:
        run_dir = Path(group.broadcast(str(created)))
        execute(replace(context, run_dir=run_dir), compared)
    return run_dir


def new_run_dir(config: Config) -> Path:
    """runs/NAME/DATE_TIME, unless `run_dir` is set. RequestError if there is a run in it."""
    if not config.run_dir:
        return RUNS / config.name / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    run_dir = Path(config.run_dir)
    if (run_dir / "checkpoints").exists():
        raise RequestError(
            f"run_dir={run_dir} holds an earlier run: continue it with {shlex.quote(f'resume={run_dir}')}"
        )
    return run_dir
