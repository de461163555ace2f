"""Files that may come from a stranger: read whole, or refused in one line. What a file claims is never allocated.

JSON and safetensors only, of a size that this machine can hold; nothing in them is ever run.
"""

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitf.errors import MinitfError

if TYPE_CHECKING:  # torch is imported where it is used: a tokenizer's file is read without it
    from torch import Tensor

MAX_JSON_BYTES = 64 << 20  # of config.json and its like; real ones have a few kB, with digests of shards a few MB
DTYPES = {
    "float32": "F32", "float64": "F64", "float16": "F16", "bfloat16": "BF16", "uint8": "U8", "int8": "I8",
    "int16": "I16", "int32": "I32", "int64": "I64", "bool": "BOOL",
}  # fmt: skip


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in a file; MinitfError if it is missing, damaged, or too large to be what it should be."""
    try:
        check_size(path, max_bytes)
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MinitfError(f"{path} is missing: this checkpoint is damaged") from None
    except (ValueError, RecursionError) as error:
        raise MinitfError(f"{path} is damaged: {_one_line(error)}") from None
    if not isinstance(content, dict):
        raise MinitfError(f"{path} is damaged: not a JSON object")
    return content


def check_size(path: Path, max_bytes: int) -> None:
    """MinitfError if a file is not a plain one of at most `max_bytes`; FileNotFoundError if there is none."""
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
        check_size(path, memory_bytes())
        return load_file(path)
    except FileNotFoundError:
        raise MinitfError(f"{path} is missing: this checkpoint is damaged") from None
    except (safetensors.SafetensorError, ValueError, KeyError, OverflowError, RuntimeError) as error:
        raise MinitfError(f"{path} is damaged: {_one_line(error)}") from None


def memory_bytes() -> int:
    """Physical memory of this machine: what no file read whole can exceed."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not there on Windows
        return 1 << 40


def write_tensors(path: Path, tensors: "Mapping[str, Tensor]") -> str:
    """Write CPU tensors as a safetensors file and return its SHA-256, of what was meant rather than of what arrived.

    Tensor by tensor, without another copy of them all and without the interpreter's lock: the library's writer makes
    one of each tensor while it holds the lock, for which a training in the same process would have to wait.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # each starts aligned to its size
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        start, end = end, end + tensors[name].numel() * tensors[name].element_size()
        shape = list(tensors[name].shape)
        header[name] = {
            "dtype": DTYPES[str(tensors[name].dtype).removeprefix("torch.")],
            "shape": shape,
            "data_offsets": [start, end],
        }
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("xb") as file:
        for part in (struct.pack("<Q", len(text)) + text, *(_bytes(tensors[name]) for name in order)):
            digest.update(part)
            file.write(part)
    return digest.hexdigest()


def _bytes(tensor: "Tensor") -> Any:
    """The memory of a tensor, as it is."""
    import torch

    flat = tensor.contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else b""


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
