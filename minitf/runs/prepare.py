"""From a config to a RunContext: a chain of functions, each with one result. Nothing is written yet."""

import os
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from minitf.backends.autotune import require_kernels
from minitf.checkpoints.checkpoint import Checkpoint, load_checkpoint
from minitf.checkpoints.model_card import origin_of
from minitf.config.schema import Config, model_sizes, resolve_shape, resolve_size
from minitf.distributed.process_group import ProcessGroup
from minitf.interpretability.own_patterns import OwnPatterns
from minitf.model import Transformer
from minitf.runs.model_size import Budget, choose_size
from minitf.system.hardware import Hardware, choose_device, choose_hardware, measure_quiet_matmul
from minitf.system.threads import usable_cores
from minitf.tokenizer import TokenizerConfig
from minitf.training import rng
from minitf.training.context import RunContext
from minitf.training.decisions import RunDecisions
from minitf.training.parallel import Parallel, check_batch_size, choose_strategy
from minitf.training.task import Task, open_task
from minitf.training.trainer_config import TrainerConfig
from minitf.variants import adopt, attention_class


class Sized(NamedTuple):
    """A config with the size of its model settled."""

    config: Config
    reason: str = ""  # why that size, if the run chose it


def prepare(
    config: Config,
    run_dir: Path,
    group: ProcessGroup,
    decisions: RunDecisions,
    resumed: Checkpoint | None = None,
) -> RunContext:
    """The context of a run: config -> hardware -> task -> sized config -> model -> context.

    All ranks call it; rank 0 of each machine prepares the data first. Raises RequestError where it cannot be done.
    """
    check_batch_size(config.trainer.batch_size, group)
    if config.model.attention_class:  # before anything that takes time
        adopt(config.model.attention_class)
        attention_class(config.model.variant, config.model.attention_class)
    if config.attention.patterns:
        OwnPatterns.load(config.attention.patterns)
    strategy = choose_strategy(config.trainer.strategy, group)
    hardware = find_hardware(config.trainer, decisions, group)
    # Rank 0 measures, so that all ranks choose the same size.
    flops = group.broadcast(measure_quiet_matmul(hardware)) * group.size if config.size_is_auto else 0.0
    with group.main_first():
        initial = resumed or (load_checkpoint(config.init_from, device="cpu") if config.init_from else None)
        recorded = resumed.state.get("text_fingerprint", "") if resumed else ""
        task = open_task(config.data, config.tokenizer, initial.tokenizer if initial else None, recorded)
        if resumed is not None:
            sized = Sized(config)
        elif initial is not None:
            sized = Sized(take_shape(config, initial))
        else:
            sized = settle_size(config, task, flops)
        model = build_model(sized.config, task, initial)
    model = place_model(model, sized.config.trainer, hardware)
    parallel = Parallel(model, group, strategy)
    if group.rank:  # all ranks start with the same weights, but each has its own dropout
        rng.seed(config.seed + group.rank)
    return RunContext(
        config=sized.config,
        run_dir=run_dir,
        task=task,
        batches=task.batches(sized.config.model.context_length, config.trainer.batch_size, config.seed),
        parallel=parallel,
        hardware=hardware,
        decisions=decisions,
        checkpoint=resumed.directory if resumed else None,
        saved_state=resumed.state if resumed else None,
        origin=origin_of(None if resumed else config.init_from, initial.directory if initial else None),
        size_reason=sized.reason,
    )


def find_hardware(config: TrainerConfig, decisions: RunDecisions, group: ProcessGroup) -> Hardware:
    """Device, threads and precision; on the device of the decisions the decided ones, unless the config sets them."""
    same_device = decisions.device == choose_device(config.device).type
    threads = config.threads
    threads_set_outside = group.size == 1 and os.environ.get("OMP_NUM_THREADS")
    if same_device and decisions.num_processes == group.size and not threads_set_outside:
        threads = threads or (decisions.num_threads if decisions.num_threads <= usable_cores() else 0)
    if same_device and config.precision == "auto":
        hardware = choose_hardware(config.device, decisions.precision, group, threads)
        return replace(hardware, reason="as when the run began")
    return choose_hardware(config.device, config.precision, group, threads)


def take_shape(config: Config, initial: Checkpoint) -> Config:
    """The config with the shape and the tokenizer of the model that a new run starts from."""
    tokenizer = TokenizerConfig(kind="pretrained", file=str(initial.directory / "tokenizer.json"))
    return resolve_shape(config, initial.model.config, tokenizer)


def settle_size(config: Config, task: Task, flops: float) -> Sized:
    """The config with the size that time and `flops` a second suffice for, if no size was asked for."""
    if not config.size_is_auto:
        return Sized(config)
    budget = Budget(config.trainer, flops, task.tokenizer.vocab_size)
    name, reason = choose_size(model_sizes(config.model), budget)
    return Sized(resolve_size(config, name), reason)


def build_model(config: Config, task: Task, initial: Checkpoint | None) -> Transformer:
    """A model with random weights from `config.seed`, or with those of `initial`; in float32 on the CPU."""
    if config.model.attention_class:  # of the model it starts from
        adopt(config.model.attention_class)
    rng.seed(config.seed)
    # A pretrained model may have embeddings for more tokens than its tokenizer has.
    vocab_size = max(task.tokenizer.vocab_size, initial.model.vocab_size if initial else 0)
    model = Transformer(config.model, vocab_size)
    if initial is not None:
        copy_weights(initial.model, model)
    return model


@torch.no_grad()
def copy_weights(source: Transformer, target: Transformer) -> None:
    """Copy all weights to a model of the same shape; tokens at its end that the source does not know keep theirs."""
    state = source.state_dict()
    for name, parameter in target.state_dict().items():
        parameter[: len(state[name])] = state[name]


def place_model(model: Transformer, config: TrainerConfig, hardware: Hardware) -> Transformer:
    """The model on its device. RequestError if the C kernels are asked for and cannot train it."""
    model = model.to(hardware.device)
    model.compute_dtype = hardware.dtype
    model.activation_checkpointing = config.activation_checkpointing
    if config.compile == "native":
        require_kernels(model)
    return model
