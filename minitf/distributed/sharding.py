"""Sharded tensors, of which every process holds some rows: their parts, and their files.

torch.distributed.checkpoint writes and reads the files, as safetensors: its own format has a pickle in it.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from minitf.errors import MinitfError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor, sharing its memory; any other tensor as it is."""
    return cast("DTensor", tensor).to_local() if is_sharded(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a sharded tensor, which all processes must ask for; any other tensor as it is."""
    return cast("DTensor", tensor).full_tensor() if is_sharded(tensor) else tensor


def as_part(part: Tensor, parameter: Tensor) -> Tensor:
    """`part`, on the rows of `parameter` that this process holds, as a part of what all hold together.

    It may have axes before those of the parameter. For a parameter that is not sharded: as it is.
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
    """A tensor all processes hold whole, cut like `parameter`; may have axes before those of the parameter."""
    if not is_sharded(parameter) or is_sharded(value):
        return value
    mesh = cast("DTensor", parameter).device_mesh
    axis = value.dim() - parameter.dim()
    height = -(-parameter.shape[0] // mesh.size())  # as FSDP2 cuts
    start = min(mesh.get_local_rank() * height, parameter.shape[0])
    part = value.narrow(axis, start, min(height, parameter.shape[0] - start))
    return as_part(part.contiguous(), parameter)


def write_shards(directory: Path, state: dict[str, Tensor]) -> None:
    """Write tensors, sharded or the same in all processes, to `directory`, each process its part.

    MinitfError in all of them if one cannot.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    try:
        save(state, storage_writer=HuggingFaceStorageWriter(str(directory), save_distributed=True))
    except CheckpointException as error:  # of any process, raised in all
        rank, (reason, _) = next(iter(error.failures.items()))
        raise MinitfError(f"process {rank} cannot write {directory}: {' '.join(str(reason).split())[:200]}") from None


def read_shards(directory: Path, template: Callable[[str, torch.Size, torch.dtype], Tensor]) -> dict[str, Tensor]:
    """Read what `write_shards` wrote, whatever the number of processes then and now.

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
            warnings.simplefilter("ignore")  # of each process planning for itself, as is meant
            load(state, storage_reader=reader, no_dist=True)
    except MinitfError:
        raise
    except Exception as error:  # safetensors', json's and DCP's own classes
        raise MinitfError(f"{directory} is damaged: {' '.join(str(error).split())[:200]}") from None
    return state
