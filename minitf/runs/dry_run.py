"""`trainer.dry_run=true`: what a run would do and need, from the time of a few steps. Nothing is written."""

import shutil
import sys
from pathlib import Path

import numpy as np
import torch

from minitf.backends import autotune
from minitf.checkpoints.locate import RUNS
from minitf.checkpoints.snapshots import MAX_BYTES, max_snapshots, snapshot_bytes
from minitf.config.schema import Config
from minitf.data.tokenized_text import Tokens
from minitf.optim import Optimizer
from minitf.reporting.console import fitted, line
from minitf.runs.summary import advice_on_size, clock
from minitf.training.budget import estimate_num_steps
from minitf.training.context import RunContext
from minitf.training.plan import Schedule
from minitf.training.task import PairsTask, Task, TextTask
from minitf.training.tuned_step import TunedStep

NUM_TIMED_STEPS = 3


def dry_run(context: RunContext) -> None:
    """Print what the run would do and need, and warnings. All ranks must call it; rank 0 prints."""
    optimizer = context.parallel.new_optimizer(context.config.optim, context.hardware.dtype)
    report = _report(context, optimizer, *_time_step(context, optimizer))
    if context.group.is_main:
        report.append("nothing was trained or written: this was trainer.dry_run=true")
        columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        print("\n".join(fitted(row, columns) if columns else row for row in report))


def _time_step(context: RunContext, optimizer: Optimizer) -> tuple[float, str]:
    """Seconds of a step, and what computed it, for a sentence."""
    config = context.config.trainer
    step = TunedStep(
        context.parallel,
        optimizer,
        context.batches,
        context.hardware,
        config.grad_accumulation,
        config.micro_batch_size,
        config.cuda_graph,
    )
    step.first_step()
    # torch.compile is not tried: it takes longer than a dry run should.
    name = step.choose_backend("native" if config.compile in ("auto", "native") else "false").backend
    step.capture()
    return step.measure(NUM_TIMED_STEPS), autotune.backends(context.model)[name].description


