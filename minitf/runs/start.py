"""A run of training from its config to its end, in a directory of its own: begun, gone on with, or only described."""

import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, cast

from minitf.backends.autotune import require_kernels
from minitf.checkpoints.checkpoint import Checkpoint, load_checkpoint
from minitf.checkpoints.locate import RUNS, find_run
from minitf.checkpoints.model_card import origin_of
from minitf.checkpoints.run_directory import annotate_os_errors, create_run_dir, lock_run_dir
from minitf.checkpoints.train_state import TrainState
from minitf.config.schema import Config, changed_settings, load_config, model_sizes, save_config
from minitf.data.sources.text import fingerprint
from minitf.distributed.process_group import SINGLE, ProcessGroup
from minitf.errors import RequestError
from minitf.model import Transformer
from minitf.reporting.console import conclude, introduce
from minitf.reporting.monitor import SCALARS, Monitor, NullMonitor, record_environment
from minitf.runs.dry_run import dry_run
from minitf.runs.model_size import Budget, choose_size
from minitf.system.hardware import Hardware, choose_device, choose_hardware, measure_quiet_matmul
from minitf.system.threads import usable_cores
from minitf.tokenizer import TokenizerConfig
from minitf.training import rng as random_state
from minitf.training.decisions import Choices
from minitf.training.parallel import Parallel, check_batch_size, choose_strategy
from minitf.training.task import Task, open_task
from minitf.training.trainer import Trainer


class Prepared(NamedTuple):
    """All that a run needs before it has a directory."""

    config: Config
    task: Task
    parallel: Parallel
    hardware: Hardware
    origin: Mapping[str, str]  # what the model card says of the model this one begins as
    size: str  # why the model has its size, where nobody asked for one


def train(
    config: Config, run_dir: Path, group: ProcessGroup | None = None, compared: Mapping[str, Any] | None = None
) -> None:
    """Train as `config` says in `run_dir`, or, where that is being used, beside it with a number behind its name.

    A request that cannot be met (RequestError) is found out before the directory is made. Of a `group` of processes
    the first one keeps the directory; the others only compute. `compared`: what a sweep gives this run, by key.
    """
    group = group or SINGLE
    prepared = _prepare(config, None, Choices(), group)
    if prepared.config.trainer.dry_run:
        _say_dry_run(prepared, None)
        return
    with create_run_dir(run_dir, numbered=not config.run_dir) if group.is_main else nullcontext(run_dir) as owned:
        _train(prepared, Path(group.broadcast(str(owned))), None, Choices(), compared)


def _train(
    prepared: Prepared, run_dir: Path, resumed: Checkpoint | None, choices: Choices,
    compared: Mapping[str, Any] | None = None,
) -> None:  # fmt: skip
    """Train in a directory that is its own, from the checkpoint `resumed` if given; leaves all it made there."""
    config, task, parallel, hardware, origin, size = prepared
    group, first = parallel.group, parallel.group.is_main
    batches = task.batches(config.model.context_length, config.trainer.batch_size, config.seed)
    state = TrainState.from_json(resumed.state) if resumed else TrainState()
    with annotate_os_errors(run_dir):
        if first:  # in this order: a run that dies in between ends where it was to end before
            choices.finished = False
            choices.save(run_dir)
            save_config(config, run_dir / "config.yaml")
    with (
        annotate_os_errors(run_dir),
        Monitor(run_dir, state.step) if first else cast(Monitor, NullMonitor()) as monitor,
    ):
        trainer = Trainer(
            config.trainer, config.optim, config.attention, parallel, task, batches, hardware, run_dir, monitor, state,
            choices,
        )  # fmt: skip
        trainer.origin = origin
        before = replace(choices)
        compilation = trainer.warm_up()  # which also decides how attention is computed
        said = {
            "size": size,
            "device": hardware.device.type,
            "threads": trainer.training_step.threads,
            "precision": f"{'bf16' if hardware.dtype.itemsize == 2 else 'fp32'}, {hardware.reason}",
            "micro_batch": trainer.training_step.describe_micro_batch(),
            "compile": compilation,
            "processes": parallel.describe(config.trainer.batch_size),
        }
        if resumed:
            trainer.restore(resumed.directory)
        choices.here(hardware.device, hardware.dtype, trainer.training_step.micro_batch_size, group.size)
        if first:
            choices.save(run_dir)
            record_environment(run_dir, hardware, {what: words for what, words in said.items() if words})
        group.set_for_restart("run_dir", str(run_dir.absolute()))
        introduce(trainer, said)
        if changed := choices.differences(before):
            monitor.say(f"resumed    with {', '.join(changed)}: the same text in the same order, other rounding")
        trainer.run()
        if first and config.trainer.attention_every >= 0:
            monitor.write_attention_page(f"Attention in {os.path.relpath(run_dir)}")
        if state.last_val:
            final = {f"final/{name}": float(state.last_val[name]) for name in SCALARS["val"] if name in state.last_val}
            monitor.hyperparameters(compared or changed_settings(config), final, state.step)
        choices.finished = not trainer.interrupted
        if first:
            choices.save(run_dir)
        conclude(trainer)


