"""`fork=RUN@STEP`: a new run that continues a kept checkpoint of another one, with something changed.

It has the other run's config, plan and decisions, so that without a change it repeats that run bit for bit.
"""

import json
import math
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from minitf.checkpoints.checkpoint import Checkpoint, load_checkpoint
from minitf.checkpoints.locate import find_run, step_of
from minitf.checkpoints.run_directory import create_run_dir
from minitf.config.compose import compose_config
from minitf.config.schema import Config, load_config
from minitf.data.fingerprint import is_same_text
from minitf.distributed.process_group import ProcessGroup
from minitf.errors import RequestError
from minitf.runs.dry_run import dry_run
from minitf.runs.execute import execute
from minitf.runs.prepare import prepare
from minitf.runs.start import new_run_dir
from minitf.system.files import write_whole
from minitf.training.context import RunContext
from minitf.training.decisions import RunDecisions
from minitf.variants import copy_in

RECORD = "forked_from.json"  # in the new run's directory, for the Attention tab
# The checkpoint's tensors fit one shape, vocabulary and optimiser, and its position in the text counts in batches.
FIXED = (
    *("model", "tokenizer", "optim.kind", "optim=", "trainer=", "experiment=", "init_from", "resume"),
    *("trainer.batch_size", "trainer.grad_accumulation"),
)
CHANGEABLE = ("model.heads_off=", "model.dropout=", "model.attention=")
LIMITS = ("trainer.max_steps", "trainer.max_minutes")


def fork(named: str, overrides: Sequence[str], group: ProcessGroup) -> None:
    """Continue the checkpoint RUN@STEP in a run of its own, with `overrides` over its config. RequestError."""
    for override in overrides:
        if override.lstrip("+~").startswith(FIXED) and not override.startswith(CHANGEABLE):
            raise RequestError(
                f"{override}: a fork keeps its model, tokenizer and batches; there may change: model.heads_off, "
                "model.dropout, data and data.*, seed, attention.*, optim.* but optim.kind, trainer.* but "
                "trainer.batch_size and trainer.grad_accumulation"
            )
    directory = Path(group.broadcast(str(find_kept(named) if group.is_main else "")))
    parent = directory.parent.parent
    config = _forked_config(parent, step_of(directory), overrides)
    run_dir = new_run_dir(config)
    checkpoint = beginning(directory, config, new_text=any(word.startswith("data") for word in overrides))
    context = prepare(config, run_dir, group, _decisions(parent, config, checkpoint, overrides, group), checkpoint)
    if config.trainer.dry_run:
        dry_run(context)
        return
    with create_run_dir(run_dir, numbered=not config.run_dir) if group.is_main else nullcontext(run_dir) as created:
        _execute(replace(context, run_dir=Path(group.broadcast(str(created)))), parent)


def _execute(context: RunContext, parent: Path) -> None:
    if context.group.is_main:
        where = os.path.relpath(parent, context.run_dir)
        write_whole(context.run_dir / RECORD, json.dumps({"run": where, "step": context.first_step}) + "\n")
    execute(context)


def find_kept(named: str) -> Path:
    """The checkpoint directory of RUN@STEP. RequestError lists the steps that the run kept."""
    run, at, step = named.rpartition("@")
    run_dir = find_run(run if at else named)
    kept = {step_of(path): path for path in run_dir.glob("checkpoints/step_*") if step_of(path) >= 0}
    if not at or not step.isdecimal() or int(step) not in kept:
        steps = ", ".join(f"{step:,}".replace(",", "") for step in sorted(kept)) or "none"
        wrong = f"it has no step {step}" if at else "the step is missing, as in RUN@STEP"
        raise RequestError(
            f"fork={named}: {wrong}; {run_dir} kept the checkpoints of steps {steps}; train with "
            "trainer.keep_checkpoints=all to keep every one"
        )
    return kept[int(step)]


def beginning(directory: Path, config: Config, new_text: bool) -> Checkpoint:
    """The checkpoint that a fork begins with. RequestError if the text has changed without `new_text`."""
    checkpoint = load_checkpoint(directory, device="cpu")
    state = {**checkpoint.state, "best_loss": math.inf, "last_val": {}}  # the best of the fork itself
    if not is_same_text(config.data, state.get("text_fingerprint", "")):
        if not new_text:
            run = directory.parent.parent
            raise RequestError(f"the text of {run} has changed since: name the other one with data.files")
        state.pop("text_fingerprint", None)
    return replace(checkpoint, state=state)


def _forked_config(parent: Path, step: int, overrides: Sequence[str]) -> Config:
    groups = [word for word in overrides if word.startswith("data=")]
    text = [word for word in overrides if word.startswith(("data=", "data."))] if groups else []
    config = load_config(parent / "config.yaml", [*_one_limit(overrides), *(w for w in overrides if w not in text)])
    named = any(word.startswith("run_dir=") for word in overrides)
    config = replace(config, run_dir=config.run_dir if named else None, fork=f"{parent}@{step}", init_from=None)
    data = compose_config(text).data if groups else config.data
    own = copy_in(config.model.attention_class, parent)
    return replace(config, data=data.located(), model=replace(config.model, attention_class=own))


def _one_limit(overrides: Sequence[str]) -> list[str]:
    """A new limit replaces both that the run had."""
    given = [name for name in LIMITS if any(word.startswith(name) for word in overrides)]
    return [f"{name}=null" for name in LIMITS if name not in given] if given else []


def _decisions(
    parent: Path, config: Config, checkpoint: Checkpoint, overrides: Sequence[str], group: ProcessGroup
) -> RunDecisions:
    """Those of the parent; without its plan if the fork has an end of its own. RequestError if nothing is left."""
    step, decisions = checkpoint.step or 0, RunDecisions.load(parent, config.model)
    max_steps = config.trainer.max_steps
    if any(word.startswith(LIMITS) for word in overrides):
        decisions = replace(decisions, backend="", plans=(), switches=(), decided_at=step)
    elif step >= checkpoint.state.get("num_steps", 0):
        max_steps = step
    if max_steps is not None and max_steps <= step:
        raise RequestError(f"{parent} ends at step {step:,}: give the fork a larger end with trainer.max_steps=N")
    if config.model.heads_off:  # what was fastest may not know them
        decisions = replace(decisions, backend="", switches=())
    return decisions
