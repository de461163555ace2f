"""The C kernels as ctypes functions, one library for each dtype of activations."""

import ctypes
import functools
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from minitf.backends.cpu import build
from minitf.errors import Unavailable

PRECISIONS = {torch.bfloat16: "bf16", torch.float32: "fp32"}
SCALARS = {"int64_t": ctypes.c_int64, "float": ctypes.c_float}


class AttentionArguments(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_int64) for name in "BTHGK"],
        *[(name, ctypes.c_void_p) for name in ("qkv", "q_norm", "k_norm")],
        ("eps", ctypes.c_float),
        *[(name, ctypes.c_void_p) for name in ("cosines", "sines", "starts", "mixed", "log_sums")],
    ]


def argument_types(source: str) -> dict[str, list[Any]]:
    """Those of each function that a C source declares, so that a wrong number of arguments is an error in Python."""
    return {
        name: [ctypes.c_void_p if "*" in one else SCALARS[one.split()[0]] for one in parameters.split(",")]
        for name, parameters in re.findall(r"^void (\w+)\(([^)]*)\) {", source, re.MULTILINE)
    }


@functools.cache
def library(dtype: torch.dtype) -> ctypes.CDLL:
    """The kernels for activations of a dtype, compiled if they are not cached; raises Unavailable."""
    if dtype not in PRECISIONS:
        raise Unavailable(f"the C kernels do not compute in {str(dtype).removeprefix('torch.')}")
    kernels = build.kernels(PRECISIONS[dtype])
    loaded = kernels.load()
    for source in kernels.sources:
        for name, types in argument_types(source.read_text(encoding="utf-8")).items():
            function = getattr(loaded, name)
            function.argtypes, function.restype = types, None
    return loaded


def call(name: str, dtype: torch.dtype, *arguments: Any) -> None:
    """Call a function of the library for `dtype`; tensors are passed by address."""
    getattr(library(dtype), name)(*[address_of(a) if isinstance(a, Tensor) else a for a in arguments])


def address_of(tensor: Tensor) -> int:
    """Where C finds the numbers of a tensor."""
    assert tensor.device.type == "cpu"
    assert tensor.is_contiguous()
    return tensor.data_ptr()


def has_fast_products() -> bool:
    """Whether products of activations and weights are faster by these kernels than by PyTorch: with AMX."""
    try:
        return bool(library(torch.bfloat16).has_fast_products())
    except Unavailable:
        return False


def places_of(tensors: Sequence[Tensor]) -> tuple[Any, list[Tensor]]:
    """An array of the addresses of float32 tensors, and the contiguous tensors to keep alive during the call."""
    assert all(tensor.dtype == torch.float32 for tensor in tensors)
    kept = [tensor.contiguous() for tensor in tensors]
    return (ctypes.c_void_p * len(kept))(*map(address_of, kept)), kept