def _say_dry_run(prepared: Prepared, resumed: Checkpoint | None) -> None:
    """Print what the run would take, without a trace of it."""
    config, task, parallel, hardware, _, size = prepared
    batches = task.batches(config.model.context_length, config.trainer.batch_size, config.seed)
    state = TrainState.from_json(resumed.state) if resumed else TrainState()
    report = dry_run(config, task, parallel, batches, hardware, state, size)
    if parallel.group.is_main:
        print(report)


def _prepare(config: Config, resumed: Checkpoint | None, choices: Choices, group: ProcessGroup) -> Prepared:
    """The task, its data prepared, the model to train, new or from a checkpoint, with the latter's shape in the config,
    in the hands of the group; and the hardware, with the precision that was chosen on it before."""
    check_batch_size(config.trainer.batch_size, group)
    strategy = choose_strategy(config.trainer.strategy, group)
    precision, threads = config.trainer.precision, config.trainer.threads
    same_device = choices.device == choose_device(config.trainer.device).type
    decided = precision == "auto" and same_device
    told = group.size == 1 and os.environ.get("OMP_NUM_THREADS")
    if same_device and choices.num_processes == group.size and not told and choices.num_threads <= usable_cores():
        threads = threads or choices.num_threads
    hardware = choose_hardware(config.trainer.device, choices.precision if decided else precision, group, threads)
    if decided:
        hardware = replace(hardware, reason="as the run began")
    # One measurement: all processes choose the same size.
    flops = group.broadcast(measure_quiet_matmul(hardware)) * group.size if config.size_is_open else 0.0
    with group.main_first():
        config, task, model, origin, size = _open(config, resumed, flops)
    model = model.to(hardware.device)
    model.compute_dtype = hardware.dtype
    model.activation_checkpointing = config.trainer.activation_checkpointing
    if config.trainer.compile == "native":
        require_kernels(model)
    parallel = Parallel(model, group, strategy)
    if group.rank:  # the first weights are those of all; what is dropped in other rows is not
        random_state.seed(config.seed + group.rank)
    return Prepared(config, task, parallel, hardware, origin, size)


def _open(
    config: Config, resumed: Checkpoint | None, flops: float
) -> tuple[Config, Task, Transformer, Mapping[str, str], str]:
    loaded = resumed or (load_checkpoint(config.init_from, device="cpu") if config.init_from else None)
    task = open_task(config.data, config.tokenizer, loaded.tokenizer if loaded else None)
    if loaded and not resumed:
        context = min(config.model.context_length, loaded.model.config.context_length)
        shape = replace(
            loaded.model.config, attention=config.model.attention, dropout=config.model.dropout, context_length=context
        )
        tokenizer = TokenizerConfig(kind="pretrained", file=str(loaded.directory / "tokenizer.json"))
        config = replace(config, model=shape, tokenizer=tokenizer)
    config, size = _choose_size(config, task, flops) if config.size_is_open and not loaded else (config, "")
    random_state.seed(config.seed)
    # A pretrained model may have room for more tokens than its tokenizer has.
    model = Transformer(config.model, max(task.tokenizer.vocab_size, loaded.model.vocab_size if loaded else 0))
    if loaded:
        model.copy_weights_from(loaded.model)
    origin = origin_of(None if resumed else config.init_from, loaded.directory if loaded else None)
    return config, task, model, origin, size


def _choose_size(config: Config, task: Task, flops: float) -> tuple[Config, str]:
    """The config with the model's size for the time on a machine of so many `flops`, and why that."""
    sizes = model_sizes(config.model)
    name, reason = choose_size(sizes, Budget(config.trainer, flops, task.tokenizer.vocab_size))
    return replace(config, model=sizes[name]), reason


