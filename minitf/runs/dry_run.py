"""`trainer.dry_run=true`: what a run would be and take, from three real steps, without a trace in runs/."""

import shutil
import sys
from pathlib import Path

import numpy as np
import torch

from minitf.checkpoints.locate import RUNS
from minitf.checkpoints.train_state import TrainState
from minitf.config.schema import Config
from minitf.data.batches import BatchSource, Tokens
from minitf.reporting.console import too_large
from minitf.system.hardware import Hardware
from minitf.training.parallel import Parallel
from minitf.training.step import TrainingStep
from minitf.training.task import PairsTask, Task, TextTask
from minitf.training.trainer_config import FORWARD_ALONE, Schedule

NUM_STEPS = 3  # that are timed


def dry_run(
    config: Config, task: Task, parallel: Parallel, batches: BatchSource, hardware: Hardware, state: TrainState,
    size: str = "",
) -> str:  # fmt: skip
    """The report, a line for each thing; warnings are at its end. Of several processes all must ask for it.

    `size`: why the model has its size, if it was chosen.
    """
    trainer, model = config.trainer, parallel.model
    train, val = tokens_of(task)
    optimizer = parallel.new_optimizer(config.optim, hardware.dtype)
    at_once = trainer.micro_batch_size
    step = TrainingStep(parallel, optimizer, batches, hardware, trainer.grad_accumulation, at_once, trainer.cuda_graph)
    step.first_step()
    # What torch.compile would give is not measured: compiling takes longer than a dry run should.
    backend = step.choose_backend("native" if trainer.compile in ("auto", "native") else "false").backend
    step.capture()
    step_s = step.measure(NUM_STEPS)
    tokens_per_step = trainer.batch_size * trainer.grad_accumulation * config.model.context_length
    num_steps = _num_steps(config, state, step_s)
    num_tokens = num_steps * tokens_per_step
    parameters = model.num_parameters()
    evaluation = task.evaluated_tokens(trainer.eval_tokens) / tokens_per_step / FORWARD_ALONE
    evaluation_s = evaluation * step_s * -(-num_steps // Schedule.of(trainer, num_steps, evaluation).evaluate)
    saved = 4 * parameters + sum(t.numel() * t.element_size() for t in optimizer.state_dict().values())
    kept = trainer.keep_checkpoints + 2  # beside them the best, and the one that is being written
    lines = [
        ("text", f"{task.description}: {len(train):,} tokens to train on, {len(val):,} held out"),
        ("parameters", f"{parameters:,}, vocabulary {model.vocab_size:,}"),
        *([("size", size)] if size else []),
        ("step", f"{step_s * 1000:,.0f} ms for {tokens_per_step:,} tokens, {tokens_per_step / step_s:,.0f} tokens/s "
                 f"on {hardware.device.type} in {str(hardware.dtype).removeprefix('torch.')}, "
                 + f"by {backend}"),
        *([("processes", words)] if (words := parallel.describe(trainer.batch_size)) else []),
        ("training", f"{num_steps:,} steps, {num_tokens:,} tokens"),
        ("tokens", f"{num_tokens / parameters:.2g} per parameter, {len(train) / parameters:.2g} different ones"),
        ("epochs", f"{num_tokens / batches.tokens_per_epoch:.2g}"),
        ("time", f"{_clock(num_steps * step_s)} of training, about {_clock(evaluation_s)} of evaluation"),
        ("memory", f"{_memory_bytes(hardware.device) / 2**20:,.0f} MiB at most in these steps, Python included"),
        ("disk", f"{saved / 1e6:,.1f} MB a checkpoint, {saved * kept / 1e6:,.1f} MB at most, beside a few MB of logs"),
    ]  # fmt: skip
    report = [f"{what:<10} {words}" for what, words in lines]
    free = _free_bytes(Path(config.run_dir) if config.run_dir else RUNS)
    if saved * kept > free:
        report.append(f"warning    the disk has {free / 1e6:,.1f} MB left: set trainer.keep_checkpoints=1, or run_dir")
    advice = too_large(model, num_tokens) if trainer.max_steps is None and not config.init_from else None
    found = [*warnings(config, task, parameters), *([advice] if advice else [])]
    report += [f"warning    {warning}" for warning in found]
    return "\n".join([*report, "nothing was trained or written: this was trainer.dry_run=true"])


def warnings(config: Config, task: Task, num_parameters: int) -> list[str]:
    """What is likely not meant so."""
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
            f"{num_parameters:,} parameters for {len(train):,} tokens: the model can learn the text by heart; "
            "watch the held-out loss, and use more text or a smaller model"
        )
    longest = longest_document(train, task.tokenizer.end_id) if isinstance(task, TextTask) else None  # pairs are packed
    if longest is not None and longest < context:
        found.append(
            f"the longest document has {longest:,} tokens, the context is {context:,}: what is farther back is always "
            f"another document; model.context_length={max(16, 1 << (longest - 1).bit_length())} is enough"
        )
    return found


def tokens_of(task: Task) -> tuple[Tokens, Tokens]:
    """All ids to train on, and all held out."""
    if isinstance(task, PairsTask):
        return task.pairs.train.ids, task.pairs.val.ids
    assert isinstance(task, TextTask)
    return task.text.train, task.text.val


def longest_document(tokens: Tokens, end_id: int) -> int | None:
    """Tokens of the longest document, without its end; None where nothing marks the ends."""
    ends = np.flatnonzero(np.asarray(tokens) == end_id)
    if len(ends) == 0:
        return None
    starts = np.concatenate([[0], ends[:-1] + 1])
    return int(max((ends - starts).max(), len(tokens) - ends[-1] - 1))


def _num_steps(config: Config, state: TrainState, step_s: float) -> int:
    """Steps that are left to do."""
    minutes, steps = config.trainer.minutes, config.trainer.max_steps
    limits = [] if steps is None else [steps - state.step]
    if minutes is not None:
        limits.append(int((minutes * 60 - state.train_s) / step_s))
    return max(1, min(limits))


def _memory_bytes(device: torch.device) -> int:
    """The most this process, or the device for it, has held so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _free_bytes(path: Path) -> int:
    place = next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())
    return shutil.disk_usage(place).free


def _clock(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours} h {rest // 60:02d} min" if hours else f"{rest // 60}:{rest % 60:02d} min"
