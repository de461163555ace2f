"""Reading and writing of JSON and safetensors files that may come from strangers.

A file is read whole or refused with a one-line error. Its size is checked against what this machine can hold before
anything is allocated, and nothing in it is ever executed.
"""

import hashlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitf.errors import MinitfError, one_line
from minitf.system.memory import physical_memory

if TYPE_CHECKING:  # imported where it is used: reading a tokenizer does not need torch
    from torch import Tensor

MAX_JSON_BYTES = 64 << 20  # real files have a few kB, with digests of shards a few MB
DTYPES = {
    "float32": "F32", "float64": "F64", "float16": "F16", "bfloat16": "BF16", "uint8": "U8", "int8": "I8",
    "int16": "I16", "int32": "I32", "int64": "I64", "bool": "BOOL",
}  # fmt: skip


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in a file; MinitfError if it is missing, damaged or larger than `max_bytes`."""
    try:
        check_size(path, max_bytes)
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MinitfError(f"{path} is missing: this checkpoint is damaged") from None
    except (ValueError, RecursionError) as error:
        raise MinitfError(f"{path} is damaged: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise MinitfError(f"{path} is damaged: not a JSON object")
    return content


def check_size(path: Path, max_bytes: int) -> None:
    """MinitfError unless this is a plain file of at most `max_bytes`; FileNotFoundError if it does not exist."""
    size = path.stat().st_size
    if not path.is_file():
        raise MinitfError(f"{path} is not a plain file")
    if size > max_bytes:
        raise MinitfError(f"{path} is refused: {size:,} bytes are more than the {max_bytes:,} such a file can need")


def read_tensors(path: Path) -> "dict[str, Tensor]":
    """All tensors of a safetensors file on the CPU; MinitfError if it is missing, damaged or larger than memory."""
    import safetensors
    from safetensors.torch import load_file

    try:
        check_size(path, physical_memory())
        return load_file(path)
    except FileNotFoundError:
        raise MinitfError(f"{path} is missing: this checkpoint is damaged") from None
    except (safetensors.SafetensorError, ValueError, KeyError, OverflowError, RuntimeError) as error:
        raise MinitfError(f"{path} is damaged: {one_line(error)}") from None


def write_tensors(path: Path, tensors: "Mapping[str, Tensor]") -> str:
    """Write CPU tensors as a safetensors file; returns the SHA-256 of the bytes in memory, not of those on disk.

    Tensors are written one by one, without copying them and without holding the interpreter's lock. The library's own
    writer copies each tensor while it holds the lock, which would stall a training loop in the same process.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # keeps each tensor aligned
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        dtype = DTYPES[str(tensor.dtype).removeprefix("torch.")]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("xb") as file:
        for part in (struct.pack("<Q", len(text)) + text, *(_bytes(tensors[name]) for name in order)):
            digest.update(part)
            file.write(part)
    return digest.hexdigest()


def _bytes(tensor: "Tensor") -> Any:
    """A tensor's memory, without a copy if it is contiguous."""
    import torch

    flat = tensor.contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else b""
