"""The tensors that resuming needs next to the weights: random states, the optimiser's, and losses not yet logged."""

import shutil
from pathlib import Path

import torch
from torch import Tensor

from minitf.checkpoints.checkpoint import load_optimizer_state
from minitf.distributed.process_group import ProcessGroup
from minitf.distributed.sharding import read_shards, write_shards
from minitf.errors import MinitfError
from minitf.optim import Optimizer
from minitf.training import rng

Pending = list[tuple[Tensor, Tensor]]  # losses and gradient norms of the steps since the last row of metrics.jsonl


def gather_state(group: ProcessGroup, pending: Pending) -> dict[str, Tensor]:
    """Random states, one row a rank if there are several, and `pending` as a tensor (N, 2)."""
    tensors = {name: group.gather(value).squeeze(0) for name, value in rng.capture().items()}
    rows = [[float(loss), float(norm)] for loss, norm in pending]
    return tensors | {"pending": torch.tensor(rows).reshape(-1, 2)}


def write_own_shards(shards: Path, group: ProcessGroup, optimizer: Optimizer) -> None:
    """Write the optimiser's state into the directory `shards`, each rank its part."""
    if group.is_main:
        shutil.rmtree(shards, ignore_errors=True)  # left by a process killed while saving
    group.barrier()
    write_shards(shards, optimizer.state_dict())
    group.barrier()


def restore(checkpoint: Path, group: ProcessGroup, optimizer: Optimizer, device: torch.device) -> Pending:
    """Restore random generators and optimiser from a checkpoint; returns what was pending.

    Raises MinitfError if the checkpoint does not fit the run.
    """
    tensors = load_optimizer_state(checkpoint)
    try:
        _restore_random_state(tensors, group)
        pending = [(loss.to(device), norm.to(device)) for loss, norm in tensors.pop("pending")]
        if (shards := checkpoint / "shards").is_dir():
            tensors |= read_shards(shards, optimizer.empty)
        optimizer.load_state_dict(tensors)
    except (ValueError, TypeError, KeyError, RuntimeError, OverflowError) as error:
        reason = " ".join(str(error).split())[:200]
        raise MinitfError(f"{checkpoint / 'trainer_state.safetensors'} does not fit its run: {reason}") from None
    return pending


def _restore_random_state(tensors: dict[str, Tensor], group: ProcessGroup) -> None:
    """Each rank takes the row that it saved; ranks that did not exist then are seeded differently."""
    num_saved = 1
    for name in [name for name in tensors if name.startswith("random_")]:
        rows = tensors[name]
        if rows.dim() > 1 and len(rows):
            num_saved = len(rows)
            # A clone: torch reads a state from the start of the memory that a row is only a view of.
            tensors[name] = rows[group.rank % num_saved].clone()
    rng.restore(tensors)
    if group.rank >= num_saved:
        rng.seed(torch.initial_seed() + group.rank)
