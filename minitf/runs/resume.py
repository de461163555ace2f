"""Resume a run in its own directory, with its own config."""

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

from minitf.checkpoints.checkpoint import Checkpoint, load_checkpoint
from minitf.checkpoints.locate import SNAPSHOTS, find_run
from minitf.checkpoints.run_directory import lock_run_dir
from minitf.config.overrides import setting
from minitf.config.schema import Config, load_config
from minitf.data.fingerprint import is_same_text
from minitf.distributed.process_group import ProcessGroup
from minitf.errors import RequestError
from minitf.runs.dry_run import dry_run
from minitf.runs.execute import execute
from minitf.runs.fork import beginning, find_kept
from minitf.runs.prepare import prepare
from minitf.training.context import RunContext
from minitf.training.decisions import RunDecisions
from minitf.variants import copy_in

# The data position counts in batches, and the optimiser's state fits its own kind alone. Text may be named by another
# path, if it is the same text.
FIXED = (
    "model",
    "tokenizer",
    "data",
    "optim.kind",
    "name",
    "seed",
    "run_dir",
    "init_from",
    "trainer.batch_size",
    "trainer.grad_accumulation",
)
MOVABLE = ("data.files=", "data.hub_path=", "data.cache_dir=")
LIMITS = ("trainer.max_steps", "trainer.max_minutes")


def resume(run: str, overrides: Sequence[str], group: ProcessGroup) -> None:
    """Continue RUN (a run or one of its checkpoints) with `overrides` over its config.

    Raises RequestError if they cannot be changed, or if the run is complete and they do not extend it.
    """
    for override in overrides:
        if override.lstrip("+~").startswith(FIXED) and not override.startswith(MOVABLE):
            raise RequestError(
                f"{override}: a resumed run keeps its model, text and batches; there may change: data.files (where the "
                "same text is now), attention.*, optim.* but optim.kind, trainer.* but trainer.batch_size and "
                "trainer.grad_accumulation"
            )
    if Path(run).absolute().parent.name == SNAPSHOTS:
        raise RequestError(f"{run} is a snapshot, weights alone: start from them with {setting('init_from', run)}")
    run_dir = Path(group.broadcast(str(find_run(run) if group.is_main else "")))
    # Before anything is read: another process may be about to write it.
    with lock_run_dir(run_dir) if group.is_main else nullcontext():
        context = _resumed_context(run, run_dir, overrides, group)
        if context.config.trainer.dry_run:
            dry_run(context)
        else:
            execute(context)


def _resumed_context(run: str, run_dir: Path, overrides: Sequence[str], group: ProcessGroup) -> RunContext:
    limits = [override for override in overrides if override.startswith(LIMITS)]
    if len(limits) == 1:  # a new limit replaces both that the run had
        other = LIMITS[1] if limits[0].startswith(LIMITS[0]) else LIMITS[0]
        overrides = [f"{other}=null", *overrides]
    config = load_config(run_dir / "config.yaml", overrides)
    config = replace(config, data=config.data.located())
    own = copy_in(config.model.attention_class, run_dir)  # wherever it was then: what was trained is here
    config = replace(config, model=replace(config.model, attention_class=own))
    if config.attention.patterns and not any("attention.patterns" in override for override in overrides):
        patterns = str(run_dir / Path(config.attention.patterns).name)  # the copy
        config = replace(config, attention=replace(config.attention, patterns=patterns))
    loaded = asdict(RunDecisions.load(run_dir, config.model)) if group.is_main else {}
    decisions = RunDecisions.of(group.broadcast(loaded))
    checkpoint = _newest_checkpoint(run, run_dir, group)
    if checkpoint is None and config.fork:  # it died before it saved anything
        checkpoint = beginning(find_kept(config.fork), config, new_text=True)
    elif checkpoint is not None:
        _check_can_continue(run_dir, config, checkpoint, decisions, extended=bool(limits))
    if limits:  # the end is decided anew, and the backend with it: what pays depends on the time that is left
        decided_at = decisions.decided_at if checkpoint is None else checkpoint.step or 0
        decisions = replace(decisions, backend="", plans=(), switches=(), decided_at=decided_at)
    return prepare(config, run_dir, group, decisions, checkpoint)


def _check_can_continue(
    run_dir: Path, config: Config, checkpoint: Checkpoint, decisions: RunDecisions, extended: bool
) -> None:
    """RequestError if the text has changed, or if there is nothing left to train."""
    step, state = checkpoint.step or 0, checkpoint.state
    if not is_same_text(config.data, state.get("text_fingerprint", "")):
        raise RequestError(
            f"the text of {run_dir} has changed since: train on it as it is now with "
            f"{setting('init_from', str(run_dir))}, or say where the text is that it was trained on with data.files"
        )
    max_steps, max_minutes = config.trainer.max_steps, config.trainer.max_minutes
    if not extended:
        if step == state.get("num_steps") and decisions.finished:
            raise RequestError(f"{run_dir} is complete at step {step:,}: extend it with a larger trainer.max_steps=N")
        return
    if max_steps is not None and max_steps <= step:
        raise RequestError(f"{run_dir} is already at step {step:,}: trainer.max_steps={max_steps} must be larger")
    if max_minutes is not None and max_minutes * 60 <= state.get("train_s", 0):
        raise RequestError(f"{run_dir} has trained longer than trainer.max_minutes={max_minutes}: it must be larger")


def _newest_checkpoint(run: str, run_dir: Path, group: ProcessGroup) -> Checkpoint | None:
    """The checkpoint to resume from, as rank 0 chooses it; None if the run died before it saved any."""
    named = Path(run) if Path(run).absolute().parent.name == "checkpoints" else run_dir
    checkpoint = None
    if group.is_main:
        try:
            checkpoint = load_checkpoint(named, device="cpu", prefer="latest")
        except RequestError:
            if named != run_dir or any((run_dir / "checkpoints").glob("step_*")):
                raise
            # Nothing can be lost, and the decisions still hold.
            print(f"minitf: {run_dir} has no checkpoint yet: starting it again from the first step", file=sys.stderr)
    found = group.broadcast(str(checkpoint.directory) if checkpoint else None)
    return checkpoint or (load_checkpoint(found, device="cpu") if found else None)