def _report(context: RunContext, optimizer: Optimizer, step_s: float, backend: str) -> list[str]:
    config, state, model = context.config, context.initial_state(), context.model
    train, val = tokens_of(context.task)
    tokens_per_step = context.tokens_per_step
    num_steps = max(1, estimate_num_steps(config.trainer, state.step, state.train_s, step_s) - state.step)
    num_tokens = num_steps * tokens_per_step
    num_parameters = model.num_parameters()
    schedule = Schedule.of(config.trainer, num_steps, context.steps_per_evaluation)
    num_evaluations = -(-num_steps // schedule.evaluate.steps)
    evaluation_s = context.steps_per_evaluation * step_s * num_evaluations
    disk_bytes, disk_lines = _disk(context, optimizer, num_steps, schedule)
    precision = str(context.hardware.dtype).removeprefix("torch.")
    how = f"{context.hardware.device.type} in {precision}, by {backend}"
    lines = [
        line("text", context.task.description),
        line("", f"{len(train):,} tokens to train on, {len(val):,} held out"),
        line("parameters", f"{num_parameters:,}, vocabulary {model.vocab_size:,}"),
    ]
    if context.size_reason:
        lines.append(line("size", context.size_reason))
    lines.append(line("step", f"{step_s * 1000:,.0f} ms for {tokens_per_step:,} tokens, on {how}"))
    lines.append(line("speed", f"{tokens_per_step / step_s:,.0f} tokens/s"))
    if processes := context.parallel.describe(config.trainer.batch_size):
        lines.append(line("processes", processes))
    lines += [
        line("training", f"{num_steps:,} steps, {num_tokens:,} tokens"),
        line("tokens", f"{num_tokens / num_parameters:.2g} per parameter, {len(train) / num_parameters:.2g} different"),
        line("epochs", f"{num_tokens / context.batches.tokens_per_epoch:.2g}"),
        line("time", f"{clock(num_steps * step_s)} of training, about {clock(evaluation_s)} of evaluation"),
        line("memory", f"{_peak_memory_bytes(context.hardware.device) / 2**20:,.0f} MiB at most, Python included"),
        *disk_lines,
    ]
    found = warnings(config, context.task, num_parameters)
    free_bytes = _free_bytes(Path(config.run_dir) if config.run_dir else RUNS)
    if disk_bytes > free_bytes:
        smaller = "trainer.keep_checkpoints=1, trainer.snapshots=none, or run_dir"
        found.insert(0, f"the disk has {free_bytes / 1e6:,.1f} MB left: set {smaller}")
    ends_by_time = config.trainer.max_steps is None
    if ends_by_time and not config.init_from and (advice := advice_on_size(model, num_tokens)):
        found.append(advice)
    return lines + [line("warning", warning) for warning in found]


def _disk(context: RunContext, optimizer: Optimizer, num_steps: int, schedule: Schedule) -> tuple[int, list[str]]:
    """The bytes that a run needs at most, and the lines that say so."""
    trainer, num_parameters = context.config.trainer, context.model.num_parameters()
    one_bytes = 4 * num_parameters + sum(t.numel() * t.element_size() for t in optimizer.state_dict().values())
    kept = trainer.num_kept or num_steps // schedule.save.steps + num_steps // schedule.evaluate.steps
    all_bytes = one_bytes * (kept + 2)  # the best, and the one being written
    small_bytes = snapshot_bytes(num_parameters, context.task.tokenizer)
    most = max_snapshots(trainer.snapshots, small_bytes) if trainer.attention_every >= 0 else 0
    looks = {0, num_steps, *(1 << power for power in range(num_steps.bit_length()))}
    num_snapshots = min(most, len(looks | set(range(0, num_steps, schedule.attention.steps))))
    snapshots_bytes = small_bytes * num_snapshots
    snapshots = f"{num_snapshots} snapshots of {small_bytes / 1e6:,.1f} MB, {snapshots_bytes / 1e6:,.1f} MB"
    if trainer.snapshots == "auto" and not most and trainer.attention_every >= 0:
        snapshots = f"no snapshots: two of {small_bytes / 1e6:,.1f} MB are more than {MAX_BYTES / 1e6:,.0f} MB"
    lines = [
        line("disk", f"{one_bytes / 1e6:,.1f} MB a checkpoint, {all_bytes / 1e6:,.1f} MB at most, and some logs"),
        line("", snapshots),
    ]
    return all_bytes + snapshots_bytes, lines


def warnings(config: Config, task: Task, num_parameters: int) -> list[str]:
    """Likely mistakes."""
    context = config.model.context_length
    in_step = config.trainer.batch_size * config.trainer.grad_accumulation * context
    train, _ = tokens_of(task)
    found = []
    if len(train) < in_step:
        found.append(
            f"the text has {len(train):,} tokens and one step takes {in_step:,}: it repeats within a step; "
            "use more text, or a smaller trainer.batch_size"
        )
    if num_parameters > len(train):
        found.append(
            f"{num_parameters:,} parameters for {len(train):,} tokens: the model can memorise the text; "
            "watch the held-out loss, and use more text or a smaller model"
        )
    longest = longest_document(train, task.tokenizer.end_id) if isinstance(task, TextTask) else None  # pairs are packed
    if longest is not None and longest < context:
        found.append(
            f"the longest document has {longest:,} tokens, the context is {context:,}: positions farther back are "
            f"always another document; model.context_length={max(16, 1 << (longest - 1).bit_length())} is enough"
        )
    return found


def tokens_of(task: Task) -> tuple[Tokens, Tokens]:
    """All ids to train on, and all held-out ids."""
    if isinstance(task, PairsTask):
        return task.pairs.train.ids, task.pairs.val.ids
    assert isinstance(task, TextTask)
    return task.text.train, task.text.val


def longest_document(tokens: Tokens, end_id: int) -> int | None:
    """Tokens of the longest document, without its end token; None if no end is marked."""
    ends = np.flatnonzero(np.asarray(tokens) == end_id)
    if len(ends) == 0:
        return None
    starts = np.concatenate([[0], ends[:-1] + 1])
    return int(max((ends - starts).max(), len(tokens) - ends[-1] - 1))


def _peak_memory_bytes(device: torch.device) -> int:
    """Peak memory of this process, or of the device for it, so far; 0 if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _free_bytes(path: Path) -> int:
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())
    return shutil.disk_usage(existing).free