def new_run_dir(config: Config) -> Path:
    """runs/NAME/DATE_TIME, unless `run_dir` says where."""
    if config.run_dir:
        run_dir = Path(config.run_dir)
        if (run_dir / "checkpoints").exists():
            raise RequestError(f"run_dir={run_dir} holds an earlier run: resume={run_dir} goes on with it")
        return run_dir
    return RUNS / config.name / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")


def resume(run: str, overrides: Sequence[str], group: ProcessGroup) -> None:
    """Continue the run RUN in its own directory, with its own config and `overrides` on top."""
    for override in overrides:
        fixed = (
            *("model", "tokenizer", "data", "optim.kind", "name", "seed", "run_dir", "init_from"),
            *("trainer.batch_size", "trainer.grad_accumulation"),  # the position in the text counts in them
        )
        if override.lstrip("+~").startswith(fixed):
            raise RequestError(
                f"{override}: a resumed run keeps its own text, model and place; trainer.* may be changed"
            )
    run_dir = Path(group.broadcast(str(find_run(run) if group.is_main else "")))
    # Before anything is read: another process may be about to write it.
    with lock_run_dir(run_dir) if group.is_main else nullcontext():
        _resume(run, run_dir, overrides, group)


def _resume(run: str, run_dir: Path, overrides: Sequence[str], group: ProcessGroup) -> None:
    ends = [override for override in overrides if override.startswith(("trainer.max_steps", "trainer.max_minutes"))]
    if len(ends) == 1:  # the other limit was that of the run as it was meant: it must not end this one
        other = "max_minutes" if "max_steps" in ends[0] else "max_steps"
        overrides = [f"trainer.{other}=null", *overrides]
    config = load_config(run_dir / "config.yaml", overrides)
    choices = Choices(**group.broadcast(asdict(Choices.load(run_dir)) if group.is_main else {}))
    checkpoint = _newest(run, run_dir, group)
    if checkpoint is None:
        choices = replace(choices, compile="", num_steps=0, corrected_at=0) if ends else choices
        _train(_prepare(config, None, choices, group), run_dir, None, choices)
        return
    step = checkpoint.step or 0
    if checkpoint.state.get("text_fingerprint") != fingerprint(config.data):
        raise RequestError(
            f"the text of {run_dir} has changed since: train on it as it is now with init_from={run_dir}"
        )
    if ends:
        most = config.trainer.max_steps
        if most is not None and most <= step:
            raise RequestError(f"{run_dir} is already at step {step:,}: trainer.max_steps={most} must be larger")
        minutes = config.trainer.max_minutes
        if minutes is not None and minutes * 60 <= checkpoint.state.get("train_s", 0):
            raise RequestError(f"{run_dir} has trained longer than trainer.max_minutes={minutes}: it must be larger")
        choices = replace(choices, compile="", num_steps=0, corrected_at=0, decided_at=step)
    elif step == checkpoint.state.get("num_steps") and choices.finished:
        raise RequestError(f"{run_dir} is complete at step {step:,}: go further with a larger trainer.max_steps=N")
    prepared = _prepare(config, checkpoint, choices, group)
    if config.trainer.dry_run:
        _say_dry_run(prepared, checkpoint)
    else:
        _train(prepared, run_dir, checkpoint, choices)


def _newest(run: str, run_dir: Path, group: ProcessGroup) -> Checkpoint | None:
    """The checkpoint to go on from, as the first process chooses; None where the run died before it saved anything."""
    place = Path(run) if Path(run).absolute().parent.name == "checkpoints" else run_dir
    checkpoint = None
    if group.is_main:
        try:
            checkpoint = load_checkpoint(place, device="cpu", prefer="latest")
        except RequestError:
            if place != run_dir or any((run_dir / "checkpoints").glob("step_*")):
                raise
            # There is nothing to lose, and what it had decided still holds.
            print(f"minitf: {run_dir} has no checkpoint yet: starting it again from the first step", file=sys.stderr)
    found = group.broadcast(str(checkpoint.directory) if checkpoint else None)
    return checkpoint or (load_checkpoint(found, device="cpu") if found else None)


def whole_context(config: Config, overrides: Sequence[str]) -> Config:
    """With `init_from` the context is that of the model, unless a shorter one is asked for."""
    if not config.init_from or any(override.startswith("model.context_length=") for override in overrides):
        return config
    return replace(config, model=replace(config.model, context_length=1 << 30))
