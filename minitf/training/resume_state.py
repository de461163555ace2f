"""What resuming needs beside weights and `TrainState`: random states, the optimiser's, the steps since the last row."""

import shutil
from pathlib import Path

import torch
from torch import Tensor

from minitf.checkpoints.checkpoint import load_optimizer_state
from minitf.distributed.process_group import ProcessGroup
from minitf.distributed.sharding import read_shards, write_shards
from minitf.errors import MinitfError
from minitf.optim import Optimizer
from minitf.training import rng as random_state

Pending = list[tuple[Tensor, Tensor]]  # losses and gradient norms of the steps since the last row


def gathered(group: ProcessGroup, pending: Pending) -> dict[str, Tensor]:
    """Random states, a row of each of several processes, and `pending` as a tensor (N, 2), for the next row."""
    tensors = {name: group.gather(value).squeeze(0) for name, value in random_state.capture().items()}
    rows = [[float(loss), float(norm)] for loss, norm in pending]
    return tensors | {"pending": torch.tensor(rows).reshape(-1, 2)}


def write_own_shards(shards: Path, group: ProcessGroup, optimizer: Optimizer) -> None:
    """The optimiser's state into a directory beside the checkpoints, each process its part."""
    if group.is_main:
        shutil.rmtree(shards, ignore_errors=True)  # of a life that was killed while saving
    group.barrier()
    write_shards(shards, optimizer.state_dict())
    group.barrier()


def restore(checkpoint: Path, group: ProcessGroup, optimizer: Optimizer, device: torch.device) -> Pending:
    """Give random generators and optimiser the state a checkpoint holds; returns what was pending.

    Raises MinitfError where it is that of another run.
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
    """Each of several processes has left a row; those there were none of then begin with others."""
    num_saved = 1
    for name in [name for name in tensors if name.startswith("random_")]:
        rows = tensors[name]
        if rows.dim() > 1 and len(rows):
            num_saved = len(rows)
            # A clone: torch reads a state from the beginning of the memory that a row is only a view of.
            tensors[name] = rows[group.rank % num_saved].clone()
    random_state.restore(tensors)
    if group.rank >= num_saved:
        random_state.seed(torch.initial_seed() + group.rank)
