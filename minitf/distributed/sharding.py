"""Tensors sharded over processes by rows (DTensors), and their files.

torch.distributed.checkpoint writes and reads the files, as safetensors: its own format contains a pickle.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from minitf.errors import MinitfError, one_line

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, sharing its memory; any other tensor unchanged."""
    return cast("DTensor", tensor).to_local() if is_sharded(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a sharded tensor, gathered by all ranks together; any other tensor unchanged."""
    return cast("DTensor", tensor).full_tensor() if is_sharded(tensor) else tensor


def as_part(part: Tensor, parameter: Tensor) -> Tensor:
    """A sharded tensor made of each rank's `part`, whose rows are those of `parameter` that the rank holds.

    `part` may have additional leading axes. For a parameter that is not sharded, `part` itself.
    """
    if not is_sharded(parameter):
        return part
    from torch.distributed.tensor import DTensor, Shard

    shape = torch.Size([*part.shape[: part.dim() - parameter.dim()], *parameter.shape])
    stride = torch.empty(shape, device="meta").stride()
    placement = Shard(part.dim() - parameter.dim())
    return DTensor.from_local(
        part, cast("DTensor", parameter).device_mesh, [placement], run_check=False, shape=shape, stride=stride
    )


def shard_like(value: Tensor, parameter: Tensor) -> Tensor:
    """A tensor that all ranks hold whole, sharded like `parameter`; it may have additional leading axes."""
    if not is_sharded(parameter) or is_sharded(value):
        return value
    mesh = cast("DTensor", parameter).device_mesh
    axis = value.dim() - parameter.dim()
    height = -(-parameter.shape[0] // mesh.size())  # as FSDP2 shards
    start = min(mesh.get_local_rank() * height, parameter.shape[0])
    part = value.narrow(axis, start, min(height, parameter.shape[0] - start))
    return as_part(part.contiguous(), parameter)


def write_shards(directory: Path, state: dict[str, Tensor]) -> None:
    """Write tensors, sharded or replicated, to `directory`, each rank its part; MinitfError in all if one fails."""
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    try:
        save(state, storage_writer=HuggingFaceStorageWriter(str(directory), save_distributed=True))
    except CheckpointException as error:  # of any rank, raised in all
        rank, (reason, _) = next(iter(error.failures.items()))
        raise MinitfError(f"process {rank} cannot write {directory}: {one_line(reason)}") from None


def read_shards(directory: Path, template: Callable[[str, torch.Size, torch.dtype], Tensor]) -> dict[str, Tensor]:
    """Read what `write_shards` wrote; the number of processes may have changed in between.

    `template(name, shape, dtype)` makes the tensor to read into: a sharded one gets its part. MinitfError if damaged.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = HuggingFaceStorageReader(str(directory))
    try:
        known = reader.read_metadata().state_dict_metadata
        state = {
            name: template(name, item.size, item.properties.dtype)
            for name, item in known.items()
            if isinstance(item, TensorStorageMetadata)
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about no_dist: each rank reads by itself
            load(state, storage_reader=reader, no_dist=True)
    except MinitfError:
        raise
    except Exception as error:  # safetensors', json's and DCP's own classes
        raise MinitfError(f"{directory} is damaged: {one_line(error)}") from None
    return state
